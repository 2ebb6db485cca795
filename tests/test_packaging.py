"""What a wheel holds, and that the command works from it."""

import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_everything_the_package_reads(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = {
        "sparc_hf/py.typed",
        "sparc_hf/hub_cards/model_card.md",
        "sparc_hf/hub_cards/report.html",
        "sparc_hf/spaces_app/app.py",
        "sparc_hf/spaces_app/page.css",
        "sparc_hf/spaces_app/page.js",
        "sparc_hf/spaces_app/requirements.txt",
        "sparc_hf/presets/sparc-coco.yaml",
        "sparc_hf/demo/encoders/clip/model.safetensors",
        "sparc_hf/demo/encoders/clip/tokenizer.json",
        "sparc_hf/demo/encoders/dino/model.safetensors",
        "sparc_hf/demo/encoders/dino/config.json",
    }
    assert needed <= names, sorted(needed - names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sparc_hf").rglob("*.py")}
    assert modules <= names, sorted(modules - names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


@pytest.mark.slow
def test_the_card_template_is_found_inside_an_unpacked_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import sparc_hf.hub as hub; print(hub.templates_folder())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "sparc_hf" / "hub_cards")
