"""Code tables: the codes of a whole dataset, k latents and k values a row and stream, and their file form."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sparc_hf.features import FeatureBatches, FeatureDataset
from sparc_hf.modeling_sparc import SparcModel

if TYPE_CHECKING:
    from scipy.sparse import csr_array

TABLE_FILE = "sparc_codes.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class CodeTable:
    """Codes of a dataset's rows.

    Attributes:
        indices: stream -> int32 [rows, k], selected latents.
        values: stream -> float32 [rows, k], 0 where a selected pre-activation was negative.
        num_latents: N.
        encoding: "joint" (all streams given, selecting as the model's config says) or "single" (each stream alone).
    """

    indices: Mapping[str, np.ndarray]
    values: Mapping[str, np.ndarray]
    num_latents: int
    encoding: str

    @property
    def streams(self) -> list[str]:
        """Names of the streams, in order."""
        return list(self.indices)

    def __len__(self) -> int:
        return len(next(iter(self.indices.values())))

    def csr(self, stream: str) -> "csr_array":
        """Return the positive values of a stream as a scipy CSR array [rows, N]."""
        from scipy.sparse import csr_array

        if stream not in self.indices:
            raise ValueError(f"the code table has no stream `{stream}`; it has {self.streams}")
        rows, k = self.indices[stream].shape
        starts = np.arange(0, rows * k + 1, k)
        data = (self.values[stream].reshape(-1), self.indices[stream].reshape(-1), starts)
        # Copied, because the clean-up below works in place.
        csr = csr_array(data, shape=(rows, self.num_latents), copy=True)
        csr.eliminate_zeros()
        csr.sort_indices()
        return csr

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the table as a datasets folder, columns `<stream>_indices` and `<stream>_values`.

        Raises:
            ValueError: where `path` exists and `overwrite` is not set. The table appears complete or not at all.
        """
        from datasets import Dataset

        path = Path(path)
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists already; choose another folder or allow overwriting it")
        import pyarrow as pa

        columns: dict[str, Any] = {}
        for stream in self.streams:
            for name, array in (("indices", self.indices[stream]), ("values", self.values[stream])):
                flat = pa.array(np.ascontiguousarray(array).reshape(-1))
                columns[f"{stream}_{name}"] = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
        unfinished = path.with_name(path.name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        Dataset(pa.table(columns)).save_to_disk(unfinished)
        facts = {
            "format_version": FORMAT_VERSION,
            "streams": self.streams,
            "num_latents": self.num_latents,
            "encoding": self.encoding,
        }
        (unfinished / TABLE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | Path) -> "CodeTable":
        """Read a table written by `save`; ValueError where `path` holds none."""
        from datasets import Dataset, load_from_disk

        path = Path(path)
        if not (path / TABLE_FILE).exists():
            raise ValueError(f"{path} is not a code table (no {TABLE_FILE}); make one with `sparc encode`")
        facts = json.loads((path / TABLE_FILE).read_text(encoding="utf-8"))
        if facts["format_version"] > FORMAT_VERSION:
            raise ValueError(f"{path} has format version {facts['format_version']}, newer than {FORMAT_VERSION}")
        table = load_from_disk(str(path))
        if not isinstance(table, Dataset):
            raise ValueError(f"{path} holds several splits where one code table is expected")

        def column(name: str) -> np.ndarray:
            combined = table.data.column(name).combine_chunks()
            return np.asarray(combined.flatten()).reshape(len(table), -1)

        return cls(
            indices={stream: column(f"{stream}_indices") for stream in facts["streams"]},
            values={stream: column(f"{stream}_values") for stream in facts["streams"]},
            num_latents=facts["num_latents"],
            encoding=facts["encoding"],
        )


@torch.no_grad()
def encode_features(
    model: SparcModel, features: FeatureDataset, *, encoding: str = "joint", batch_size: int = 1024
) -> CodeTable:
    """Encode every row of a feature dataset.

    Args:
        model: its streams must be in the dataset.
        features: the rows.
        encoding: "joint" gives the model all streams together; "single" gives each stream alone, the code it has
            when nothing else is known of the sample.
        batch_size: rows at a time.

    Raises:
        ValueError: for another encoding, or streams the dataset lacks.
    """
    if encoding not in ("joint", "single"):
        raise ValueError(f'`encoding` must be "joint" or "single", but it is {encoding!r}')
    streams = model.config.stream_names
    check_streams(model, features)
    rows, k = len(features), model.config.k
    indices = {name: np.empty((rows, k), np.int32) for name in streams}
    values = {name: np.empty((rows, k), np.float32) for name in streams}
    batches = FeatureBatches(features, batch_size=min(batch_size, rows), streams=streams, shuffle=False)
    start = 0
    for batch in tqdm(batches, desc=f"encoding ({encoding})", unit="batch", leave=False):
        if encoding == "joint":
            codes = model.encode(batch)
        else:
            codes = {name: model.encode({name: value})[name] for name, value in batch.items()}
        stop = start + len(next(iter(codes.values())))
        for name, code in codes.items():
            indices[name][start:stop] = code.indices.cpu().numpy()
            values[name][start:stop] = code.values.float().cpu().numpy()
        start = stop
    return CodeTable(indices, values, model.config.num_latents, encoding)


def check_streams(model: SparcModel, features: FeatureDataset) -> None:
    """Raise ValueError where a dataset lacks a stream of the model."""
    if missing := [name for name in model.config.stream_names if name not in features.stream_names]:
        raise ValueError(f"the model needs the streams {missing}, but the features have {features.stream_names}")
