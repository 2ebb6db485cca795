"""The same photograph gives the same codes and maps in every form, whichever way it comes in."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageColumn
from photographs import odd_files, photograph, tagged
from PIL import Image

from sparc_hf import SparcConfig, SparcModel, SparcPipeline
from sparc_hf.cli import explain as cli_explain
from sparc_hf.cli import main
from sparc_hf.codes.encoding import sample_codes
from sparc_hf.encoders.stream_encoder import load_encoders
from sparc_hf.encoders.views import visible_box
from sparc_hf.evaluation.masked_images import open_masked_images
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.extraction import extract_features
from sparc_hf.features.stream_records import parse_streams
from sparc_hf.maps.contact_sheets import concept_heatmaps
from sparc_hf.maps.explanation import explain_sample
from sparc_hf.maps.patch_maps import image_maps
from sparc_hf.maps.plots import overlay
from sparc_hf.maps.targets import ConceptTarget
from sparc_hf.space.data import SpaceData
from sparc_hf.space.index import open_index
from sparc_hf.space.seen_maps import latent_maps
from sparc_hf.space.visitor_input import checked_image

STREAMS = ("dino=demo:dino:image", "clip_img=demo:clip:image", "clip_txt=demo:clip:text")


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return list(odd_files(tmp_path_factory.mktemp("forms")))


@pytest.fixture(scope="module")
def world(tmp_path_factory, forms):
    """A model that nobody trained, saved, and features of the odd files, once as paths and once with their bytes."""
    folder = tmp_path_factory.mktemp("world")
    encoders = load_encoders(parse_streams(STREAMS))
    torch.manual_seed(0)
    model = SparcModel(
        SparcConfig(streams=[one.record for one in encoders.values()], num_latents=32, k=6, auxk=8)
    ).eval()
    model.save_pretrained(folder / "model")
    columns = {"id": [name for name, _, _ in forms], "text": ["a photograph"] * len(forms)}
    paths = Dataset.from_dict(columns | {"image": [str(path) for _, path, _ in forms]})
    extract_features(paths.cast_column("image", Value("string")), encoders, folder / "paths", image_column="image")
    stored = paths.cast_column("image", ImageColumn())
    extract_features(stored, encoders, folder / "stored", keep_columns=("image",))
    return model, encoders, folder


def plain_rows(encoders, forms) -> dict[str, np.ndarray]:
    return {
        name: encoder.encode([plain for _, _, plain in forms])
        for name, encoder in encoders.items()
        if encoder.modality == "image"
    }


def test_features_of_files(world, forms):
    _, encoders, folder = world
    for made in ("paths", "stored"):
        features = FeatureDataset.load(folder / made)
        for name, expected in plain_rows(encoders, forms).items():
            found = features.array(name)
            cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
            assert dict(zip(features.ids, cosines.tolist(), strict=True)) == pytest.approx(
                dict.fromkeys(features.ids, 1.0), abs=1e-5
            )


def test_stored_images_keep_their_bytes_and_are_read_upright(world, forms):
    features = FeatureDataset.load(world[2] / "stored")
    for row, (name, path, plain) in enumerate(forms):
        assert features.column("image", [row])[0]["bytes"] == path.read_bytes()
        np.testing.assert_array_equal(np.asarray(features.image(row)), np.asarray(plain), err_msg=name)


def test_the_pipeline_takes_files_and_open_images(world, forms):
    pipe = SparcPipeline.from_pretrained(world[2] / "model", device="cpu")
    expected = pipe(images=[plain for _, _, plain in forms])
    opened = [Image.open(path) for _, path, _ in forms]
    for given in ([str(path) for _, path, _ in forms], opened):
        for (name, _, _), one, other in zip(forms, pipe(images=given), expected, strict=True):
            for stream, concepts in other.items():
                assert {c["latent"]: c["value"] for c in one[stream]} == pytest.approx(
                    {c["latent"]: c["value"] for c in concepts}, abs=1e-4
                ), name


def test_uploads(forms, world):
    for name, path, plain in forms:
        if path.suffix != ".pgm":  # no format of the page
            np.testing.assert_array_equal(np.asarray(checked_image(path)[0]), np.asarray(plain), err_msg=name)


def test_explanations_lie_on_the_turned_picture(world, forms):
    model, encoders, _ = world
    expected, compared = {}, set()
    for name, path, plain in forms:
        codes = sample_codes(model, encoders, plain, "")
        latents = {stream: [int(codes[stream].argmax())] for stream in codes}  # maps are of active latents only
        with Image.open(path) as opened:
            found = explain_sample(model, encoders, opened, "", latents)
        key = plain.tobytes()
        if key not in expected:
            expected[key] = explain_sample(model, encoders, plain, "", latents)
        np.testing.assert_array_equal(np.asarray(found.image), np.asarray(plain), err_msg=name)
        heats = [
            (target.maps, wanted.maps) for target, wanted in zip(found.targets, expected[key].targets, strict=True)
        ]
        for heat, wanted, stream in ((ours[s], theirs[s], s) for ours, theirs in heats for s in theirs):
            assert (heat is None) == (wanted is None), name
            if heat is None:
                continue
            compared.add((name, stream))
            np.testing.assert_allclose(heat, wanted, atol=1e-6, err_msg=name)
            with Image.open(path) as opened:
                assert visible_box(encoders[stream], opened) == visible_box(encoders[stream], plain), name
                drawn = overlay(opened, heat)
            np.testing.assert_allclose(drawn, overlay(plain, wanted), atol=1)
        found.panel()
    streams = [stream for stream, encoder in encoders.items() if encoder.modality == "image"]
    assert compared == {(name, stream) for name, _, _ in forms for stream in streams}


def test_the_commands_explain_and_retrieve(world, forms, tmp_path, capsys, monkeypatch):
    model, encoders, folder = world
    seen = []
    monkeypatch.setattr(cli_explain, "explain_sample", lambda *a, **k: seen.append(a[2]) or explain_sample(*a, **k))
    paths = [str(path) for name, path, _ in forms if name in ("tag 1", "tag 6", "16-bit.png", "transparent.png")]
    command = ["explain", "--model", f"{folder}/model", "--output", f"{tmp_path}/panels", "--latents", "3"]
    assert main([*command, "--shifts", "1", "--image", *paths]) == 0
    capsys.readouterr()
    plain = {str(path): image for _, path, image in forms}
    for path, image in zip(paths, seen, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(plain[path]))
    rows = {name: torch.from_numpy(values) for name, values in plain_rows(encoders, forms).items()}
    code = model.encode({"dino": rows["dino"]})["dino"].to_dense().detach()
    for row in (1, 5, 8, 20):
        name, path, _ = forms[row]
        command = f"retrieve --model {folder}/model --features {folder}/stored --source dino --target dino --count 99"
        assert main([*command.split(), "--image", str(path)]) == 0
        matches = {m["id"]: m["similarity"] for m in json.loads(capsys.readouterr().out)["matches"]["dino"]}
        expected = torch.nn.functional.cosine_similarity(code, code[row : row + 1])
        assert matches[name] == pytest.approx(1, abs=1e-4)
        for other, (known, _, _) in enumerate(forms):
            assert matches.get(known, 0.0) == pytest.approx(float(expected[other]), abs=1e-4), (name, known)


def test_heatmaps_over_open_images(world, tmp_path):
    model, encoders, _ = world
    upright = photograph()
    with Image.open(tagged(upright, 6, tmp_path / "a.png")) as opened:
        figure = concept_heatmaps(model, encoders, [opened], [3], names={})
    expected = concept_heatmaps(model, encoders, [upright], [3], names={})
    for one, other in zip(figure.axes, expected.axes, strict=True):
        np.testing.assert_allclose(one.images[0].get_array(), other.images[0].get_array(), atol=1)


def test_the_space_shows_indexed_samples_upright(world, forms, tmp_path):
    model, encoders, folder = world
    features = FeatureDataset.load(folder / "stored")
    data = SpaceData(model, features, open_index(model, features, tmp_path), encoders=encoders)
    names = [name for name, _, _ in forms]
    rows = [names.index(f"tag {tag}") for tag in range(1, 9)] + [names.index("16-bit tagged 6.png")]
    for row in rows:
        np.testing.assert_array_equal(np.asarray(data.image(row)), np.asarray(forms[row][2]))
        matches = data.retrieve("dino", "dino", data.image(row), count=len(forms))
        assert {match.row: match.similarity for match in matches}[row] == pytest.approx(1, abs=1e-4)
    seen = latent_maps(data, 3, {"dino": rows[:8]})["dino"]
    for one in seen:
        np.testing.assert_array_equal(np.asarray(one.image), np.asarray(seen[0].image))
        np.testing.assert_allclose(one.heat, seen[0].heat, atol=1e-6)


def test_a_saved_dataset_with_masks(world, forms, tmp_path):
    """datasets turns images as it reads them, and their masks lie on what it shows."""
    upright = photograph()
    mask = Image.fromarray(np.asarray(upright)[..., 0] > 99)
    mask.save(tmp_path / "mask.png")
    columns = Features({"image": ImageColumn(), "masks": List(ImageColumn()), "mask_labels": List(Value("string"))})
    rows = {
        "image": [str(path) for _, path, _ in forms],
        "masks": [[str(tmp_path / "mask.png")]] * len(forms),
        "mask_labels": [["red"]] * len(forms),
    }
    Dataset.from_dict(rows, features=columns).save_to_disk(tmp_path / "saved")
    images = open_masked_images(str(tmp_path / "saved"))
    for row, (name, _, plain) in enumerate(forms):
        image, masks = images.read(row)
        np.testing.assert_array_equal(np.asarray(masks["red"]), np.asarray(mask), err_msg=name)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(plain), err_msg=name)


def test_maps_of_open_images_are_those_of_the_upright_ones(world, forms):
    model, encoders, _ = world
    used = {"clip_img": encoders["clip_img"]}
    opened = [Image.open(path) for _, path, _ in forms]
    target = [ConceptTarget((3,))]
    found = image_maps(model, used, opened, target)["clip_img"]
    expected = image_maps(model, used, [plain for _, _, plain in forms], target)["clip_img"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
