"""What processes tell each other of their gradients, once per step.

A gradient [N, d] of a parameter is made of the rows of a batch, so for all but huge batches it is cheaper to send what
it is made of (`GradientTerm`) to everyone than to add up arrays [N, d]: 3 streams of 1,792 columns together send 29 kB
a row, where the dense gradients of 8,192 latents have 117 MB.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sparc_hf.model.configuration_sparc import SparcConfig
from sparc_hf.model.sparse_ops import GradientTerm, Selection

# Smaller gradients travel together, since every message has a cost of its own.
LARGE = 2**18


def exchanged_bytes(config: SparcConfig, rows_of_step: int, alone: bool = False) -> tuple[int, int]:
    """Return the float32 bytes a process takes part in exchanging per step: as terms, and as dense gradients.

    Terms arrive once from everyone; a dense all-reduce passes every array about twice, there and back.
    """
    streams, widths = len(config.hidden_sizes), sum(config.hidden_sizes.values())
    per_row = 4 * ((streams + 1) * widths + config.k * streams * (2 * streams + 3))
    # Streams given alone have one code for all, in as many rows, of which some have no weight.
    per_row += alone * 4 * (2 * widths + config.k * streams * 5)
    return per_row * rows_of_step, 2 * 4 * 2 * config.num_latents * widths


def gather_terms(terms: Mapping[str, list[GradientTerm]], rows: int) -> int:
    """Replace each process's terms by those of all processes, in their order.

    Args:
        terms: parameter name -> terms, as many on every process.
        rows: the most rows any process has in a term; shorter terms are filled up with rows of no weight.

    Returns:
        Bytes received.
    """
    parts = [term for name in sorted(terms) for term in terms[name]]
    mine = [_filled_up(tensor, rows) for term in parts for tensor in _tensors(term)]
    packed = torch.cat([tensor.contiguous().view(torch.uint8).reshape(-1) for tensor in mine])
    world = dist.get_world_size()
    gathered = packed.new_empty(world * packed.numel())
    dist.all_gather_into_tensor(gathered, packed)
    everyone = iter(gathered.view(world, -1).split([tensor.nbytes for tensor in mine], dim=1))
    for term in parts:
        latents = term.selection.num_latents
        joined = [
            # [processes, 1 or P, rows, width] -> [1 or P, processes * rows, width]
            _from_bytes(next(everyone), tensor.dtype, (world, tensor.shape[0], rows, tensor.shape[2]))
            .transpose(0, 1)
            .flatten(1, 2)
            for tensor in _tensors(term)
        ]
        term.selection = Selection(joined[0][0].long(), latents)
        term.coefficients, term.rows = joined[1:3]
        term.dots = joined[3] if term.dots is not None else None
    return gathered.nbytes


def sum_gradients(parameters: Iterable[Tensor]) -> int:
    """Replace the `.grad` of each parameter by the sum over processes.

    Returns:
        Bytes of the gradients.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    small = [gradient for gradient in gradients if gradient.numel() < LARGE]
    pending = [dist.all_reduce(gradient, async_op=True) for gradient in gradients if gradient.numel() >= LARGE]
    if small:
        together = torch.cat([gradient.reshape(-1) for gradient in small])
        dist.all_reduce(together)
        for gradient, total in zip(small, together.split([gradient.numel() for gradient in small]), strict=True):
            gradient.copy_(total.view_as(gradient))
    for work in pending:
        work.wait()  # pyright: ignore[reportOptionalMemberAccess]
    return sum(gradient.nbytes for gradient in gradients)


def _tensors(term: GradientTerm) -> list[Tensor]:
    """Return the term's arrays as [1 or P, rows, width]."""
    dots = [] if term.dots is None else [term.dots]
    return [term.selection.indices.int().unsqueeze(0), term.coefficients, term.rows, *dots]


def _filled_up(tensor: Tensor, rows: int) -> Tensor:
    return F.pad(tensor, (0, 0, 0, rows - tensor.shape[1]))


def _from_bytes(packed: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return packed.contiguous().view(-1).view(dtype).view(shape)
