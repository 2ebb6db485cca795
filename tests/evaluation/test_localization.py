"""Masks, thresholds and figures of maps."""

import itertools
import json

import numpy as np
import pytest
from conftest import planted_features, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from photographs import BACK, TURNS, photograph, tagged
from PIL import Image
from pycocotools import mask as coco_mask

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.cli import main
from sparc_hf.codes.code_table import encode_features
from sparc_hf.demo.scenes import make_scenes_dataset
from sparc_hf.encoders.stream_encoder import load_encoders
from sparc_hf.evaluation.coco_masks import mask_of
from sparc_hf.evaluation.localization import LocalizationSettings, latents_of_classes, localize, otsu_threshold
from sparc_hf.evaluation.masked_images import MaskedImages, open_masked_images
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.stream_records import parse_streams
from sparc_hf.maps.targets import ConceptTarget


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(lambda values: len(set(values)) > 1))
def test_otsu_parts_as_well_as_any_threshold(values):
    values = np.array(values, float)

    def spread_between(threshold: float) -> float:
        inside, outside = values[values > threshold], values[values <= threshold]
        return len(inside) * len(outside) * (inside.mean() - outside.mean()) ** 2

    best = max(spread_between(threshold) for threshold in range(int(values.min()), int(values.max())))
    assert spread_between(otsu_threshold(values)) == pytest.approx(best)


def test_otsu_of_nothing_finds_nothing():
    assert otsu_threshold(np.full(5, 0.3)) == np.inf


@pytest.fixture(scope="module")
def demo():
    """The shipped encoders, and a model that nobody trained."""
    encoders = load_encoders(
        parse_streams(("dino=demo:dino:image", "clip_img=demo:clip:image", "clip_txt=demo:clip:text"))
    )
    return SparcModel(
        SparcConfig(streams=[one.record for one in encoders.values()], num_latents=32, k=6, auxk=8)
    ).eval(), encoders


def square(box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def test_figures_by_hand(demo, monkeypatch):
    """Four pairs: a perfect map, one of half the object, a constant one, and a class without a latent."""
    model, encoders = demo
    masks = [
        {"a": square((0, 0, 32, 64))},
        {"a": square((0, 0, 32, 64))},
        {"a": square((0, 0, 8, 8)), "b": square((9, 9, 20, 20))},
    ]
    grids = [np.zeros((64, 64), np.float32) for _ in masks]
    grids[0][:, :32] = 1
    grids[1][:, 16:48] = 1
    grids[2][:] = 0.5
    images = MaskedImages([sorted(one) for one in masks], lambda n: (Image.new("RGB", (64, 64), (n, 0, 0)), masks[n]))

    def maps(_model, used, read, targets, *_, **__):
        stream = next(iter(used))
        return {stream: np.stack([grids[image.getpixel((0, 0))[0]][None] for image in read])}

    monkeypatch.setattr("sparc_hf.evaluation.localization.image_maps", maps)
    latents = {"dino": {"a": ConceptTarget((1,))}}
    used = {"dino": encoders["dino"]}
    found = localize(model, used, images, latents, LocalizationSettings(batch_size=2))
    assert (found["images"], found["pairs"], len(found["maps"])) == (3, 4, 1)
    (row,) = found["maps"]
    assert (row["target"], row["stream"], row["method"]) == ("latent", "dino", "relevance")
    assert row["miou"]["value"] == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert row["pointing"]["value"] == pytest.approx((1 + 0 + 0 + 0) / 4 + 1 / 4)  # the second map peaks at x = 16
    assert row["miou"]["low"] < row["miou"]["value"] < row["miou"]["high"]
    # Class a: two of its three objects are found, without a false one; class b never.
    assert row["ap"] == pytest.approx((67 / 101 + 0) / 2, abs=1e-6)


def test_every_kind_of_map_is_measured(demo):
    model, encoders = demo
    images = open_masked_images(make_scenes_dataset("test", 3))
    names = {name for of_image in images.classes for name in of_image}
    latents = {stream: {name: ConceptTarget((3,)) for name in names} for stream in ("dino", "clip_img")}
    settings = LocalizationSettings(methods=("relevance", "patch_codes"), intervals=False, batch_size=2)
    found = localize(model, encoders, images, latents, settings)
    kinds = {(row["target"], row["stream"], row["method"]) for row in found["maps"]}
    for method in settings.methods:
        assert {kind[:2] for kind in kinds if kind[2] == method} == {
            ("latent", "dino"),
            ("latent", "clip_img"),
            ("codes of clip_txt", "dino"),
            ("codes of clip_txt", "clip_img"),
            ("embeddings of clip_txt", "clip_img"),
        }
    assert all(0 <= row[name]["value"] <= 1 for row in found["maps"] for name in ("miou", "pointing"))
    with pytest.raises(ValueError, match="`prompt` needs"):
        localize(model, encoders, images, latents, LocalizationSettings(prompt="a cat"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"methods": ["saliency"]}, "`method` must be one of"), ({"shifts": 0}, "`shifts` must be at least 1")],
)
def test_impossible_settings_are_refused_before_anything_is_measured(settings, message):
    with pytest.raises(ValueError, match=message):
        LocalizationSettings(**settings)


def test_a_latent_that_fires_for_a_class_is_chosen():
    model = tiny_model(num_latents=16, k=4)
    features = planted_features(300)
    codes = encode_features(model, features, encoding="single")
    fires = codes.csr("dino")[:, [5]].toarray().ravel() > 0
    assert 20 < fires.sum() < 280, "this seed's latent 5 has to fire sometimes"
    labels = [[1] if one else [0] for one in fires]
    arrays = {name: features.array(name) for name in features.stream_names}
    labelled = FeatureDataset.from_arrays(arrays, streams=features.streams, labels=labels, label_names=["no", "yes"])
    chosen = latents_of_classes(codes, labelled, ["yes", "absent"])
    assert chosen["dino"] == {"yes": ConceptTarget((5,))}
    with pytest.raises(ValueError, match="single-stream codes"):
        latents_of_classes(encode_features(model, features), labelled, ["yes"])


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "images").mkdir()
    for name, size in (("a.png", (20, 10)), ("b.png", (8, 8)), ("empty.png", (4, 4))):
        Image.new("RGB", size).save(tmp_path / "images" / name)
    annotations = [
        {"image_id": 1, "category_id": 7, "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]], "iscrowd": 0},
        {"image_id": 1, "category_id": 7, "segmentation": [[15, 0, 20, 0, 20, 10, 15, 10]], "iscrowd": 0},
        {"image_id": 2, "category_id": 9, "segmentation": {"counts": [8, 16, 40], "size": [8, 8]}, "iscrowd": 1},
    ]
    content = {
        "images": [{"id": n + 1, "file_name": f} for n, f in enumerate(("a.png", "b.png", "empty.png"))],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [{**one, "id": n} for n, one in enumerate(annotations)],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_masks(coco):
    images = open_masked_images(str(coco / "instances.json"), str(coco / "images"))
    assert images.classes == [["cat"], ["dog"]]  # the image without masks is left out
    image, masks = images.read(0)
    assert image.size == (20, 10)
    expected = np.zeros((10, 20), bool)
    expected[:, :10] = expected[:, 15:] = True
    np.testing.assert_array_equal(masks["cat"], expected)
    _, masks = images.read(1)
    assert masks["dog"].sum(axis=0).tolist() == [0, 8, 8, 0, 0, 0, 0, 0]  # runs go down the columns
    assert len(open_masked_images(str(coco / "instances.json"), str(coco / "images"), rows=1)) == 1


def back(tag: int) -> Image.Transpose:
    """How an upright picture is turned to lie as it is stored."""
    return BACK.get(TURNS[tag], TURNS[tag])


def coco_text(mask: np.ndarray) -> dict:
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.fixture
def large_coco(tmp_path):
    """A photograph of 120 x 80 with a polygon, run lengths as numbers and as text, two of them of one class."""
    folder = tmp_path / "large"
    folder.mkdir()
    picture = photograph(120, 80)
    rows, columns = np.mgrid[0:80, 0:120]
    disc = (columns - 80) ** 2 + (rows - 30) ** 2 < 20**2
    blob = (columns + rows) % 120 < 55
    runs = [(inside, len(list(run))) for inside, run in itertools.groupby(blob.T.ravel().tolist())]
    counts = [length for _, length in ([(False, 0), *runs] if runs[0][0] else runs)]
    segmentations = [
        (1, [[10, 10, 50, 10, 50, 70, 10, 70]]),
        (1, coco_text(disc)),
        (2, {"size": [80, 120], "counts": counts}),
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 120, "height": 80}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": category, "segmentation": segmentation}
            for n, (category, segmentation) in enumerate(segmentations)
        ],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    box = (rows >= 10) & (rows < 70) & (columns >= 10) & (columns < 50)
    return folder, picture, {"cat": box | disc, "dog": blob}


def change(folder, **changes):
    """Change the only image's entry, or the annotations, of a COCO JSON."""
    content = json.loads((folder / "instances.json").read_text())
    for key, value in changes.items():
        if key == "annotations":
            content[key] = value
        elif value is None:
            del content["images"][0][key]
        else:
            content["images"][0][key] = value
    (folder / "instances.json").write_text(json.dumps(content))
    return content


def read_first(folder):
    return open_masked_images(str(folder / "instances.json"), str(folder)).read(0)


def assert_masks(masks, expected, size, least):
    for name, mask in expected.items():
        assert overlap(masks[name], np.asarray(Image.fromarray(mask).resize(size))) > least, name


def test_run_lengths_and_polygons_of_one_class_are_one_mask(large_coco):
    folder, picture, expected = large_coco
    picture.save(folder / "a.png")
    image, masks = read_first(folder)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))
    for name, mask in expected.items():
        np.testing.assert_array_equal(masks[name], mask)


@pytest.mark.parametrize("size", [(60, 40), (61, 40), (30, 20), (360, 240), (41, 27)])
def test_masks_follow_the_size_of_the_file(large_coco, size):
    folder, picture, expected = large_coco
    picture.resize(size).save(folder / "a.png")
    image, masks = read_first(folder)
    assert image.size == size
    for name, mask in expected.items():
        smooth = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        assert overlap(masks[name], np.asarray(smooth) > 0.5) > 0.88


@pytest.mark.parametrize("size", [(80, 124), (100, 40), (120, 76), (120, 120)])
def test_files_of_other_proportions_are_refused_before_anything_is_read(large_coco, size):
    folder, picture, _ = large_coco
    picture.resize(size).save(folder / "a.png")
    message = f"has {size[0]} x {size[1]} pixels, but its masks in `instances.json` were drawn on 120 x 80"
    with pytest.raises(ValueError, match=message):
        open_masked_images(str(folder / "instances.json"), str(folder))


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("tag", [1, 5, 6, 7, 8])
def test_masks_that_were_drawn_on_the_turned_picture(large_coco, tag, halved):
    """The listed width and height are those of the turned picture, which the stored pixels have not."""
    folder, picture, expected = large_coco
    shown = picture.resize((60, 40)) if halved else picture
    tagged(shown, tag, folder / "a.png")
    image, masks = read_first(folder)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(shown))
    assert_masks(masks, expected, shown.size, 0.9 if halved else 0.999)


@pytest.mark.parametrize("listed", ["whole", "halved", "unlisted"])
@pytest.mark.parametrize("tag", range(2, 9))
def test_masks_that_were_drawn_on_the_stored_pixels_turn_with_the_picture(large_coco, tag, listed):
    folder, picture, expected = large_coco
    shown = picture.resize((60, 40)) if listed == "halved" else picture
    tagged(shown, tag, folder / "a.png")
    drawn = {name: np.asarray(Image.fromarray(mask).transpose(back(tag))) for name, mask in expected.items()}
    height, width = drawn["cat"].shape
    annotations = [
        {"id": n, "image_id": 1, "category_id": n + 1, "segmentation": coco_text(mask)}
        for n, mask in enumerate(drawn.values())
    ]
    sizes = {"width": None, "height": None} if listed == "unlisted" else {"width": width, "height": height}
    change(folder, annotations=annotations, **sizes)
    image, masks = read_first(folder)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(shown))
    assert_masks(masks, expected, shown.size, 0.9 if listed == "halved" else 0.999)


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [80, 120], "counts": [3, 2]},
        {"size": [80, 120], "counts": [-3, 9603]},
        {"size": [80, 120], "counts": [2**62, 2**62, 2**62, 2**62, 9600]},
        {"size": [80, 120], "counts": ["a"]},
        {"size": [80, 120], "counts": ""},
        {"size": [80, 120], "counts": "zzzzzz"},
        {"size": [80, 120], "counts": "o" * 4000},
        {"size": [80], "counts": [9600]},
        {"size": [-80, 120], "counts": [9600]},
        {"size": [2**28, 2**28], "counts": [0, 2**56]},
        {"size": [60, 60], "counts": [0, 3600]},
        {"counts": [9600]},
        [[0, 0, 9, 0, 9, 9, 0]],
        [[0, 0, float("nan"), 0, 9, 9]],
        [[0, 0, 1e300, 0, 9, 9]],
        [[0, 0, 2e8, 0, 9, 9] * 50],
        [[0, 0, "9", 0, 9, 9]],
        [0, 0, 9, 0, 9, 9],
    ],
    ids=str,
)
def test_segmentations_that_are_none_are_refused(large_coco, segmentation):
    folder, picture, _ = large_coco
    picture.save(folder / "a.png")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": segmentation}
    change(folder, annotations=[annotation])
    with pytest.raises(ValueError, match=r"segmentation of cat in instances\.json"):
        read_first(folder)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_run_lengths_in_text_are_read_as_pycocotools_does(width, height, data):
    bits = data.draw(st.lists(st.booleans(), min_size=width * height, max_size=width * height))
    mask = np.array(bits).reshape(height, width)
    np.testing.assert_array_equal(mask_of(coco_text(mask), (width, height), "it"), mask)


def test_two_points_enclose_nothing(large_coco):
    folder, picture, expected = large_coco
    picture.save(folder / "a.png")
    annotations = change(folder)["annotations"]
    annotations[0]["segmentation"] += [[1, 1, 5, 5], []]
    change(folder, annotations=annotations)
    np.testing.assert_array_equal(read_first(folder)[1]["cat"], expected["cat"])


def test_real_photographs_at_half_their_size(shared_data, tmp_path):
    """Masks of halved files are the halved masks."""
    source, folder = shared_data / "coco_val" / "instances.json", shared_data / "coco_val" / "images"
    for image in json.loads(source.read_text())["images"]:
        with Image.open(folder / image["file_name"]) as photo:
            photo.resize((photo.width // 2, photo.height // 2)).save(tmp_path / image["file_name"])
    whole, half = open_masked_images(str(source), str(folder), 20), open_masked_images(str(source), str(tmp_path), 20)
    overlaps = []
    for number in range(len(half)):
        (_, masks), (image, smaller) = whole.read(number), half.read(number)
        for name, mask in masks.items():
            expected = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
            overlaps += [overlap(smaller[name], expected)] if mask.sum() > 2000 else []
    assert len(overlaps) > 20
    assert min(overlaps) > 0.95


def test_unusable_masks_are_named(coco, tmp_path):
    with pytest.raises(ValueError, match="folder of the images"):
        open_masked_images(str(coco / "instances.json"))
    with pytest.raises(ValueError, match="lacks 2 images"):
        open_masked_images(str(coco / "instances.json"), str(tmp_path))
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="not in COCO's format"):
        open_masked_images(str(tmp_path / "bad.json"), str(tmp_path))
    with pytest.raises(ValueError, match="neither a JSON file nor a folder"):
        open_masked_images(str(tmp_path / "nothing"))


def test_the_command_measures_and_reports(demo, coco, tmp_path, capsys):
    model, encoders = demo
    model.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(40, one.hidden_size)).astype(np.float32) for name, one in encoders.items()}
    features = FeatureDataset.from_arrays(
        arrays,
        streams={name: one.record for name, one in encoders.items()},
        labels=[[n % 2] for n in range(40)],
        label_names=["cat", "dog"],
    )
    features.save(tmp_path / "features")
    command = f"evaluate {tmp_path}/model --features {tmp_path}/features --replicates 2 --no_probes --shifts 1"
    masks = f"--masks {coco}/instances.json --mask_images {coco}/images --concept_features {tmp_path}/features"
    assert main([*command.split(), *masks.split(), "--output", str(tmp_path / "report")]) in (0, None)
    told = json.loads(capsys.readouterr().out)["model"]["localization"]
    assert {row["target"] for row in told["maps"]} == {"latent", "codes of clip_txt", "embeddings of clip_txt"}
    saved = json.loads((tmp_path / "report" / "results.json").read_text())["models"]["model"]["localization"]
    assert saved == told
    assert "Where classes are found" in (tmp_path / "report" / "report.html").read_text()
