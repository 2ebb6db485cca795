"""The command line: one sentence on bad input, JSON on success."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from sparc_hf.cli import COMMANDS, main
from sparc_hf.codes.code_table import CodeTable


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = int(stop.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_help_lists_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for name, command in COMMANDS.items():
        assert name in out
        assert command.summary.split()[0] in out


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_explains_every_flag(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"usage: sparc {command}" in out
    assert "--config" in out
    assert "--preset" in out


def test_version(capsys):
    from sparc_hf import __version__

    assert run(capsys, "--version")[:2] == (0, f"sparc_hf {__version__}\n")


def test_no_command_prints_help_and_fails(capsys):
    status, out, _ = run(capsys)
    assert status == 2
    assert "usage: sparc" in out


def test_train_encode_evaluate_card(capsys, tmp_path, planted_folder):
    model, codes = str(tmp_path / "model"), str(tmp_path / "codes")
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        yaml.safe_dump(
            {
                "num_latents": 48,
                "k": 4,
                "auxk": 4,
                "epochs": 1,
                "cpu": True,
                "learning_rate": 1e-4,
                "max_grad_norm": None,
            }
        )
        + "batch_size: 1e2\n".replace("1e2", "100")
    )
    status, out, err = run(
        capsys,
        *("train", "--config", str(settings), "--features", str(planted_folder), "--output_dir", model),
        *("--learning_rate", "0.01"),
    )
    assert status == 0, err
    assert json.loads(out)["latents"] == 48
    saved = json.loads((tmp_path / "model" / "training_arguments.json").read_text())
    assert (saved["learning_rate"], saved["k"], saved["batch_size"]) == (0.01, 4, 100)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "`clip_txt`" in card
    assert "48" in card
    status, out, err = run(
        capsys,
        "encode",
        "--model",
        model,
        "--features",
        str(planted_folder),
        "--output",
        codes,
        "--encoding",
        "single",
        "--top_samples",
        "3",
    )
    assert status == 0, err
    assert json.loads(out) == {
        "codes": codes,
        "rows": 600,
        "streams": ["dino", "clip_img", "clip_txt"],
        "encoding": "single",
        "top_samples": f"{codes}/top_samples.parquet",
    }
    assert len(CodeTable.load(codes, verify=True)) == 600
    report = tmp_path / "report"
    flags = ("--features", str(planted_folder), "--output", str(report), "--replicates", "5", "--no_probes")
    status, out, err = run(capsys, "evaluate", model, *flags)
    assert status == 0, err
    results = str(report / "results.json")
    written = json.loads(Path(results).read_text())["models"]["model"]
    encodings = ("joint", "single", "single_ignoring")
    assert json.loads(out) == {"model": {name: written[name]["headline"] for name in encodings}}
    assert {path.name for path in report.iterdir()} == {
        "results.json",
        "report.html",
        "model-index.yaml",
        "latents-model.csv",
    }
    status, out, err = run(capsys, "card", "--model", model, "--results", results, "--repo", "me/planted")
    assert status == 0, err
    card = (tmp_path / "model" / "README.md").read_text()
    assert 'from_pretrained("me/planted")' in card
    assert f"{written['single']['headline']['jaccard']['value']:.3f}" in card


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], ["--features", "sparc train --help"]),
        (["train", "--features", "nowhere", "--output_dir", "x"], ["nowhere"]),
        (["train", "--features", "a", "--output_dir", "b", "--k", "many"], ["--k", "many"]),
        (["train", "--features", "a", "--output_dir", "b", "--batch_size", "0"], ["`batch_size`", "0"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "--preset", "imagenet"], ["imagenet", "sparc-coco"]),
        (["train", "--features", "a", "--output_dir", "b", "--latents", "8"], ["--latents"]),
        (["evaluate", "--features", "x"], ["--models"]),
        (["evaluate", "m", "--features", "nowhere"], ["model `m`"]),
        (["evaluate", "m", "m", "--features", "x", "--output", "tests/conftest.py"], ["conftest.py"]),
        (["evaluate", "m", "--features", "x", "--replicates", "-1"], ["`replicates`"]),
        (["encode", "--model", "m", "--features", "f", "--output", "o", "--top_samples", "-2"], ["`top_samples`"]),
        (["encode", "--model", "m", "--features", "f", "--output", "o", "--encoding", "both"], ["both", "joint"]),
        (["card", "--model", "/no/model"], ["/no/model", "config.json"]),
        (["sing"], ["sing", "train"]),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(capsys, argv, words):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("sparc")
    for word in words:
        assert word in last


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "no_such_flag: 3\n"])
def test_bad_settings_files(capsys, tmp_path, content):
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    status, _, err = run(capsys, "train", "--features", "a", "--output_dir", "b", "--config", str(file))
    assert status == 2
    assert "Traceback" not in err
    assert "settings.yaml" in err or "no_such_flag" in err


PRESETS = ROOT / "sparc_hf" / "cli" / "presets"


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_hold_known_settings_only(preset):
    from sparc_hf.cli.extract import ExtractionArguments
    from sparc_hf.features.stream_records import parse_streams
    from sparc_hf.training.arguments import SparcTrainingArguments

    content = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    if preset == "aligned":  # for any streams
        args = SparcTrainingArguments(features="f", output_dir="o", **content.pop("train"))
        assert not content
        assert (args.adam_beta2, args.rare_latent_push, args.impute) == (0.95, 0.003, True)
        return
    extract = ExtractionArguments(source="s", output="o", **content["extract"])
    streams = parse_streams(extract.encoders)
    if preset == "usae-imagenet":
        assert [(record["name"], record["pooling"]) for record in streams] == [
            ("siglip", "tokens"),
            ("dino", "tokens"),
            ("vit", "tokens"),
        ]
        assert (extract.grid, extract.normalize, extract.source_format) == ([14, 14], "standardize", "imagenet")
        return
    args = SparcTrainingArguments(features="f", output_dir="o", **content["train"])
    if preset != "demo":
        assert (args.num_latents, args.k, args.batch_size, args.epochs) == (8192, 64, 256, 50)
    assert [(record["name"], record["modality"]) for record in streams] == [
        ("dino", "image"),
        ("clip_img", "image"),
        ("clip_txt", "text"),
    ]
