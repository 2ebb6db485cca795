"""A kill at any moment leaves what was there before, whole, or what was to be there, whole; a rerun ends well."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import planted_features, tiny_model
from kill_points import files_of, in_child, killed_everywhere, litter_of, outcome

from sparc_hf import SparcModel, report
from sparc_hf.cli import main
from sparc_hf.codes import CodeTable
from sparc_hf.evaluation import EvaluationSettings, evaluate_model
from sparc_hf.hub import write_model_card
from sparc_hf.legacy_checkpoints import save_imported
from sparc_hf.picture_folder import picture_folder
from sparc_hf.report import write_report
from sparc_hf.space_index import SpaceIndex, index_name, open_index

pytestmark = pytest.mark.usefixtures("one_thread")
LEAST_KILLS = 3
TRAINING = {
    "num_latents": 16,
    "k": 4,
    "auxk": 4,
    "batch_size": 32,
    "epochs": 2,
    "eval_fraction": 0.2,
    "logging_every": 1,
    "checkpoint_every": 2,
    "step_kernel": "off",
}


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "features"
    planted_features(100).save(folder)
    return folder


def sparc(command: str, *bare: str, **flags) -> None:
    given = [part for name, value in flags.items() for part in (f"--{name}", *map(str, np.atleast_1d(value)))]
    assert main([command, *bare, *given]) == 0


def without_clock(files: dict[str, bytes]) -> dict[str, object]:
    """Leave out how fast the rows went, which differs from run to run."""
    told: dict[str, object] = dict(files)
    for name in files:
        if name.endswith("training_log.jsonl"):
            entries = [json.loads(line) for line in files[name].decode().splitlines()]
            told[name] = [{key: value for key, value in e.items() if key != "rows_per_second"} for e in entries]
    return told


def seen_by_users(folder: Path) -> dict[str, object]:
    return without_clock(files_of(folder, hidden=False))


def foreign_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("my notes\n")
    (folder / "notes").mkdir()
    (folder / "notes" / "more.txt").write_text("more notes\n")


@pytest.fixture
def check(every, record_property):
    """Return what kills work everywhere and looks at what is left; the report of the tests counts the kills."""

    def counted(work, root: Path, output: str, litter=litter_of) -> None:
        record_property("kills", kills_survived(work, root, output, every, litter))

    return counted


def without_locks(folder: Path) -> list[str]:
    """Return the litter but for locks: work that finds itself done takes none, and so removes none of a killed run."""
    return [name for name in litter_of(folder) if not name.endswith(".lock")]


def kills_survived(work, root: Path, output: str, every: int, litter) -> int:
    """Kill `work` everywhere; after each kill `root/output` is old or new, and after a rerun it is new."""
    former = root.with_name("former")
    if root.exists():
        shutil.copytree(root, former)
    else:
        former.mkdir()
    old = seen_by_users(former / output)
    assert outcome(in_child(work)) == 0
    new = seen_by_users(root / output)
    assert new != old
    assert not litter(root)
    kills = 0
    for number in killed_everywhere(work, root, former, every=every):
        kills += 1
        seen = seen_by_users(root / output)
        if seen != new:
            changed = [name for name in {*old, *seen} if old.get(name) != seen.get(name)]
            assert seen == old, f"killed before change {number}: {sorted(changed)}"
        assert outcome(in_child(work)) == 0, f"the rerun after a kill before change {number} failed"
        assert seen_by_users(root / output) == new
        assert not litter(root)
    assert kills >= LEAST_KILLS
    return kills


def training(root: Path, features: Path, **settings) -> None:
    sparc("train", features=features, output_dir=root / "run", cpu=True, **TRAINING | settings)


def points(every: int):
    """Kill before each n-th change of the folder, and in the exhaustive sweeps before each one."""
    sweep = pytest.param(1, marks=[pytest.mark.slow, pytest.mark.exhaustive])
    return pytest.mark.parametrize("every", [every, sweep])


@points(17)
def test_training_over_an_older_run(tmp_path, features, check):
    root = tmp_path / "root"
    training(root, features, seed=1)
    quick = EvaluationSettings(replicates=0, probes=False)
    evaluation = evaluate_model(SparcModel.from_pretrained(root / "run"), planted_features(40), quick)
    write_report({"run": evaluation}, root / "report")
    sparc("card", model=root / "run", results=root / "report" / "results.json")
    sparc("concepts", model=root / "run", features=features)
    (root / "run" / "README.md").unlink()
    foreign_files(root / "run")
    check(lambda: training(root, features, seed=2, overwrite=True), root, "run")
    made = files_of(root / "run")
    assert made["README.md"] == b"my notes\n"
    assert b"library_name: sparc-hf" in made["model_card.md"]
    assert {"notes/more.txt", "checkpoints/step-00000004/trainer_state.json"} <= set(made)
    assert not {"results.json", "concepts.json", "reconstruction.png"} & set(made)
    assert (tmp_path / "former" / "run" / "concepts.json").exists()


@points(17)
def test_training_over_an_older_run_and_resuming(tmp_path, features, check):
    """The older run is never taken for the one to be resumed."""
    root = tmp_path / "root"
    training(root, features, seed=1)
    foreign_files(root / "run")
    check(lambda: training(root, features, seed=2, overwrite=True, resume=True), root, "run")


@points(17)
def test_training_into_a_folder_with_files_of_others(tmp_path, features, every, record_property):
    """The files of a new run come one after the other; its weights come last, when all else is there."""
    root, former = tmp_path / "root", tmp_path / "former"
    foreign_files(root / "run")
    shutil.copytree(root, former)

    def work():
        training(root, features, resume=True)

    work()
    new = seen_by_users(root / "run")
    assert new["README.md"] == b"my notes\n"
    killed_at = []
    for number in killed_everywhere(work, root, former, every=every):
        killed_at.append(number)
        seen = seen_by_users(root / "run")
        assert "model.safetensors" not in seen or seen == new
        assert outcome(in_child(work)) == 0
        assert seen_by_users(root / "run") == new
        assert not litter_of(root)
    assert len(killed_at) >= LEAST_KILLS
    record_property("kills", len(killed_at))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two models, saved."""
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("old", "new")):
        tiny_model(2, seed=number, num_latents=16, k=4, auxk=4).save_pretrained(root / name)
    return {name: root / name for name in ("old", "new")}


@points(7)
def test_encoding_over_an_older_table(tmp_path, features, models, check):
    root = tmp_path / "root"

    def encode(model: str) -> None:
        output = root / "codes"
        sparc("encode", model=models[model], features=features, output=output, top_samples=3, overwrite=True)

    encode("old")
    (root / "codes" / "notes.txt").write_text("mine")
    check(lambda: encode("new"), root, "codes")
    assert {"notes.txt", "top_samples.parquet"} <= set(files_of(root / "codes"))
    assert len(CodeTable.load(root / "codes")) == 100


@points(7)
def test_saving_features_over_older_ones(tmp_path, check):
    root, new = tmp_path / "root", planted_features(40, seed=1)
    planted_features(40).save(root / "set")
    check(lambda: new.save(root / "set", overwrite=True, rows_per_shard=20), root, "set")


@points(7)
def test_a_report_over_an_older_one(tmp_path, monkeypatch, check):
    """Files of one model that the new report does not have go, and files of others stay."""
    root = tmp_path / "root"
    monkeypatch.setattr(report, "report_html", lambda found: f"<html>{len(found)}</html>")  # which takes seconds
    settings = EvaluationSettings(replicates=0, probes=False)
    old, new = (evaluate_model(tiny_model(2, seed=seed), planted_features(40), settings) for seed in (0, 1))
    write_report({"a": old, "b": old}, root / "report")
    foreign_files(root / "report")
    check(lambda: write_report({"a": new}, root / "report"), root, "report")
    made = set(files_of(root / "report"))
    reported = {"results.json", "report.html", "model-index.yaml", "latents-a.csv"}
    assert made == {*reported, "README.md", "notes/more.txt"}


@points(7)
def test_an_import_over_an_older_model(tmp_path, check):
    root = tmp_path / "root"

    def save(seed: int) -> None:
        origin = {"project": "theirs", "checkpoint": f"{seed}.pth", "sha256": "0", "run": "a", "data": "b"}
        settings = {"learning_rate": 0.1}
        card = partial(write_model_card, settings=settings, title="model")
        save_imported(tiny_model(2, seed), root / "model", origin, settings, overwrite=True, complete=card)

    save(0)
    foreign_files(root / "model")
    check(lambda: save(1), root, "model")
    assert {"notes/more.txt", "README.md", "imported_from.json"} <= set(files_of(root / "model"))


@points(7)
def test_what_would_be_pushed(tmp_path, models, check):
    root = tmp_path / "root"
    root.mkdir()

    def dry_run() -> None:
        if not (root / "out").exists():  # it must be new
            sparc("push", repo="me/model", model=models["new"], dry_run=root / "out")

    check(dry_run, root, "out", without_locks)


@points(3)
def test_pictures_over_those_of_another_model(tmp_path, check):
    from matplotlib.figure import Figure

    root = tmp_path / "root"

    def draw(seed: int) -> None:
        with picture_folder(root / "out", tiny_model(1, seed)) as pictures:
            for name in ("latent-1.png", "latent-2.png"):
                if not pictures.has(name):
                    pictures.save(Figure(figsize=(1, 1)), name)

    draw(0)
    (root / "out" / "mine.png").write_bytes(b"a picture of mine")
    check(lambda: draw(1), root, "out")
    assert set(files_of(root / "out")) == {"latent-1.png", "latent-2.png", "mine.png"}
    with pytest.raises(ValueError, match=r"mine\.png` was not drawn by this package and is not replaced"):  # noqa: SIM117
        with picture_folder(root / "out", tiny_model(1, 1)) as pictures:
            pictures.save(Figure(figsize=(1, 1)), "mine.png")


@points(7)
def test_an_index_of_the_space(tmp_path, check):
    root, model, features = tmp_path / "root", tiny_model(2), planted_features(40)
    name = index_name(model, features)
    check(lambda: open_index(model, features, root), root, name, without_locks)
    assert SpaceIndex(root / name).concepts


@pytest.mark.slow
@pytest.mark.parametrize("every", [60, pytest.param(27, marks=pytest.mark.exhaustive)])
def test_a_demo_over_an_older_one(tmp_path, check):
    root = tmp_path / "root"

    def demo(seed: int) -> None:
        given = {"train_rows": 60, "test_rows": 30, "epochs": 1, "num_latents": 16, "k": 4}
        sparc("demo", output=root / "demo", seed=seed, **given)

    demo(0)
    for name in ("", "model", "evaluation", "features"):
        foreign_files(root / "demo" / name)
    check(lambda: demo(1), root, "demo")
    made = files_of(root / "demo")
    assert sum(path.endswith("notes/more.txt") for path in made) == 4
    assert made["model/README.md"] == b"my notes\n"
    settings = json.loads(made["model/training_arguments.json"])
    assert settings["output_dir"] == str(root / "demo" / "model")
