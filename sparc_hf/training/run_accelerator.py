"""The Accelerator of a run: its device, its precision and its tracker."""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from sparc_hf.training.arguments import SparcTrainingArguments


def accelerator_of(args: SparcTrainingArguments, folder: Path) -> Accelerator:
    """Return the Accelerator of a run that works in a folder.

    Raises:
        ValueError: for a precision that the device has not.
    """
    # The state is shared by the whole process, which refuses a second run in another precision otherwise.
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=str(folder),
    )
    if precision != "no" and not accelerator.native_amp:
        # Accelerate would train in float32 without a word.
        raise ValueError(
            f"`mixed_precision` {precision} needs a GPU, but this run is on {accelerator.device.type}; "
            "choose bf16 or no"
        )
    return accelerator
