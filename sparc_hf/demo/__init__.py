"""The embedded demo world: scenes that are drawn from a seed, and two small encoders trained on them."""

from pathlib import Path

ENCODERS_PATH = Path(__file__).parent / "encoders"
"""Folder of the shipped encoders, `clip/` and `dino/`, which load through the Auto classes."""
