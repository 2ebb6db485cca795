"""Pushing to a Hub on this machine through the real client, and loading from it in fresh processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, planted_features, random_features, tiny_model
from hub_server import HubServer
from tiny_encoders import save_dinov2

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.cli import main
from sparc_hf.cli.push import PushArguments, run_push
from sparc_hf.codes.concepts import Concept, save_concepts
from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.evaluation.report import write_report
from sparc_hf.evaluation.suite import EvaluationSettings, evaluate_model
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.hub.cards import write_model_card
from sparc_hf.model_folder import save_model


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        # The newer upload protocol is compiled code that talks to a service of its own.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        yield server


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "run"
    save_model(tiny_model(2), folder)
    (folder / "training_arguments.json").write_text(json.dumps({"features": "/home/me/secret", "k": 8}))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "big.bin").write_bytes(b"x" * 100)
    return folder


def user_environment(hub: HubServer, tmp_path, *, offline: bool = False, **variables: str) -> dict[str, str]:
    """Return the variables of somebody with an empty cache, whose Hub this is."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return known | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }


def fresh_process(hub: HubServer, tmp_path, code: str, **given) -> str:
    """Run code as somebody else would."""
    environment = user_environment(hub, tmp_path, **given)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def push(**given) -> dict:
    return run_push(PushArguments(**given))


def test_a_model_goes_up_in_one_commit_and_loads_elsewhere(hub, tmp_path, model_folder):
    pushed = push(repo="me/concepts", model=str(model_folder), private=True)
    repo = hub.repos["model", "me/concepts"]
    assert repo.private
    assert [commit.title.split()[0] for commit in repo.commits] == ["initial", "Push"]
    assert set(pushed["files"]) == set(repo.files) - {".gitattributes"}
    assert {"config.json", "model.safetensors", "README.md", "modeling_sparc.py", "sparse_ops.py"} <= set(repo.files)
    assert not any("checkpoints" in path for path in repo.files)
    assert b"secret" not in b"".join(repo.files.values())
    assert repo.files["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    card = repo.files["README.md"].decode()
    assert 'SparcModel.from_pretrained("me/concepts")' in card

    model = tiny_model(2)
    rows = random_features(model)
    torch.save(rows, tmp_path / "rows.pt")
    code = f"""
import torch
from transformers import AutoModel
from sparc_hf import SparcModel
rows = torch.load({str(tmp_path / "rows.pt")!r})
losses = [m(rows).loss.item() for m in (
    SparcModel.from_pretrained("me/concepts"), AutoModel.from_pretrained("me/concepts", trust_remote_code=True))]
print(losses[0] == losses[1], losses[0])
"""
    same, loss = fresh_process(hub, tmp_path, code, HF_TOKEN="hf_me").split()
    assert same == "True"
    assert float(loss) == pytest.approx(model(rows).loss.item(), rel=1e-6)
    # What was loaded once loads again without the Hub.
    fresh_process(
        hub, tmp_path, 'from sparc_hf import SparcModel; SparcModel.from_pretrained("me/concepts")', offline=True
    )


def test_a_pipeline_finds_model_names_and_encoders_on_the_hub(hub, tmp_path):
    encoder = save_dinov2(tmp_path / "encoder")
    files = {path.name: path.read_bytes() for path in encoder.iterdir()}
    commit = hub.create("model", "them/tiny-dino", files).at("main").oid
    record = StreamEncoder("dino", str(encoder), "image").record | {"encoder": "them/tiny-dino", "revision": commit}
    model = SparcModel(SparcConfig(streams=[record], num_latents=32, k=4, auxk=4))
    save_model(model, tmp_path / "run")
    save_concepts([Concept(latent, f"concept {latent}", 5.0, {"dino": 0.1}) for latent in range(32)], tmp_path / "run")
    push(repo="me/concepts", model=str(tmp_path / "run"))
    assert "https://huggingface.co/them/tiny-dino" in hub.repos["model", "me/concepts"].files["README.md"].decode()
    code = """
from PIL import Image
from transformers import pipeline
from sparc_hf import SparcPipeline
image = Image.new("RGB", (40, 30), "red")
found = SparcPipeline.from_pretrained("me/concepts", device="cpu")(images=image)["dino"]
assert found == pipeline("concept-extraction", model="me/concepts", device="cpu")(images=image)["dino"]
print(all(concept["name"] == f"concept {concept['latent']}" for concept in found), len(found))
"""
    named, count = fresh_process(hub, tmp_path, code).split()
    assert named == "True"
    assert 1 <= int(count) <= 4


def test_features_load_as_splits_and_stream_into_training(hub, tmp_path):
    train, test = planted_features(300), planted_features(40, seed=1)
    for name, features in {"train": train, "test": test}.items():
        features.save(tmp_path / name)
    push(repo="me/rows", features=[str(tmp_path / "train"), f"held_out={tmp_path / 'test'}"], license="cc-by-4.0")
    files = hub.repos["dataset", "me/rows"].files
    assert {path.split("/")[-1].split("-")[0] for path in files if path.startswith("data/")} == {"train", "held_out"}
    card = huggingface_hub.DatasetCard(files["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert "| `held_out` | 40 |" in card.text
    code = f"""
import numpy as np
from datasets import load_dataset
from sparc_hf import FeatureDataset, SparcConfig, SparcModel
from sparc_hf.features.batches import StreamedBatches
features = FeatureDataset.load("hf://datasets/me/rows/held_out")
np.save({str(tmp_path / "back.npy")!r}, features.array("dino"))
assert features.label_names[0] == "cause 0" and features.ids[3] == "sample-3"
rows = load_dataset("me/rows", split="train", streaming=True)
assert len(next(iter(rows))["dino"]) == 24
assert len(load_dataset("me/rows", split="held_out")) == 40
batches = StreamedBatches("hf://datasets/me/rows/train", batch_size=64)
model = SparcModel(SparcConfig(streams=batches.records, num_latents=32, k=4, auxk=4)).train()
print(batches.rows, sum(len(batch["dino"]) for batch in batches if model(batch).loss.backward() is None))
"""
    assert fresh_process(hub, tmp_path, code).split() == ["300", "300"]
    assert np.array_equal(np.load(tmp_path / "back.npy"), test.array("dino"))
    offline = 'from sparc_hf import FeatureDataset; print(len(FeatureDataset.load("hf://datasets/me/rows/held_out")))'
    assert fresh_process(hub, tmp_path, offline, offline=True).split() == ["40"]


@pytest.mark.slow
def test_the_readmes_hub_section_word_for_word(hub, tmp_path, small_space, space_cache):
    section = (ROOT / "README.md").read_text().split("## Publish and load from the Hub")[1].split("\n## ")[0]
    commands, code = (re.search(rf"```{kind}\n(.*?)```", section, re.S)[1] for kind in ("bash", "python"))
    model = tiny_model(3)
    save_model(model, tmp_path / "runs/coco")
    for name, features in {"train": planted_features(300), "test": planted_features(60, seed=1)}.items():
        features.save(tmp_path / "features" / name)
    quick = EvaluationSettings(replicates=10, probes=False)
    write_report({"coco": evaluate_model(model, planted_features(60), quick)}, tmp_path / "runs/coco/evaluation")
    own_command = f'sparc() {{ "{sys.executable}" -m sparc_hf.cli "$@"; }}\nset -e\n'
    environment = user_environment(hub, tmp_path, HF_TOKEN="hf_me", SPARC_CACHE=str(space_cache))
    run = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    pushed = subprocess.run(["bash", "-c", own_command + commands], **run)
    assert pushed.returncode == 0, pushed.stderr[-3000:]
    loaded = subprocess.run([sys.executable, "-c", code], **run)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert {id for _, id in hub.repos} == {"me/coco-concepts", "me/coco-features", "me/cross_retrieval", "me/concepts"}
    assert "reconstruction.png" in hub.repos["model", "me/coco-concepts"].files
    index = small_space.index.folder.name
    assert f"demo/indexes/{index}/index.json" in hub.repos["space", "me/concepts"].files


def test_a_second_push_of_fewer_files_leaves_no_old_ones(hub, tmp_path):
    planted_features(60).save(tmp_path / "train")
    planted_features(30).save(tmp_path / "test")
    push(repo="me/rows", features=[str(tmp_path / "train"), str(tmp_path / "test")])
    push(repo="me/rows", features=[str(tmp_path / "test")])
    repo = hub.repos["dataset", "me/rows"]
    files = [path for path in repo.files if path.startswith("data/")]
    assert sorted(files) == ["data/test-00000-of-00001.parquet", "data/test-checksums.json"]
    assert len(repo.commits) == 3


def test_a_metric_loads_with_evaluate(hub, tmp_path):
    push(repo="me/cross_retrieval", metric="cross_retrieval")
    assert set(hub.repos["space", "me/cross_retrieval"].files) >= {"cross_retrieval.py", "app.py", "requirements.txt"}
    code = """
import evaluate
metric = evaluate.load("me/cross_retrieval", "vectors", module_type="metric")
print(metric.compute(queries=[[1.0, 0.0], [0.0, 1.0]], references=[[0.9, 0.1], [0.2, 0.8]]))
"""
    assert "1.0" in fresh_process(hub, tmp_path, code)


def a_space(folder: Path, requirements: str) -> Path:
    folder.mkdir()
    (folder / "app.py").write_text("import gradio\n")
    (folder / "README.md").write_text("---\nsdk: gradio\n---\n")
    (folder / "requirements.txt").write_text(requirements)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "app.pyc").write_bytes(b"x")
    return folder


def test_a_space_brings_the_package_until_it_is_on_the_index(hub, tmp_path):
    from sparc_hf.version import __version__

    space = a_space(tmp_path / "space", "--prefer-binary\nSPARC_hf[space]>=0.1  # this package\npillow\n")
    push(repo="me/show", space=str(space))
    repo = hub.repos["space", "me/show"]
    assert repo.sdk == "gradio"
    lines = repo.files["requirements.txt"].decode().splitlines()
    assert lines[0] == "--prefer-binary"
    assert lines[-1] == "pillow"
    assert not [line for line in lines if "sparc" in line.lower()]
    assert {"torch>=2.6", "gradio>=6.0"} <= set(lines)
    assert not [line for line in lines if line.startswith(("pytest", "h5py"))]
    own = {path for path in repo.files if path.startswith("sparc_hf/")}
    source = ROOT / "sparc_hf"
    assert {f"sparc_hf/{path.relative_to(source).as_posix()}" for path in source.rglob("*.py")} <= own
    assert {"sparc_hf/hub_cards/model_card.md", "sparc_hf/demo/encoders/clip/model.safetensors"} <= own
    assert not any("pycache" in path for path in repo.files)
    assert not any(path.startswith("demo/") for path in repo.files)  # its app shows none
    push(repo="me/show", space=str(space), package="index")
    assert repo.files["requirements.txt"].decode().splitlines()[1] == f"sparc-hf[space]=={__version__}"
    assert not any(path.startswith("sparc_hf/") for path in repo.files)
    with pytest.raises(ValueError, match=r"lacks \['app.py'"):
        push(repo="me/show", space=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="`package` must be one of"):
        push(repo="me/show", space=str(space), package="wheel")


def test_a_space_without_this_package_goes_up_as_it_lies(hub, tmp_path):
    push(repo="me/other", space=str(a_space(tmp_path / "space", "pillow\n")))
    files = hub.repos["space", "me/other"].files
    assert files["requirements.txt"] == b"pillow\n"
    assert set(files) - {".gitattributes"} == {"app.py", "README.md", "requirements.txt"}


def test_a_push_keeps_the_results_of_the_card_until_there_are_new_weights(hub, model_folder):
    found = evaluate_model(tiny_model(2), planted_features(60), EvaluationSettings(replicates=0, probes=False)).results
    write_model_card(model_folder, results=found)
    push(repo="me/concepts", model=str(model_folder))
    files = hub.repos["model", "me/concepts"].files
    assert json.loads(files["results.json"])["models"]["concepts"]["rows"] == 60
    assert "reconstruction.png" in files
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.eval_results
    save_model(tiny_model(2), model_folder)
    push(repo="me/other", model=str(model_folder))
    assert "results.json" not in hub.repos["model", "me/other"].files
    assert not huggingface_hub.ModelCard(hub.repos["model", "me/other"].files["README.md"].decode()).data.eval_results


FAULTS = {
    "upload refused": ("PUT", "/lfs/", {"status": 403}),
    "upload broken": ("PUT", "/lfs/", {"action": "drop", "times": 20}),
    "commit refused": ("POST", "/commit/", {"status": 400}),
    "commit broken": ("POST", "/commit/", {"action": "drop", "times": 20}),
    "preupload failed": ("POST", "/preupload/", {"status": 400}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_interrupted_push_leaves_the_repository_and_a_second_completes_it(
    hub, tmp_path, model_folder, fault, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    push(repo="me/concepts", model=str(model_folder))
    repo = hub.repos["model", "me/concepts"]
    before = repo.files
    other = tiny_model(2)
    with torch.no_grad():
        other.pre_bias["dino"].add_(1)
    save_model(other, model_folder)
    method, path, what = FAULTS[fault]
    hub.fail(method, path, **what)
    with pytest.raises(ValueError, match="Hub"):
        push(repo="me/concepts", model=str(model_folder))
    assert repo.files == before
    hub.faults.clear()
    push(repo="me/concepts", model=str(model_folder))
    assert repo.files["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    assert len(repo.commits) == 3


def test_a_busy_hub_is_asked_again(hub, model_folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("PUT", "/lfs/", status=503, times=2)
    push(repo="me/concepts", model=str(model_folder))
    assert hub.seen("PUT", "/lfs/") == [503, 503, 200]
    hub.fail("POST", "/commit/", status=503, times=2)
    (model_folder / "training_arguments.json").write_text(json.dumps({"k": 9}))
    push(repo="me/concepts", model=str(model_folder))
    assert hub.seen("POST", "/commit/") == [200, 503, 503, 200]


@pytest.mark.parametrize(
    ("variables", "repo", "words"),
    [
        ({"HF_TOKEN": "hf_wrong"}, "me/concepts", "does not accept the token"),
        ({"HF_TOKEN": "hf_reader"}, "me/concepts", "does not let this token write to `me/concepts`"),
        ({}, "you/concepts", "does not let this token write to `you/concepts`"),
    ],
)
def test_refusals_are_one_sentence(hub, model_folder, monkeypatch, variables, repo, words, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["push", "--repo", repo, "--model", str(model_folder)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("sparc push: ")
    assert words in said


def test_no_token_no_network_and_offline(hub, model_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no token"):
        push(repo="me/concepts", model=str(model_folder))
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        push(repo="me/concepts", model=str(model_folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot reach the Hub"):
        push(repo="me/concepts", model=str(model_folder))
    assert not hub.repos


def test_a_dry_run_writes_the_folder_and_asks_nobody(hub, model_folder, tmp_path):
    told = push(repo="me/concepts", model=str(model_folder), dry_run=str(tmp_path / "dry"))
    assert sorted(path.name for path in (tmp_path / "dry").iterdir()) == told["files"]
    assert not hub.requests
    with pytest.raises(ValueError, match="exists"):
        push(repo="me/concepts", model=str(model_folder), dry_run=str(tmp_path / "dry"))
    planted_features(30).save(tmp_path / "train")
    push(repo="me/rows", features=[str(tmp_path / "train")], dry_run=str(tmp_path / "dry_rows"))
    back = FeatureDataset.load(tmp_path / "dry_rows" / "train")
    assert np.array_equal(back.array("dino"), planted_features(30).array("dino"))
    assert back.streams == planted_features(30).streams


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"repo": "me/x"}, "give one of"),
        ({"repo": "me/x", "model": "a", "metric": "b"}, "give one of"),
        ({"repo": "x", "metric": "cross_retrieval"}, "`owner/name`"),
        ({"repo": "me/a b", "metric": "cross_retrieval"}, "no name for a repository"),
        ({"repo": "me/other", "metric": "cross_retrieval"}, "must end in `/cross_retrieval`"),
        ({"repo": "me/x", "metric": "bleu"}, "no metric `bleu`"),
        ({"repo": "me/x", "model": "/nowhere"}, "holds no model"),
    ],
)
def test_wrong_calls(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        push(**given, dry_run=str(tmp_path / "dry"))
    assert not list(tmp_path.iterdir())


def test_a_broken_parquet_file_is_named(tmp_path, model_folder):
    planted_features(30).save(tmp_path / "train")
    push(repo="me/rows", features=[str(tmp_path / "train")], dry_run=str(tmp_path / "dry"))
    file = next((tmp_path / "dry" / "data").iterdir())
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises((ValueError, OSError)):
        FeatureDataset.load(tmp_path / "dry")
    assert write_model_card(model_folder).exists()
