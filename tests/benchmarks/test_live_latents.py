"""The settings and the lines of the table of docs/training.md."""

import sys

import yaml
from conftest import ROOT, planted_features

from sparc_hf.training.arguments import SparcTrainingArguments

sys.path.insert(0, str(ROOT / "benchmarks"))
from live_latents import CAPTIONS, COLUMNS, SETTINGS, VARIANTS, figures_of_run, table_line


def test_settings_are_known_to_training():
    demo = yaml.safe_load((SETTINGS / "demo.yaml").read_text())["train"]
    for shared in (demo, CAPTIONS | {"num_latents": 2048}):
        for replaced in VARIANTS.values():
            SparcTrainingArguments(features="f", output_dir="o", **shared | replaced)


def test_a_run_is_measured_once(tmp_path):
    train, kept = planted_features(300).split(200)
    settings = {"num_latents": 48, "k": 4, "auxk": 8, "batch_size": 64, "epochs": 1, "step_kernel": "off"}
    figures = figures_of_run(tmp_path / "run", settings, train, kept)
    assert figures.keys() >= {name for name, *_ in COLUMNS}
    assert figures["dead_train"] <= figures["dead_share"]  # twice as many rows
    assert figures_of_run(tmp_path / "run", settings, train, kept) == figures
    assert table_line("one", [figures]).count("|") == len(COLUMNS) + 2
