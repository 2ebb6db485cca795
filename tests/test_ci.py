"""What decides whether a change lands leaves no test of the browser out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, lacking


def stub(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def browser_script(tmp_path: Path, *, user: int = 0, apt: bool = True, **variables: str) -> tuple[int, list[str]]:
    """Run .ci/browser where only stubs are to be found; return its exit code and what was asked of apt-get."""
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    stub(commands, "id", f"echo {user}")
    if apt:
        stub(commands, "apt-get", f'echo "$@" >> {tmp_path}/asked')
    done = subprocess.run(["/bin/bash", ROOT / ".ci" / "browser"], env={"PATH": str(commands)} | variables)
    asked = tmp_path / "asked"
    return done.returncode, asked.read_text().splitlines() if asked.exists() else []


def test_chromium_is_installed_where_it_is_missing(tmp_path):
    code, asked = browser_script(tmp_path)
    assert code == 0
    assert asked[0].startswith("update")
    assert asked[1].startswith("install")
    assert asked[1].split()[-1] == "chromium"


@pytest.mark.parametrize("given", [{"user": 1000}, {"apt": False}, {"CHROMIUM": sys.executable}])
def test_it_is_not_installed_where_that_cannot_or_need_not_be(tmp_path, given):
    assert browser_script(tmp_path, **given) == (0, [])


def test_a_chromium_on_the_path_is_enough(tmp_path):
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin", "chromium", "exit 1")
    assert browser_script(tmp_path) == (0, [])


def test_a_failed_installation_ends_it(tmp_path):
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin", "apt-get", "exit 100")
    assert browser_script(tmp_path, apt=False)[0] != 0


def test_what_is_lacking_fails_in_ci_and_is_skipped_elsewhere(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="there is no Chromium here"):
        lacking("there is no Chromium here")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception):
        lacking("there is no Chromium here")


def test_ci_asks_for_every_test_before_it_runs_them():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines.index("export CI=true") < lines.index(".ci/browser") < lines.index('eval "$second_command"')
    assert os.access(ROOT / ".ci" / "browser", os.X_OK)


def test_the_browser_tests_fail_in_ci_without_a_browser(tmp_path):
    code = "def test_page(browser):\n    pass\n"
    (tmp_path / "test_one.py").write_text(code)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    known = {name: value for name, value in os.environ.items() if name not in ("CI", "CHROMIUM")}
    environment = known | {"PATH": "/nowhere", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    for variables, words in (({"CI": "true"}, "1 error"), ({}, "1 skipped")):
        done = subprocess.run(command, env=environment | variables, cwd=tmp_path, capture_output=True, text=True)
        assert words in done.stdout, done.stdout[-2000:]
