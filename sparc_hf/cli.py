"""The `sparc` command: parse, build settings, call one library function, print JSON.

Only the chosen command's modules are imported, so that `sparc --help` answers at once.
"""

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sparc_hf.command_guards import check_address, locked_folders, memory_sentence, yes_or_no
from sparc_hf.plain_files import read_yaml
from sparc_hf.user_errors import is_users


@dataclass(frozen=True)
class Command:
    """One verb of the command line.

    Attributes:
        summary: its line in `sparc --help`.
        arguments: "module:Class" of the dataclass whose fields are its flags.
        run: takes the filled dataclass and returns what to print, as JSON-ready values.
        leading: the flag whose values may also be given bare, right after the command.
        writes: the flags that name folders it writes into, which no other process may do at the same time.
        is_shared: whether the processes of a launcher do it together.
    """

    summary: str
    arguments: str
    run: Callable[[Any], Any]
    leading: str | None = None
    writes: tuple[str, ...] = ()
    is_shared: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for unusable input, 128 + n when stopped by signal n."""
    chosen, rest = _choose(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("sparc_hf").setLevel(logging.INFO)
    command = COMMANDS[chosen]
    settings: Any = None
    try:
        settings, wait = _settings(chosen, command, rest)
        with locked_folders(settings, command.writes, wait=wait, is_shared=command.is_shared):
            result = command.run(settings)
    except KeyboardInterrupt:
        return _fail(chosen, "interrupted", 130)
    except Exception as error:
        stopped_by = getattr(error, "signal_number", None)  # of a run that saved its state and left
        memory = memory_sentence(error, settings)
        if stopped_by is None and memory is None and not is_users(error):
            raise
        return _fail(chosen, memory or str(error), 2 if stopped_by is None else 128 + stopped_by)
    if result is not None:
        sys.stdout.write(result if isinstance(result, str) else json.dumps(result, indent=2) + "\n")
    return 0


def _choose(argv: Sequence[str]) -> tuple[str, list[str]]:
    parser = argparse.ArgumentParser(
        prog="sparc",
        description="One sparse concept space for many frozen vision and language encoders.",
        epilog="`sparc COMMAND --help` lists a command's flags. --config FILE and --preset NAME give any of them "
        "from YAML or JSON; flags on the command line win.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        verbs.add_parser(name, help=command.summary, add_help=False)
    given, rest = parser.parse_known_args(argv[:1])
    if given.version:
        from sparc_hf.version import __version__

        sys.stdout.write(f"sparc_hf {__version__}\n")
        parser.exit()
    if given.command is None:
        parser.print_help()
        parser.exit(2)
    return given.command, [*rest, *argv[1:]]


def _settings(name: str, command: Command, argv: Sequence[str]) -> tuple[Any, bool]:
    """Fill the command's dataclass from preset, config file and flags, the later ones winning.

    Returns:
        The dataclass, and whether to wait for another process that writes into the same folder.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", help="YAML or JSON file with any of these flags")
    files.add_argument("--preset", help="settings that come with the package: " + ", ".join(_presets()))
    if command.writes:
        wait_help = "wait until another process that writes into the same folder is done, instead of refusing"
        files.add_argument("--wait", nargs="?", const=True, default=False, type=yes_or_no, help=wait_help)
    given, flags = files.parse_known_args(argv)
    module, _, class_name = command.arguments.partition(":")
    arguments = getattr(importlib.import_module(module), class_name)

    from transformers import HfArgumentParser
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a second's loading needs no bar
    parser = HfArgumentParser(arguments, prog=f"sparc {name}", description=command.summary, parents=[files])
    # One sentence instead of the usage text, which is longer than a screen.
    parser.error = lambda message: parser.exit(2, f"sparc {name}: {message}; see `sparc {name} --help`\n")
    defaults: list[str] = []
    if given.preset is not None:
        if given.preset not in _presets():
            raise ValueError(f"there is no preset `{given.preset}`; the presets are {sorted(_presets())}")
        defaults += _flags_of(_presets()[given.preset], name)
    if given.config is not None:
        defaults += _flags_of(Path(given.config), name)
    bare = 0
    while command.leading and bare < len(flags) and not flags[bare].startswith("-"):
        bare += 1
    if bare:
        flags = [f"--{command.leading}", *flags]
    flags += ["--wait"] if getattr(given, "wait", False) else []
    # Behind the filled dataclass come the parsed flags that all commands have, and what no flag takes.
    filled, *common, unknown = parser.parse_args_into_dataclasses(
        [*defaults, *flags], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise ValueError(f"there are no flags {unknown}; see `sparc {name} --help`")
    return filled, any(getattr(flags, "wait", False) for flags in common)


def _presets() -> dict[str, Path]:
    return {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}


def _flags_of(file: Path, command: str) -> list[str]:
    """Return a settings file as command-line flags; it is flat, or has one section a command."""
    if not file.is_file():
        raise ValueError(f"there is no settings file {file}")
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold settings as `name: value`, but it holds {type(content).__name__}")
    if content and all(isinstance(value, dict) and key in COMMANDS for key, value in content.items()):
        content = content.get(command, {})
    flags: list[str] = []
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str | int | float | date) or one is None for one in values):
            raise ValueError(f"`{key}` in {file} must be one value or a list of them, but it holds values in others")
        if value is not None:
            flags += [f"--{key}", *map(str, values)]
    return flags


def _fail(command: str, message: str, status: int) -> int:
    sys.stderr.write(f"sparc {command}: {' '.join(message.split())}\n")
    return status


def _run_extract(args: Any) -> dict[str, Any] | None:
    from sparc_hf.extraction import run_extraction

    features = run_extraction(args)
    if int(os.environ.get("RANK", "0")) > 0:  # of several processes one speaks
        return None
    skipped = features.rows_skipped
    return {"features": args.output, "rows": len(features), "rows_skipped": skipped, "streams": features.streams}


def _run_train(args: Any) -> dict[str, Any] | None:
    from accelerate import PartialState

    from sparc_hf.hub import write_model_card
    from sparc_hf.training import train

    def write_card(folder: Path) -> None:
        title = Path(args.output_dir).resolve().name
        write_model_card(folder, settings=args.to_dict(), title=title, repo=args.output_dir)

    model = train(args, complete=write_card)
    if not PartialState().is_main_process:
        return None
    return {"model": args.output_dir, "latents": model.config.num_latents, "streams": model.config.stream_names}


def _run_encode(args: Any) -> dict[str, Any]:
    from sparc_hf.codes import CODE_FOLDER, CodeTable, encode_features
    from sparc_hf.feature_files import check_target
    from sparc_hf.features import FeatureDataset
    from sparc_hf.modeling_sparc import SparcModel
    from sparc_hf.output_folder import check_output_folder
    from sparc_hf.top_samples import TOP_SAMPLES_FILE, top_samples, write_top_samples

    if args.top_samples < 0 or args.batch_size < 1:
        raise ValueError(
            f"`top_samples` must not be negative and `batch_size` at least 1, but they are {args.top_samples} and "
            f"{args.batch_size}"
        )
    check_output_folder(args.output)
    check_target(Path(args.output), args.overwrite, CODE_FOLDER)

    def write_top(codes: CodeTable, folder: Path) -> None:
        write_top_samples(top_samples(codes, args.top_samples), folder / TOP_SAMPLES_FILE)

    codes = encode_features(
        SparcModel.from_pretrained(args.model),
        FeatureDataset.load(args.features, verify=not args.no_verify),
        encoding=args.encoding,
        batch_size=args.batch_size,
        output=args.output,
        overwrite=args.overwrite,
        complete=write_top if args.top_samples else None,
    )
    printed = {"codes": args.output, "rows": len(codes), "streams": codes.streams, "encoding": codes.encoding}
    if args.top_samples:
        printed["top_samples"] = str(Path(args.output) / TOP_SAMPLES_FILE)
    return printed


def _run_evaluate(args: Any) -> dict[str, Any]:
    from sparc_hf.concepts import concept_names
    from sparc_hf.evaluation import EvaluationSettings, evaluate_models
    from sparc_hf.features import FeatureDataset
    from sparc_hf.modeling_sparc import SparcModel
    from sparc_hf.report import check_report_folder, model_names, write_report

    settings = EvaluationSettings(
        batch_size=args.batch_size,
        replicates=args.replicates,
        retrieval_rows=args.retrieval_rows,
        probes=not args.no_probes,
        seed=args.seed,
        dataset=Path(args.features).name,
    )
    if args.output is not None:
        check_report_folder(Path(args.output))
    models = {name: SparcModel.from_pretrained(path) for name, path in model_names(args.models).items()}
    localize = _localizer(args, models.values()) if args.masks else None
    # Last, because all rows are compared with their checksums.
    features = FeatureDataset.load(args.features, verify=not args.no_verify)
    evaluations = evaluate_models(models, features, settings)
    if localize is not None:
        for name, evaluation in evaluations.items():
            evaluation.results["localization"] = localize(models[name])
    if args.output is not None:
        write_report(evaluations, args.output, names={name: concept_names(model) for name, model in models.items()})
    told = ("localization",) if localize else ()
    return {
        name: {encoding: evaluation.results[encoding]["headline"] for encoding in ("joint", "single")}
        | {part: evaluation.results[part] for part in told}
        for name, evaluation in evaluations.items()
    }


def _localizer(args: Any, models: Iterable[Any]) -> Callable[[Any], dict[str, Any]]:
    """Return what measures the maps of a model, after looking at what it and the models are given."""
    from sparc_hf.codes import check_streams, encode_features
    from sparc_hf.encoders import check_encoders, load_encoders
    from sparc_hf.features import FeatureDataset
    from sparc_hf.localization import LocalizationSettings, check_labelled, latents_of_classes, localize
    from sparc_hf.masked_images import open_masked_images

    settings = LocalizationSettings(
        methods=tuple(args.map_methods),
        shifts=args.shifts,
        prompt=args.prompt,
        intervals=args.replicates > 0,
    )
    for model in models:
        check_encoders(model.config.streams)
    images = open_masked_images(args.masks, args.mask_images, args.mask_rows)
    rows = None if args.concept_features is None else FeatureDataset.load(args.concept_features)
    if rows is not None:
        check_labelled(rows)
        for model in models:
            check_streams(model, rows)
    classes = sorted({name for of_image in images.classes for name in of_image})

    def measure(model: Any) -> dict[str, Any]:
        latents = {}
        if rows is not None:
            latents = latents_of_classes(encode_features(model, rows, encoding="single"), rows, classes)
        return localize(
            model,
            load_encoders(model.config.streams, trust_remote_code=args.trust_remote_code),
            images,
            latents,
            settings,
        )

    return measure


def _run_import(args: Any) -> dict[str, Any]:
    from sparc_hf.features import FeatureDataset
    from sparc_hf.importers import run_import

    cards = []

    def write_card(folder: Path) -> None:
        from sparc_hf.hub import write_model_card
        from sparc_hf.run_folder import read_settings

        title = Path(args.output).resolve().name
        card = write_model_card(folder, settings=read_settings(folder), title=title, repo=args.output)
        cards.append(Path(args.output) / card.name)

    found = run_import(args, complete=write_card)
    if isinstance(found, FeatureDataset):
        return {"features": args.output, "rows": len(found), "streams": found.streams}
    config = found.config
    return {
        "model": args.output,
        "latents": config.num_latents,
        "selection": config.selection,
        "streams": config.stream_names,
        "card": str(cards[0]),
    }


def _run_demo(args: Any) -> str:
    from sparc_hf.demo_run import run_demo

    return run_demo(args)


def _run_card(args: Any) -> dict[str, Any]:
    from sparc_hf.hub import write_model_card
    from sparc_hf.results import results_of_model
    from sparc_hf.run_folder import read_settings

    results = results_of_model(args.results, args.model) if args.results else None
    settings = read_settings(Path(args.model))
    return {"card": str(write_model_card(args.model, results=results, settings=settings, repo=args.repo))}


def _run_space(args: Any) -> None:
    import importlib.util

    from sparc_hf.hub import space_folder
    from sparc_hf.space_data import open_space

    if importlib.util.find_spec("gradio") is None:
        raise ImportError('the Space needs gradio: pip install "sparc-hf[space]"')
    check_address(args.host, args.port)
    model = args.model or os.environ.get("SPARC_MODEL") or None
    # A model of one's own is not shown on the dataset that the environment has for another one.
    features = args.features or (None if args.model else os.environ.get("SPARC_DATASET")) or None
    data = open_space(model, features, args.cache)
    spec = importlib.util.spec_from_file_location("sparc_space_app", space_folder() / "app.py")
    assert spec is not None
    assert spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    app.launch(data, host=args.host, port=args.port)


def _function(address: str) -> Callable[[Any], Any]:
    """Return what calls the function "module:name", importing it only then."""
    module, _, name = address.partition(":")
    return lambda settings: getattr(importlib.import_module(module), name)(settings)


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "make scenes, extract features, train and evaluate, all from what ships with the package",
        "sparc_hf.command_arguments:DemoArguments",
        _run_demo,
        writes=("output",),
    ),
    "extract": Command(
        "run frozen encoders over images and texts into a feature dataset",
        "sparc_hf.extraction:ExtractionArguments",
        _run_extract,
        writes=("output",),
        is_shared=True,
    ),
    "train": Command(
        "train a SparcModel on a feature dataset",
        "sparc_hf.training_arguments:SparcTrainingArguments",
        _run_train,
        writes=("output_dir",),
        is_shared=True,
    ),
    "encode": Command(
        "turn a feature dataset into a code table",
        "sparc_hf.command_arguments:EncodeArguments",
        _run_encode,
        writes=("output",),
    ),
    "evaluate": Command(
        "measure models on a feature dataset, side by side",
        "sparc_hf.command_arguments:EvaluateArguments",
        _run_evaluate,
        leading="models",
        writes=("output",),
    ),
    "import": Command(
        "bring features and checkpoints of the two earlier projects into today's formats",
        "sparc_hf.importers:ImportArguments",
        _run_import,
        writes=("output",),
    ),
    "concepts": Command(
        "name latents, and draw their top samples, their maps, and images made to fire them",
        "sparc_hf.command_arguments:ConceptsArguments",
        _function("sparc_hf.concept_sheets:run_concepts"),
        writes=("model", "output"),
    ),
    "explain": Command(
        "draw where concepts are in images and captions, beside the baseline",
        "sparc_hf.explain:ExplainArguments",
        _function("sparc_hf.explain:run_explain"),
        writes=("output",),
    ),
    "retrieve": Command(
        "find the samples whose codes are most like those of an image, a text or another sample",
        "sparc_hf.sample_search:RetrieveArguments",
        _function("sparc_hf.sample_search:run_retrieve"),
    ),
    "card": Command(
        "write the model card of a saved model",
        "sparc_hf.command_arguments:CardArguments",
        _run_card,
        writes=("model",),
    ),
    "push": Command(
        "publish a model, a feature dataset, a metric or the Space on the Hub",
        "sparc_hf.push:PushArguments",
        _function("sparc_hf.push:run_push"),
        writes=("dry_run",),
    ),
    "space": Command(
        "serve the Space: look at a model's concepts in the browser",
        "sparc_hf.command_arguments:SpaceArguments",
        _run_space,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
