"""Triton's kernels: through its interpreter, as machine code for a GPU that is not there, and on a GPU that is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, lacking
from test_training import arguments, assert_same_weights, weights

from sparc_hf.training.step_kernel import load_gpu_kernels
from sparc_hf.training.trainer import train

CHECKS = Path(__file__).with_name("kernel_checks.py")


def run(arguments: list[str], **environment: str) -> str:
    """Run Python in a process of its own, since Triton decides how kernels run when it is imported."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def triton():
    try:
        return pytest.importorskip("triton")
    except pytest.skip.Exception:
        if sys.platform == "linux":
            lacking("the kernels need triton, which is not installed")
        raise


@pytest.mark.slow
def test_the_kernels_give_what_torch_gives_through_the_interpreter(triton):
    report = run(["-m", "pytest", str(CHECKS), "-q", "-p", "no:cacheprovider"], TRITON_INTERPRET="1")
    assert "skipped" not in report
    assert int(report.splitlines()[-1].split()[0]) >= 40  # 47 passed in ...


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_kernels_give_what_torch_gives_on_a_gpu(triton):
    run(["-m", "pytest", str(CHECKS), "-q", "-p", "no:cacheprovider"], SPARC_KERNELS_ON="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_run_on_a_gpu_takes_the_kernels_and_repeats_to_the_bit(triton, tmp_path, planted_folder):
    for name, step_kernel in (("torch", "off"), ("kernels", "on"), ("again", "on")):
        train(arguments(tmp_path / name, planted_folder, cpu=False, step_kernel=step_kernel))
        assert hasattr(torch.ops.sparc_hf_gpu, "residuals") == (name != "torch")
    assert_same_weights(tmp_path / "kernels", tmp_path / "again")
    mine, theirs = weights(tmp_path / "kernels"), weights(tmp_path / "torch")
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_and_spill_no_registers(triton, tmp_path):
    """What the interpreter does not tell. An example of every kernel, as a step of three streams starts it."""
    report = run([str(Path(__file__).with_name("kernel_compilation.py"))], TRITON_CACHE_DIR=str(tmp_path))
    assert report.splitlines()[-1] == "12 compiled"


def test_without_triton_training_goes_on(monkeypatch, caplog):
    for name in [name for name in sys.modules if name.startswith(("triton", "sparc_hf.training.gpu"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not load_gpu_kernels("cpu")
    assert "training goes on with torch's operators" in caplog.text


def test_a_run_on_a_cpu_imports_no_triton_kernels():
    code = """
import sys
import sparc_hf, sparc_hf.training.trainer, sparc_hf.model.modeling_sparc
print([name for name in sys.modules if name.startswith("sparc_hf.training.gpu")])
"""
    assert run(["-c", code], PYTHONPATH=str(ROOT)).strip() == "[]"
