"""Patch tokens as rows, their common grid, and attention maps."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tiny_encoders import SAVERS

from sparc_hf.encoders.stream_encoder import StreamEncoder, load_encoders
from sparc_hf.encoders.token_grid import resample_tokens

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {family: str(save(root / family)) for family, save in SAVERS.items()}


@pytest.mark.parametrize(
    ("case", "prefix", "grid", "to"),
    [
        ("nocls", 0, (16, 16), (14, 14)),
        ("cls", 1, (16, 16), (14, 14)),
        ("cls_plus_4_registers", 5, (16, 16), (14, 14)),
        ("up", 1, (4, 4), (6, 6)),
    ],
)
def test_resampling_equals_the_earlier_project(golden, case, prefix, grid, to):
    tensors = load_file(golden / "usae_interpolate.safetensors")
    made = resample_tokens(tensors[f"{case}.in"][:, prefix:], grid, to)
    # Of the tokens before the patches the earlier project keeps the last; here they are no rows at all.
    expected = tensors[f"{case}.out"][:, min(prefix, 1) :]
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


def test_resampling_by_hand():
    tokens = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])
    assert resample_tokens(tokens, (2, 2), (1, 1)).tolist() == [[[1.5]]]
    assert resample_tokens(tokens, (2, 2), (2, 2)) is tokens
    # Two columns from four: the triangle reaches two columns to each side of a centre, with weights 1, 3, 3, 1 cut off
    # at the border, so (3 * 0 + 3 * 1 + 1 * 2) / 7.
    line = torch.arange(4.0).reshape(1, 4, 1)
    torch.testing.assert_close(resample_tokens(line, (1, 4), (1, 2)).flatten(), torch.tensor([5 / 7, 16 / 7]))
    with pytest.raises(ValueError, match="do not fill a grid of 3 x 3"):
        resample_tokens(tokens, (3, 3), (2, 2))


@pytest.mark.parametrize("family", list(SAVERS))
def test_tokens_are_rows_on_a_common_grid(folders, family):
    plain = StreamEncoder("x", folders[family], "image")
    encoder = StreamEncoder("x", folders[family], "image", pooling="tokens", grid=(3, 2))
    inputs = encoder.prepare([PICTURE, PICTURE.rotate(90)])
    rows = encoder.rows(inputs)
    assert rows.shape == (12, 16)
    torch.testing.assert_close(rows, resample_tokens(plain.patch_tokens(inputs), (4, 4), (3, 2)).flatten(0, 1))
    assert (encoder.rows_per_sample, encoder.record["grid"], encoder.record["pooling"]) == (6, [3, 2], "tokens")
    again = load_encoders([encoder.record])["x"]
    assert again.record == encoder.record
    np.testing.assert_array_equal(again.encode([PICTURE]), encoder.encode([PICTURE]))
    own = StreamEncoder("x", folders[family], "image", pooling="tokens")
    assert (own.rows_per_sample, own.record["grid"], own.encode([PICTURE]).shape) == (16, [4, 4], (16, 16))
    with pytest.raises(ValueError, match="no one vector a sample"):
        encoder.pooled(inputs)


def test_bad_token_settings(folders):
    with pytest.raises(ValueError, match="has no patch tokens"):
        StreamEncoder("x", folders["clip"], "text", pooling="tokens")
    with pytest.raises(ValueError, match="with `pooling` tokens"):
        StreamEncoder("x", folders["clip"], "image", grid=(3, 3))
    with pytest.raises(ValueError, match="two positive numbers"):
        StreamEncoder("x", folders["clip"], "image", pooling="tokens", grid=(3, 0))


def test_prefix_tokens_of_an_unknown_family_can_be_given(tmp_path):
    config = transformers.DeiTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config.image_size, config.patch_size = 32, 8
    transformers.DeiTModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="say in the stream record how many `prefix_tokens`"):
        StreamEncoder("x", str(tmp_path), "image", pooling="tokens")
    encoder = StreamEncoder("x", str(tmp_path), "image", pooling="tokens", prefix_tokens=2)
    inputs = encoder.prepare([PICTURE])
    expected = encoder.model(**inputs).last_hidden_state[0, 2:]
    torch.testing.assert_close(encoder.rows(inputs), expected)
    assert encoder.record["prefix_tokens"] == 2
    assert load_encoders([encoder.record])["x"].record == encoder.record
