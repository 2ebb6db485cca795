"""Imports point to lower floors only, the package registers itself, and importing it stays light."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "sparc_hf"
FLOORS = {
    "version": 0,
    "atomic_files": -2,
    "folder_lock": -2,
    "command_guards": 0,
    "atomic_folders": -1,
    "stop_signals": 0,
    "picture_folder": 0,
    "checkpoints": 4,
    "configuration_sparc": 0,
    "sparse_ops": 0,
    "training_arguments": 0,
    "command_arguments": 0,
    "feature_columns": 0,
    "feature_files": 0,
    "outputs_sparc": 0,
    "token_grid": 0,
    "buffers_sparc": 1,
    "checks_sparc": 0,
    "weights_sparc": 1,
    "objectives_sparc": 1,
    "objectives_usae": 1,
    "step_sparc": 1,
    "encoder_usae": 1,
    "encoders": 1,
    "encoder_families": 0,
    "pretrained": 0,
    "batches": 0,
    "parquet_features": 1,
    "streamed_batches": 2,
    "metrics": 0,
    "plots": 0,
    "intervals": 0,
    "count_figures": 1,
    "feature_writer": 2,
    "features": 2,
    "row_format": 1,
    "shard_folder": 1,
    "feature_statistics": 1,
    "sample_reader": 2,
    "encoded_rows": 3,
    "extraction_arguments": 1,
    "demo": 1,
    "sources": 1,
    "label_hierarchy": 0,
    "coco_source": 2,
    "open_images_source": 2,
    "imagenet_source": 2,
    "modeling_sparc": 2,
    "extraction": 4,
    "step_kernel": 0,
    "term_sums": 0,
    "random_numbers": 0,
    "gradient_exchange": 1,
    "learning_rate": 1,
    "optimizer": 3,
    "codes": 3,
    "top_samples": 4,
    "run_folder": 3,
    "legacy_hdf5": 3,
    "legacy_npz": 3,
    "legacy_checkpoints": 4,
    "legacy_usae": 5,
    "importers": 6,
    "training_rows": 3,
    "training": 5,
    "universality": 3,
    "retrieval": 4,
    "probing": 5,
    "evaluation": 6,
    "results": 1,
    "hub": 6,
    "report": 7,
    "pipeline": 6,
    "map_plots": 0,
    "image_files": -1,
    "plain_files": -1,
    "output_folder": -1,
    "user_errors": -1,
    "coco_masks": 0,
    "declared_sizes": 0,
    "explain": 7,
    "sample_search": 6,
    "maximisation": 3,
    "concept_sheets": 8,
    "backbone_trace": 2,
    "attribution": 3,
    "masked_images": 3,
    "localization": 4,
    "concepts": 5,
    "demo_queries": 5,
    "demo_run": 8,
    "stranger_input": 0,
    "space_guard": 1,
    "space_controls": 2,
    "code_search": 4,
    "concept_search": 6,
    "space_index": 7,
    "space_data": 9,
    "space_publishing": 10,
    "push": 11,
    "space_maps": 10,
    "space_page": 11,
    "cli": 12,
}
REMOTE_CODE = {
    "configuration_sparc",
    "sparse_ops",
    "outputs_sparc",
    "buffers_sparc",
    "checks_sparc",
    "weights_sparc",
    "objectives_sparc",
    "objectives_usae",
    "step_sparc",
    "encoder_usae",
    "modeling_sparc",
}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """First-party rooms a module imports at import time; imports inside functions wait for the call."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            inside = "" if path.parent == PACKAGE else f"{room_of(path)}."
            names = [f"sparc_hf.{inside}{node.module}"] if node.level else [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("sparc_hf.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    assert room in FLOORS, f"give {room} a floor"
    for other in imported(path) - {room}:
        # The two faces of one floor may not know each other either.
        assert FLOORS[other] < FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"


def test_modules_are_small_and_named_for_what_they_do():
    for path in modules():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 460, path
        assert path.stem not in {"utils", "common", "misc", "helpers", "manager"}


@pytest.mark.parametrize("room", sorted(REMOTE_CODE))
def test_remote_code_needs_torch_and_transformers_only(room):
    tree = ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in REMOTE_CODE
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            tops = {name.split(".")[0] for name in names}
            # huggingface_hub and safetensors come with transformers; scipy is imported on call, inside a try.
            known = {"torch", "transformers", "huggingface_hub", "safetensors", "scipy"}
            assert tops <= {*sys.stdlib_module_names, *known}, names


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
