"""Time of a top-k of random rows beside `torch.topk`, interleaved A B C A B C ...

    python benchmarks/bench_top_k.py
    python benchmarks/bench_top_k.py --device cuda --batch 4096

*torch.topk* promises no order among equal numbers; *torch form* (`sparc_hf/model/top_k.py`) and *kernel* (C++ on a
CPU, Triton on a GPU) give the lower index first. Prints medians over the rounds: on a CPU of the time of one thread,
which other processes on the machine disturb less, on a GPU between events of its own.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from sparc_hf.model.top_k import largest
from sparc_hf.training.step_kernel import load_gpu_kernels, load_step_kernel

FORMS = ("torch.topk", "torch form", "kernel")


def forms_of(values: torch.Tensor, k: int) -> dict[str, Callable[[], torch.Tensor]]:
    forms = {"torch.topk": lambda: values.topk(k, dim=1).indices, "torch form": lambda: largest(values, k)}
    on_gpu = values.device.type == "cuda"
    if load_gpu_kernels(values.device) if on_gpu else load_step_kernel():
        operators = torch.ops.sparc_hf_gpu if on_gpu else torch.ops.sparc_hf
        forms["kernel"] = lambda: operators.top_k_of_sum([values], k)
    return forms


def milliseconds(work: Callable[[], torch.Tensor], device: str) -> float:
    if device == "cpu":
        start = time.thread_time()
        work()
        return 1e3 * (time.thread_time() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--latents", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--k", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)  # the clock counts one
    print(f"| N | k | {' | '.join(f'{name} ms' for name in FORMS)} |\n|{'---|' * (2 + len(FORMS))}")
    for latents in args.latents:
        values = torch.randn(args.batch, latents, generator=torch.Generator().manual_seed(0)).to(args.device)
        for k in args.k:
            forms = forms_of(values, k)
            times: dict[str, list[float]] = {name: [] for name in FORMS}
            for round_number in range(args.rounds + 1):
                for name, form in forms.items():
                    taken = milliseconds(form, args.device)
                    if round_number:  # the first round warms up
                        times[name].append(taken)
            cells = [f"{statistics.median(found):.3g}" if found else "" for found in times.values()]
            print(f"| {latents:,} | {k} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
