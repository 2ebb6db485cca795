"""The shipped encoders: they load as real ones do, and see what they should."""

import pytest
import torch
from conftest import ROOT  # noqa: F401 the offline switches are set there
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

from sparc_hf.demo import ENCODERS_PATH
from sparc_hf.demo.encoder_training.measure import clip_queries, clip_retrieval, shape_neighbours
from sparc_hf.demo.scenes import SPLITS, make_scene


def test_they_are_small():
    total = sum(file.stat().st_size for file in ENCODERS_PATH.rglob("*") if file.is_file())
    assert total < 8_000_000


@pytest.mark.parametrize(("name", "model_type"), [("clip", "clip"), ("dino", "dinov2_with_registers")])
def test_they_load_through_the_auto_classes(name, model_type):
    folder = ENCODERS_PATH / name
    assert AutoConfig.from_pretrained(folder).model_type == model_type
    model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor([make_scene(5).image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_tokenizer_takes_any_text():
    tokenizer = AutoTokenizer.from_pretrained(ENCODERS_PATH / "clip")
    texts = ["a red circle", "ein roter Kreis, größer", "円と四角", "", "word " * 500, "🙂"]
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape[1] <= 32
    model = AutoModel.from_pretrained(ENCODERS_PATH / "clip", dtype=torch.float32)
    assert model.get_text_features(**tokens).pooler_output.isfinite().all()
    assert tokenizer.tokenize("a red circle") == ["a</w>", "red</w>", "circle</w>"]
    both = AutoProcessor.from_pretrained(ENCODERS_PATH / "clip", backend="pil")
    assert "pixel_values" in both(text=["a red circle"], images=[make_scene(1).image], return_tensors="pt")


def test_clip_finds_the_caption_of_a_scene():
    """Over 200 held-out scenes; chance is 0.005. The figure over 1,000 is in the documentation."""
    figures = clip_retrieval(ENCODERS_PATH / "clip", scenes=200)
    assert figures["ceiling"] > 0.95
    assert figures["image_to_text_r_at_1"] > CLIP_FLOOR
    assert figures["text_to_image_r_at_1"] > CLIP_FLOOR


def test_clip_finds_the_shape_of_an_object_and_its_colour():
    """All questions "a COLOUR SHAPE" over 1,000 held-out scenes, precision at 5; chance is 0.115 and 0.138."""
    figures = clip_queries(ENCODERS_PATH / "clip")["colour"]["embeddings"]
    assert figures["shape"] > QUERY_SHAPE_FLOOR
    assert figures["attribute"] > QUERY_COLOUR_FLOOR


@pytest.mark.slow
def test_vision_only_neighbours_share_the_shape():
    figures = shape_neighbours(ENCODERS_PATH / "dino", bank=1500, queries=300)
    assert figures["encoder"] > DINO_FLOOR
    assert figures["encoder"] > 2 * max(figures["pixels"], figures["untrained"], figures["most_frequent"])


def test_held_out_scenes_were_not_trained_on():
    assert not set(SPLITS["encoders"][:100]) & set(SPLITS["test"][:100])


CLIP_FLOOR = 0.5
DINO_FLOOR = 0.6
QUERY_SHAPE_FLOOR = 0.6
QUERY_COLOUR_FLOOR = 0.95
