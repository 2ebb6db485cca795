"""The inside of frozen transformers: attention maps with gradients, patches as rows, what of an image is seen."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_encoders import SAVERS, TEXTS

from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.encoders.trace import blocks_of, patch_vectors, trace
from sparc_hf.encoders.views import pixel_statistics, visible_box

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
STREAMS = [*((family, "image") for family in SAVERS), ("clip", "text"), ("siglip", "text")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {family: str(save(root / family)) for family, save in SAVERS.items()}


def inputs_of(encoder: StreamEncoder) -> dict[str, torch.Tensor]:
    return encoder.prepare([PICTURE, PICTURE.rotate(90)] if encoder.modality == "image" else TEXTS[:2])


@pytest.mark.parametrize(("family", "modality"), STREAMS)
def test_maps_and_their_gradients(folders, family, modality):
    encoder = StreamEncoder("x", folders[family], modality)
    inputs = inputs_of(encoder)
    before = encoder.model.config._attn_implementation
    seen = trace(encoder, inputs)
    tokens = encoder.prefix_tokens + 16 if modality == "image" else inputs["input_ids"].shape[1]
    assert [list(one.shape) for one in seen.attentions] == [[2, 2, tokens, tokens]] * 2
    assert list(seen.hidden.shape) == list(seen.normed.shape) == [2, tokens, 16]
    torch.testing.assert_close(seen.attentions[0].sum(-1), torch.ones(2, 2, tokens))
    torch.testing.assert_close(seen.vectors, encoder.pooled(inputs), rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(seen.vectors[:, 0].sum(), (*seen.attentions, seen.hidden, seen.normed))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert encoder.model.config._attn_implementation == before
    with torch.no_grad():
        assert not trace(encoder, inputs).vectors.requires_grad


@pytest.mark.parametrize(("family", "modality"), STREAMS)
def test_only_blocks_from_the_start_layer_on_are_in_the_graph(folders, family, modality):
    encoder = StreamEncoder("x", folders[family], modality)
    inputs = inputs_of(encoder)
    whole, last = trace(encoder, inputs), trace(encoder, inputs, -1)
    assert len(last.attentions) == 1
    (expected,) = torch.autograd.grad(whole.vectors[:, 0].sum(), whole.attentions[1:])
    (found,) = torch.autograd.grad(last.vectors[:, 0].sum(), last.attentions)
    torch.testing.assert_close(found, expected)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        trace(encoder, inputs)
        whole_kept = sum(kept)
        kept.clear()
        trace(encoder, inputs, -1)
    assert sum(kept) < 0.75 * whole_kept
    with pytest.raises(ValueError, match="`start_layer` must be from -2 to 1"):
        trace(encoder, inputs, 2)


def test_a_backbone_without_blocks_is_refused(tmp_path):
    transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_channels=3)
    ).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder = StreamEncoder.__new__(StreamEncoder)
    encoder.encoder, encoder.modality = str(tmp_path), "image"
    encoder.config = transformers.AutoConfig.from_pretrained(tmp_path)
    encoder.model = transformers.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no transformer blocks"):
        blocks_of(encoder)


@pytest.mark.parametrize("family", list(SAVERS))
@torch.no_grad()
def test_patches_go_the_way_of_the_pooled_token(folders, family):
    encoder = StreamEncoder("x", folders[family], "image")
    inputs = inputs_of(encoder)
    found = patch_vectors(encoder, inputs)
    assert list(found.shape) == [2, 16, encoder.hidden_size]
    tokens, model = encoder.patch_tokens(inputs), encoder.model
    by_hand = {
        "clip": lambda token: model.visual_projection(model.vision_model.post_layernorm(token)),
        "siglip": lambda token: model.vision_model.head(token[:, None]),
    }.get(family, lambda token: token)
    torch.testing.assert_close(found[:, 5], by_hand(tokens[:, 5]))


@pytest.mark.parametrize(
    ("family", "size"), [(f, s) for f in SAVERS for s in ((50, 40), (33, 90), (32, 32), (200, 70))]
)
def test_the_box_is_what_the_processor_keeps(folders, family, size):
    """A ramp of brightness tells from which place of the image the first and last pixel came."""
    encoder = StreamEncoder("x", folders[family], "image")
    box = visible_box(encoder, Image.new("RGB", size))
    for axis, length in enumerate(size):
        ramp = np.linspace(0, 255, length)
        picture = np.broadcast_to(ramp[None, :] if axis == 0 else ramp[:, None], (size[1], size[0]))
        ends = [np.zeros_like(picture), np.full_like(picture, 255), picture]
        images = [Image.fromarray(one.astype(np.uint8)).convert("RGB") for one in ends]
        dark, light, pixels = encoder.prepare(images)["pixel_values"][:, 0].mean(dim=1 + axis)
        places = ((pixels - dark) / (light - dark) * (length - 1) + 0.5).numpy()
        width = (box[2 + axis] - box[axis]) / len(places)
        # Pixels at the border of an image mix fewer of its pixels, so the ones next to them tell more.
        assert places[3] == pytest.approx(box[axis] + 3.5 * width, abs=0.6 + width / 4)
        assert places[-4] == pytest.approx(box[2 + axis] - 3.5 * width, abs=0.6 + width / 4)


def test_colours_are_normalised_as_the_processor_does(folders):
    encoder = StreamEncoder("x", folders["clip"], "image")
    white = encoder.prepare([Image.new("RGB", (32, 32), "white")])["pixel_values"][0, :, 5, 5]
    mean, deviation = (torch.tensor(one) for one in pixel_statistics(encoder))
    torch.testing.assert_close(white * deviation + mean, torch.ones(3))
    encoder.inputs_of.processor.do_normalize = False
    assert pixel_statistics(encoder) == ([0.0] * 3, [1.0] * 3)
    torch.testing.assert_close(
        encoder.prepare([Image.new("RGB", (32, 32), "white")])["pixel_values"][0, :, 5, 5], torch.ones(3)
    )
