"""RowSchema: the columns of a feature dataset, and batches checked against them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sparc_hf.features.columns import fixed_size_lists
from sparc_hf.model.stream_record import StreamRecords, checked_stream_records

FLOAT_TYPES = ("float32", "float16")


class RowSchema:
    """The stream columns and the other columns of a feature dataset.

    Args:
        streams: stream records in order (or a dict name -> record), each with `name` and `hidden_size`.
        dtype: how the numbers are stored, "float32" or "float16".
        extra_columns: the other columns, among `id`, `image`, `text`, `captions` and `labels`, or a dict column name
            -> datasets feature.
        measured: see `checked_stream_records`.

    Raises:
        ValueError: for bad records, another dtype, or columns without a type or with the name of a stream.
    """

    def __init__(
        self,
        streams: StreamRecords,
        dtype: str,
        extra_columns: Sequence[str] | Mapping[str, Any] = (),
        measured: bool = True,
    ):
        from datasets import Features, List, Value

        if dtype not in FLOAT_TYPES:
            raise ValueError(f"`dtype` must be one of {list(FLOAT_TYPES)}, but it is {dtype!r}")
        self.streams, self.dtype = checked_stream_records(streams, measured=measured), dtype
        self.extra_features = _extra_features(extra_columns, self.streams)
        columns = {record["name"]: List(Value(dtype), length=record["hidden_size"]) for record in self.streams}
        self.schema: pa.Schema = Features({**columns, **self.extra_features}).arrow_schema

    @property
    def column_types(self) -> dict[str, str]:
        """Column name -> Arrow type, as strings."""
        return {field.name: str(field.type) for field in self.schema}

    def checked(
        self, batch: Mapping[str, Any], first_row: int = 0
    ) -> tuple[dict[str, np.ndarray], dict[str, pa.Array], int]:
        """Return the stream arrays, the other columns and the number of rows of a batch.

        Args:
            batch: every stream as an array [rows, hidden_size], every other column as a list of `rows` values.
            first_row: what to call its first row in an error.

        Raises:
            ValueError: for missing or unknown columns, another width or row count, a number that is not finite (also
                after conversion to `dtype`), or a value its column cannot hold.
        """
        expected = set(self.schema.names)
        if set(batch) != expected:
            raise ValueError(
                f"a batch must have the columns {self.schema.names}; missing are {sorted(expected - set(batch))}, "
                f"not expected are {sorted(set(batch) - expected)}"
            )
        lengths = {name: len(values) for name, values in batch.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"all columns of a batch must have the same number of rows, but they have {lengths}")
        arrays = {
            record["name"]: self._checked_array(record, batch[record["name"]], first_row) for record in self.streams
        }
        extras = {name: self._checked_extra(name, batch[name]) for name in self.extra_features}
        return arrays, extras, next(iter(lengths.values()))

    def record_batch(
        self, arrays: Mapping[str, np.ndarray], extras: Mapping[str, Sequence[pa.Array]]
    ) -> pa.RecordBatch:
        """Return what `checked` gave as one Arrow record batch; extra columns come in pieces."""
        columns = [fixed_size_lists(arrays[record["name"]]) for record in self.streams]
        columns += [pa.concat_arrays(extras[name]) for name in self.extra_features]
        return pa.record_batch(columns, schema=self.schema)

    def _checked_array(self, record: Mapping[str, Any], values: Any, first_row: int) -> np.ndarray:
        array = np.asarray(values)
        if array.ndim != 2 or array.shape[1] != record["hidden_size"]:
            raise ValueError(
                f"stream `{record['name']}` needs an array [rows, {record['hidden_size']}], "
                f"but got one of shape {list(array.shape)}"
            )
        with np.errstate(over="ignore"):
            array = array.astype(self.dtype, copy=False)
        finite = np.isfinite(array).all(axis=1)
        if not finite.all():
            row = first_row + int(np.argmin(finite))
            hint = "" if self.dtype == "float32" else " (float16 ends at 65504; float32 holds larger numbers)"
            raise ValueError(f"stream `{record['name']}` has a NaN or infinite number in row {row}{hint}")
        return array

    def _checked_extra(self, name: str, values: Any) -> pa.Array:
        from datasets import Features

        try:
            feature = Features({name: self.extra_features[name]})
            encoded = feature.encode_batch({name: list(values)})[name]
            return pa.array(encoded, type=self.schema.field(name).type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            kind = self.schema.field(name).type
            raise ValueError(f"column `{name}` holds {kind}, which a value of this batch is not: {error}") from error


def _extra_features(
    columns: Sequence[str] | Mapping[str, Any], streams: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return column name -> datasets feature for the columns beside the streams."""
    from datasets import Image, List, Value

    known = {
        "id": Value("string"),
        "image": Image(),
        "text": Value("string"),
        "captions": List(Value("string")),
        "labels": List(Value("int32")),
        "sample": Value("int64"),
        "token": Value("int32"),
    }
    if not isinstance(columns, Mapping):
        unknown = sorted(set(columns) - set(known))
        if unknown:
            raise ValueError(f"columns {unknown} need a type; pass `extra_columns` as a dict name -> datasets feature")
        columns = {name: known[name] for name in columns}
    taken = sorted({record["name"] for record in streams} & set(columns))
    if taken:
        raise ValueError(f"columns {taken} carry the name of a stream; rename the stream or the column")
    return dict(columns)
