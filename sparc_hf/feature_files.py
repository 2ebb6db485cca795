"""Folders of Arrow shards (feature datasets, code tables): shards, the manifest, and renames that leave no halves."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pyarrow as pa

from sparc_hf.plain_files import Count, FileName, Limit, Taxonomy, checked, read_json

FORMAT_VERSION = 1
MANIFEST_NAME = "sparc_features.json"
# Arrow's lists and numpy's indices of this package end there.
LARGEST_SIZE = 2**31 - 1
MEND = "copy it again, or run the command that made the dataset once more with `--repair`"

StreamRecords = Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]]


class ShardEntry(TypedDict):
    """What a manifest says of one file."""

    file: FileName
    rows: Count
    bytes: Count
    sha256: str


class Manifest(TypedDict):
    """What the manifests of all kinds of folders have in common."""

    rows: Count
    shards: Annotated[list[ShardEntry], Limit("a list of at least one shard", bool)]


class DatasetFacts(TypedDict, total=False):
    """What is known of a feature dataset beside its streams."""

    label_names: list[str] | None
    taxonomy: Taxonomy | None
    source: Any
    rows_skipped: Count


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
    """

    manifest: str
    shape: Any
    name: str
    remedy: str


FEATURE_FOLDER = FolderKind(
    MANIFEST_NAME,
    FeatureManifest,
    "feature dataset",
    "make one with `sparc extract`, or wrap a table with `FeatureDataset.from_dataset`",
)


def checked_streams(streams: StreamRecords) -> list[dict[str, Any]]:
    """Return the stream records as a list of plain dicts, in order.

    Raises:
        ValueError: for no stream, a name that is no identifier or occurs twice, a bad `hidden_size`, or a value that
            JSON cannot hold.
    """
    if isinstance(streams, Mapping):
        streams = [{**record, "name": name} for name, record in streams.items()]
    try:
        records = json.loads(json.dumps([dict(record) for record in streams]))
    except TypeError as error:
        raise ValueError(f"stream records must be made of JSON values: {error}") from error
    for record in records:
        name, size = record.get("name"), record.get("hidden_size")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"a stream name must be a Python identifier such as `clip_img`, but it is {name!r}")
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST_SIZE:
            raise ValueError(f"stream `{name}` needs `hidden_size` as a positive integer, but it is {size!r}")
    names = [record["name"] for record in records]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"at least one stream is needed and each name may occur once, but the names are {names}")
    return records


def write_shard(folder: Path, name: str, batch: pa.RecordBatch) -> dict[str, Any]:
    """Write one record batch as the file `name`, which appears only when it is whole; return its manifest entry."""
    temporary = folder / f"{name}.tmp"
    try:
        with open(temporary, "wb") as file:
            with pa.ipc.new_stream(file, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
    except OSError:  # half a shard on a full disk would take the room that the next try needs
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(folder)
    path = folder / name
    return {"file": name, "rows": batch.num_rows, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def read_manifest(folder: Path, kind: FolderKind = FEATURE_FOLDER) -> dict[str, Any]:
    """Read the manifest of a feature dataset, or of another kind of folder.

    Raises:
        FileNotFoundError: if there is no such folder, or it is of another kind.
        ValueError: if the manifest is damaged or of a newer format.
    """
    file = folder / kind.manifest
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder `{folder}`")
    if not file.is_file():
        raise FileNotFoundError(f"`{folder}` is not a {kind.name}: it has no {kind.manifest}; {kind.remedy}")
    try:
        manifest = read_json(file, dict[str, Any])
        check_version(manifest, f"{folder}")
        return checked(manifest, kind.shape, file.name)
    except NewerFormat:
        raise
    except ValueError as error:
        raise ValueError(f"`{file}` is damaged: {error}") from error


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


def joined(tables: Sequence[pa.Table], folder: Path) -> pa.Table:
    """Return the rows of all shards.

    Raises:
        ValueError: where they do not have the same columns.
    """
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise ValueError(f"the shards of `{folder}` do not have the same columns ({error}); {MEND}") from error


def open_shard(folder: Path, shard: Mapping[str, Any], verify: bool = True) -> pa.Table:
    """Map one shard into memory after comparing it with its manifest entry, by SHA-256 if `verify` is true.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not the file that was written.
    """
    file = folder / shard["file"]
    if not file.is_file():
        raise FileNotFoundError(f"shard `{file}` is missing; {MEND}")
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
    raise ValueError(f"shard `{file}` is damaged: {problem}; {MEND}")


def finish_folder(
    folder: Path,
    schema: pa.Schema,
    shards: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    kind: FolderKind = FEATURE_FOLDER,
) -> None:
    """Write what `datasets.load_from_disk` needs beside the shards, and the manifest."""
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
    DatasetInfo(features=Features.from_arrow_schema(schema)).write_to_directory(str(folder))
    write_json(folder / "state.json", state)
    rows = sum(shard["rows"] for shard in shards)
    manifest = {"format_version": FORMAT_VERSION, "rows": rows, **facts, "shards": list(shards)}
    write_json(folder / kind.manifest, manifest)


def check_target(path: Path, overwrite: bool = False, kind: FolderKind = FEATURE_FOLDER) -> None:
    """Raise ValueError where a folder may not be written to `path`."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / kind.manifest).is_file():
        raise ValueError(f"`{path}` exists and is not a {kind.name}; choose another path")
    if not overwrite:
        raise ValueError(f"`{path}` already holds a {kind.name}; choose another path or pass `overwrite=True`")


def publish(folder: Path, path: Path, overwrite: bool = False, kind: FolderKind = FEATURE_FOLDER) -> None:
    """Rename a finished `folder` to `path`, replacing an older one of its kind if `overwrite` says so."""
    check_target(path, overwrite, kind)
    retired = path.with_name(path.name + ".retired")
    if path.exists():
        os.replace(path, retired)
    os.replace(folder, path)
    _sync_folder(path.parent)
    if retired.exists():
        shutil.rmtree(retired)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, sync it and rename it, so that readers see all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
