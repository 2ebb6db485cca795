"""The learning rate of every update of a run."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from sparc_hf.training_arguments import SparcTrainingArguments


def schedule_of(args: SparcTrainingArguments, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Return the schedule of a run of `total_steps` updates, to be stepped once after each."""
    if args.schedule_after_update:
        return LambdaLR(optimizer, lambda update: _rate_set_after(update, args, total_steps) / args.learning_rate)
    cosine = args.lr_schedule == "cosine"
    return get_scheduler(  # pyright: ignore[reportReturnType]
        "cosine_with_min_lr" if cosine else args.lr_schedule,
        optimizer,
        args.warmup_steps,
        max(total_steps, 1),
        {"min_lr": args.final_learning_rate} if cosine else None,
    )


def _rate_set_after(update: int, args: SparcTrainingArguments, total_steps: int) -> float:
    """Return the rate at an update, counted from 0, in the code of Universal Sparse Autoencoders (arXiv 2502.03714).

    The warm-up goes in equal steps from the final to the full rate, both included; the cosine falls over the rest.
    The rate of an update is looked up after the one before, so that the first has the full rate.
    """
    full, final, warmup = args.learning_rate, args.final_learning_rate, args.warmup_steps
    if update == 0:
        return full
    if update < warmup:
        return final + (full - final) * update / (warmup - 1)
    if update >= total_steps:
        return final
    return final + (full - final) * (1 + math.cos(math.pi * (update - warmup) / (total_steps - warmup))) / 2
