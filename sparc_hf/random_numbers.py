"""Random numbers of one's own: seeded for a while, with the caller's put back after."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from accelerate.utils import set_seed


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's random numbers inside a `with`, and put back what they were."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
