"""What the two earlier projects left behind, told apart by its files and brought into today's formats."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm.auto import tqdm

from sparc_hf.feature_files import check_target
from sparc_hf.feature_writer import FeatureWriter
from sparc_hf.features import FeatureDataset
from sparc_hf.legacy_hdf5 import AnalysisCache, FeatureFiles, configured_files, is_analysis_cache
from sparc_hf.legacy_npz import ActivationTree, has_activations
from sparc_hf.output_folder import check_output_folder
from sparc_hf.sources import parse_streams

if TYPE_CHECKING:
    from sparc_hf.modeling_sparc import SparcModel

HDF5_SUFFIXES = (".h5", ".hdf5")
CHECKPOINT_SUFFIXES = (".pth", ".pt")
CHECKPOINT_FILES = ("msae_checkpoint.pth", "**/uni_*_checkpoint_*.pth")
LegacyFeatures = FeatureFiles | AnalysisCache | ActivationTree


@dataclass
class ImportArguments:
    """Flags of `sparc import`."""

    source: list[str] = field(
        metadata={
            "help": "What to import: name=file.h5 for each stream, a configuration .json that names them, an analysis "
            "cache .h5, a folder of npz activations, or a checkpoint .pth (or its folder)."
        }
    )
    output: str = field(metadata={"help": "Folder for the feature dataset or the model."})
    split: str | None = field(
        default=None,
        metadata={"help": "Split of a configuration (train, val, test; default train) or of a tree of activations."},
    )
    encoders: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What made the streams, which the old files do not say: name=encoder:modality[:pooling] each."
        },
    )
    models: list[str] = field(
        default_factory=list, metadata={"help": "Models of npz activations to read, in order (default: all)."}
    )
    grid: list[int] | None = field(
        default=None,
        metadata={"help": "Rows and columns of the common grid of npz activations (default: the smallest of theirs)."},
    )
    dtype: str = field(
        default="float32", metadata={"help": "How features are stored.", "choices": ["float32", "float16"]}
    )
    run_config: str | None = field(
        default=None,
        metadata={"help": "The run_config.json or YAML of a checkpoint (default: the one beside it)."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that is in the output folder."})


def run_import(args: ImportArguments, complete: Callable[[Path], Any] | None = None) -> "FeatureDataset | SparcModel":
    """Import what the sources are.

    Args:
        args: the flags.
        complete: adds to a model's folder what else belongs to it, such as its card, before it appears.

    Raises:
        ValueError: for sources of no known kind, and as the importers of each kind.
    """
    records = parse_streams(args.encoders)
    check_output_folder(args.output)
    if args.grid is not None and (len(args.grid) != 2 or min(args.grid) < 1):
        raise ValueError(f"`grid` must be rows and columns, such as `14 14`, but it is {args.grid}")
    paths = _stream_files(args.source)
    only = Path(args.source[0])
    checkpoint = _checkpoint_of(only) if paths is None else None
    if checkpoint is not None:
        # Not at the top: transformers' model classes take more memory than the import of features.
        from sparc_hf.legacy_checkpoints import import_checkpoint
        from sparc_hf.legacy_usae import import_usae_checkpoints

        is_usae = only.is_dir() and checkpoint.name != CHECKPOINT_FILES[0]
        load = import_usae_checkpoints if is_usae else import_checkpoint
        return load(
            only if is_usae else checkpoint,
            args.output,
            run_config=args.run_config,
            records=records,
            overwrite=args.overwrite,
            complete=complete,
        )
    check_target(Path(args.output))
    if paths is not None:
        found: LegacyFeatures = FeatureFiles(paths)
    elif only.suffix == ".json":
        found = FeatureFiles(configured_files(only, args.split or "train"))
    elif only.suffix in HDF5_SUFFIXES and is_analysis_cache(only):
        found = AnalysisCache(only)
    elif only.suffix in HDF5_SUFFIXES:
        raise ValueError(f"`{only}` is a feature file of one stream; say which: `--source name={only}`")
    elif only.is_dir() and has_activations(only):
        found = ActivationTree(only, split=args.split, models=args.models, grid=args.grid)
    else:
        state = "is none of these" if only.exists() else "does not exist"
        raise ValueError(
            f"`{only}` {state}: `source` is name=file.h5 for each stream, a configuration .json, an analysis cache "
            ".h5, a folder of npz activations, or a checkpoint .pth or its folder"
        )
    return import_features(found, args.output, dtype=args.dtype, records=records)  # pyright: ignore[reportArgumentType] argparse checked it


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
