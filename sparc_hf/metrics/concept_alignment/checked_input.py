"""Codes and labels as sparse matrices, refused where their numbers do not fit.

This very file lies in every metric's folder that takes codes, because `evaluate.load` takes a folder alone.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array

# Kinds of numpy numbers that become which.
NUMBERS_OF: dict[Any, str] = {np.int64: "iu", np.float32: "iuf"}
CSR = Any  # a scipy csr_array, whose own types say that it has no shape
# An array of one double per latent then takes a gigabyte.
LARGEST_SIZE = 2**27


def checked_streams(codes: Mapping[str, Any]) -> dict[str, CSR]:
    """Return stream -> sparse [rows, N] codes whose indices fit, whose values are finite, each latent once a row.

    Raises:
        ValueError: for other codes, streams of different shapes, or none.
    """
    checked = {stream: checked_matrix(matrix, f"the codes of `{stream}`") for stream, matrix in codes.items()}
    shapes = {stream: matrix.shape for stream, matrix in checked.items()}
    if len(set(shapes.values())) != 1 or not all(next(iter(shapes.values()))):
        raise ValueError(
            f"every stream needs the same rows and latents, at least one of each, but the shapes are {shapes}"
        )
    return checked


def checked_labels(labels: Any, rows: int) -> CSR:
    """Return labels as a sparse 0/1 matrix [rows, classes] without stored zeros.

    Raises:
        ValueError: for other numbers, other rows, or no classes.
    """
    matrix = checked_matrix(labels, "the labels")
    if matrix.shape[0] != rows or not matrix.shape[1]:
        raise ValueError(
            f"there are {rows} rows of codes but {matrix.shape[0]} rows of labels, with {matrix.shape[1]} classes"
        )
    if not ((matrix.data == 1) | (matrix.data == 0)).all():
        raise ValueError("labels [rows, classes] may only hold 0 and 1")
    if not matrix.data.all():
        matrix = matrix.copy()
        matrix.eliminate_zeros()
    return matrix


def checked_matrix(matrix: Any, name: str) -> CSR:
    """Return a matrix as csr_array [rows, columns] with indices inside it, finite values and every entry once."""
    checked: Any = csr_array(matrix)
    try:
        checked.check_format(full_check=True)
    except ValueError as error:
        raise ValueError(f"{name} do not fit into {list(checked.shape)}: {error}") from error
    if not np.isfinite(checked.data).all():
        place = int(np.flatnonzero(~np.isfinite(checked.data))[0])
        row = int(np.searchsorted(checked.indptr, place, side="right")) - 1
        raise ValueError(f"{name} hold NaN or an infinite value in row {row}")
    if not checked.has_canonical_format:
        checked = checked.copy()
        checked.sum_duplicates()
    return checked


def codes_of_streams(indices: Any, values: Any, num_latents: Any, streams: Sequence[str] | None) -> dict[str, CSR]:
    """Return stream -> sparse [samples, N] from nested lists [samples][streams][k].

    Raises:
        ValueError: for samples of another number of streams, names that are no names, or as `codes_of_samples`.
    """
    count = len(indices[0])
    names = [str(place) for place in range(count)] if streams is None else list(streams)
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"`streams` must name the {count} streams of every sample, each once, but it is {names}")
    for name, samples in (("indices", indices), ("values", values)):
        if wrong := [row for row, sample in enumerate(samples) if sample is None or len(sample) != count]:
            raise ValueError(f"sample {wrong[0]} must have `{name}` of {count} streams, as sample 0 has")
    return {
        name: codes_of_samples(
            [sample[at] for sample in indices], [sample[at] for sample in values], num_latents, f"stream `{name}`"
        )
        for at, name in enumerate(names)
    }


def codes_of_samples(indices: Any, values: Any, num_latents: Any, name: str = "the codes") -> CSR:
    """Return sparse float32 [samples, N] from nested lists [samples][k].

    Raises:
        ValueError: for latents that are none of the N or are named twice by a sample, values that are not finite, or
            not as many as latents.
    """
    latents, ends = _flat(indices, np.int64, f"`indices` of {name}")
    strengths, ends_of_values = _flat(values, np.float32, f"`values` of {name}")
    if not np.array_equal(ends, ends_of_values):
        row = int(np.flatnonzero(ends != ends_of_values)[0]) - 1
        raise ValueError(f"sample {row} of {name} must have as many `values` as `indices`")
    width = size_of(num_latents, "num_latents")
    _check_range(latents, ends, width, name, "latent")
    codes: Any = csr_array((strengths, latents, ends), shape=(len(ends) - 1, width))
    codes.eliminate_zeros()
    entries = codes.nnz
    codes.sum_duplicates()
    if codes.nnz != entries:
        raise ValueError(f"a sample of {name} names a latent more than once")
    return codes


def class_matrix(labels: Any, num_classes: Any) -> CSR:
    """Return a sparse 0/1 float32 [samples, classes] from lists of class ids.

    Raises:
        ValueError: for ids that are none of the classes.
    """
    ids, ends = _flat(labels, np.int64, "`labels`")
    width = size_of(num_classes, "num_classes")
    _check_range(ids, ends, width, "`labels`", "class")
    matrix: Any = csr_array((np.ones(len(ids), np.float32), ids, ends), shape=(len(ends) - 1, width))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def size_of(value: Any, name: str) -> int:
    """Return a number of latents or classes; ValueError where it is none."""
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    if not 1 <= size <= LARGEST_SIZE:
        raise ValueError(f"`{name}` must be a whole number from 1 to {LARGEST_SIZE}, but it is {value!r}")
    return size


def _flat(rows: Any, kind: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all numbers of [samples][k] in a line, and where each sample's begin and the last one's end."""
    arrays = []
    for row, sample in enumerate(rows):
        try:
            array = np.asarray(sample)
            if array.ndim != 1 or (array.size and array.dtype.kind not in NUMBERS_OF[kind]):
                raise TypeError(array.dtype)
            arrays.append(array.astype(kind))
        except (TypeError, ValueError) as error:
            raise ValueError(f"sample {row} of {name} must be a list of numbers") from error
    flat = np.concatenate([np.empty(0, kind), *arrays])
    if not np.isfinite(flat).all():
        raise ValueError(f"{name} hold NaN or an infinite value")
    return flat, np.cumsum([0, *(len(sample) for sample in arrays)])


def _check_range(ids: np.ndarray, ends: np.ndarray, width: int, name: str, thing: str) -> None:
    outside = np.flatnonzero((ids < 0) | (ids >= width))
    if len(outside):
        row = int(np.searchsorted(ends, outside[0], side="right")) - 1
        raise ValueError(
            f"sample {row} of {name} names {thing} {ids[outside[0]]}, but there are only 0 to {width - 1}"
        )
