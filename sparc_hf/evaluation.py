"""Evaluate a model on a feature dataset: reconstruction, liveness, label alignment and retrieval."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sparc_hf.codes import CodeTable, check_streams, encode_features
from sparc_hf.features import FeatureBatches, FeatureDataset
from sparc_hf.modeling_sparc import SparcModel
from sparc_hf.retrieval import counterpart_ranks, recall_at
from sparc_hf.run_folder import write_json


def evaluate_model(model: SparcModel, features: FeatureDataset, *, batch_size: int = 1024) -> dict[str, Any]:
    """Return the figures of a model on a feature dataset, as JSON-ready values.

    Everything that depends on codes is given twice: for joint encoding, in which every stream of a sample helps to
    choose the latents of the others (with global selection the counterpart is then partly given away), and for
    single-stream encoding, in which each stream stands alone.

    Returns:
        {"rows", "nmse": {"self", "cross", "self/<stream>", "cross/<target><-<source>"},
        "joint" and "single": {"dead_share", "dead": stream -> share, "latent_r_at_1", "retrieval":
        "<source>-><target>" -> R@1, and "jaccard" where the dataset has labels}}

    Raises:
        ValueError: for streams the dataset lacks, or unusable rows.
    """
    check_streams(model, features)
    training = model.training
    model.eval()
    results: dict[str, Any] = {"rows": len(features), "nmse": reconstruction_errors(model, features, batch_size)}
    for encoding in ("joint", "single"):
        codes = encode_features(model, features, encoding=encoding, batch_size=batch_size)
        figures = {**_liveness(codes), **_latent_retrieval(codes)}
        if features.label_names is not None:
            figures["jaccard"] = float(label_jaccard(codes, features.labels_csr()).mean())
        results[encoding] = figures
    model.train(training)
    return results


@torch.no_grad()
def reconstruction_errors(model: SparcModel, features: FeatureDataset, batch_size: int = 1024) -> dict[str, float]:
    """Return the nmse of every (source, target) pair under joint encoding, and the means "self" and "cross"."""
    streams = model.config.stream_names
    batches = FeatureBatches(features, batch_size=min(batch_size, len(features)), streams=streams, shuffle=False)
    sums: dict[str, float] = {}
    for batch in tqdm(batches, desc="reconstructing", unit="batch", leave=False):
        losses = model(batch).losses
        weight = len(next(iter(batch.values()))) / len(features)
        for name, value in losses.items():
            if not name.startswith("auxk"):
                sums[name] = sums.get(name, 0.0) + weight * value.item()
    return sums


def label_jaccard(codes: CodeTable, labels: Any) -> np.ndarray:
    """Return float64 [N]: per latent, how alike the labels of its active samples are in every two streams.

    With counts[s, c] the samples with label c on which the latent is active in stream s, the score of a pair of
    streams is sum_c min / sum_c max, and a latent's score is the mean over the pairs in which it is active at all.
    A latent active in fewer than two streams scores 0, as the SPARC paper's evaluation counts it.

    Args:
        codes: codes of the samples.
        labels: scipy sparse [rows, classes], multi-hot.

    Raises:
        ValueError: for labels of another number of rows.
    """
    if labels.shape[0] != len(codes):
        raise ValueError(f"there are {len(codes)} rows of codes but {labels.shape[0]} rows of labels")
    active = {stream: codes.csr(stream) for stream in codes.streams}
    for matrix in active.values():
        matrix.data[:] = 1
    counts = {stream: (matrix.T @ labels).toarray() for stream, matrix in active.items()}
    alive = {stream: np.asarray(matrix.sum(axis=0)).reshape(-1) > 0 for stream, matrix in active.items()}
    scores, pairs = np.zeros(codes.num_latents), np.zeros(codes.num_latents)
    for one, other in itertools.combinations(codes.streams, 2):
        both = alive[one] & alive[other]
        larger = np.maximum(counts[one], counts[other]).sum(axis=1)
        smaller = np.minimum(counts[one], counts[other]).sum(axis=1)
        scores += np.where(both, smaller / np.maximum(larger, 1), 0)
        pairs += both
    return scores / np.maximum(pairs, 1)


def _liveness(codes: CodeTable) -> dict[str, Any]:
    dead = {stream: float((codes.csr(stream).sum(axis=0) == 0).mean()) for stream in codes.streams}
    return {"dead_share": float(np.mean(list(dead.values()))), "dead": dead}


def _latent_retrieval(codes: CodeTable) -> dict[str, Any]:
    matrices = {stream: codes.csr(stream) for stream in codes.streams}
    pairs = list(itertools.permutations(codes.streams, 2))
    found = {
        f"{source}->{target}": recall_at(counterpart_ranks(matrices[source], matrices[target]), 1)
        for source, target in tqdm(pairs, desc="retrieving", unit="pair", leave=False)
    }
    return {"latent_r_at_1": float(np.mean(list(found.values()))) if found else None, "retrieval": found}


def write_results(results: dict[str, Any], path: str | Path) -> None:
    """Write results as JSON, making the folder; the file appears complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
