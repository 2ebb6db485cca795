"""How the demo encoders are trained: blobs and their clusters, wrong captions, the tower CLIP starts from."""

import itertools

import numpy as np
import pytest
import torch
from conftest import ROOT  # noqa: F401 the offline switches are set there
from scipy.cluster.vq import kmeans2

from sparc_hf.demo.blobs import find_blobs
from sparc_hf.demo.image_tower import copy_image_tower
from sparc_hf.demo.scenes import make_scene
from sparc_hf.demo.taxonomy import (
    COLOUR_IDS,
    SHAPE_IDS,
    SHAPE_SYNONYMS,
    TEXTURE_IDS,
    TEXTURE_OFFSET,
    WORD_CLASSES,
    plural,
)
from sparc_hf.demo.train_clip import ClipRecipe, build_clip, build_tokenizer, encode_captions, to_pixels, train_clip
from sparc_hf.demo.train_dino import DinoRecipe, build_dino, train_dino
from sparc_hf.demo.train_encoders import draw_scenes
from sparc_hf.demo.word_swaps import WordSwaps, object_phrases

OBJECT_CLASSES = {*SHAPE_IDS, *COLOUR_IDS, *TEXTURE_IDS}


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes("encoders", 400)


def words_of(tokenizer, token_ids) -> list[str]:
    return tokenizer.decode(token_ids, skip_special_tokens=True).split()


def test_wrong_captions_differ_in_one_word_that_no_caption_of_the_scene_has(scenes):
    captions = scenes[1]
    tokenizer = build_tokenizer(caption for of_scene in captions for caption in of_scene)
    token_ids = encode_captions(tokenizer, captions)
    numbers = np.arange(len(captions))
    variants, valid = WordSwaps(tokenizer, token_ids).swapped(token_ids[:, 0], numbers, 3, np.random.default_rng(0))
    assert valid.mean() > 0.95
    replaced = set()
    for scene, variant in zip(*np.nonzero(valid), strict=True):
        old, new = words_of(tokenizer, token_ids[scene, 0]), words_of(tokenizer, variants[scene, variant])
        assert len(old) == len(new)
        changes = [(one, other) for one, other in zip(old, new, strict=True) if one != other]
        (change,) = [pair for pair in changes if not set(pair) <= {"a", "an"}]
        named = {WORD_CLASSES.get(word) for caption in captions[scene] for word in caption.split(" ")}
        put_in = WORD_CLASSES.get(change[1])
        assert WORD_CLASSES.get(change[0]) != put_in or put_in is None
        assert put_in not in OBJECT_CLASSES or put_in not in named
        for article, noun in itertools.pairwise(new):
            assert article not in ("a", "an") or (article == "an") == (noun[0] in "aeiou")
        replaced.add(change[0])
    assert {"red", "circle", "striped", "small", "dark", "left"} <= replaced
    assert replaced & {plural(word) for words in SHAPE_SYNONYMS for word in words}


def test_variants_of_a_caption_change_different_words(scenes):
    tokenizer = build_tokenizer(caption for of_scene in scenes[1] for caption in of_scene)
    token_ids = encode_captions(tokenizer, [["a small red striped circle on the left"]])
    variants, _ = WordSwaps(tokenizer, token_ids).swapped(token_ids[:, 0], np.array([0]), 5, np.random.default_rng(1))
    changed = {int(np.flatnonzero(variant != token_ids[0, 0])[0]) for variant in variants[0]}
    assert len(changed) == 5
    nothing = encode_captions(tokenizer, [["we see"]])
    assert (
        not WordSwaps(tokenizer, nothing).swapped(nothing[:, 0], np.array([0]), 2, np.random.default_rng(1))[1].any()
    )


def test_phrases_of_single_objects():
    captions = [
        "we see a small red striped circle beside an orange box on a dark backdrop",
        "a dotted heart in pink",
        "two circles in red and blue",
        "an orange box",
    ]
    assert object_phrases(captions) == ["a small red striped circle", "an orange box", "a dotted heart in pink"]


def test_textures_of_blobs_tell_textures_apart():
    """Clusters of the fixed rule's numbers, without labels, beside the truth; the most frequent texture is 0.38."""
    textures, truth = [], []
    for index in range(700):
        scene = make_scene(index)
        blobs = find_blobs(np.asarray(scene.image), 8)
        if len(scene.objects) == len(blobs.textures) == 1:
            textures.append(blobs.textures[0])
            truth.append(scene.objects[0].texture - TEXTURE_OFFSET)
    clusters = kmeans2(np.array(textures), 16, minit="++", seed=0)[1]
    table = np.zeros((16, 5))
    np.add.at(table, (clusters, truth), 1)
    assert len(truth) > 200
    assert table.max(axis=1).sum() / len(truth) > 0.85


def test_the_copied_tower_computes_what_its_source_does(scenes):
    torch.manual_seed(0)
    source = build_dino(DinoRecipe(registers=0)).eval()
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "lambda" in name or "bias" in name:
                parameter.uniform_(0.2, 1)
    clip = build_clip(build_tokenizer(scenes[1][0]), ClipRecipe()).eval()
    copy_image_tower(source, clip)
    clip.vision_model.pre_layrnorm = torch.nn.Identity()
    pixels = to_pixels(scenes[0][:3])
    with torch.no_grad():
        expected = source(pixel_values=pixels).last_hidden_state
        found = clip.vision_model.post_layernorm(clip.vision_model(pixel_values=pixels).last_hidden_state)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_training_twice_gives_the_same_weights(scenes):
    images, captions = scenes[0][:80], scenes[1][:80]

    def weights() -> dict[str, torch.Tensor]:
        dino, _ = train_dino(images, recipe=DinoRecipe(steps=2, batch_size=16, silhouette_clusters=4))
        clip, _ = train_clip(images, captions, dino, recipe=ClipRecipe(steps=2, batch_size=16))
        return dict(clip.state_dict())

    first, second = weights(), weights()
    assert all(torch.equal(values, second[name]) for name, values in first.items())
