"""Feature datasets as Parquet, the form they have on the Hub: writing, and opening a folder or a repository."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from sparc_hf.features.shards import DatasetFacts, FileChecksums, NewerFormat, check_version, format_facts
from sparc_hf.files.atomic_files import checksums_of, first_damage, new_file, write_json
from sparc_hf.files.checked_reading import Count, checked, read_json
from sparc_hf.model.stream_record import checked_stream_records

if TYPE_CHECKING:
    import datasets

HUB_PREFIX = "hf://datasets/"
METADATA_KEY = b"sparc_features"
DATA_FOLDER = "data"
ROWS_PER_GROUP = 1024
FILE_BYTES = 256 * 2**20
# Beside the files of a split, their SHA-256.
CHECKSUMS_FILE = "{}-checksums.json"
FACTS = ("streams", "label_names", "taxonomy", "source")


class _Checksums(TypedDict):
    files: FileChecksums


class _Facts(DatasetFacts):
    rows: Count
    streams: list[dict[str, Any]]


class SavableFeatures(Protocol):
    """What this module needs to know of a feature dataset."""

    streams: list[dict[str, Any]]
    label_names: list[str] | None
    taxonomy: Any
    source: Any
    table: pa.Table

    @property
    def rows_without(self) -> dict[str, int]:
        """Stream -> how many rows lack it."""
        ...

    def __len__(self) -> int: ...

    def record_batch(self, rows: slice) -> pa.RecordBatch:
        """Return rows with all their columns."""
        ...


@dataclass(frozen=True)
class ParquetSplit:
    """The Parquet files of one split, on this machine or on the Hub.

    Attributes:
        files: their paths, in order; for `read_table` paths on this machine, for `stream_rows` also `hf://` addresses.
        facts: stream records, label names, taxonomy, source, `rows`, the number of rows of the split, and, where rows
            lack streams, `rows_without`, how many by stream.
    """

    files: list[str]
    facts: dict[str, Any]

    def read_table(self) -> pa.Table:
        """Return all rows, memory-mapped from datasets' cache.

        Raises:
            ValueError: if a file is damaged or rows are missing.
        """
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            dataset = datasets.load_dataset("parquet", data_files=self.files, split="train")
        except (DatasetsError, pa.ArrowException, OSError) as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"a Parquet file beside `{self.files[0]}` is damaged: {str(cause).splitlines()[0]}"
            ) from error
        table: pa.Table = dataset.data.table.replace_schema_metadata(dataset.features.arrow_schema.metadata)
        if table.num_rows != self.facts["rows"]:
            raise ValueError(
                f"the {len(self.files)} Parquet files beside `{self.files[0]}` should have {self.facts['rows']} rows, "
                f"but they have {table.num_rows}; files of the split are missing"
            )
        return table

    def stream_rows(self) -> "datasets.IterableDataset":
        """Return the rows as they are read, from the Hub with no more than a file at a time on this machine.

        Pages are compared with their checksums as they come.
        """
        import datasets
        from pyarrow.dataset import ParquetFragmentScanOptions

        options = ParquetFragmentScanOptions(page_checksum_verification=True)
        return datasets.load_dataset(
            "parquet", data_files=self.files, split="train", streaming=True, fragment_scan_options=options
        )


def write_parquet_split(features: SavableFeatures, folder: Path, split: str, file_bytes: int = FILE_BYTES) -> None:
    """Write a feature dataset as `data/<split>-<number>-of-<count>.parquet`, a row group in memory at a time.

    What is known beside the rows is in the metadata of every file's schema, under "sparc_features"; the files' SHA-256
    are in `data/<split>-checksums.json`.

    Args:
        features: the dataset.
        folder: the folder that gets `data`.
        split: its split, letters, digits and underscores.
        file_bytes: size to keep each file near to, before compression.

    Raises:
        ValueError: for an unusable name of a split, or no rows.
    """
    check_split_name(split)
    rows = len(features)
    if not rows:
        raise ValueError(f"the split `{split}` has no rows")
    (folder / DATA_FOLDER).mkdir(parents=True, exist_ok=True)
    facts = {name: getattr(features, name) for name in FACTS}
    version = format_facts(features.rows_without)
    stored = {"format_version": version.pop("format_version"), "rows": rows, **facts, **version}
    metadata = json.dumps(stored).encode()
    schema = features.table.schema
    schema = schema.with_metadata({**(schema.metadata or {}), METADATA_KEY: metadata})
    groups = range(0, rows, ROWS_PER_GROUP)
    bytes_per_group = max(1, features.record_batch(slice(0, ROWS_PER_GROUP)).nbytes)
    groups_per_file = max(1, file_bytes // bytes_per_group)
    files = -(-len(groups) // groups_per_file)
    streams = {record["name"] for record in features.streams}
    names = [f"{split}-{number:05d}-of-{files:05d}.parquet" for number in range(files)]
    # Dictionaries of floats only cost time.
    plain: Any = [field.name for field in schema if field.name not in streams]
    for number, name in enumerate(names):
        with (
            new_file(folder / DATA_FOLDER / name) as file,
            pq.ParquetWriter(file, schema, use_dictionary=plain, write_page_checksum=True) as writer,
        ):
            for start in groups[number * groups_per_file : (number + 1) * groups_per_file]:
                batch = features.record_batch(slice(start, start + ROWS_PER_GROUP))
                writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    write_json(
        folder / DATA_FOLDER / CHECKSUMS_FILE.format(split), {"files": checksums_of(folder / DATA_FOLDER, names)}
    )


def check_split_name(split: str) -> None:
    """Raise ValueError for a name that Parquet files of a split cannot have."""
    if not re.fullmatch(r"\w+", split):
        raise ValueError(f"a split must be named by letters, digits and underscores, but it is {split!r}")


def is_parquet_address(address: str | os.PathLike) -> bool:
    """Return whether this is `hf://datasets/...`, a folder that `write_parquet_split` wrote, or a split of one."""
    if str(address).startswith(HUB_PREFIX):
        return True
    folder = Path(address)
    return bool(_local_files(folder)) or (not folder.exists() and bool(_local_files(folder.parent)))


def open_parquet(address: str | os.PathLike, streaming: bool = False, verify: bool = True) -> ParquetSplit:
    """Find the Parquet files of a feature dataset and what is known of it.

    Args:
        address: `hf://datasets/<owner>/<name>[@<revision>][/<split>]`, or a folder with `data/<split>-*.parquet`,
            perhaps followed by `/<split>`.
        streaming: leave the files on the Hub; by default those of the split are downloaded into the Hub's cache, from
            which they also open offline.
        verify: compare the SHA-256 of every file that is on this machine, or, where a dataset was pushed without them,
            the checksums of its pages; without it only sizes are compared.

    Raises:
        ValueError: for an address of another form, one that cannot be reached, a split that is missing or has to be
            chosen, files that are damaged, or Parquet files of another kind.
    """
    if str(address).startswith(HUB_PREFIX):
        return _open_remote(str(address), streaming, verify)
    folder = Path(address)
    split = None
    if not _local_files(folder):
        folder, split = folder.parent, folder.name
    files = _files_of_split([str(path) for path in _local_files(folder)], split, str(address))
    return _local_split(files, verify and not streaming)


def _schema_of(file: str, opened: Any = None) -> pa.Schema:
    """Return the schema of a Parquet file, from its path or from the opened file.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return pq.read_schema(opened or file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"`{file}` cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _local_split(files: list[str], verify: bool) -> ParquetSplit:
    """Return a split whose files are on this machine, after comparing them with their checksums."""
    folder = Path(files[0]).parent
    sums = folder / CHECKSUMS_FILE.format(_split_of(files[0]))
    problem = None
    try:
        if sums.is_file():
            problem = first_damage(folder, read_json(sums, _Checksums)["files"], verify)
        elif verify:
            for file in files:
                _check_pages(file)
    except (pa.ArrowException, OSError) as error:
        problem = str(error)
    if problem:
        raise ValueError(
            f"the Parquet files in `{folder}` are damaged ({problem}); write them again, or, where they came from the "
            "Hub, delete them from its cache and fetch them again"
        )
    return ParquetSplit(files, _facts(_schema_of(files[0]), files[0]))


def _check_pages(file: str) -> None:
    """Read a file once, a row group at a time; an error of pyarrow's where a page is not what its checksum says."""
    with pq.ParquetFile(file, page_checksum_verification=True) as opened:
        for group in range(opened.num_row_groups):
            opened.read_row_group(group)


def _open_remote(address: str, streaming: bool, verify: bool) -> ParquetSplit:
    from huggingface_hub import HfApi, HfFileSystem, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    match = re.fullmatch(
        r"(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<split>\w+))?", address[len(HUB_PREFIX) :]
    )
    if match is None:
        raise ValueError(f"`{address}` is not of the form {HUB_PREFIX}<owner>/<name>[@<revision>][/<split>]")
    repo, revision, split = match["repo"], match["revision"], match["split"]
    try:
        if streaming:
            # All files from one commit, whatever is pushed meanwhile.
            commit = HfApi().dataset_info(repo, revision=revision).sha
            system = HfFileSystem()
            paths = system.glob(f"datasets/{repo}@{commit}/{DATA_FOLDER}/*.parquet")
            files = _files_of_split([f"hf://{path}" for path in paths], split, address)
            with system.open(files[0].removeprefix("hf://")) as file:
                return ParquetSplit(files, _facts(_schema_of(files[0], file), files[0]))
        wanted = [f"{DATA_FOLDER}/{split or '*'}-*.parquet", f"{DATA_FOLDER}/{CHECKSUMS_FILE.format(split or '*')}"]
        folder = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=wanted)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no dataset `{repo}` on the Hub that you may read; check its name, and log in with "
            "`hf auth login` where it is private"
        ) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        raise ValueError(
            f"cannot reach `{address}`: {(str(error).strip().splitlines() or [repr(error)])[0]}"
        ) from error
    files = _files_of_split([str(path) for path in _local_files(Path(folder))], split, address)
    return _local_split(files, verify)


def _local_files(folder: Path) -> list[Path]:
    return sorted((folder / DATA_FOLDER).glob("*-of-*.parquet"))


def _files_of_split(files: Sequence[str], split: str | None, address: str) -> list[str]:
    splits = sorted({_split_of(file) for file in files})
    if split is None and len(splits) == 1:
        split = splits[0]
    if split is None and "train" in splits:
        split = "train"
    if split is None or split not in splits:
        content = f"the splits {splits}" if splits else f"no {DATA_FOLDER}/<split>-*.parquet"
        raise ValueError(f"`{address}` has {content}; write a split behind it, as in `{address.rstrip('/')}/test`")
    return sorted(file for file in files if Path(file).name.startswith(f"{split}-"))


def _split_of(file: str) -> str:
    return Path(file).name.rpartition("-of-")[0].rpartition("-")[0]


def _facts(schema: pa.Schema, file: str) -> dict[str, Any]:
    """Return what a file says of its dataset."""
    metadata = (schema.metadata or {}).get(METADATA_KEY)
    if metadata is None:
        raise ValueError(
            f"`{file}` does not say which streams it holds (no {METADATA_KEY.decode()} in its metadata); open it with "
            "`FeatureDataset.from_dataset(load_dataset(...), streams=...)`"
        )
    try:
        facts = checked(json.loads(metadata), dict[str, Any], METADATA_KEY.decode())
        check_version(facts, file)
        checked(facts, _Facts, METADATA_KEY.decode())
    except NewerFormat:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{file}` has damaged metadata: {error}") from error
    names = (*FACTS, "rows", *(["rows_without"] if "rows_without" in facts else []))
    return {name: facts.get(name) for name in names} | {"streams": checked_stream_records(facts["streams"])}
