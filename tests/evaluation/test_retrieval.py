"""Ranks of whole models against the earlier code's, on its own checkpoints and feature files."""

import json

import numpy as np
import pytest
from conftest import WIDTHS
from safetensors.torch import load_file
from test_parity import load_earlier_state

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.codes.code_table import encode_features
from sparc_hf.evaluation.retrieval import model_ranks
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.metrics.cross_retrieval.cross_retrieval import retrieval_figures

FAMILIES = {
    "SelfRecon": "self_reconstruction",
    "LatentAlignment": "latent_alignment",
    "CrossReconRecall": "cross_reconstruction",
}
FILES = {"dino": "dino", "clip_img": "clip_image", "clip_txt": "clip_text"}


@pytest.mark.parametrize(
    ("case", "variant", "encoding"),
    [
        ("global_cross", "as_global", "joint"),
        ("global_cross", "local_evaluation", "single"),
        ("local_cross", "local_evaluation", "single"),
    ],
)
def test_every_family_equals_the_earlier_code(golden, case, variant, encoding):
    """Single-stream encoding of a global model is what the earlier main program calls its local evaluation."""
    h5py = pytest.importorskip("h5py", reason="the earlier feature files are HDF5: pip install h5py")
    arrays = {}
    for name, file in FILES.items():
        with h5py.File(golden / "legacy" / "features" / f"{file}_features_tiny.h5") as stored:
            arrays[name] = stored["features"][:]
    features = FeatureDataset.from_arrays(arrays, streams={name: {"normalize": "l2"} for name in arrays})
    model = SparcModel(
        SparcConfig(
            streams={name: {"hidden_size": width, "normalize": "l2"} for name, width in WIDTHS.items()},
            num_latents=64,
            k=8,
            auxk=8,
            selection=case.split("_")[0],
        )
    )
    state = load_file(golden / "legacy" / "results" / f"msae_tiny_{case}" / "msae_checkpoint.safetensors")
    load_earlier_state(model, {f"state.{name}": value for name, value in state.items()}, "state")
    found = model_ranks(model.eval(), features, encode_features(model, features, encoding=encoding))
    ranks = np.load(golden / "metrics_retrieval_ranks.npz")
    theirs = json.loads((golden / "metrics.json").read_text())["retrieval"][case][variant]
    equal = 0
    for family, ours in FAMILIES.items():
        for pair, expected in theirs[family].items():
            target, source = pair.lower().split("_from_")
            rank = found[ours][source, target]
            prefix = f"{case}.{variant}.{family}.{pair}"
            # Rounding decides of a similarity 1e-6 away whether it is a tie: at most one row and one rank here.
            off = np.abs(rank - ranks[f"{prefix}.rank_hi"])
            assert off.sum() <= 1, prefix
            assert (rank >= ranks[f"{prefix}.rank_lo"]).all()
            if np.array_equal(rank, ranks[f"{prefix}.ranks"]):
                figures = retrieval_figures(rank)
                for name, key in (("R@1", "R@1"), ("R@10", "R@10"), ("median_rank", "MedR"), ("mrr", "MRR")):
                    assert figures[name] == pytest.approx(expected[key], abs=1e-6)
                equal += 1
    assert equal > 5
