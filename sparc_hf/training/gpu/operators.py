"""The kernels as operators, `torch.ops.sparc_hf_gpu`, where `sparc_hf/model` finds them without importing Triton."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparc_hf.training.gpu.adam import adam_step
from sparc_hf.training.gpu.decode import decode_residuals, dots
from sparc_hf.training.gpu.row_sums import sum_rows, sum_values
from sparc_hf.training.gpu.top_k import top_k_of_sum


def transpose(indices: Tensor, latents: int) -> tuple[Tensor, Tensor]:
    """Return entries of indices [entries] sorted by latent, and where each latent's start, [N + 1]."""
    # A sort of 32 bits takes half the passes of one of 64.
    by_latent, order = torch.sort(indices.int(), stable=True)
    bounds = torch.arange(latents + 1, dtype=torch.int32, device=indices.device)
    return order, torch.searchsorted(by_latent, bounds)


OPERATORS = {
    "top_k_of_sum(Tensor[] parts, int k) -> Tensor": top_k_of_sum,
    "residuals(Tensor values, Tensor atoms, Tensor indices, Tensor targets) -> (Tensor, Tensor, Tensor)": (
        decode_residuals
    ),
    "dots(Tensor rows, Tensor atoms, Tensor indices) -> Tensor": dots,
    "transpose(Tensor indices, int latents) -> (Tensor, Tensor)": transpose,
    "sum_rows(Tensor rows, Tensor values, Tensor order, Tensor offsets) -> Tensor": sum_rows,
    "sum_values(Tensor values, Tensor order, Tensor offsets) -> Tensor": sum_values,
    "adam_step(Tensor(a!) parameter, Tensor(b!) average, Tensor(c!) square, Tensor[] coefficients, Tensor[] rows, "
    "Tensor[] orders, Tensor[] offsets, Tensor step, bool unit_norm, float beta1, float beta2, float rate, "
    "float eps) -> ()": adam_step,
}
LIBRARIES: list[torch.library.Library] = []


def register() -> None:
    """Make the operators of this process, once."""
    if LIBRARIES:
        return
    LIBRARIES.append(torch.library.Library("sparc_hf_gpu", "DEF"))
    for schema, function in OPERATORS.items():
        LIBRARIES[0].define(schema)
        # On every device, because the interpreter runs the kernels on a CPU's tensors.
        LIBRARIES[0].impl(schema.partition("(")[0], _on_its_device(function), "CompositeExplicitAutograd")


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let kernels start on the GPU where their first argument is, which need not be the current one."""

    @functools.wraps(function)
    def started(first: Any, *others: Any) -> Any:
        with torch.cuda.device_of(first[0] if isinstance(first, list) else first):
            return function(first, *others)

    return started
