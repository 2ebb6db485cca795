"""Patch-token activations of Universal Sparse Autoencoders as feature datasets."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sparc_hf.cli.import_files import ImportArguments, run_import
from sparc_hf.legacy.importing import import_features
from sparc_hf.legacy.npz_activations import ActivationTree
from sparc_hf.model.sparse_ops import normalize_rows

MODELS = {"SigLIP": (4, 6), "ViT": (5, 3), "DinoV2": (10, 5)}  # tokens and width: grids 2x2, 1 + 2x2, 1 + 3x3


def activations(image: int, model: str) -> np.ndarray:
    return np.random.default_rng([image, len(model)]).standard_normal(MODELS[model]).astype(np.float32) + image


def write_tree(folder, *, combined=False, underscore="_", images=5):
    for number in range(images):
        label = f"n0{number // 2}"
        (folder / label).mkdir(parents=True, exist_ok=True)
        arrays = {name: activations(number, name) for name in MODELS}
        if combined:
            np.savez(folder / label / f"{label}_{number}_combined.npz", **arrays)
            continue
        for name, values in arrays.items():
            np.savez(folder / label / f"{label}_{number}{underscore}{name}.npz", activation=values, label=number // 2)
    return folder


def run(folder, output, **settings):
    return run_import(ImportArguments(source=[str(folder)], output=str(output), **settings))


@pytest.mark.parametrize("kind", ["per_model", "combined"])
def test_activations_of_the_earlier_code(golden, tmp_path, kind):
    features = run(golden / "usae_activations" / kind, tmp_path / "made", models=["SigLIP", "ViT", "DinoV2"])
    expected = load_file(golden / "usae_activation_dataset_expected.safetensors")
    facts = json.loads((golden / "usae.json").read_text())["activation_dataset"]
    assert features.stream_names == ["SigLIP", "ViT", "DinoV2"]
    for record in features.streams:
        assert record["grid"] == [3, 3]
        statistics = facts["standardization"]["standardize_nocls"][record["name"]]
        for key, value in statistics.items():
            assert record[key] == pytest.approx(value, rel=1e-6)
        plain = np.concatenate([expected[f"plain_nocls.{image}.{record['name']}"] for image in range(6)])
        np.testing.assert_array_equal(features.array(record["name"]), plain)
        standard = np.concatenate([expected[f"standardize_nocls.{image}.{record['name']}"] for image in range(6)])
        constants = torch.tensor([record["mean"]]), torch.tensor([record["std"]])
        rows = normalize_rows(torch.from_numpy(features.array(record["name"])), "standardize", constants)
        np.testing.assert_allclose(rows.numpy(), standard, rtol=1e-5, atol=1e-6)
    images = [entry["image"].removeprefix("train/").removesuffix(".JPEG") for entry in facts["manifest"]]
    assert features.ids == [image for image in images for _ in range(9)]
    assert features.column("labels") == [[entry["target"]] for entry in facts["manifest"] for _ in range(9)]
    assert features.column("sample") == [image for image in range(6) for _ in range(9)]
    assert features.column("token") == list(range(9)) * 6


@pytest.mark.parametrize("form", [{"combined": True}, {}, {"underscore": ""}])
def test_every_form_of_the_files_gives_the_same_rows(tmp_path, form):
    features = run(write_tree(tmp_path / "tree", **form), tmp_path / "made")
    assert features.stream_names == ["DinoV2", "SigLIP", "ViT"]
    assert len(features) == 5 * 4
    assert features.label_names == ["n00", "n01", "n02"]
    expected = np.concatenate([activations(number, "ViT")[1:] for number in range(5)])
    np.testing.assert_array_equal(features.array("ViT"), expected)
    assert features.ids[::4] == ["n00/n00_0", "n00/n00_1", "n01/n01_2", "n01/n01_3", "n02/n02_4"]


def test_larger_grids_are_resampled(tmp_path):
    features = run(write_tree(tmp_path / "tree"), tmp_path / "made")
    patches = torch.from_numpy(activations(3, "DinoV2")[1:]).reshape(1, 3, 3, 5).permute(0, 3, 1, 2)
    smaller = torch.nn.functional.interpolate(patches, size=(2, 2), mode="bilinear", antialias=True)
    expected = smaller.flatten(2)[0].T.numpy()
    np.testing.assert_allclose(features.array("DinoV2", slice(12, 16)), expected, rtol=1e-6, atol=1e-6)
    wider = run(tmp_path / "tree", tmp_path / "wider", grid=[3, 3], models=["ViT", "DinoV2"])
    assert wider.stream_names == ["ViT", "DinoV2"]
    assert len(wider) == 5 * 9
    np.testing.assert_array_equal(wider.array("DinoV2", slice(27, 36)), activations(3, "DinoV2")[1:])


def test_statistics_are_of_the_patches_as_stored(tmp_path):
    features = run(write_tree(tmp_path / "tree"), tmp_path / "made")
    values = np.concatenate([activations(number, "DinoV2")[1:] for number in range(5)]).astype(np.float64)
    record = features.streams[0]
    assert record["mean"] == pytest.approx(values.mean(), rel=1e-9)
    assert record["std"] == pytest.approx(values.std(ddof=1), rel=1e-9)


def test_rows_from_the_middle_of_an_image(tmp_path):
    tree = ActivationTree(write_tree(tmp_path / "tree"))
    whole = [block for block in tree.blocks(0)]
    rest = list(tree.blocks(6))
    assert rest[0]["token"] == [2, 3]
    assert rest[0]["sample"] == [1, 1]
    np.testing.assert_array_equal(rest[0]["ViT"], whole[1]["ViT"][2:])
    assert len(rest) == 4


def test_splits(tmp_path):
    write_tree(tmp_path / "tree" / "train")
    assert len(run(tmp_path / "tree", tmp_path / "only")) == 20
    write_tree(tmp_path / "tree" / "val", images=2)
    with pytest.raises(ValueError, match=r"splits \['train', 'val'\]; choose one with `split`"):
        run(tmp_path / "tree", tmp_path / "made")
    assert len(run(tmp_path / "tree", tmp_path / "val", split="val")) == 8


def test_an_image_without_one_model(tmp_path):
    tree = write_tree(tmp_path / "tree")
    (tree / "n01" / "n01_3_ViT.npz").unlink()
    with pytest.raises(ValueError, match=r"`n01/n01_3` has files for .* but `n00/n00_0` has `.*n00_0_ViT.npz` too"):
        ActivationTree(tree)
    assert len(ActivationTree(tree, models=["SigLIP"])._images) == 5


def test_images_of_other_sizes_or_labels(tmp_path):
    tree = write_tree(tmp_path / "tree")
    file = tree / "n01" / "n01_3_ViT.npz"
    np.savez(file, activation=np.ones((17, 3), np.float32), label=1)
    with pytest.raises(
        ValueError, match=r"n00_0_ViT.npz` has activations \[5, 3\] but `.*n01_3_ViT.npz` has \[17, 3\]"
    ):
        ActivationTree(tree)
    np.savez(file, activation=activations(3, "ViT"), label=9)
    with pytest.raises(ValueError, match=r"n01_3_.*npz` has label \d but `.*n01_3_.*npz` has \d; they are not"):
        ActivationTree(tree)


class Planted:
    """What unpickling would call; it must never be."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return self.file.write_text, ("unpickled",)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda file: np.savez(file, activation=np.array([Planted(file.with_name("ran"))], dtype=object)),
            "cannot read",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "cannot read"),
        (lambda file: file.write_bytes(b""), "cannot read"),
        (lambda file: np.savez(file, activations=np.ones((4, 6), np.float32)), "has no `activation`"),
        (lambda file: np.savez(file, activation=np.ones(6, np.float32)), r"needs activations \[tokens, width\]"),
        (lambda file: np.savez(file, activation=np.ones((35, 6), np.float32)), "35 tokens for SigLIP"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, words):
    tree = write_tree(tmp_path / "tree")
    file = tree / "n00" / "n00_0_SigLIP.npz"
    damage(file)
    with pytest.raises(ValueError, match=words) as caught:
        import_features(ActivationTree(tree), tmp_path / "made")
    assert "n00_0_SigLIP.npz" in str(caught.value)
    assert not file.with_name("ran").exists()


def test_a_tree_without_activations(tmp_path):
    tree = write_tree(tmp_path / "tree")
    shutil.move(tree / "n00", tmp_path / "flat")
    with pytest.raises(ValueError, match="has no activations"):
        ActivationTree(tmp_path / "flat")
    with pytest.raises(ValueError, match="no activations of the models"):
        ActivationTree(tree, models=["CLIP"])
