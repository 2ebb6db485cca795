"""Maps on images and scores of words."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_encoders import SAVERS, TEXTS

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.encoders.stream_encoder import StreamEncoder, load_encoders
from sparc_hf.encoders.trace import trace
from sparc_hf.maps.methods import MAP_METHODS, attention_relevance
from sparc_hf.maps.patch_maps import image_maps, map_on_image
from sparc_hf.maps.scored_words import merged_words, word_scores
from sparc_hf.maps.targets import ConceptTarget, SimilarityTarget

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
CASES = ["flat_heads", "split_heads", "single", "one_by_one_matrix_target"]


@pytest.mark.parametrize("case", CASES)
def test_relevance_equals_the_earlier_project(golden, case):
    tensors = load_file(golden / "attention_relevance.safetensors")
    facts = json.loads((golden / "attention_relevance.json").read_text())["cases"][case]
    layers = range(sum(key.startswith(f"{case}.attn.") for key in tensors))

    def maps(kind: str) -> list[torch.Tensor]:
        found = [tensors[f"{case}.{kind}.{layer}"] for layer in layers]
        return [one.unflatten(0, (facts["B"], facts["H"])) if one.ndim == 3 else one for one in found]

    identity = torch.eye(facts["T"]).repeat(facts["B"], 1, 1)
    checked = 0
    for key, expected in tensors.items():
        if key.startswith(f"{case}.relevance.start"):
            start = max(int(key.rpartition("start")[2]), 0)  # theirs takes all layers for -1
            found = attention_relevance(identity, maps("attn"), maps("grad"), start)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            one_row = attention_relevance(identity[:, :1], maps("attn"), maps("grad"), start)[:, 0, 1:]
            torch.testing.assert_close(one_row, tensors[f"{case}.cls_row.start{key.rpartition('start')[2]}"])
            checked += 1
    assert checked >= 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {family: str(save(root / family)) for family, save in SAVERS.items()}


@pytest.fixture(scope="module")
def world(folders):
    """A model whose streams are all image families and both text towers."""
    records = [{"name": family, "encoder": folder, "modality": "image"} for family, folder in folders.items()]
    records += [{"name": f"{name}_text", "encoder": folders[name], "modality": "text"} for name in ("clip", "siglip")]
    encoders = load_encoders(records)
    torch.manual_seed(0)
    config = SparcConfig(streams=[one.record for one in encoders.values()], num_latents=32, k=6, auxk=4)
    return SparcModel(config).eval(), encoders


TARGETS = [ConceptTarget((3,)), ConceptTarget((3, 8)), SimilarityTarget("clip_text", TEXTS[0])]


@pytest.mark.parametrize("method", MAP_METHODS)
def test_every_family_has_maps(world, method):
    model, encoders = world
    baseline = SimilarityTarget("clip_text", TEXTS[0], embeddings=True)
    found = image_maps(model, encoders, [PICTURE, PICTURE.rotate(90)], [*TARGETS, baseline], method)
    assert list(found) == list(SAVERS)
    for family, maps in found.items():
        assert (maps.shape, maps.dtype) == ((2, 4, 4, 4), np.float32)
        assert np.isfinite(maps[:, :3]).all()
        assert (maps[:, :3] >= 0).all()
        assert np.isnan(maps[:, 3]).all() == (family != "clip")
    assert sum(maps[:, :3].max() > 0 for maps in found.values()) >= 4


@pytest.mark.parametrize("method", MAP_METHODS)
def test_batches_and_lists_of_targets_change_nothing(world, method):
    model, encoders = world
    images = [PICTURE, PICTURE.rotate(90), PICTURE.rotate(180)]
    together = image_maps(model, encoders, images, TARGETS, method, batch_size=2)
    lists = [[TARGETS[1]], [], [TARGETS[0], TARGETS[2]]]
    apart = image_maps(model, encoders, images, lists, method)
    for name, maps in together.items():
        options = {"rtol": 1e-3, "atol": 1e-5}
        np.testing.assert_allclose(apart[name][0, 0], maps[0, 1], **options)
        np.testing.assert_allclose(apart[name][2], maps[2][[0, 2]], **options)
        assert np.isnan(apart[name][1]).all()
        assert np.isnan(apart[name][0, 1]).all()


def test_a_map_for_many_targets_takes_one_pass(world, monkeypatch):
    model, encoders = world
    passes = []
    monkeypatch.setattr("sparc_hf.maps.methods.trace", lambda *args: passes.append(1) or trace(*args))
    image_maps(model, {"vit": encoders["vit"]}, [PICTURE], [ConceptTarget((n,)) for n in range(8)])
    assert len(passes) == 1


def test_relevance_by_hand(world):
    """The class token's row of (I + M2)(I + M1), from gradients of one pre-activation."""
    model, encoders = world
    encoder = encoders["dinov2_with_registers"]
    seen = trace(encoder, encoder.prepare([PICTURE]))
    rows = model.normalize({encoder.name: seen.vectors})[encoder.name] - model.pre_bias[encoder.name]
    weights = model.encoders[encoder.name]
    value = rows[0] @ weights.weight[3] + weights.bias[3]
    gradients = torch.autograd.grad(value, seen.attentions)
    relevance = torch.eye(20)
    for attention, gradient in zip(seen.attentions, gradients, strict=True):
        relevance = relevance + (attention * gradient).clamp(min=0).mean(dim=1)[0] @ relevance
    found = image_maps(model, {encoder.name: encoder}, [PICTURE], TARGETS[:1])[encoder.name]
    np.testing.assert_allclose(found[0, 0].ravel(), relevance[0, 4:].detach(), rtol=1e-4, atol=1e-7)


def test_grad_cam_of_a_linear_model_by_hand(world, monkeypatch):
    """Where the vector is the sum of the norm's outputs, Grad-CAM is w . a at each patch, and sums to the value."""
    model, encoders = world
    encoder = encoders["vit"]
    direction = model.encoders["vit"].weight[3].detach()
    activations = torch.rand(1, 17, 16, requires_grad=True)

    class Linear:
        vectors = activations[:, 1:].sum(dim=1)
        normed, hidden, attentions = activations, activations, ()

    monkeypatch.setattr("sparc_hf.maps.methods.trace", lambda *_: Linear)
    model.config.stream("vit")["normalize"] = "none"
    try:
        found = image_maps(model, {"vit": encoder}, [PICTURE], TARGETS[:1], "grad_cam")["vit"][0, 0].ravel()
    finally:
        model.config.stream("vit")["normalize"] = "l2"
    by_hand = (activations[0, 1:] @ direction).detach()
    np.testing.assert_allclose(found, by_hand.clamp(min=0), rtol=1e-4, atol=1e-6)
    bias = model.encoders["vit"].bias[3].item()
    value = (Linear.vectors @ direction).item() + bias
    assert by_hand.sum().item() + bias == pytest.approx(value, rel=1e-4)


def test_patch_codes_are_codes_of_patches(world):
    model, encoders = world
    encoder = encoders["dinov2"]
    tokens = encoder.patch_tokens(encoder.prepare([PICTURE]))[0]
    with torch.no_grad():
        whole = SparcModel(model.config)
        whole.load_state_dict(model.state_dict())
        whole.config.k = whole.config.num_latents
        dense = whole.encode({"dinov2": tokens})["dinov2"].to_dense()
    found = image_maps(model, {"dinov2": encoder}, [PICTURE], [ConceptTarget((3, 8))], "patch_codes")["dinov2"]
    np.testing.assert_allclose(found[0, 0].ravel(), dense[:, [3, 8]].sum(1), rtol=1e-4, atol=1e-5)
    model.config.k = 6


@pytest.mark.parametrize("method", MAP_METHODS)
def test_shifts_refine_a_map(world, method):
    model, encoders = world
    used = {name: encoders[name] for name in ("dinov2", "clip_text")}
    plain = image_maps(model, used, [PICTURE], TARGETS, method)["dinov2"]
    fine = image_maps(model, used, [PICTURE], TARGETS, method, shifts=2)["dinov2"]
    assert fine.shape == (1, 3, 16, 16)
    flat = Image.new("RGB", (32, 32), "red")
    even = image_maps(model, used, [flat], TARGETS[:1], method, shifts=2)["dinov2"]
    assert even.shape == (1, 1, 16, 16)
    # A map and its refinement are of the same places.
    coarse = fine.reshape(1, 3, 4, 4, 4, 4).mean(axis=(3, 5))
    assert np.corrcoef(coarse.ravel(), plain.ravel())[0, 1] > 0.5


def test_maps_on_pixels():
    grid = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)
    values, seen = map_on_image(grid, (1, 0, 5, 4), (6, 4))
    assert seen.tolist() == [[False, True, True, True, True, False]] * 4
    np.testing.assert_allclose(values[0], [0, 0, 0.25, 0.75, 1, 0], atol=1e-6)
    np.testing.assert_allclose(values[:, 1], [0, 0.5, 1.5, 2], atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("size", [(1, 1), (37, 91), (400, 3)])
def test_images_of_any_kind(world, mode, size):
    model, encoders = world
    used = {name: encoders[name] for name in ("clip", "siglip")}
    image = Image.new("RGB", size, (200, 30, 90)).convert("L" if mode in ("I;16", "F") else mode)
    image = image.convert("F") if mode == "F" else image
    if mode == "I;16":
        image = Image.fromarray(np.full((size[1], size[0]), 3000, np.uint16))
    found = image_maps(model, used, [image], TARGETS[:1])
    assert all(np.isfinite(maps).all() for maps in found.values())


@pytest.mark.parametrize("method", ["relevance", "gradient"])
def test_words_of_texts(world, method):
    model, encoders = world
    texts = ["a red circle", "", "Zwei Hunde, im Schnee!", "赤い円 на снегу", " ".join(["dogs"] * 500)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = word_scores(model, encoders, texts, [ConceptTarget((3,)), SimilarityTarget("vit", PICTURE)], method)
    assert list(found) == ["clip_text", "siglip_text"]
    for per_text in found.values():
        assert [word.word for word in per_text[0][0]] == ["a", "red", "circle"]
        assert per_text[1] == [[], []]
        assert [word.word for word in per_text[2][0]][:4] == ["Zwei", "Hunde", ",", "im"]
        assert per_text[3][0][0].word.startswith("赤")
        assert 1 <= len(per_text[4][0]) < 16
        for text, of_text in zip(texts, per_text, strict=True):
            for word in (word for of_target in of_text for word in of_target):
                assert text[word.start : word.end] == word.word
                assert np.isfinite(word.score)
                assert word.score >= 0


def test_a_words_score_is_the_mean_of_its_tokens(world, monkeypatch):
    model, encoders = world
    encoder = encoders["clip_text"]
    text = "a redsquare dog"
    tokens = encoder.inputs_of.tokenizer.tokenize(text)
    assert len(tokens) > 3  # the middle word has several
    scores = torch.arange(len(tokens) + 2.0)[None]
    monkeypatch.setattr("sparc_hf.maps.methods._scores", lambda *_: scores)
    words = word_scores(model, {"clip_text": encoder}, [text], TARGETS[:1])["clip_text"][0][0]
    last = [number for number, token in enumerate(tokens) if token.endswith("</w>")]
    first = [0, *(number + 1 for number in last[:-1])]
    assert [word.word for word in words] == ["a", "redsquare", "dog"]
    expected = [np.mean(np.arange(a, b + 1) + 1) for a, b in zip(first, last, strict=True)]
    assert [word.score for word in words] == pytest.approx(expected)


class Tokenized(dict):
    """What a tokenizer returns for one text."""

    def word_ids(self, _: int) -> list[int]:
        return self["words"]


def test_words_of_pieces_equal_the_earlier_project(golden):
    """Its own pieces end in </w> where a word ends; here the tokenizer says which word a token is of."""
    cases = json.loads((golden / "attention_relevance.json").read_text())["tokens_to_words"]
    for case in cases:
        kept = [
            (piece.removesuffix("</w>"), piece.endswith("</w>"), score)
            for piece, score in zip(case["tokens"], case["scores"], strict=True)
            # It leaves out pieces of exclamation marks alone, its padding, but not where one ends a word.
            if not piece.startswith(("<start_of_text>", "<end_of_text>")) and set(piece) != {"!"}
        ]
        text, offsets, words = "", [], [0]
        for piece, ends, _ in kept:
            offsets.append((len(text), len(text) + len(piece)))
            text += piece + " " * ends
            words.append(words[-1] + ends)
        told = Tokenized(offset_mapping=[offsets], words=words[:-1])
        inputs = SimpleNamespace(tokenizer=lambda *_, told=told, **__: told, settings={})
        scores = np.array([[score for *_, score in kept]])
        (found,) = merged_words(SimpleNamespace(inputs_of=inputs), text, scores)
        assert [word.word for word in found] == case["words"]
        assert [word.score for word in found] == pytest.approx(case["word_scores"])


def test_impossible_requests(world):
    model, encoders = world
    with pytest.raises(ValueError, match="a concept needs latents from 0 to 31"):
        image_maps(model, encoders, [PICTURE], [ConceptTarget((32,))])
    with pytest.raises(ValueError, match="maps need images and targets"):
        image_maps(model, encoders, [], TARGETS)
    with pytest.raises(ValueError, match="2 images but 1 lists of targets"):
        image_maps(model, encoders, [PICTURE, PICTURE], [TARGETS])
    with pytest.raises(ValueError, match="`method` must be one of"):
        image_maps(model, encoders, [PICTURE], TARGETS, "saliency")
    with pytest.raises(ValueError, match="no encoder of stream `ears`"):
        image_maps(model, encoders, [PICTURE], [SimilarityTarget("ears", "a")])
    with pytest.raises(ValueError, match="encodes text"):
        word_scores(model, {"vit": encoders["vit"]}, ["a"], TARGETS[:1])
    with pytest.raises(ValueError, match="`shifts` must be at least 1"):
        image_maps(model, encoders, [PICTURE], TARGETS, shifts=0)


def test_maps_of_a_usae_model_and_of_token_streams(folders):
    encoder = StreamEncoder("x", folders["vit"], "image", pooling="tokens", grid=(3, 3))
    config = SparcConfig(
        streams=[encoder.record], num_latents=32, k=6, auxk=16, auxk_coef=0.1, objective="usae", selection="local"
    )
    model = SparcModel(config).eval()
    found = image_maps(model, {"x": encoder}, [PICTURE], TARGETS[:2], "patch_codes")["x"]
    assert found.shape == (1, 2, 3, 3)
    # They have no other kind, so that one call does for streams of both sorts.
    np.testing.assert_array_equal(image_maps(model, {"x": encoder}, [PICTURE], TARGETS[:2])["x"], found)
