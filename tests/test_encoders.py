import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_encoders import SAVERS, TEXTS, save_clip, save_dinov2

from sparc_hf.encoders import StreamEncoder, load_encoders
from sparc_hf.pretrained import LONGEST_RATIO


def picture(mode: str = "RGB", size: tuple[int, int] = (50, 40)) -> Image.Image:
    rng = np.random.default_rng(len(mode))
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {family: save(root / family) for family, save in SAVERS.items()}


def by_hand(family: str, folder, pixels: torch.Tensor) -> torch.Tensor:
    """The pooled vector as the papers define it, from the plain model."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if family == "clip":
        pooled = model.vision_model.post_layernorm(model.vision_model(pixel_values=pixels).last_hidden_state[:, 0])
        return model.visual_projection(pooled)
    if family == "siglip":
        hidden = model.vision_model(pixel_values=pixels).last_hidden_state
        return model.vision_model.head(hidden)
    return model(pixel_values=pixels).last_hidden_state[:, 0]


@pytest.mark.parametrize(
    ("family", "width", "pooling", "prefix"),
    [
        ("clip", 12, "projection", 1),
        ("siglip", 16, "pooler", 0),
        ("dinov2", 16, "cls", 1),
        ("dinov2_with_registers", 16, "cls", 4),
        ("vit", 16, "cls", 1),
    ],
)
@torch.no_grad()
def test_images(folders, family, width, pooling, prefix):
    encoder = StreamEncoder("img", str(folders[family]), "image")
    inputs = encoder.prepare([picture(), picture(size=(33, 90))])
    rows = encoder.pooled(inputs)
    torch.testing.assert_close(rows, by_hand(family, folders[family], inputs["pixel_values"]))
    assert rows.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert encoder.record == {
        "name": "img",
        "hidden_size": width,
        "normalize": "l2",
        "encoder": str(folders[family]),
        "revision": None,
        "modality": "image",
        "pooling": pooling,
        "image_backend": "pil",
        "image_size": [32, 32],
        "grid": [4, 4],
    }
    assert encoder.prefix_tokens == prefix
    tokens = encoder.patch_tokens(inputs)
    assert tokens.shape == (2, 16, 16)
    full = encoder.tower(pixel_values=inputs["pixel_values"]).last_hidden_state
    torch.testing.assert_close(tokens, full[:, prefix:])
    mean = StreamEncoder("img", str(folders[family]), "image", pooling="mean")
    torch.testing.assert_close(mean.pooled(inputs), tokens.mean(1))


@torch.no_grad()
def test_clip_texts(folders):
    encoder = StreamEncoder("txt", str(folders["clip"]), "text")
    inputs = encoder.prepare(TEXTS)
    model = transformers.CLIPModel.from_pretrained(folders["clip"])
    hidden = model.text_model(**inputs).last_hidden_state
    ends = inputs["attention_mask"].sum(1) - 1
    torch.testing.assert_close(encoder.pooled(inputs), model.text_projection(hidden[torch.arange(4), ends]))
    assert (encoder.hidden_size, encoder.record["modality"], "grid" in encoder.record) == (12, "text", False)
    # Neither the other texts of a batch nor its padding change a row.
    np.testing.assert_allclose(encoder.encode(TEXTS, batch_size=1), encoder.encode(TEXTS, batch_size=3), atol=1e-5)
    mean = StreamEncoder("txt", str(folders["clip"]), "text", pooling="mean")
    np.testing.assert_allclose(mean.encode(TEXTS, batch_size=1), mean.encode(TEXTS), atol=1e-5)
    with pytest.raises(ValueError, match="has no patches"):
        encoder.patch_tokens(inputs)


def test_siglip_texts_are_padded_to_full_length_without_mask(folders):
    encoder = StreamEncoder("txt", str(folders["siglip"]), "text")
    inputs = encoder.prepare(["cat"])
    assert list(inputs) == ["input_ids"]
    assert inputs["input_ids"].shape == (1, 16)
    assert encoder.encode(TEXTS).shape == (4, 16)


@pytest.mark.parametrize(("limit", "positions", "longest"), [(None, 10, 10), (12, 16, 12), (20, 16, 16)])
def test_long_texts_are_truncated(tmp_path, limit, positions, longest):
    encoder = StreamEncoder("txt", str(save_clip(tmp_path / "clip", limit, positions)), "text")
    assert encoder.prepare(["red dogs " * 50])["input_ids"].shape == (1, longest)


@pytest.mark.parametrize("family", list(SAVERS))
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_image_modes(folders, family, mode):
    encoder = StreamEncoder("img", str(folders[family]), "image")
    image = picture(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = encoder.encode([image, picture()])
    np.testing.assert_allclose(rows[0], encoder.encode([image.convert("RGB")])[0], atol=1e-5)
    assert np.isfinite(rows).all()


def test_streams_of_one_checkpoint_share_its_model(folders):
    records = [
        {
            "name": "clip_img",
            "encoder": str(folders["clip"]),
            "modality": "image",
            "normalize": "none",
            "note": "kept",
        },
        {"name": "clip_txt", "encoder": str(folders["clip"]), "modality": "text"},
        {"name": "dino", "encoder": str(folders["dinov2"]), "modality": "image", "pooling": "mean"},
    ]
    encoders = load_encoders(records)
    assert list(encoders) == ["clip_img", "clip_txt", "dino"]
    assert encoders["clip_img"].model is encoders["clip_txt"].model
    record = encoders["clip_img"].record
    assert (record["normalize"], record["note"], record["hidden_size"]) == ("none", "kept", 12)
    assert encoders["dino"].record["pooling"] == "mean"
    again = load_encoders([encoder.record for encoder in encoders.values()])
    assert [encoder.record for encoder in again.values()] == [encoder.record for encoder in encoders.values()]
    with pytest.raises(ValueError, match="made with `hidden_size` 13"):
        load_encoders([{**record, "hidden_size": 13}])
    with pytest.raises(ValueError, match="does not say which encoder"):
        load_encoders([{"name": "x", "hidden_size": 3}])


def test_half_precision(folders):
    full = StreamEncoder("img", str(folders["clip"]), "image")
    half = StreamEncoder("img", str(folders["clip"]), "image", dtype=torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    rows = half.encode([picture()])
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, full.encode([picture()]), rtol=0.1, atol=0.1)
    assert half.patch_tokens(half.prepare([picture()])).dtype == torch.float32


def test_shipped_encoders_are_named_without_their_folder(folders, monkeypatch, tmp_path):
    monkeypatch.setattr("sparc_hf.pretrained.__file__", str(tmp_path / "pretrained.py"))
    shutil.copytree(folders["clip"], tmp_path / "demo" / "encoders" / "clip")
    encoder = StreamEncoder("txt", "demo:clip", "text")
    assert (encoder.record["encoder"], encoder.record["revision"]) == ("demo:clip", None)
    assert encoder.encode(TEXTS).shape == (4, 12)
    with pytest.raises(ValueError, match="`demo:cat` is neither"):
        StreamEncoder("txt", "demo:cat", "text")


def test_revision_of_a_hub_repository(folders, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--me--tiny"
    shutil.copytree(folders["dinov2"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoder = StreamEncoder("dino", "me/tiny", "image")
    assert encoder.record["revision"] == commit
    assert encoder.encode([picture()]).shape == (1, 16)
    with pytest.raises(ValueError, match="`me/other` is neither a folder nor a repository"):
        StreamEncoder("dino", "me/other", "image")


def test_unknown_family_needs_a_pooling(tmp_path):
    config = transformers.DeiTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config.image_size, config.patch_size = 32, 8
    transformers.DeiTModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unknown family `deit`; say which vector .*\['cls', 'mean'"):
        StreamEncoder("x", str(tmp_path), "image")
    encoder = StreamEncoder("x", str(tmp_path), "image", pooling="cls")
    assert encoder.hidden_size == 16
    with pytest.raises(ValueError, match="prefix tokens"):  # DeiT has two, which nothing here knows
        encoder.patch_tokens(encoder.prepare([picture()]))


def test_what_cannot_be_loaded(folders, tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a repository"):
        StreamEncoder("x", str(tmp_path / "no such folder"), "image")
    with pytest.raises(ValueError, match="cannot load the config"):
        StreamEncoder("x", str(tmp_path), "image")
    with pytest.raises(ValueError, match="encodes image, not text"):
        StreamEncoder("x", str(folders["dinov2"]), "text")
    with pytest.raises(ValueError, match="`modality` must be one of"):
        StreamEncoder("x", str(folders["dinov2"]), "audio")
    with pytest.raises(ValueError, match="has no `pooling` 'projection'"):
        StreamEncoder("x", str(folders["dinov2"]), "image", pooling="projection")
    with pytest.raises(ValueError, match="has no `pooling` 'cls'"):
        StreamEncoder("x", str(folders["siglip"]), "image", pooling="cls")
    with pytest.raises(ValueError, match="lacks 2 weights"):  # its pooler would be random
        StreamEncoder("x", str(folders["vit"]), "image", pooling="pooler")


def test_missing_parts(tmp_path):
    folder = save_clip(tmp_path / "clip")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="cannot load the image processor"):
        StreamEncoder("x", str(folder), "image")
    with pytest.raises(ValueError, match="no tokenizer files"):
        StreamEncoder("x", str(folder), "text")
    folder = save_dinov2(tmp_path / "dino")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot load the model"):
        StreamEncoder("x", str(folder), "image")


def test_wrong_samples(folders):
    encoder = StreamEncoder("img", str(folders["dinov2"]), "image")
    for samples in ([], ["text"], "text"):
        with pytest.raises(ValueError, match="non-empty list of PIL images"):
            encoder.encode(samples)
    with pytest.raises(ValueError, match="non-empty list of texts"):
        StreamEncoder("txt", str(folders["clip"]), "text").encode("one text")


def test_the_image_backend_is_recorded_and_torchvision_must_be_there(folders, monkeypatch):
    encoder = StreamEncoder("x", str(folders["clip"]), "image")
    assert encoder.record["image_backend"] == "pil"
    monkeypatch.setattr("sparc_hf.pretrained.is_torchvision_available", lambda: False)
    with pytest.raises(ValueError, match="pip install torchvision"):
        StreamEncoder("x", str(folders["clip"]), "image", image_backend="torchvision")
    with pytest.raises(ValueError, match="'opencv'"):
        StreamEncoder("x", str(folders["clip"]), "image", image_backend="opencv")


@pytest.mark.parametrize("name", ["clip", "dinov2"])
@pytest.mark.parametrize("size", [(4, 80), (7, 141), (3, 299)])
def test_long_pictures_are_prepared_as_by_their_processor(folders, name, size):
    encoder = StreamEncoder("img", str(folders[name]), "image")
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    for picture in (strip, strip.rotate(90, expand=True)):
        expected = encoder.inputs_of.processor(images=[picture], return_tensors="pt")["pixel_values"]
        assert torch.equal(encoder.prepare([picture])["pixel_values"], expected)


def test_a_line_of_pixels_is_cut_before_it_is_resized(folders):
    """Resized whole, 12,000 x 1 pixels would become 432,000 x 36; the ends that are cut off are never seen."""
    encoder = StreamEncoder("img", str(folders["clip"]), "image")
    line = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2, 900, 3), dtype=np.uint8))
    expected = encoder.inputs_of.processor(images=[line], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder.prepare([line])["pixel_values"], expected, rtol=0, atol=0.02)
    seen = []
    resized = Image.Image.resize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Image.Image, "resize", lambda self, size, *a, **k: seen.append(size) or resized(self, size, *a, **k)
        )
        encoder.prepare([Image.new("RGB", (12000, 1)), Image.new("L", (1, 12000))])
    assert len(seen) == 2
    assert max(max(size) for size in seen) <= LONGEST_RATIO * 36
