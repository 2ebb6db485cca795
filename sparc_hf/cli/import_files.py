"""`sparc import`: bring features and checkpoints of the two earlier projects into today's formats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.shards import check_target
from sparc_hf.features.stream_records import parse_streams
from sparc_hf.files.output_folder import check_output_folder
from sparc_hf.legacy.hdf5_features import AnalysisCache, FeatureFiles, configured_files, is_analysis_cache
from sparc_hf.legacy.importing import LegacyFeatures, import_features
from sparc_hf.legacy.npz_activations import ActivationTree, has_activations
from sparc_hf.model.stream_record import check_names_differ, check_stream_name

if TYPE_CHECKING:
    from sparc_hf.model.modeling_sparc import SparcModel

HDF5_SUFFIXES = (".h5", ".hdf5")
CHECKPOINT_SUFFIXES = (".pth", ".pt")
CHECKPOINT_FILES = ("msae_checkpoint.pth", "**/uni_*_checkpoint_*.pth")


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
    stream_files = _stream_files(args.source)
    source = Path(args.source[0])
    checkpoint = _checkpoint_of(source) if stream_files is None else None
    if checkpoint is not None:
        # Not at the top: transformers' model classes take more memory than the import of features.
        from sparc_hf.legacy.sparc_checkpoints import import_checkpoint
        from sparc_hf.legacy.usae_checkpoints import import_usae_checkpoints

        is_usae = source.is_dir() and checkpoint.name != CHECKPOINT_FILES[0]
        load = import_usae_checkpoints if is_usae else import_checkpoint
        return load(
            source if is_usae else checkpoint,
            args.output,
            run_config=args.run_config,
            records=records,
            overwrite=args.overwrite,
            complete=complete,
        )
    check_target(Path(args.output))
    if stream_files is not None:
        files: LegacyFeatures = FeatureFiles(stream_files)
    elif source.suffix == ".json":
        files = FeatureFiles(configured_files(source, args.split or "train"))
    elif source.suffix in HDF5_SUFFIXES and is_analysis_cache(source):
        files = AnalysisCache(source)
    elif source.suffix in HDF5_SUFFIXES:
        raise ValueError(f"`{source}` is a feature file of one stream; say which: `--source name={source}`")
    elif source.is_dir() and has_activations(source):
        files = ActivationTree(source, split=args.split, models=args.models, grid=args.grid)
    else:
        state = "is none of these" if source.exists() else "does not exist"
        raise ValueError(
            f"`{source}` {state}: `source` is name=file.h5 for each stream, a configuration .json, an analysis cache "
            ".h5, a folder of npz activations, or a checkpoint .pth or its folder"
        )
    return import_features(files, args.output, dtype=args.dtype, records=records)  # pyright: ignore[reportArgumentType] argparse checked it


def run_import_files(args: Any) -> dict[str, Any]:
    cards = []

    def write_card(folder: Path) -> None:
        from sparc_hf.hub.cards import write_model_card
        from sparc_hf.model_folder import read_settings

        title = Path(args.output).resolve().name
        card = write_model_card(folder, settings=read_settings(folder), title=title, repo=args.output)
        cards.append(Path(args.output) / card.name)

    imported = run_import(args, complete=write_card)
    if isinstance(imported, FeatureDataset):
        return {"features": args.output, "rows": len(imported), "streams": imported.streams}
    config = imported.config
    return {
        "model": args.output,
        "latents": config.num_latents,
        "selection": config.selection,
        "streams": config.stream_names,
        "card": str(cards[0]),
    }


def _stream_files(sources: Sequence[str]) -> dict[str, Path] | None:
    """Return stream name -> file from `name=file` strings, or None for one source of another kind."""
    pairs = [source.partition("=") for source in sources]
    # The path of one source may have that sign in it too.
    if len(pairs) == 1 and not (pairs[0][1] and pairs[0][0].isidentifier()):
        return None
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"several sources must be name=file.h5, each name once, but they are {list(sources)}")
    names = [name for name, _, _ in pairs]
    for name in names:
        check_stream_name(name)
    check_names_differ(names)
    return {name: Path(file) for name, _, file in pairs}


def _checkpoint_of(path: Path) -> Path | None:
    """Return the checkpoint that a path is or holds; of a Universal SAE run, one of its models."""
    if path.suffix in CHECKPOINT_SUFFIXES:
        return path
    return next((file for pattern in CHECKPOINT_FILES for file in sorted(path.glob(pattern))), None)
