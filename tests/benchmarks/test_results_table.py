"""The settings behind docs/results.md, and the table made of them."""

import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT

from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.training.arguments import SparcTrainingArguments

SETTINGS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))
from results_table import COLUMNS, settings_of_run, standardized, table_line  # noqa: E402


@pytest.mark.parametrize("name", ["demo", "caption_streams"])
def test_settings_are_known_to_training(name):
    content = yaml.safe_load((SETTINGS / f"{name}.yaml").read_text())
    variants = yaml.safe_load((SETTINGS / "variants.yaml").read_text())
    objectives = set()
    for replaced in variants.values():
        settings = settings_of_run(content["train"], replaced, seed=3)
        arguments = SparcTrainingArguments(features="f", output_dir="o", **settings)
        usae = arguments.objective == "usae"
        assert arguments.auxk == (content["train"]["num_latents"] // 2 if usae else content["train"]["auxk"])
        assert arguments.seed == 3
        objectives.add(arguments.objective)
    assert objectives == {"sparc", "usae"}


def test_a_line_holds_means_and_deviations():
    def run(value: float) -> dict:
        return {
            encoding: {"headline": {name: {"value": value} for name, _, _ in COLUMNS}}
            for encoding in ("joint", "single")
        }

    assert table_line("ours", [run(1.0), run(2.0), run(3.0)]).split(" | ")[:2] == ["| ours", "2.000 ± 1.000"]
    assert table_line("ours", [run(0.5)]).count("0.500") == len(COLUMNS)


def test_usae_rows_are_standardised_by_the_training_rows():
    rows = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    features = FeatureDataset.from_arrays({"a": rows}, streams={"a": {"normalize": "l2"}})
    train, test = standardized(*features.split(30))
    np.testing.assert_array_equal(test.array("a"), rows[30:])
    assert train.streams == test.streams
    assert train.streams[0]["mean"] == pytest.approx(rows[:30].mean(), rel=1e-5)
    assert features.streams[0]["normalize"] == "l2"
