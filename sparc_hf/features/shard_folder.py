"""ShardFolder: numbered shards that survive a kill at any moment, from the first one to the finished dataset."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pyarrow as pa

from sparc_hf.features.shards import (
    COMPLETE_VERSION,
    FEATURE_FOLDER,
    MANIFEST_NAME,
    NewerFormat,
    ShardEntry,
    check_target,
    check_version,
    finish_folder,
    joined,
    open_shard,
    read_manifest,
    write_shard,
)
from sparc_hf.files.atomic_files import checksums_of, write_json, write_text, writing
from sparc_hf.files.atomic_folders import place, recover, refuse_fixed_place, remove_tree
from sparc_hf.files.checked_reading import Limit, read_json

logger = logging.getLogger(__name__)

SETTINGS_NAME = "sparc_partial.json"
PROGRESS_FOLDER = "progress"
# Of samples that no row was made of, and of rows that lack streams which could not be made.
SKIPPED_NAME = "skipped.jsonl"
INCOMPLETE_NAME = "incomplete.jsonl"


class _Skipped(TypedDict, total=False):
    skipped: list[dict[str, Any]]
    incomplete: list[dict[str, Any]]


class _FullShard(ShardEntry, _Skipped):
    pass


class _EmptyShard(_Skipped):
    rows: Annotated[int, Limit("0 rows", lambda rows: rows == 0)]


class ShardFolder:
    """The shards of a feature dataset that is being made, or repaired.

    Shard number i is `data-<i>.arrow`. It counts when the folder `progress` has its manifest entry, which is written
    after it. Everything lies in `<path>.partial` until `finish` gives the folder its name. Several processes may save
    shards of different numbers at once.

    Args:
        path: the finished folder.
        settings: what a run that goes on must have in common with the one before, as JSON values: `streams`,
            `label_names`, `taxonomy`, `source`, `columns`, `rows_per_shard`.
        repair: where the dataset is finished, allow its damaged shards to be saved again.

    Raises:
        ValueError: if `path` or `<path>.partial` holds something else, or was made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, repair: bool = False):
        self.path = path = path.resolve()
        self.partial = path.with_name(path.name + ".partial")
        refuse_fixed_place(path)
        recover(path)
        self.settings = {"format_version": COMPLETE_VERSION, **json.loads(json.dumps(settings))}
        self.finished = (path / MANIFEST_NAME).is_file()
        self._manifest: dict[str, Any] = {}
        if self.finished:
            self.folder = path
            self._manifest = read_manifest(path)
            self._refuse_other_settings(self._manifest, f"`{path}` already holds a feature dataset that")
            if not repair:
                self._remove_notes()  # left by a kill right after the folder got its name
        else:
            if repair:
                raise ValueError(f"there is no feature dataset to repair at `{path}`; leave `repair` out to make it")
            check_target(path)
            self.folder = self.partial
            self._begin()

    @property
    def streams(self) -> list[dict[str, Any]] | None:
        """The stream records of the finished dataset that is being repaired; None for a new one."""
        return self._manifest.get("streams")

    @property
    def finished_shards(self) -> list[dict[str, Any]]:
        """The manifest entries of the finished dataset; none for a new one."""
        return self._manifest.get("shards", [])

    def entry(self, number: int) -> dict[str, Any] | None:
        """Return the manifest entry of a shard that is whole by its checksum; None where it has to be made."""
        entry = self._entry(number)
        if entry is None or not entry["rows"]:
            return entry
        try:
            open_shard(self.folder, entry, verify=True)
        except (ValueError, OSError) as error:
            logger.warning("%s", error)
            return None
        return entry

    def save(self, number: int, batch: pa.RecordBatch | None, **facts: Any) -> dict[str, Any]:
        """Write a shard, or note that all its rows were left out (None), and return its manifest entry.

        Raises:
            OSError: saying what to do, if it cannot be written, as on a full disk. Other shards stay as they are.
        """
        entry: dict[str, Any] = {"number": number, "rows": 0, **facts}
        with self._writing(f"shard {number}"):
            (self.folder / PROGRESS_FOLDER).mkdir(exist_ok=True)
            if batch is not None:
                streams = [record["name"] for record in self.settings["streams"]]
                entry |= write_shard(self.folder, f"data-{number:05d}.arrow", batch, streams)
            write_json(self._progress_file(number), entry)
        return entry

    def open_table(self, count: int) -> pa.Table:
        """Return the rows of shards 0 to `count` - 1, memory-mapped.

        Raises:
            ValueError: if one is missing or damaged.
        """
        return joined([open_shard(self.folder, entry) for entry in self._all(count) if entry["rows"]], self.folder)

    def finish(self, schema: pa.Schema, facts: Mapping[str, Any], count: int) -> None:
        """Write the manifest over shards 0 to `count` - 1, and give the folder its final name.

        Raises:
            ValueError: if one of them is missing, or there are no rows at all.
            OSError: saying what to do, if something cannot be written.
        """
        entries = self._all(count)
        shards = [entry for entry in entries if entry["rows"]]
        if not shards:
            raise ValueError(f"no rows were left for `{self.path}`; a feature dataset needs at least one row")
        failures = {
            SKIPPED_NAME: [row for entry in entries for row in entry.get("skipped", [])],
            INCOMPLETE_NAME: [row for entry in entries for row in entry.get("incomplete", [])],
        }
        layout = {key: self.settings[key] for key in ("columns", "rows_per_shard") if key in self.settings}
        manifest = {**facts, **layout, "rows_skipped": len(failures[SKIPPED_NAME])}
        with self._writing("the manifest"):
            if listed := self._write_failures(failures):
                manifest["files"] = checksums_of(self.folder, listed)
            finish_folder(self.folder, schema, shards, manifest)
            if not self.finished:
                for litter in self.partial.glob(".*.tmp"):
                    litter.unlink()
                place(self.partial, self.path, FEATURE_FOLDER.owns, last=MANIFEST_NAME)
        self._remove_notes()

    def _write_failures(self, failures: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
        """Write a file of one line a row for each kind of failures that there is, and return their names."""
        for name, rows in failures.items():
            if rows:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_text(self.folder / name, "".join(lines))
            else:  # of what was made before a repair
                (self.folder / name).unlink(missing_ok=True)
        return [name for name, rows in failures.items() if rows]

    def _writing(self, what: str) -> Any:
        return writing(f"{what} of `{self.folder}`", "the shards before it are kept: make room and run the same again")

    def _remove_notes(self) -> None:
        """Remove what only an unfinished folder needs."""
        (self.path / SETTINGS_NAME).unlink(missing_ok=True)
        remove_tree(self.path / PROGRESS_FOLDER)

    def _begin(self) -> None:
        """Note the settings of a new folder, or compare them with those an earlier run began with."""
        file = self.partial / SETTINGS_NAME
        self.partial.mkdir(parents=True, exist_ok=True)
        # A run that was killed while it wrote just that has left an unfinished file.
        if all(entry.name.startswith(f".{SETTINGS_NAME}.") for entry in self.partial.iterdir()):
            with self._writing("the settings"):
                write_json(file, {"settings": self.settings})
        try:
            earlier_settings = read_json(file, dict[str, dict[str, Any]])["settings"]
            check_version(earlier_settings, f"{self.partial}")
            self._refuse_other_settings(earlier_settings, f"`{self.partial}`")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if "other settings" in str(error) or isinstance(error, NewerFormat):
                raise
            raise ValueError(
                f"`{self.partial}` is in the way: it is not an unfinished feature dataset (no readable "
                f"{SETTINGS_NAME}); delete or rename that folder"
            ) from error

    def _refuse_other_settings(self, earlier_settings: Mapping[str, Any], what: str) -> None:
        differing = [
            key
            for key in self.settings
            # The version of a finished folder depends on its rows; it was looked at on reading.
            if key != "format_version" and _comparable(earlier_settings.get(key)) != _comparable(self.settings[key])
        ]
        if differing:
            names = ", ".join(f"`{key}`" for key in sorted(differing))
            raise ValueError(
                f"{what} was begun with other settings ({names} differ); "
                "repeat the earlier settings to go on, choose another path, or delete that folder to start again"
            )

    def _progress_file(self, number: int) -> Path:
        return self.folder / PROGRESS_FOLDER / f"{number:05d}.json"

    def _entry(self, number: int) -> dict[str, Any] | None:
        try:
            return read_json(self._progress_file(number), _FullShard | _EmptyShard)
        except ValueError:
            entries = [entry for entry in self._manifest.get("shards", ()) if entry.get("number") == number]
            return entries[0] if entries else None

    def _all(self, count: int) -> list[dict[str, Any]]:
        entries = [self._entry(number) for number in range(count)]
        if None in entries:
            raise ValueError(
                f"shard {entries.index(None)} is not in `{self.folder}`; all processes and machines must write to one "
                "folder that each of them sees"
            )
        return [entry for entry in entries if entry is not None]


def _comparable(value: Any) -> Any:
    """Leave out what is found only at the end: the statistics in stream records."""
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    if isinstance(value, dict) and value.get("normalize") == "standardize":
        return {key: item for key, item in value.items() if key not in ("mean", "std")}
    return value
