"""A Space over a small demo, for tests."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from unittest import mock

from sparc_hf.demo.run import DemoArguments
from sparc_hf.files.installed_folders import space_folder
from sparc_hf.space import data as space_data

SMALL = {"train_rows": 400, "test_rows": 150, "epochs": 6, "num_latents": 96, "k": 8}


def small_demo(cache: Path) -> space_data.SpaceData:
    """Open the embedded demo, in sizes that take seconds."""
    with mock.patch.object(space_data, "DemoArguments", functools.partial(DemoArguments, **SMALL)):
        return space_data.open_space(cache=str(cache))


def space_app() -> ModuleType:
    """Return spaces_app/app.py, as `sparc space` loads it."""
    spec = importlib.util.spec_from_file_location("sparc_space_app", space_folder() / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app
