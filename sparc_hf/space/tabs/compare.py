"""The tab that puts the figures of joint and single-stream encoding side by side."""

import functools
from collections.abc import Callable

import gradio as gr

from sparc_hf.space import fragments as page
from sparc_hf.space.data import SpaceData
from sparc_hf.space.tabs.controls import Pane, answered, endpoint


def compare_tab(data: SpaceData, tab: gr.Tab, open_latent: Callable[[Callable], None]) -> None:
    """Build the tab that compares the streams."""

    @answered
    @functools.lru_cache(maxsize=4)
    def compared(encoding: str) -> str:
        return page.compare_page(data, encoding)

    encoding = gr.Radio(
        ["single", "joint"],
        value="single",
        label="Encoding",
        info="single: each stream alone; joint: the streams of a sample choose their latents together",
        elem_id="encoding",
    )
    pane = Pane("comparison")
    pane.ask(encoding.input, compared, [encoding])
    pane.ask(tab.select, compared, [encoding])
    open_latent(pane.shown.click)
    endpoint("compare", compared, [encoding])
