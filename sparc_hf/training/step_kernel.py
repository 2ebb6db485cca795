"""The optional compiled forms of a training step's memory-bound parts: `step_cpu.cpp` for CPUs, `gpu/` for GPUs.

Nothing needs them: without them the same numbers come from torch's own operators, in more passes over memory. On a CPU
it takes a C++ compiler and `ninja` (`pip install "sparc-hf[kernel]"`), and some 15 seconds once per machine and torch
version; on a GPU Triton (`pip install "sparc-hf[gpu]"`), which torch for CUDA brings along on Linux.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("step_cpu.cpp")
# Named after what the processor can do, so that unlike machines of a cluster with one home folder share no build.
INSTRUCTIONS = {"AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "AVX2": ["-march=x86-64-v3"]}

logger = logging.getLogger(__name__)


def is_loaded() -> bool:
    """Return whether the compiled operators are there."""
    return hasattr(torch.ops.sparc_hf, "residuals")


def load_step_kernel() -> bool:
    """Load the compiled operators, building them first where that was not done before.

    Returns:
        Whether they are there; False, with a warning that says why, where they cannot be built.
    """
    if is_loaded():
        return True
    try:
        if not (library := built_library()).is_file():
            _build(library)
        torch.ops.load_library(library)
    except (RuntimeError, OSError) as error:
        logger.warning("training goes on without the compiled step, which would be about twice as fast: %s", error)
    return is_loaded()


def load_gpu_kernels(device: torch.device | str) -> bool:
    """Load Triton's kernels, once they gave what torch's operators give on a small example on this device.

    Returns:
        Whether they are in use; False, with a warning that says why, where Triton is not installed, cannot compile
        them, or a result differs.
    """
    if hasattr(torch.ops.sparc_hf_gpu, "residuals"):
        return True
    try:
        from sparc_hf.training.gpu import check, operators

        if differing := check.kernels_that_differ(device):
            raise RuntimeError(f"{differing} differ from torch's operators on this GPU")
    except Exception as error:  # Triton's own errors have no common class
        logger.warning("training goes on with torch's operators, without `sparc-hf[gpu]`'s kernels: %s", error)
        return False
    operators.register()
    return True


def built_library() -> Path:
    """Return where the build for this source, torch and processor lies, or would lie."""
    from torch.utils.cpp_extension import get_default_build_root

    build = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    return Path(get_default_build_root()) / f"sparc_step_{_capability().lower()}_{build}.so"


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _build(library: Path) -> None:
    """Compile in a folder of its own and move the result, so that processes at the same time do no harm."""
    from torch.utils.cpp_extension import load

    if missing := [tool for tool in ("c++", "ninja") if not shutil.which(tool)]:
        raise RuntimeError(f'{missing} not found; install a C++ compiler and `pip install "sparc-hf[kernel]"`')
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        load(
            library.stem,
            [str(SOURCE)],
            extra_cflags=["-O3", "-ffast-math", "-fopenmp", *INSTRUCTIONS.get(_capability(), [])],
            extra_ldflags=["-fopenmp"],
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder) / f"{library.stem}.so", library)
