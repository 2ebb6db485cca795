"""The learning rate of every update of a run."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from sparc_hf.training_arguments import SparcTrainingArguments


def schedule_of(args: SparcTrainingArguments, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Return the schedule of a run of `total_steps` updates, to be stepped once after each."""
    if args.schedule_after_update:
        return ScheduleAfterUpdate(optimizer, args.final_learning_rate, args.warmup_steps, total_steps)
    cosine = args.lr_schedule == "cosine"
    return get_scheduler(  # pyright: ignore[reportReturnType]
        "cosine_with_min_lr" if cosine else args.lr_schedule,
        optimizer,
        args.warmup_steps,
        max(total_steps, 1),
        {"min_lr": args.final_learning_rate} if cosine else None,
    )


class ScheduleAfterUpdate(LRScheduler):
    """The schedule of the code of Universal Sparse Autoencoders (arXiv 2502.03714): every model has its own.

    A group of parameters has the rate of its own number of updates, so that with several models, of which an update
    moves one, each goes through a part of the schedule only. The warm-up goes in equal steps from the final to the
    full rate, both included; the cosine falls over the rest of the run's updates. The rate of an update is looked up
    after the one before, so that a group's first update has the full rate.

    Args:
        optimizer: with the full rate.
        final: the rate at the end of the cosine.
        warmup: updates of the warm-up.
        total: updates of the run, of all groups together.
    """

    def __init__(self, optimizer: Optimizer, final: float, warmup: int, total: int):
        self.final, self.warmup, self.total = final, warmup, total
        self.updates = [0] * len(optimizer.param_groups)
        super().__init__(optimizer)

    def count_update(self, group: int | None = None) -> None:
        """Note that an update moved one group of parameters, or all of them."""
        for number in range(len(self.updates)) if group is None else [group]:
            self.updates[number] += 1

    def get_lr(self) -> list[float]:
        """Return the rate of every group's next update."""
        return [self._rate(float(full), update) for full, update in zip(self.base_lrs, self.updates, strict=True)]

    def _rate(self, full: float, update: int) -> float:
        if update == 0:
            return full
        if update < self.warmup:
            return self.final + (full - self.final) * update / (self.warmup - 1)
        if update >= self.total:
            return self.final
        share = (update - self.warmup) / (self.total - self.warmup)
        return self.final + (full - self.final) * (1 + math.cos(math.pi * share)) / 2
