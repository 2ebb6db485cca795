"""What the two earlier projects left behind, told apart by its files and brought into today's formats."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm.auto import tqdm

from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.writer import FeatureWriter
from sparc_hf.legacy.hdf5_features import AnalysisCache, FeatureFiles
from sparc_hf.legacy.npz_activations import ActivationTree

if TYPE_CHECKING:
    pass

HDF5_SUFFIXES = (".h5", ".hdf5")
CHECKPOINT_SUFFIXES = (".pth", ".pt")
CHECKPOINT_FILES = ("msae_checkpoint.pth", "**/uni_*_checkpoint_*.pth")
LegacyFeatures = FeatureFiles | AnalysisCache | ActivationTree


def import_features(
    found: LegacyFeatures,
    output: str | os.PathLike,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    records: Sequence[Mapping[str, Any]] = (),
    rows_per_shard: int = 4096,
) -> FeatureDataset:
    """Write features of an earlier project as a feature dataset, a block at a time; a stopped import goes on.

    Args:
        found: the opened files, which are closed.
        output: folder for the feature dataset.
        dtype: how the numbers are stored.
        records: what is known of the streams beside the files (`name`, `encoder`, `modality`, ...).
        rows_per_shard: rows of one file, which is also what is held in memory.

    Raises:
        ValueError: for records of other streams, rows in different orders, numbers that are not finite, or an `output`
            that already holds something.
    """
    with found:
        known = {record["name"]: dict(record) for record in records}
        names = [record["name"] for record in found.records]
        if unknown := sorted(set(known) - set(names)):
            raise ValueError(f"encoders are given for {unknown}, but the streams of the source are {names}")
        writer = FeatureWriter(
            output,
            [known.get(record["name"], {}) | record for record in found.records],
            dtype=dtype,
            rows_per_shard=rows_per_shard,
            label_names=found.label_names,
            source=found.source,
            extra_columns=found.columns,
        )
        start = writer.rows_done
        with writer, tqdm(total=found.rows, initial=start, desc="import", unit=" rows", delay=2) as progress:
            for block in found.blocks(start):
                writer.append(block)
                progress.update(len(block["id"]))
    return FeatureDataset.load(output, verify=False)  # these very files were just written


def _stream_files(sources: Sequence[str]) -> dict[str, Path] | None:
    """Return stream name -> file from `name=file` strings, or None for one source of another kind."""
    pairs = [source.partition("=") for source in sources]
    named = [bool(equals) and name.isidentifier() for name, equals, _ in pairs]
    if len(sources) == 1 and not named[0]:
        return None
    if not all(named) or len({name for name, _, _ in pairs}) != len(pairs):
        raise ValueError(f"several sources must be name=file.h5, each name once, but they are {list(sources)}")
    return {name: Path(file) for name, _, file in pairs}


def _checkpoint_of(path: Path) -> Path | None:
    """Return the checkpoint that a path is or holds; of a Universal SAE run, one of its models."""
    if path.suffix in CHECKPOINT_SUFFIXES:
        return path
    return next((file for pattern in CHECKPOINT_FILES for file in sorted(path.glob(pattern))), None)
