"""The `sparc` command: parse, build settings, call one library function, print JSON.

Only the chosen command's modules are imported, so that `sparc --help` answers at once.
"""

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sparc_hf.cli.guards import locked_folders, memory_sentence
from sparc_hf.cli.parser import Command, settings_of
from sparc_hf.cli.user_errors import is_users


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for unusable input, 128 + n when stopped by signal n."""
    name, rest = _choose(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("sparc_hf").setLevel(logging.INFO)
    command = COMMANDS[name]
    settings: Any = None
    try:
        settings, wait = settings_of(name, command, rest, list(COMMANDS))
        with locked_folders(settings, command.writes, wait=wait, is_shared=command.is_shared):
            result = command.run(settings)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", 130)
    except Exception as error:
        stopped_by = getattr(error, "signal_number", None)  # of a run that saved its state and left
        memory = memory_sentence(error, settings)
        if stopped_by is None and memory is None and not is_users(error):
            raise
        return _fail(name, memory or str(error), 2 if stopped_by is None else 128 + stopped_by)
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
    parsed, rest = parser.parse_known_args(argv[:1])
    if parsed.version:
        from sparc_hf.version import __version__

        sys.stdout.write(f"sparc_hf {__version__}\n")
        parser.exit()
    if parsed.command is None:
        parser.print_help()
        parser.exit(2)
    return parsed.command, [*rest, *argv[1:]]


def _fail(command: str, message: str, status: int) -> int:
    sys.stderr.write(f"sparc {command}: {' '.join(message.split())}\n")
    return status


def _function(address: str) -> Callable[[Any], Any]:
    """Return what calls the function "module:name", importing it only then."""
    module, _, name = address.partition(":")
    return lambda settings: getattr(importlib.import_module(module), name)(settings)


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "make scenes, extract features, train and evaluate, all from what ships with the package",
        "sparc_hf.demo.run:DemoArguments",
        _function("sparc_hf.demo.run:run_demo"),
        writes=("output",),
    ),
    "extract": Command(
        "run frozen encoders over images and texts into a feature dataset",
        "sparc_hf.cli.extract:ExtractionArguments",
        _function("sparc_hf.cli.extract:run_extract"),
        writes=("output",),
        is_shared=True,
    ),
    "train": Command(
        "train a SparcModel on a feature dataset",
        "sparc_hf.training.arguments:SparcTrainingArguments",
        _function("sparc_hf.cli.train:run_train"),
        writes=("output_dir",),
        is_shared=True,
    ),
    "impute": Command(
        "measure a model's streams, so that it encodes rows that lack some of them",
        "sparc_hf.cli.impute:ImputeArguments",
        _function("sparc_hf.cli.impute:run_impute"),
        writes=("output",),
    ),
    "encode": Command(
        "turn a feature dataset into a code table",
        "sparc_hf.cli.encode:EncodeArguments",
        _function("sparc_hf.cli.encode:run_encode"),
        writes=("output",),
    ),
    "evaluate": Command(
        "measure models on a feature dataset, side by side",
        "sparc_hf.cli.evaluate:EvaluateArguments",
        _function("sparc_hf.cli.evaluate:run_evaluate"),
        leading="models",
        writes=("output",),
    ),
    "import": Command(
        "bring features and checkpoints of the two earlier projects into today's formats",
        "sparc_hf.cli.import_files:ImportArguments",
        _function("sparc_hf.cli.import_files:run_import_files"),
        writes=("output",),
    ),
    "concepts": Command(
        "name latents, and draw their top samples, their maps, and images made to fire them",
        "sparc_hf.cli.concepts:ConceptsArguments",
        _function("sparc_hf.cli.concepts:run_concepts"),
        writes=("model", "output"),
    ),
    "explain": Command(
        "draw where concepts are in images and captions, beside the baseline",
        "sparc_hf.cli.explain:ExplainArguments",
        _function("sparc_hf.cli.explain:run_explain"),
        writes=("output",),
    ),
    "retrieve": Command(
        "find the samples whose codes are most like those of an image, a text or another sample",
        "sparc_hf.cli.retrieve:RetrieveArguments",
        _function("sparc_hf.cli.retrieve:run_retrieve"),
    ),
    "card": Command(
        "write the model card of a saved model",
        "sparc_hf.cli.card:CardArguments",
        _function("sparc_hf.cli.card:run_card"),
        writes=("model",),
    ),
    "push": Command(
        "publish a model, a feature dataset, a metric or the Space on the Hub",
        "sparc_hf.cli.push:PushArguments",
        _function("sparc_hf.cli.push:run_push"),
        writes=("dry_run",),
    ),
    "space": Command(
        "serve the Space: look at a model's concepts in the browser",
        "sparc_hf.cli.space:SpaceArguments",
        _function("sparc_hf.cli.space:run_space"),
    ),
}
