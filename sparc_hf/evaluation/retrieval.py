"""Retrieval with a model: ranks of a sample's counterpart by codes, reconstructions and cross-reconstructions."""

import itertools

import numpy as np
from tqdm.auto import tqdm

from sparc_hf.codes.code_table import CodeTable, decoded_rows, normalized_rows
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.metrics.cross_retrieval.cross_retrieval import code_ranks, vector_ranks
from sparc_hf.model.modeling_sparc import SparcModel

FAMILIES = ("self_reconstruction", "latent_alignment", "cross_reconstruction")


def model_ranks(
    model: SparcModel, features: FeatureDataset, codes: CodeTable, *, batch_size: int = 1024
) -> dict[str, dict[tuple[str, str], np.ndarray]]:
    """Return family -> (source, target) -> int64 [rows], the rank of every sample's counterpart (1 is best).

    The families are those of SPARC (arXiv 2507.06265, retrieval): `self_reconstruction` looks for a row among all rows
    of its stream by its own reconstruction, `latent_alignment` for a code of the target stream by the code of the
    source stream, `cross_reconstruction` for a row of the target stream by what the source's code decodes to.

    Give single-stream codes. In joint codes of a model with global selection the target took part in choosing the
    source's latents, which gives the answer partly away; such ranks say how alike the streams are, not how well one
    finds the other.

    Args:
        model: any objective and selection.
        features: the samples; memory is one stream's rows and their reconstruction.
        codes: their codes, from `encode_features`.
        batch_size: rows decoded at a time.

    Raises:
        ValueError: for codes of other rows or streams.
    """
    if len(codes) != len(features) or codes.streams != model.config.stream_names:
        raise ValueError(
            f"the codes have {len(codes)} rows of {codes.streams}, but the features {len(features)} rows and the "
            f"model {model.config.stream_names}"
        )
    ranks: dict[str, dict[tuple[str, str], np.ndarray]] = {family: {} for family in FAMILIES}
    pairs = list(itertools.product(codes.streams, repeat=2))
    with tqdm(total=len(pairs) + len(pairs) - len(codes.streams), desc="retrieving", unit="pair", leave=False) as bar:
        for target in codes.streams:
            references = normalized_rows(model, features, target)
            for source in codes.streams:
                family = "self_reconstruction" if source == target else "cross_reconstruction"
                queries = decoded_rows(model, codes, source, target, batch_size)
                ranks[family][source, target] = vector_ranks(queries, references)
                bar.update()
        matrices = {stream: codes.csr(stream) for stream in codes.streams}
        for source, target in itertools.permutations(codes.streams, 2):
            ranks["latent_alignment"][source, target] = code_ranks(matrices[source], matrices[target])
            bar.update()
    return ranks
