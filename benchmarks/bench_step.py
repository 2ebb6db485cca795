"""Time and memory of a training step beside the dense step and the encoder product, interleaved A B C A B C ...

    python benchmarks/bench_step.py --batch 256 1024 --output step.json
    python benchmarks/bench_step.py --device cuda --output step_gpu.json

The step is measured twice, with torch's operators alone and with the compiled ones (on a GPU Triton's kernels). Prints
a table and writes JSON: medians over the rounds, the ratios to dense, and the ratio to the floor, the encoder product
alone. Memory is the peak of torch's own allocations during one step, gradients among them, beyond what lives between
steps. On a GPU times are between events of its own, and what does not fit is left empty.
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from dense_baseline import DenseSparc
from torch.profiler import ProfilerActivity, profile

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.model import sparse_ops
from sparc_hf.training import optimizer
from sparc_hf.training.optimizer import SparcAdam
from sparc_hf.training.step_kernel import load_gpu_kernels, load_step_kernel

# What is measured where the command line does not say.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"latents": [8192], "batch": [256, 1024], "precision": ["float32"], "dead": [0.0, 0.1], "budget_mb": 1024},
    "cuda": {
        "latents": [8192, 32768, 131072],
        "batch": [256, 4096, 16384],
        "precision": ["float32", "bfloat16"],
        "dead": [0.1],
        "budget_mb": 16384,
    },
}


def random_rows(widths: dict[str, int], batch: int) -> dict[str, torch.Tensor]:
    return {name: torch.nn.functional.normalize(torch.randn(batch, width)) for name, width in widths.items()}


class Steps:
    """The things that are timed, on the same rows."""

    def __init__(
        self, args: argparse.Namespace, widths: dict[str, int], latents: int, batch: int, precision: str, dead: float
    ):
        settings = {"num_latents": latents, "k": args.k, "auxk": args.auxk, "dead_after_steps": 10**6}
        config = SparcConfig(streams={name: {"hidden_size": width} for name, width in widths.items()}, **settings)
        torch.manual_seed(0)
        self.device = args.device
        self.precision = getattr(torch, precision)
        self.model = SparcModel(config).train().to(self.device)
        self.model.max_preactivation_mb = args.budget_mb
        self.dense = None
        if not args.without_dense:
            self.dense = DenseSparc(config).train().to(self.device)
            self.dense.load_state_dict(self.model.state_dict())
            self.plain_optimizer = torch.optim.Adam(self.dense.parameters(), lr=1e-4)
        self.rows = {name: x.to(self.device) for name, x in random_rows(widths, batch).items()}
        self.dead = (torch.rand(latents) < dead).to(self.device)
        self.has_kernel = load_gpu_kernels(self.device) if self.device == "cuda" else load_step_kernel()
        self.optimizer = SparcAdam(self.model, lr=1e-4)
        # The floor is the product alone, of weights that are already in its precision.
        self.factors = [
            (x.to(self.precision), self.model.encoders[name].weight.detach().to(self.precision))
            for name, x in self.rows.items()
        ]

    def works(self) -> dict[str, Callable[[], None]]:
        works = {"dense": self.plain} if self.dense is not None else {}
        works |= {"torch": self.sparse, "product": self.floor}
        return works | ({"compiled": self.compiled} if self.has_kernel else {})

    def compiled(self) -> None:
        self.model.gradient_terms = {}
        self._step(self.model, self.optimizer)

    def sparse(self) -> None:
        self.model.gradient_terms = {} if self.device == "cpu" else None
        with (
            mock.patch.object(sparse_ops, "compiled_ops", return_value=None),
            mock.patch.object(sparse_ops, "gpu_ops", return_value=None),
            mock.patch.object(optimizer, "compiled_ops", return_value=None),
            mock.patch.object(optimizer, "gpu_ops", return_value=None),
        ):
            self._step(self.model, self.optimizer)

    def plain(self) -> None:
        self._step(self.dense, self.plain_optimizer)

    def floor(self) -> None:
        with torch.no_grad():
            for rows, weight in self.factors:
                torch.nn.functional.linear(rows, weight)

    def _step(self, model, optimizer) -> None:
        for name in self.rows:
            getattr(model.steps_since_fired, name)[self.dead] = 10**7
        optimizer.zero_grad(set_to_none=True)
        lower = torch.autocast(self.device, self.precision) if self.precision != torch.float32 else None
        with lower or contextlib.nullcontext():
            loss = model(self.rows)["loss"]
        loss.backward()
        if model is self.dense:
            model.prepare_atoms_for_step()
        optimizer.step()


def peak_memory(steps: Steps, work) -> int:
    """Return the peak of allocations during a step, gradients among them, in bytes above what lives between steps."""
    work()
    for module in filter(None, (steps.model, steps.dense)):
        module.zero_grad(set_to_none=True)
    if steps.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    level = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def fitting(steps: Steps) -> dict[str, Callable[[], None]]:
    """Return what runs in this memory, warmed up."""
    works = {}
    for name, work in steps.works().items():
        with contextlib.suppress(torch.OutOfMemoryError):
            work()
            works[name] = work
        for module in filter(None, (steps.model, steps.dense)):
            module.zero_grad(set_to_none=True)
    return works


def seconds(works: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Return the times of every round, one work after the other in each."""
    times: dict[str, list[float]] = {name: [] for name in works}
    if device == "cpu":
        for name, work in (item for _ in range(rounds) for item in works.items()):
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
        return times
    events = []
    for name, work in (item for _ in range(rounds) for item in works.items()):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        events.append((name, start, end))
    torch.cuda.synchronize()
    for name, start, end in events:
        times[name].append(start.elapsed_time(end) / 1e3)
    return times


def measure(steps: Steps, rounds: int) -> dict[str, float]:
    works = fitting(steps)
    times = seconds(works, rounds, steps.device)
    result = {f"{name} ms": 1e3 * statistics.median(values) for name, values in times.items()}
    for name in sorted(works.keys() - {"dense", "product"}):
        if "dense" in works:
            result[f"dense / {name}"] = _median_ratio(times["dense"], times[name])
        result[f"{name} / product"] = _median_ratio(times[name], times["product"])
    return result | {f"{name} peak MB": peak_memory(steps, work) / 2**20 for name, work in works.items()}


def _median_ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


COLUMNS = ("product ms", "dense ms", "torch ms", "compiled ms", "dense / compiled", "compiled / product")
COLUMNS += ("dense peak MB", "torch peak MB", "compiled peak MB")


def table_row(case: dict[str, Any], result: dict[str, float]) -> str:
    """Return a row of the table in docs/performance.md; what was not measured is left empty."""
    cells = [str(value) for value in case.values()] + [
        f"{result[column]:.3g}" if column in result else "" for column in COLUMNS
    ]
    return f"| {' | '.join(cells)} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 512, 512])
    parser.add_argument("--latents", type=int, nargs="+")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--auxk", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), nargs="+", help="of the product (autocast)")
    parser.add_argument("--dead", type=float, nargs="+", help="share of dead latents")
    parser.add_argument("--budget_mb", type=float, help="memory for pre-activations, in MiB")
    parser.add_argument("--without_dense", action="store_true", help="leave out the dense step, for large N")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = arguments()
    widths = {f"stream{number}": width for number, width in enumerate(args.widths)}
    results = []
    names = ("latents", "batch", "precision", "dead")
    print(f"| {' | '.join(names + COLUMNS)} |\n|{'---|' * len(names + COLUMNS)}", flush=True)
    for values in product(*(getattr(args, name) for name in names)):
        case = dict(zip(names, values, strict=True))
        result = measure(Steps(args, widths, **case), args.rounds)
        results.append(case | result)
        print(table_row(case, result), flush=True)
    if args.output:
        of_device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
        machine = {"processor": of_device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        report = {"machine": machine, "settings": vars(args) | {"output": None}, "results": results}
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
