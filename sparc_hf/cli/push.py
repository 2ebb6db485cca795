"""`sparc push`: publish a model, a feature dataset, a metric or the Space on the Hub."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparc_hf.features.parquet import CHECKSUMS_FILE, DATA_FOLDER
from sparc_hf.files.atomic_files import writing
from sparc_hf.files.atomic_folders import everything, new_folder
from sparc_hf.files.folder_lock import locked_folder
from sparc_hf.files.installed_folders import space_folder
from sparc_hf.files.output_folder import check_output_folder
from sparc_hf.hub.push import (
    PUSHED_FILES,
    check_login,
    check_repository_name,
    prepare_features,
    prepare_metric,
    prepare_model,
    push_folder,
)
from sparc_hf.space.publishing import PACKAGE_FOLDER, PACKAGE_WAYS, SHIPPED_FOLDER, prepare_space

KINDS = ("model", "features", "metric", "space")
# Files of a former push that go with the next where they are not in it.
REPLACED = {
    "model": list(PUSHED_FILES),
    "dataset": [f"{DATA_FOLDER}/*.parquet", f"{DATA_FOLDER}/{CHECKSUMS_FILE.format('*')}"],
    "space": [f"{PACKAGE_FOLDER}/*", f"{SHIPPED_FOLDER}/*"],
}


@dataclass
class PushArguments:
    """Flags of `sparc push`."""

    repo: str = field(metadata={"help": "Hub id, `owner/name`."})
    model: str | None = field(default=None, metadata={"help": "Folder of a model to push."})
    features: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders of feature datasets to push, one a split: split=folder, or the split's folder name."
        },
    )
    metric: str | None = field(default=None, metadata={"help": "Name of a metric to push as an evaluate module."})
    space: str | None = field(
        default=None, metadata={"help": "Folder of a Gradio Space to push; spaces_app is the package's own."}
    )
    package: str = field(
        default=PACKAGE_WAYS[0],
        metadata={
            "help": "How a Space gets this package: source, a copy beside app.py; index, this version from the "
            "package index, once it is released there.",
            "choices": list(PACKAGE_WAYS),
        },
    )
    demo: bool = field(
        default=True,
        metadata={
            "help": "Put the prepared demo into a Space that shows it (about 11 MB), so that its first start is "
            "quick; prepared now, in a few minutes, where `sparc space` has not yet done so."
        },
    )
    results: str | None = field(
        default=None, metadata={"help": "results.json of `sparc evaluate`, for a model's card."}
    )
    license: str | None = field(default=None, metadata={"help": "Licence of a feature dataset, for its card."})
    private: bool = field(default=False, metadata={"help": "Make the repository private, where it is new."})
    dry_run: str | None = field(
        default=None, metadata={"help": "Write what would be pushed into this new folder, and push nothing."}
    )


def run_push(args: PushArguments) -> dict[str, Any]:
    """Push one thing, or write what would be pushed.

    Returns:
        The repository's kind, its files, and its commit's address or the folder.

    Raises:
        ValueError: unless exactly one thing is given, and where it, the repository's name or the Hub refuses.
    """
    given = [kind for kind in KINDS if getattr(args, kind)]
    if len(given) != 1:
        raise ValueError(f"give one of --model, --features, --metric and --space, but there are {given or 'none'}")
    check_repository_name(args.repo)
    if args.dry_run is None:
        check_login(args.repo)
    else:
        check_output_folder(args.dry_run, "dry_run")
    with _folder_for(args.dry_run) as folder:
        if args.model:
            prepare_model(Path(args.model), folder, repo=args.repo, results=args.results)
        elif args.features:
            prepare_features(_splits(args.features), folder, repo=args.repo, license=args.license)
        elif args.metric:
            prepare_metric(args.metric, folder, repo=args.repo)
        else:
            space = Path(args.space or "")
            own = args.space == "spaces_app" and not space.exists()
            prepare_space(space_folder() if own else space, folder, package=args.package, with_demo=args.demo)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        kind = {"model": "model", "features": "dataset"}.get(given[0], "space")
        if args.dry_run is not None:
            return {"kind": kind, "files": files, "folder": args.dry_run}
        return {
            "kind": kind,
            "files": files,
            "commit": push_folder(folder, args.repo, kind, private=args.private, replaced=REPLACED.get(kind)),
        }


@contextmanager
def _folder_for(dry_run: str | None) -> Iterator[Path]:
    """Give a new folder, which is kept under its name only if all goes well."""
    with ExitStack() as opened:
        if dry_run is None:
            yield Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="sparc-push-")))
            return
        opened.enter_context(locked_folder(dry_run))
        if Path(dry_run).exists():
            raise ValueError(f"`dry_run` must be a new folder, but {dry_run} exists")
        opened.enter_context(writing(f"`{dry_run}`", "make room and run the same again"))
        yield opened.enter_context(new_folder(dry_run, everything))


def _splits(given: Sequence[str]) -> dict[str, Path]:
    splits: dict[str, Path] = {}
    for text in given:
        name, separator, path = text.partition("=")
        split, folder = (name, Path(path)) if separator else (Path(text).name, Path(text))
        if split in splits:
            raise ValueError(f"two folders are given for the split `{split}`; name them as split=folder")
        splits[split] = folder
    return splits
