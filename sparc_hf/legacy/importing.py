"""Features that the two earlier projects left behind, brought into today's format."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tqdm.auto import tqdm

from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.writer import FeatureWriter
from sparc_hf.legacy.hdf5_features import AnalysisCache, FeatureFiles
from sparc_hf.legacy.npz_activations import ActivationTree

LegacyFeatures = FeatureFiles | AnalysisCache | ActivationTree


def import_features(
    files: LegacyFeatures,
    output: str | os.PathLike,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    records: Sequence[Mapping[str, Any]] = (),
    rows_per_shard: int = 4096,
) -> FeatureDataset:
    """Write features of an earlier project as a feature dataset, a block at a time; a stopped import goes on.

    Args:
        files: the opened files, which are closed.
        output: folder for the feature dataset.
        dtype: how the numbers are stored.
        records: what is known of the streams beside the files (`name`, `encoder`, `modality`, ...).
        rows_per_shard: rows of one file, which is also what is held in memory.

    Raises:
        ValueError: for records of other streams, rows in different orders, numbers that are not finite, or an `output`
            that already holds something.
    """
    with files:
        encoder_records = {record["name"]: dict(record) for record in records}
        names = [record["name"] for record in files.records]
        if unknown := sorted(set(encoder_records) - set(names)):
            raise ValueError(f"encoders are given for {unknown}, but the streams of the source are {names}")
        writer = FeatureWriter(
            output,
            [encoder_records.get(record["name"], {}) | record for record in files.records],
            dtype=dtype,
            rows_per_shard=rows_per_shard,
            label_names=files.label_names,
            source=files.source,
            extra_columns=files.columns,
        )
        start = writer.rows_done
        with writer, tqdm(total=files.rows, initial=start, desc="import", unit=" rows", delay=2) as progress:
            for block in files.blocks(start):
                writer.append(block)
                progress.update(len(block["id"]))
    return FeatureDataset.load(output, verify=False)  # these very files were just written
