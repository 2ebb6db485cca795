"""SparcPipeline on the encoders that ship with the package."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from sparc_hf import SparcConfig, SparcModel, SparcPipeline
from sparc_hf.codes.concepts import Concept, save_concepts
from sparc_hf.encoders.stream_encoder import StreamEncoder

STREAMS = (("dino", "demo:dino", "image"), ("clip_img", "demo:clip", "image"), ("clip_txt", "demo:clip", "text"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    records = [StreamEncoder(name, encoder, modality).record for name, encoder, modality in STREAMS]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    SparcModel(SparcConfig(streams=records, num_latents=128, k=8, auxk=8)).save_pretrained(folder)
    save_concepts([Concept(latent, f"concept {latent}", 5.0, {}) for latent in range(0, 128, 2)], folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return SparcPipeline.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def images():
    draws = np.random.default_rng(0)
    return [Image.fromarray(draws.integers(0, 255, (48, 40, 3), np.uint8)) for _ in range(5)]


TEXTS = ["a red circle", "a blue square", "a dog", "two cats", "nothing"]


def test_concepts_are_the_models_codes(pipe, images):
    found = pipe(images=images, text=TEXTS, batch_size=2)
    rows = {
        name: encoder.rows(encoder.prepare(images if encoder.modality == "image" else TEXTS))
        for name, encoder in pipe.encoders.items()
    }
    codes = pipe.model.encode(rows)
    assert len(found) == 5
    for number, sample in enumerate(found):
        assert list(sample) == ["dino", "clip_img", "clip_txt"]
        for name, concepts in sample.items():
            dense = codes[name][number].to_dense()[0]
            assert {concept["latent"] for concept in concepts} == set(dense.nonzero().flatten().tolist())
            values = [concept["value"] for concept in concepts]
            assert values == sorted(values, reverse=True)
            torch.testing.assert_close(
                torch.tensor(values), dense[[concept["latent"] for concept in concepts]], rtol=1e-4, atol=1e-5
            )
            for concept in concepts:
                expected = f"concept {concept['latent']}" if concept["latent"] % 2 == 0 else None
                assert concept["name"] == expected


def test_one_modality_single_samples_files_and_top(pipe, images, tmp_path):
    images[0].convert("L").save(tmp_path / "grey.png")
    from_file = pipe(images=tmp_path / "grey.png", top=3)
    assert list(from_file) == ["dino", "clip_img"]
    assert len(from_file["dino"]) <= 3
    assert pipe(images=str(tmp_path / "grey.png"), top=3) == from_file
    alone = pipe(text="a red circle")
    assert list(alone) == ["clip_txt"]
    assert pipe(text=["a red circle"]) == [alone]


def test_it_is_a_task_of_transformers(folder, images):
    made = pipeline("concept-extraction", model=str(folder), device="cpu")
    assert isinstance(made, SparcPipeline)
    assert made.model.dtype == torch.float32
    own = SparcPipeline.from_pretrained(folder, device="cpu")
    assert made(images=images[0]) == own(images=images[0])
    low = SparcPipeline.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    assert next(low.encoders["dino"].model.parameters()).dtype == torch.bfloat16
    assert low(images=images[0])["dino"]


def test_patch_tokens_give_their_strongest_value(images):
    record = StreamEncoder("dino", "demo:dino", "image", pooling="tokens").record
    torch.manual_seed(0)
    made = SparcPipeline(SparcModel(SparcConfig(streams=[record], num_latents=64, k=4, auxk=4)), device="cpu")
    rows = made.encoders["dino"].rows(made.encoders["dino"].prepare(images[:1]))
    dense = made.model.encode({"dino": rows})["dino"].to_dense().amax(dim=0)
    concepts = made(images=images[0])["dino"]
    assert {concept["latent"] for concept in concepts} == set(dense.nonzero().flatten().tolist())
    assert concepts[0]["value"] == pytest.approx(dense.max().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give `images`, `text`"),
        ({"images": []}, "give `images`, `text`"),
        ({"images": ["a.png"], "text": ["a", "b"]}, "'image': 1, 'text': 2"),
        ({"images": "/nowhere.png"}, "/nowhere.png"),
    ],
)
def test_wrong_calls_are_value_errors(pipe, given, words):
    with pytest.raises(ValueError, match=words):
        pipe(**given)


def test_a_model_without_encoders_says_which_stream_lacks_one():
    config = SparcConfig(streams={"dino": {"hidden_size": 4}}, num_latents=8, k=2, auxk=2)
    with pytest.raises(ValueError, match="stream `dino` does not say which encoder"):
        SparcPipeline(SparcModel(config), device="cpu")


def test_a_text_model_refuses_images(images):
    record = StreamEncoder("clip_txt", "demo:clip", "text").record
    made = SparcPipeline(SparcModel(SparcConfig(streams=[record], num_latents=8, k=2, auxk=2)), device="cpu")
    with pytest.raises(ValueError, match=r"encode \['text'\]"):
        made(images=images)
