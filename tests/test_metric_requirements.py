"""A pushed metric works where nothing is installed but what its requirements.txt names."""

import json
import os
import subprocess
import sys

import pytest
from library_folder import link_libraries

from sparc_hf.push import METRICS, PushArguments, run_push

ROWS = 60
# Two latents that fire in turn, in two streams, and a class that goes with the first.
PAIRS = [[[row % 2, 2], [row % 2, 3]] for row in range(ROWS)]
STRENGTHS = [[[1.0, 0.5], [0.7, 0.1]]] * ROWS
LABELS = [[row % 2] for row in range(ROWS)]
VECTORS = [[1.0, row / ROWS] for row in range(ROWS)]
INPUTS = {
    "concept_alignment": {
        "indices": PAIRS,
        "values": STRENGTHS,
        "labels": LABELS,
        "num_latents": 4,
        "label_names": ["a", "b"],
    },
    "concept_probe": {
        "indices": [pair[0] for pair in PAIRS],
        "values": [pair[0] for pair in STRENGTHS],
        "labels": LABELS,
        "num_latents": 4,
        "num_classes": 2,
        "min_count": 10,
    },
    "concept_universality": {"indices": PAIRS, "values": STRENGTHS, "num_latents": 4},
    "cross_retrieval": {
        "query_indices": [pair[0] for pair in PAIRS],
        "query_values": [pair[0] for pair in STRENGTHS],
        "reference_indices": [pair[1] for pair in PAIRS],
        "reference_values": [pair[1] for pair in STRENGTHS],
        "num_latents": 4,
    },
    "dictionary_stability": {"predictions": VECTORS[:2], "references": VECTORS[1:3]},
    "latent_liveness": {"indices": PAIRS, "values": STRENGTHS, "num_latents": 4},
    "monosemanticity": {"rows": [[0, 1], [2, 3]], "values": [[1.0, 0.5], [0.5, 0.5]], "features": VECTORS},
    "reconstruction": {"predictions": VECTORS, "references": VECTORS[::-1]},
}
CODE = """
import json
import sys
import evaluate
try:
    import sparc_hf
    sys.exit("sparc_hf must not be importable here")
except ImportError:
    pass
metric = evaluate.load(sys.argv[1])
found = metric.compute(**json.loads(sys.argv[2]))
print(len(found))
"""


def test_every_metric_is_tried():
    assert set(INPUTS) == {path.parent.name for path in METRICS.glob("*/*.py") if path.stem == path.parent.name}


@pytest.mark.slow
@pytest.mark.parametrize("metric", INPUTS)
def test_a_pushed_metric_needs_no_more_than_it_says(tmp_path, metric):
    folder = tmp_path / metric
    run_push(PushArguments(repo=f"me/{metric}", metric=metric, dry_run=str(folder)))
    requirements = (folder / "requirements.txt").read_text().splitlines()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {
        "PYTHONPATH": str(link_libraries(tmp_path / "site", requirements)),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", CODE, str(folder), json.dumps(INPUTS[metric])],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0
