"""`sparc demo`: the main job on the embedded world."""

from typing import Any


def run_demo(args: Any) -> str:
    from sparc_hf.demo.run import run_demo

    return run_demo(args)
