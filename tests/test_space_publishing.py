"""A pushed Space: everything it needs lies in its folder, and it starts where this package was never installed."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import venv
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from packaging.requirements import Requirement

from sparc_hf.push import PushArguments, run_push
from sparc_hf.space_publishing import dependencies

pytest.importorskip("gradio", reason="the Space needs gradio")


@pytest.fixture(scope="module")
def pushed(small_space, space_cache, tmp_path_factory) -> Path:
    """The package's own Space as it is pushed, with the small demo."""
    folder = tmp_path_factory.mktemp("pushed") / "space"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARC_CACHE", str(space_cache))
        run_push(PushArguments(repo="me/space", space=str(ROOT / "spaces_app"), dry_run=str(folder)))
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """A Python that has what this package requires, but not this package."""
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder, with_pip=False, symlinks=True)
    installed = Path(torch.__file__).parents[1]
    own = next((folder / "lib").glob("python*/site-packages"))
    (own / "required.pth").write_text(f"{installed}\n")
    return folder / "bin" / "python"


def started(python: Path, folder: Path, home: Path) -> tuple[str, float, float, subprocess.Popen]:
    """Start a Space as the Hub does; return its page, the seconds until it came, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    environment = {"HOME": str(home), "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    begun = time.monotonic()
    with open(home / "log", "wb") as log:
        process = subprocess.Popen([python, "app.py"], cwd=folder, env=kept | environment, stdout=log, stderr=log)
    open_after = 0.0
    while process.poll() is None and time.monotonic() - begun < 300:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                open_after = open_after or time.monotonic() - begun
                return answer.read().decode(), open_after, time.monotonic() - begun, process
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    process.kill()
    raise AssertionError((home / "log").read_text()[-3000:])


def test_a_pushed_space_holds_all_it_needs(pushed, small_space):
    names = {path.relative_to(pushed).as_posix() for path in pushed.rglob("*") if path.is_file()}
    index = small_space.index.folder.name
    assert {
        "README.md",
        "app.py",
        "page.css",
        "requirements.txt",
        "sparc_hf/space_data.py",
        "sparc_hf/demo/encoders/dino/model.safetensors",
        "demo/model/config.json",
        "demo/model/model.safetensors",
        "demo/model/concepts.json",
        "demo/features/sparc_features.json",
        f"demo/indexes/{index}/index.json",
    } <= names
    assert not [name for name in names if "train" in name.split("/")[:-1]]
    told = b"".join(path.read_bytes() for path in pushed.rglob("*") if path.is_file())
    # Where things lay on the pusher's machine is nobody's business.
    assert str(small_space.index.folder.parent.parent).encode() not in told


def test_its_requirements_are_those_of_the_package(pushed):
    lines = (pushed / "requirements.txt").read_text().splitlines()
    every = [Requirement(line) for line in requires("sparc-hf")]
    plain = {one.name for one in every if one.marker is None}
    assert {Requirement(line).name for line in lines} == plain | {"gradio"}
    assert dependencies(set()) == [line for line in dependencies({"space"}) if not line.startswith("gradio")]


@pytest.mark.slow
def test_it_starts_where_the_package_was_never_installed(pushed, stranger, tmp_path, small_space):
    code = "import sparc_hf; print(sparc_hf.__file__)"
    alone = subprocess.run([stranger, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'sparc_hf'" in alone.stderr
    found = subprocess.run([stranger, "-c", code], cwd=pushed, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(pushed / "sparc_hf" / "__init__.py")
    before = {path: path.stat().st_mtime_ns for path in (pushed / "demo").rglob("*") if path.is_file()}
    page, *_, process = started(stranger, pushed, tmp_path)
    try:
        best = small_space.find_latents()[0]
        assert f'data-latent=\\"{best}\\"' in page
        # Nothing was trained, drawn or indexed for it, and nothing written beside the app.
        assert [path.name for path in (tmp_path / ".cache" / "sparc_hf").iterdir()] == ["space.lock"]
        assert {path: path.stat().st_mtime_ns for path in (pushed / "demo").rglob("*") if path.is_file()} == before
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_it_starts_from_a_folder_that_it_may_not_write(pushed, stranger, tmp_path):
    for path in [pushed, *pushed.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        *_, process = started(stranger, pushed, tmp_path)
        process.terminate()
        process.wait()
    finally:
        for path in [pushed, *pushed.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
