"""The embedded world: the same everywhere, and true to its captions, labels and masks."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from conftest import ROOT  # noqa: F401 the offline switches are set there

from sparc_hf.demo.scenes import CLASS_NAMES, SPLITS, TAXONOMY, make_scene, make_scenes_dataset
from sparc_hf.demo.taxonomy import COLOUR_IDS, SHAPE_IDS, TEXTURE_IDS, WORD_CLASSES

SOME = [make_scene(SPLITS["test"][number]) for number in range(120)]


def test_pixels_and_captions_are_pinned():
    """Whoever changes the world must train the encoders again."""
    digest = hashlib.sha256()
    for scene in SOME[:20]:
        digest.update(np.asarray(scene.image).tobytes())
        digest.update("\n".join(scene.captions).encode())
    assert digest.hexdigest()[:16] == "f308e0081d3f3e33"


def test_a_scene_depends_on_index_and_seed_only():
    one, again, other = make_scene(7), make_scene(7), make_scene(7, seed=1)
    assert np.array_equal(np.asarray(one.image), np.asarray(again.image))
    assert one.captions == again.captions
    assert not np.array_equal(np.asarray(one.image), np.asarray(other.image))
    with pytest.raises(ValueError, match="index=-1"):
        make_scene(-1)


def test_scenes_vary():
    assert {len(scene.objects) for scene in SOME} == {1, 2, 3}
    assert {o.shape for scene in SOME for o in scene.objects} == set(SHAPE_IDS)
    assert len({caption for scene in SOME for caption in scene.captions}) > 500
    assert all(scene.image.size == (64, 64) and scene.image.mode == "RGB" for scene in SOME)


def test_labels_are_what_the_objects_are():
    for scene in SOME:
        for o in scene.objects:
            assert {o.shape, o.colour, o.texture} <= set(scene.labels)
            assert o.shape in SHAPE_IDS
            assert o.colour in COLOUR_IDS
            assert o.texture in TEXTURE_IDS
        assert {label for label in scene.labels if label in SHAPE_IDS} == {o.shape for o in scene.objects}
        assert len(scene.labels) == len(set(scene.labels))


def test_masks_do_not_overlap_and_show_the_object():
    for scene in SOME:
        total = np.sum([o.mask for o in scene.objects], axis=0)
        assert total.max() == 1
        pixels = np.asarray(scene.image).astype(float)
        for o in scene.objects:
            assert o.mask.shape == (64, 64)
            assert 25 <= o.mask.sum() <= 1600
            rows, columns = np.nonzero(o.mask)
            assert abs(columns.mean() - o.centre[0]) < 8
            assert abs(rows.mean() - o.centre[1]) < 8
            background = pixels[total == 0].mean(axis=0)
            assert np.abs(pixels[o.mask].mean(axis=0) - background).max() > 12


def test_captions_say_only_what_is_there():
    for scene in SOME:
        for caption in scene.captions:
            named = {WORD_CLASSES[word] for word in caption.replace(",", "").split() if word in WORD_CLASSES}
            assert named <= set(scene.labels), caption
            assert named & set(SHAPE_IDS), caption
        assert len(scene.captions) == 5


def test_captions_leave_something_out():
    told = [
        len({WORD_CLASSES[word] for word in scene.captions[0].replace(",", "").split() if word in WORD_CLASSES})
        / len(scene.labels)
        for scene in SOME
    ]
    assert 0.3 < np.mean(told) < 0.9


def test_splits_are_disjoint():
    ranges = sorted(SPLITS.values(), key=lambda split: split.start)
    assert all(one.stop <= other.start for one, other in pairwise(ranges))


def test_taxonomy_has_three_levels_over_all_classes():
    leaves = {}

    def walk(node: dict, depth: int) -> None:
        children = node.get("Subcategory", [])
        if not children:
            leaves[node["LabelName"]] = depth
        for child in children:
            walk(child, depth + 1)

    walk(TAXONOMY, 0)
    assert set(leaves) == set(CLASS_NAMES)
    assert set(leaves.values()) == {3}


def test_dataset():
    dataset = make_scenes_dataset("test", 5)
    assert dataset.column_names == ["id", "image", "text", "captions", "labels", "masks", "mask_labels"]
    scene, row = make_scene(SPLITS["test"][3]), dataset[3]
    assert np.array_equal(np.asarray(row["image"]), np.asarray(scene.image))
    assert row["labels"] == list(scene.labels)
    assert np.array_equal(np.asarray(row["masks"][0]), scene.objects[0].mask)
    for split, rows in (("validation", 5), ("test", 0)):
        with pytest.raises(ValueError, match="must be"):
            make_scenes_dataset(split, rows)
