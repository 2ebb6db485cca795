"""Encoders whose repositories hold code or pickles: nothing of it runs, and nobody is asked, unless a flag says so."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import save_clip, save_dinov2

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.encoders import StreamEncoder, load_encoders
from sparc_hf.pipeline import SparcPipeline

# Code that leaves a trace when it is imported, and else is what it says it is.
CODE = """
from pathlib import Path
import transformers
Path({trace!r}).write_text("ran")
class OwnConfig(transformers.Dinov2Config):
    model_type = "own-dino"
class OwnModel(transformers.Dinov2Model):
    config_class = OwnConfig
class OwnProcessor(transformers.BitImageProcessorPil):
    pass
class OwnTokenizer(transformers.CLIPTokenizer):
    pass
"""
CONFIG = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}


def _change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _own_model(folder: Path) -> tuple[str, str, str]:
    save_dinov2(folder)
    # transformers renames tensors by the model's type, which is another one here.
    model = transformers.Dinov2Model.from_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    _change(folder / "config.json", model_type="own-dino", auto_map=CONFIG)
    return str(folder), "image", "cls"


def _own_processor(folder: Path) -> tuple[str, str, str]:
    save_dinov2(folder)
    processor = {"image_processor_type": "OwnProcessor", "auto_map": {"AutoImageProcessor": "own.OwnProcessor"}}
    _change(folder / "preprocessor_config.json", **processor)
    return str(folder), "image", "cls"


WAYS = {"model": _own_model, "processor": _own_processor}


@pytest.fixture(params=WAYS)
def own(request, tmp_path, monkeypatch):
    """An encoder with code of its own, the trace that code leaves, and a person who would say yes to everything."""
    trace = tmp_path / "trace"
    encoder = WAYS[request.param](tmp_path / "encoder")
    (tmp_path / "encoder" / "own.py").write_text(CODE.format(trace=str(trace)))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    yield encoder, trace
    assert not asked


def test_code_of_a_repository_runs_only_where_it_is_trusted(own):
    (encoder, modality, pooling), trace = own
    record = {"name": "own", "encoder": encoder, "modality": modality, "pooling": pooling, "trust_remote_code": True}
    for load in (
        lambda: StreamEncoder("own", encoder, modality, pooling=pooling),
        lambda: load_encoders([record]),  # a record comes from others and cannot trust for us
    ):
        with pytest.raises(
            ValueError, match=r"needs code from its repository, which was not run.*--trust_remote_code"
        ):
            load()
    assert not trace.exists()
    made = StreamEncoder("own", encoder, modality, pooling=pooling, trust_remote_code=True)
    assert trace.exists()
    assert made.encode([Image.new("RGB", (40, 30))] if modality == "image" else ["a red circle"]).shape[0] == 1
    assert "trust_remote_code" not in made.record


def test_a_pipeline_asks_for_the_same_trust(own):
    (encoder, modality, pooling), _ = own
    record = StreamEncoder("own", encoder, modality, pooling=pooling, trust_remote_code=True).record
    model = SparcModel(SparcConfig(streams=[record], num_latents=16, k=2, auxk=2))
    with pytest.raises(ValueError, match="--trust_remote_code"):
        SparcPipeline(model, device="cpu")
    assert list(SparcPipeline(model, device="cpu", trust_remote_code=True).encoders) == ["own"]


def test_code_beside_known_parts_is_not_needed_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    dino, clip = save_dinov2(tmp_path / "dino"), save_clip(tmp_path / "clip")
    for folder in (dino, clip):
        (folder / "own.py").write_text(CODE.format(trace=str(trace)))
        _change(folder / "config.json", auto_map=CONFIG)
    _change(dino / "preprocessor_config.json", auto_map={"AutoImageProcessor": "own.OwnProcessor"})
    _change(clip / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]})
    assert StreamEncoder("dino", str(dino), "image").hidden_size == 16
    assert StreamEncoder("clip", str(clip), "text").hidden_size == 12
    assert not trace.exists()


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_the_command_neither_asks_nor_runs(tmp_path, answer):
    trace = tmp_path / "trace"
    encoder, _, pooling = _own_model(tmp_path / "encoder")
    (tmp_path / "encoder" / "own.py").write_text(CODE.format(trace=str(trace)))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "0.png")
    command = [sys.executable, "-m", "sparc_hf.cli", "extract", "--source", "images", "--output", "rows"]
    command += ["--encoders", f"own={encoder}:image:{pooling}"]
    settings = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "cwd": tmp_path, "capture_output": True, "text": True}
    refused = subprocess.run(command, input=answer, **settings)
    assert refused.returncode == 2
    assert "--trust_remote_code" in refused.stderr
    assert "[y/N]" not in refused.stdout + refused.stderr
    assert not trace.exists()
    done = subprocess.run([*command, "--trust_remote_code"], **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert trace.exists()


class _Harm:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("trust", [False, True])
def test_pickled_weights_are_never_loaded(tmp_path, trust):
    folder = save_dinov2(tmp_path / "encoder")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load the model of encoder .*no file named model\.safetensors"):
        StreamEncoder("dino", str(folder), "image", trust_remote_code=trust)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Harm(tmp_path / "trace")))
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        StreamEncoder("dino", str(folder), "image", trust_remote_code=trust)
    assert not (tmp_path / "trace").exists()
