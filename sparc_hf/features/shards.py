"""Folders of Arrow shards (feature datasets, code tables): shards, checksums, and the manifest that has them."""

import contextlib
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pyarrow as pa

from sparc_hf.files.atomic_files import first_damage, new_file, sha256_of, write_json, write_text
from sparc_hf.files.atomic_folders import is_half_replaced, named, recover
from sparc_hf.files.checked_reading import Count, FileName, Limit, Taxonomy, checked, read_json
from sparc_hf.files.folder_lock import FolderInUse, locked_folder

FORMAT_VERSION = 2
# Of everything in which no row lacks a stream, which versions of this package read that know of no such rows.
COMPLETE_VERSION = 1
MANIFEST_NAME = "sparc_features.json"
# What such folders hold beside the manifest, the caches of `datasets` and unfinished work among it.
SHARD_FILES = (
    *("data-*.arrow", "cache-*.arrow", "state.json", "dataset_info.json", "skipped.jsonl", "incomplete.jsonl"),
    *(".*.tmp", "progress", "sparc_partial.json"),
)


class RowsWithout(TypedDict, total=False):
    """Stream -> how many rows of a file lack it; not there where none does."""

    rows_without: dict[str, Count]


class ShardEntry(RowsWithout):
    """What a manifest says of one file."""

    file: FileName
    rows: Count
    bytes: Count
    sha256: str


class FileChecksum(TypedDict):
    """What is known of one file beside the shards."""

    bytes: Count
    sha256: str


FileChecksums = Annotated[
    dict[str, FileChecksum],
    Limit("an object with the names of files", lambda files: all(Path(name).name == name for name in files)),
]


class Files(TypedDict, total=False):
    """The files of a folder, by name, and what they were when they were written."""

    files: FileChecksums


class Manifest(Files):
    """What the manifests of all kinds of folders have in common."""

    rows: Count
    shards: Annotated[list[ShardEntry], Limit("a list of at least one shard", bool)]


class DatasetFacts(TypedDict, total=False):
    """What is known of a feature dataset beside its streams.

    `rows_without` has, by stream, how many rows lack it, of those streams that any row lacks.
    """

    label_names: list[str] | None
    taxonomy: Taxonomy | None
    source: Any
    rows_skipped: Count
    rows_without: dict[str, Count]


class FeatureManifest(Manifest, DatasetFacts):
    """The manifest of a feature dataset."""

    streams: list[dict[str, Any]]


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder of shards.

    Attributes:
        manifest: name of its manifest file.
        shape: what that must hold, see `checked`.
        name: what messages call such a folder.
        remedy: how a user gets one.
        mend: how a user mends a damaged one.
        files: name patterns of its files, beside those that all kinds have.
    """

    manifest: str
    shape: Any
    name: str
    remedy: str
    mend: str
    files: tuple[str, ...] = ()

    def owns(self, entry: Path) -> bool:
        """Return whether an entry of such a folder belongs to it, and is not somebody else's."""
        return named(self.manifest, *SHARD_FILES, *self.files)(entry)


FEATURE_FOLDER = FolderKind(
    MANIFEST_NAME,
    FeatureManifest,
    "feature dataset",
    "make one with `sparc extract`, or wrap a table with `FeatureDataset.from_dataset`",
    "copy it again, or run the command that made the dataset once more with `--repair`",
)


def write_shard(folder: Path, name: str, batch: pa.RecordBatch, streams: Sequence[str] = ()) -> dict[str, Any]:
    """Write one record batch as the file `name`, which appears only when it is whole; return its manifest entry.

    Args:
        folder: where it lies.
        name: of the file.
        batch: the rows.
        streams: columns in which a null is a row that lacks that stream; the entry counts them.
    """
    with new_file(folder / name) as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    path = folder / name
    lacking = rows_without(batch, streams)
    return {
        **{"file": name, "rows": batch.num_rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)},
        **({"rows_without": lacking} if lacking else {}),
    }


def rows_without(rows: pa.Table | pa.RecordBatch, streams: Iterable[str]) -> dict[str, int]:
    """Return stream -> how many rows lack it; only streams that some row lacks."""
    counts = {name: rows.column(name).null_count for name in streams}
    return {name: count for name, count in counts.items() if count}


def format_facts(lacking: Mapping[str, int]) -> dict[str, Any]:
    """Return what a manifest says of its format, and of the rows that lack streams, from `rows_without`."""
    if not lacking:
        return {"format_version": COMPLETE_VERSION}
    return {"format_version": FORMAT_VERSION, "rows_without": dict(lacking)}


def check_missing_rows(lacking: Mapping[str, int], facts: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where more or fewer rows lack a stream than the manifest, or the metadata of a file, says."""
    expected = facts.get("rows_without") or {}
    if lacking != expected:
        raise ValueError(
            f"`{name}` is damaged: rows that lack a stream should be {expected or 'none'}, but they are "
            f"{dict(lacking) or 'none'}; make it again"
        )


def read_manifest(folder: Path, kind: FolderKind = FEATURE_FOLDER) -> dict[str, Any]:
    """Read the manifest of a feature dataset, or of another kind of folder, and compare it with its checksum.

    Raises:
        FileNotFoundError: if there is no such folder, or it is of another kind.
        ValueError: if the manifest is damaged or of a newer format.
    """
    file = folder / kind.manifest
    if is_half_replaced(folder):
        with contextlib.suppress(FolderInUse, OSError), locked_folder(folder):
            recover(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder `{folder}`")
    if not file.is_file():
        raise FileNotFoundError(f"`{folder}` is not a {kind.name}: it has no {kind.manifest}; {kind.remedy}")
    try:
        # The version comes first: a newer format may have its checksum elsewhere.
        check_version(read_json(file, dict[str, Any], verify=False), f"{folder}")
        return checked(read_json(file, dict[str, Any]), kind.shape, file.name)
    except NewerFormat:
        raise
    except ValueError as error:
        raise ValueError(f"`{file}` is damaged: {error}; {kind.mend}") from error


class NewerFormat(ValueError):
    """Something was written by a newer version of this package."""


def check_version(facts: Mapping[str, Any], name: str) -> None:
    """Raise ValueError for facts without `format_version`, and `NewerFormat` where it is newer than ours."""
    version = checked(facts.get("format_version"), int, "format_version")
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"`{name}` has format version {version}, but this version of sparc_hf reads up to {FORMAT_VERSION}; "
            "upgrade with `pip install -U sparc-hf`"
        )


def joined(tables: Sequence[pa.Table], folder: Path, kind: FolderKind = FEATURE_FOLDER) -> pa.Table:
    """Return the rows of all shards.

    Raises:
        ValueError: where they do not have the same columns.
    """
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise ValueError(f"the shards of `{folder}` do not have the same columns ({error}); {kind.mend}") from error


def check_files(folder: Path, manifest: Mapping[str, Any], kind: FolderKind, verify: bool = True) -> None:
    """Compare the files beside the shards with the manifest; ValueError where one is not what was written."""
    if problem := first_damage(folder, manifest.get("files", {}), verify):
        raise ValueError(f"`{folder}` is damaged: {problem}; {kind.mend}")


def open_shard(
    folder: Path, shard: Mapping[str, Any], verify: bool = True, kind: FolderKind = FEATURE_FOLDER
) -> pa.Table:
    """Map one shard into memory after comparing it with its manifest entry, by SHA-256 if `verify` is true.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not the file that was written.
    """
    file = folder / shard["file"]
    if not file.is_file():
        raise FileNotFoundError(f"shard `{file}` is missing; {kind.mend}")
    problem = ""
    if file.stat().st_size != shard["bytes"]:
        problem = f"it has {file.stat().st_size} bytes instead of {shard['bytes']}"
    elif verify and sha256_of(file) != shard["sha256"]:
        problem = "its SHA-256 is not that of the manifest"
    else:
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
            if table.num_rows == shard["rows"]:
                return table
            problem = f"it has {table.num_rows} rows instead of {shard['rows']}"
        except (pa.ArrowException, OSError) as error:
            problem = str(error)
    raise ValueError(f"shard `{file}` is damaged: {problem}; {kind.mend}")


def finish_folder(
    folder: Path,
    schema: pa.Schema,
    shards: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    kind: FolderKind = FEATURE_FOLDER,
) -> None:
    """Write what `datasets.load_from_disk` needs beside the shards, and, last, the manifest.

    Args:
        folder: the folder.
        schema: of the shards.
        shards: their manifest entries, in order.
        facts: what else the manifest shall say; `files` has the checksums of files beside the shards.
        kind: what the folder is.
    """
    from datasets import DatasetInfo, Features

    fingerprint = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()[:16]
    state = {
        "_data_files": [{"filename": shard["file"]} for shard in shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    with tempfile.TemporaryDirectory() as written:  # it is not written whole or not at all
        DatasetInfo(features=Features.from_arrow_schema(schema)).write_to_directory(written)
        write_text(folder / "dataset_info.json", (Path(written) / "dataset_info.json").read_text(encoding="utf-8"))
    write_text(folder / "state.json", json.dumps(state, indent=1) + "\n")
    rows, lacking = sum(shard["rows"] for shard in shards), Counter[str]()
    for shard in shards:
        lacking.update(shard.get("rows_without", {}))
    version = format_facts(lacking)
    manifest = {"format_version": version.pop("format_version"), "rows": rows, **facts, **version}
    manifest["shards"] = list(shards)
    write_json(folder / kind.manifest, manifest, indent=1)


def check_target(path: Path, overwrite: bool = False, kind: FolderKind = FEATURE_FOLDER) -> None:
    """Raise ValueError where a folder may not be written to `path`."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / kind.manifest).is_file():
        raise ValueError(f"`{path}` exists and is not a {kind.name}; choose another path")
    if not overwrite:
        raise ValueError(f"`{path}` already holds a {kind.name}; choose another path or pass `overwrite=True`")
