"""Time and memory of a training step of Universal Sparse Autoencoders beside its plain dense form, interleaved.

    OMP_NUM_THREADS=2 python benchmarks/bench_usae_step.py --output usae_step.json

A step is forward, backward, clipping and AdamW, of one source; the sources take turns. *products* are the five matrix
products that no exact step can leave out, at full size: the encoder's, the auxiliary term's decode and its backward
over all targets, and the gradients of the source's encoder and atoms. Prints a line a source and writes JSON: medians
over the rounds and medians of the rounds' ratios. Memory is the peak beyond rows, parameters and Adam's
moments, of a process of its own for each form.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from usae_dense_baseline import DenseUsae

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.training.optimizer import UsaeAdamW

LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 3e-4, 1e-5, 1.0


def config_of(args: argparse.Namespace) -> SparcConfig:
    return SparcConfig(
        streams={f"stream{number}": {"hidden_size": width} for number, width in enumerate(args.widths)},
        num_latents=args.latents,
        k=args.k,
        auxk=args.latents // 2,
        auxk_coef=0.1,
        objective="usae",
        selection="local",
        distance=args.distance,
    )


def sparse_step(
    config: SparcConfig, bf16: bool = False
) -> tuple[torch.nn.Module, Callable[[dict[str, Tensor], str], None]]:
    torch.manual_seed(0)
    model = SparcModel(config).train()
    optimizer = UsaeAdamW(model, LEARNING_RATE, WEIGHT_DECAY)

    def step(rows: dict[str, Tensor], source: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        with optimizer.only(source), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(rows, source=source).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    return model, step


def dense_step(config: SparcConfig) -> tuple[torch.nn.Module, Callable[[dict[str, Tensor], str], None]]:
    torch.manual_seed(0)
    dense = DenseUsae(config).train()
    optimizers = dense.optimizers(LEARNING_RATE, WEIGHT_DECAY)
    return dense, lambda rows, source: dense.train_step(rows, source, optimizers, MAX_NORM)


def products(config: SparcConfig) -> Callable[[dict[str, Tensor], str], None]:
    sizes, latents = config.hidden_sizes, config.num_latents
    weights = {name: torch.randn(latents, size) for name, size in sizes.items()}
    every_atom = torch.randn(latents, sum(sizes.values()))

    def make(rows: dict[str, Tensor], source: str) -> None:
        x = rows[source]
        codes = x @ weights[source].t()
        decoded = codes @ every_atom
        gradient = decoded @ every_atom.t()
        gradient.t() @ x
        codes.t() @ decoded[:, : x.shape[1]]

    return make


def random_rows(args: argparse.Namespace) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"stream{number}": torch.randn(args.batch, width, generator=generator)
        for number, width in enumerate(args.widths)
    }


def peak_of_step(args: argparse.Namespace, form: str) -> float:
    """Return the memory in MB that steps take beyond rows, parameters and Adam's moments, in a fresh process."""
    command = [sys.executable, __file__, "--peak_of", form, "--batch", str(args.batch), "--latents", str(args.latents)]
    command += ["--k", str(args.k), "--distance", args.distance, "--widths", *map(str, args.widths)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(args: argparse.Namespace) -> None:
    config, rows = config_of(args), random_rows(args)
    model, step = dense_step(config) if args.peak_of == "dense" else sparse_step(config, args.peak_of == "bf16")
    before = _memory("VmRSS")
    for name in rows:
        step(rows, name)
    moments = 2 * sum(4 * value.numel() for value in model.parameters() if value.requires_grad) / 2**20
    print(_memory("VmHWM") - before - moments)


def _memory(name: str) -> float:
    """Return this process's memory in MB as the kernel counts it: VmRSS, what it has, or VmHWM, the most it had."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 384, 768])
    parser.add_argument("--latents", type=int, default=6144)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32 * 196)
    parser.add_argument("--distance", choices=["l1", "l2"], default="l1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak_of", choices=["dense", "model", "bf16"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print_peak(args)
        return
    config, rows = config_of(args), random_rows(args)
    works = {
        "dense": dense_step(config)[1],
        "model": sparse_step(config)[1],
        "bf16": sparse_step(config, bf16=True)[1],
        "products": products(config),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in works}
    for round_number in range(args.rounds + 1):
        for name, work in works.items():
            taken = []
            for source in rows:
                start = time.perf_counter()
                work(rows, source)
                taken.append(time.perf_counter() - start)
            if round_number:  # the first round warms up
                times[name].append([*taken, sum(taken) / len(taken)])
    results = []
    for at, source in enumerate([*(f"{name} ({len(x[0])})" for name, x in rows.items()), "mean of the sources"]):
        result = {f"{name} s": statistics.median(taken[at] for taken in found) for name, found in times.items()}
        for one, other in (("dense", "model"), ("model", "products"), ("dense", "bf16")):
            ratios = [a[at] / b[at] for a, b in zip(times[one], times[other], strict=True)]
            result[f"{one} / {other}"] = statistics.median(ratios)
        results.append({"source": source, **result})
        print(source, " | ".join(f"{key} {value:.3g}" for key, value in result.items()), flush=True)
    memory = {f"{form} peak MB": peak_of_step(args, form) for form in ("dense", "model", "bf16")}
    print(" | ".join(f"{key} {value:.0f}" for key, value in memory.items()))
    if args.output:
        machine = {"processor": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        report = {"machine": machine, "settings": vars(args) | {"output": None}, "results": results, "memory": memory}
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
