"""Compile every kernel for GPUs of compute capability 9.0, without one; `test_gpu_kernels.py` runs this file.

Fails where a kernel does not compile, or keeps numbers in memory that should be in registers.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparc_hf.training.gpu import adam, decode, row_sums, top_k

COMMANDS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITY = 90
TYPES = {
    **dict.fromkeys(("latents", "k", "blocks", "batch", "width", "more_batch", "more_k"), "i32"),
    **dict.fromkeys(("keep1", "keep2", "take1", "take2", "log1", "log2", "rate", "eps", "norm_eps"), "fp32"),
    **dict.fromkeys(("indices", "chosen", "order", "offsets", "more_order", "more_offsets"), "*i64"),
}
SELECTING = {"maxima": "*i32", "out": "*i64"}
HALF = dict.fromkeys(("values", "atoms", "targets", "residuals"), "*bf16")
DECODED = {"CODES": 3, "CODE_TILE": 4, "ENTRIES": 64, "COLUMNS": decode.ATOM_NUMBERS // 64}
ADAM = {"CODES": 3, "MORE_CODES": 1, "HAS_DENSE": False, "UNIT_NORM": True, "ENTRIES": 8, "COLUMN_TILE": 1024}
# kernel, constants, types of its own, warps. A number that is 1 is a constant to Triton.
KERNELS: list[tuple[Any, dict[str, Any], dict[str, str], int]] = [
    (top_k.block_maxima, {"BLOCK": 64, "BLOCKS": 64}, {"values": "*bf16", **SELECTING}, 4),
    (top_k.largest_blocks, {"PLACES": 2048}, SELECTING, top_k.WARPS),
    (top_k.largest_latents, {"BLOCK": 64, "PLACES": 4096, "IN_BLOCKS": True}, SELECTING, top_k.WARPS),
    (top_k.largest_latents, {"BLOCK": 1, "PLACES": 8192, "IN_BLOCKS": False}, SELECTING, top_k.WARPS),
    (decode.residuals_of_row, DECODED, {}, decode.WARPS),
    (decode.residuals_of_row, DECODED, HALF, decode.WARPS),
    (decode.residuals_of_row, DECODED | {"width": 37}, {}, decode.WARPS),
    (decode.dots_of_row, {"ENTRIES": decode.DOTS_AT_ONCE, "COLUMNS": 128}, {}, decode.WARPS),
    (
        row_sums.rows_per_latent,
        {"CODES": 3, "ENTRIES": row_sums.ENTRIES_AT_ONCE, "COLUMN_TILE": row_sums.COLUMNS, "ADD": False},
        {},
        4,
    ),
    (row_sums.values_per_latent, {"ENTRIES": row_sums.VALUES_AT_ONCE}, {}, 1),
    (adam.adam_row, ADAM, {}, 4),
    (adam.adam_row, ADAM | {"CODES": 1, "HAS_DENSE": True, "UNIT_NORM": False, "k": 1, "batch": 1}, {}, 4),
]


def compiled(kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int) -> bytes:
    """Return the machine code of a kernel."""
    signature = {
        name: "constexpr" if name in constants else {"out": "*fp32", **TYPES, **types}.get(name, "*fp32")
        for name in kernel.arg_names
    }
    # Arrays start at multiples of 16 bytes, and the sizes of a usual step are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith("*") or kind == "i32"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": warps}).asm["cubin"]


def main() -> None:
    for kernel, constants, types, warps in KERNELS:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled(kernel, constants, types, warps))
            file.flush()
            usage = subprocess.run(
                [COMMANDS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        sys.stdout.write(f"{kernel.__name__}: {registers} registers a thread\n")
        assert stack == local == 0, usage
        assert registers <= 255
    sys.stdout.write(f"{len(KERNELS)} compiled\n")


if __name__ == "__main__":
    main()
