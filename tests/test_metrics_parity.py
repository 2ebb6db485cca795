"""Metrics against the earlier codes' numbers, to 1e-6."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.sparse import csr_array

from sparc_hf.metrics.concept_alignment.concept_alignment import concept_alignment, label_counts, taxonomy_buckets
from sparc_hf.metrics.cross_retrieval.cross_retrieval import code_ranks, retrieval_figures
from sparc_hf.metrics.latent_liveness.latent_liveness import latent_liveness
from sparc_hf.metrics.reconstruction.reconstruction import reconstruction

CASES = ["global_cross", "global_no_cross", "local_cross", "local_no_cross"]
STREAMS = ("clip_img", "clip_txt", "dino")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pairing", ["column_ordered", "notebook"])
def test_alignment_equals_the_earlier_code(golden, case, pairing):
    """With the right class codes, and as the earlier notebook pairs them (quirk 12), at every depth."""
    latents, expected = np.load(golden / "metrics_latents.npz"), np.load(golden / "metrics_jaccard.npz")
    labelled = np.load(golden / "legacy" / "labels.npz")
    rows, labels = labelled["sample_indices"], csr_array(labelled["labels_labelled_only"])
    variant = "local_evaluation" if case.startswith("local") else "as_global"
    codes = {name: csr_array(latents[f"{case}.{variant}.{name}"][rows]) for name in STREAMS}
    for position, name in enumerate(STREAMS):
        counts, _ = label_counts(codes[name], labels)
        assert np.array_equal(counts, expected[f"{case}.counts"][:, position])
    names = labelled["class_codes" if pairing == "column_ordered" else "csv_codes"]
    taxonomy = json.loads((golden / "legacy" / "taxonomy.json").read_text())
    # Theirs counts a sample whose only label is unknown as labelled; its row of labels is empty.
    known = np.ones(len(rows), bool)
    found = concept_alignment(codes, labels, taxonomy_buckets(names.tolist(), taxonomy), labelled=known)
    means = json.loads((golden / "metrics.json").read_text())["jaccard_mean"][pairing][case]
    assert len(found["mean"]) == len(means)
    for depth, scores in enumerate(found["per_latent"]):
        np.testing.assert_allclose(scores, expected[f"{case}.{pairing}.depth{depth}"], atol=1e-6)
        assert found["mean"][depth] == pytest.approx(means[f"depth{depth}"], abs=1e-6)
    metrics = json.loads((golden / "metrics.json").read_text())
    assert (~found["live"]).sum() == metrics["n_active_in_under_two_streams_scored_zero"][case]


@pytest.mark.parametrize("case", CASES)
def test_liveness_equals_the_earlier_code(golden, case):
    """Theirs calls a latent alive where it fires on a sample that has a label (quirk 13)."""
    latents, labelled = np.load(golden / "metrics_latents.npz"), np.load(golden / "legacy" / "labels.npz")
    rows = labelled["sample_indices"][labelled["labels_labelled_only"].any(axis=1)]
    variant = "local_evaluation" if case.startswith("local") else "as_global"
    found = latent_liveness({name: csr_array(latents[f"{case}.{variant}.{name}"][rows]) for name in STREAMS})
    theirs = json.loads((golden / "metrics.json").read_text())["activation_patterns"][case]
    assert [found["dead"], found["alive_in_all"]] == [theirs["num_all_dead"], theirs["num_all_alive"]]
    assert found["alive_in"] == [theirs[f"exactly_{number}_alive"] for number in range(4)]
    assert list(found["dead_in"].values()) == theirs["stream_dead_counts"]
    short = {"clip_img": "ci", "clip_txt": "ct", "dino": "d"}
    for pattern in ("clip_img", "clip_txt", "dino", "clip_img+clip_txt", "clip_img+dino", "clip_txt+dino"):
        parts = [short[name] for name in pattern.split("+")]
        name = f"pattern_{parts[0]}_only" if len(parts) == 1 else "pattern_" + "_".join(parts)
        assert found["patterns"].get(pattern, 0) == theirs[name]


def test_reconstruction_equals_the_earlier_codes(golden):
    """nmse of SPARC's reference, R2 of Universal SAE's, to 1e-6."""
    for kind in ("global", "local"):
        tensors = load_file(golden / f"sparc_{kind}.safetensors")
        losses = json.loads((golden / f"sparc_{kind}.json").read_text())["unit"]["losses"]["cross1"]
        for target in STREAMS:
            x = tensors[f"unit.input.{target}"]
            for source in STREAMS:
                itself = source == target
                y = tensors[f"unit.recon.{target}" if itself else f"unit.cross.{target}_from_{source}"]
                theirs = losses[f"mse_loss_{target}" if itself else f"cross_loss_{target}_from_{source}"]
                found = reconstruction({target: x}, {target: {source: y}})["nmse"][target][source]
                assert found == pytest.approx(theirs, abs=1e-6)
    tensors = load_file(golden / "usae_forward.safetensors")
    models = json.loads((golden / "usae.json").read_text())
    names = list(tensors[key].shape and key.split(".")[1] for key in tensors if key.startswith("input."))
    expected = _find(models, "r2")["eval"]
    order = ["SigLIP", "ViT", "MAE"]
    assert set(order) == set(names)
    for row, source in enumerate(order):
        for column, target in enumerate(order):
            x = tensors[f"input.{target}"].reshape(-1, tensors[f"input.{target}"].shape[-1])
            y = tensors[f"eval.decode.{target}_from_{source}"]
            found = reconstruction({target: x}, {target: {source: y}})["r2"][target][source]
            assert found == pytest.approx(expected[row][column], abs=1e-6)


def _find(tree, key):
    if isinstance(tree, dict):
        if key in tree:
            return tree[key]
        for value in tree.values():
            if (found := _find(value, key)) is not None:
                return found
    return None


@pytest.mark.parametrize("case", CASES)
def test_retrieval_equals_the_earlier_code(golden, case):
    """Our ranks are the worst of the bracket that ties within 1e-6 allow; without ties all figures are theirs."""
    latents, expected = np.load(golden / "metrics_latents.npz"), np.load(golden / "metrics_retrieval_ranks.npz")
    every = json.loads((golden / "metrics.json").read_text())["retrieval"][case]
    compared = 0
    for variant, families in every.items():
        for pair, theirs in families["LatentAlignment"].items():
            target, source = pair.lower().split("_from_")
            query, reference = (csr_array(latents[f"{case}.{variant}.{name}"]) for name in (source, target))
            prefix = f"{case}.{variant}.LatentAlignment.{pair}"
            ranks = code_ranks(query, reference)
            assert np.array_equal(ranks, expected[f"{prefix}.rank_hi"])
            if np.array_equal(expected[f"{prefix}.rank_hi"], expected[f"{prefix}.ranks"]):
                figures = retrieval_figures(ranks)
                names = {"R@1": "R@1", "R@5": "R@5", "R@10": "R@10", "MedR": "median_rank", "MRR": "mrr"}
                for key, name in names.items():
                    assert figures[name] == pytest.approx(theirs[key], abs=1e-6)
                compared += 1
    assert compared or case == "local_no_cross"
