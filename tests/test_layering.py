"""Which room may import which, remote code that stands alone, and an import that stays light."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "sparc_hf"
MODEL = PACKAGE / "model"
# Top-level modules count as rooms of one file. `version`, `lazy_names` and `files` are open to all.
OPEN_TO_ALL = {"version", "lazy_names", "files"}
MAY_IMPORT = {
    "version": set(),
    "lazy_names": set(),
    "files": set(),
    "model": set(),
    "encoders": set(),
    "metrics": set(),
    "features": {"model", "encoders"},
    "model_folder": {"model"},
    "training": {"model", "model_folder", "features"},
    "codes": {"model", "model_folder", "encoders", "features", "metrics"},
    "legacy": {"model", "model_folder", "encoders", "features"},
    "maps": {"model", "encoders", "features", "codes"},
    "pipeline": {"model", "encoders", "codes"},
    "evaluation": {"model", "model_folder", "encoders", "features", "codes", "maps", "metrics"},
    "hub": {"model", "model_folder", "features", "codes", "evaluation"},
    "demo": {"model", "model_folder", "encoders", "features", "training", "codes", "evaluation", "hub"},
    "space": {"model", "model_folder", "encoders", "features", "codes", "maps", "evaluation", "demo"},
}
# The face and the command line stand on top of everything.
TOP = {"__init__", "cli"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module imports anywhere: at import time, inside functions, and for types only."""
    return {name.split(".")[1] for name in imported_names(path) if name.startswith("sparc_hf.")}


def imported_names(path: Path) -> Iterator[str]:
    package = ["sparc_hf", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path):
    room = room_of(path)
    if room in TOP:
        return
    assert room in MAY_IMPORT, f"give the room {room} a line in the table"
    unwanted = imported_rooms(path) - MAY_IMPORT[room] - OPEN_TO_ALL - {room}
    assert not unwanted, f"{path.relative_to(PACKAGE)} imports {sorted(unwanted)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_others_use_has_a_public_name(path):
    private = [name for name in imported_names(path) if name.startswith("sparc_hf.") and ".__" not in name]
    private = [name for name in private if name.rpartition(".")[2].startswith("_")]
    assert not private, f"{path.relative_to(PACKAGE)} imports {private}"


def test_the_table_has_no_circle():
    floors = {}
    while len(floors) < len(MAY_IMPORT):
        next_floor = {room for room, below in MAY_IMPORT.items() if room not in floors and below <= floors.keys()}
        assert next_floor, f"a circle among {sorted(MAY_IMPORT.keys() - floors.keys())}"
        floors |= dict.fromkeys(next_floor)


def test_modules_are_small_and_named_for_what_they_do():
    for path in modules():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 460, path
        assert path.stem not in {"utils", "common", "misc", "helpers", "manager"}


def test_functions_fit_on_a_screen():
    """What a function does, from its first statement on; its parameters and docstring are read apart."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                statements = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.end_lineno or 0) - statements[0].lineno + 1 if statements else 0
                assert lines <= 60, f"{path.relative_to(PACKAGE)}: {node.name} has {lines} lines"


def test_the_top_is_short():
    assert len([path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]) <= 14
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 6


def remote_code() -> set[str]:
    """Modules that transformers takes along with a pushed model: those reached from its class."""
    reached, waiting = set(), {"modeling_sparc"}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        names = imported_names(MODEL / f"{module}.py")
        siblings = {name.split(".")[2] for name in names if name.startswith("sparc_hf.model.")}
        waiting |= siblings - reached
    return reached


@pytest.mark.parametrize("path", sorted(MODEL.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_remote_code_stands_alone(path):
    """A pushed model has its siblings and what transformers needs, but not this package."""
    assert path.stem in remote_code(), "a file of this room that a pushed model would lack"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            tops = {name.split(".")[0] for name in names}
            # huggingface_hub and safetensors come with transformers; scipy is imported on call, inside a try.
            known = {*sys.stdlib_module_names, "torch", "transformers", "huggingface_hub", "safetensors", "scipy"}
            assert tops <= known, names


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_package_pulls_in_nothing_heavy():
    code = """
import sys
from transformers import AutoModel, AutoConfig
before = set(sys.modules)
import sparc_hf
added = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = added & {"datasets", "matplotlib", "evaluate", "gradio", "sklearn", "scipy", "pandas", "pyarrow", "accelerate"}
print(sorted(heavy), "sparc" in AutoConfig.for_model("sparc").model_type)
"""
    assert run(code).split("\n")[0] == "[] True"


def test_help_answers_without_torch():
    code = """
import sys
sys.argv = ["sparc", "--help"]
try:
    from sparc_hf.cli import main
    main()
except SystemExit:
    print("torch" in sys.modules)
"""
    assert run(code).endswith("False\n")
