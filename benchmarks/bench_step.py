"""Time and memory of a training step beside the dense step and the encoder product, interleaved A B C A B C ...

    python benchmarks/bench_step.py --batch 256 1024 --output step.json

The step is measured twice, with torch's operators alone and with the compiled ones. Prints a table and writes JSON:
medians over the rounds, the ratios to dense, and the ratio to the floor, the encoder product alone. Memory is the peak
of torch's own allocations during one step, gradients among them, beyond what lives between steps.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from dense_baseline import DenseSparc
from torch.profiler import ProfilerActivity, profile

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.model import sparse_ops
from sparc_hf.training import optimizer
from sparc_hf.training.optimizer import SparcAdam
from sparc_hf.training.step_kernel import load_step_kernel


def random_rows(widths: dict[str, int], batch: int) -> dict[str, torch.Tensor]:
    return {name: torch.nn.functional.normalize(torch.randn(batch, width)) for name, width in widths.items()}


class Steps:
    """The three things that are timed, on the same rows."""

    def __init__(self, args: argparse.Namespace, widths: dict[str, int], batch: int, dead: float):
        latents, k, auxk = args.latents, args.k, args.auxk
        settings = {"num_latents": latents, "k": k, "auxk": auxk, "dead_after_steps": 10**6}
        config = SparcConfig(streams={name: {"hidden_size": width} for name, width in widths.items()}, **settings)
        torch.manual_seed(0)
        self.model = SparcModel(config).train()
        self.model.max_preactivation_mb = args.budget_mb
        self.dense = None
        if not args.without_dense:
            self.dense = DenseSparc(config).train()
            self.dense.load_state_dict(self.model.state_dict())
            self.plain_optimizer = torch.optim.Adam(self.dense.parameters(), lr=1e-4)
        self.rows = random_rows(widths, batch)
        self.dead = torch.rand(latents) < dead
        self.has_kernel = load_step_kernel()
        self.optimizer = SparcAdam(self.model, lr=1e-4)

    def compiled(self) -> None:
        self.model.gradient_terms = {}
        self._step(self.model, self.optimizer)

    def sparse(self) -> None:
        self.model.gradient_terms = {}
        with (
            mock.patch.object(sparse_ops, "compiled_ops", return_value=None),
            mock.patch.object(optimizer, "compiled_ops", return_value=None),
        ):
            self._step(self.model, self.optimizer)

    def plain(self) -> None:
        self._step(self.dense, self.plain_optimizer)

    def floor(self) -> None:
        with torch.no_grad():
            for name, x in self.rows.items():
                torch.nn.functional.linear(x, self.model.encoders[name].weight, self.model.encoders[name].bias)

    def _step(self, model, optimizer) -> None:
        for name in self.rows:
            getattr(model.steps_since_fired, name)[self.dead] = 10**7
        optimizer.zero_grad(set_to_none=True)
        model(self.rows)["loss"].backward()
        if model is self.dense:
            model.prepare_atoms_for_step()
        optimizer.step()


def peak_memory(steps: Steps, work) -> int:
    """Return the peak of allocations during a step, gradients among them, in bytes above what lives between steps."""
    work()
    for module in filter(None, (steps.model, steps.dense)):
        module.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    level = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def measure(steps: Steps, rounds: int) -> dict[str, float]:
    works = {"dense": steps.plain} if steps.dense is not None else {}
    works |= {"torch": steps.sparse, "product": steps.floor}
    if steps.has_kernel:
        works["compiled"] = steps.compiled
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if round_number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    result = {f"{name} ms": 1e3 * statistics.median(values) for name, values in times.items()}
    for name in sorted(works.keys() - {"dense", "product"}):
        if "dense" in works:
            result[f"dense / {name}"] = _median_ratio(times["dense"], times[name])
        result[f"{name} / product"] = _median_ratio(times[name], times["product"])
    return result | {f"{name} peak MB": peak_memory(steps, work) / 2**20 for name, work in works.items()}


def _median_ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 512, 512])
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--auxk", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dead", type=float, nargs="+", default=[0.0, 0.1], help="share of dead latents")
    parser.add_argument("--budget_mb", type=float, default=1024, help="memory for pre-activations, in MiB")
    parser.add_argument("--without_dense", action="store_true", help="leave out the dense step, for large N")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    widths = {f"stream{number}": width for number, width in enumerate(args.widths)}
    results = []
    for batch in args.batch:
        for dead in args.dead:
            steps = Steps(args, widths, batch, dead)
            results.append({"batch": batch, "dead": dead, **measure(steps, args.rounds)})
            print(" | ".join(f"{key} {value:.4g}" for key, value in results[-1].items()), flush=True)
    if args.output:
        machine = {"processor": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        report = {"machine": machine, "settings": vars(args) | {"output": None}, "results": results}
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
