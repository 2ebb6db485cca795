"""Samples to choose from below an upload."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from sparc_hf.space.data import SpaceData
from sparc_hf.space.tabs.controls import answered
from sparc_hf.space.visitor_input import checked_number

PICKS = 16


def picked(data: SpaceData) -> Callable:
    """Return the handler that takes a sample's image and caption over."""

    @answered
    def pick(event: gr.EventData) -> tuple[Any, str]:
        row = checked_number((event._data or {}).get("row"), len(data.features), "sample")
        return data.image(row), data.caption(row) or ""

    return pick
