"""The Space: look at the concepts of a SPARC model instead of reading about them.

`SPARC_MODEL` names the model (Hub id or folder) and `SPARC_DATASET` the feature dataset it is shown on; without
them it is the embedded demo, which lies beside this file in a pushed Space and is prepared once elsewhere. Nothing a
visitor sends is ever loaded as a model.
"""

import logging
import os
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default
from starlette.middleware import Middleware

from sparc_hf.space.data import SHIPPED_FOLDER, SpaceData, open_space
from sparc_hf.space.guard import GuardedBlocks, NoFetching
from sparc_hf.space.tabs.compare import compare_tab
from sparc_hf.space.tabs.explain import explain_tab
from sparc_hf.space.tabs.explorer import explorer_tab
from sparc_hf.space.tabs.retrieve import retrieve_tab

HERE = Path(__file__).parent
MAX_FILE_SIZE = "11mb"  # a little over what is accepted, so that the page can say why
# Requests that may wait, and how many of one kind run at once; more are told that the Space is busy.
QUEUE_SIZE = 128
AT_ONCE = 2
# Each thread keeps memory of its own.
THREADS = 8
# Fonts of the visitor's machine: nothing is fetched from elsewhere. Every text has a contrast of at least 4.5 to 1
# (WCAG 2.2, success criterion 1.4.3), which the theme's own hints and buttons lack.
THEME = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    input_placeholder_color="*neutral_600",
    input_placeholder_color_dark="*neutral_400",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
)
LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css_paths": [HERE / "page.css"],
    "head": f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
    "max_file_size": MAX_FILE_SIZE,
    "max_threads": THREADS,
    "show_error": True,
    "ssr_mode": False,
    "footer_links": ["api"],
}


def build_app(data: SpaceData) -> gr.Blocks:
    """Return the page over a model and its index."""
    with GuardedBlocks(title="SPARC concept explorer", analytics_enabled=False, delete_cache=(1800, 3600)) as app:
        gr.Markdown("# SPARC concept explorer")
        with gr.Tabs(selected="explorer", overflow_behavior="wrap", elem_id="tabs") as tabs:
            with gr.Tab("Concept explorer", id="explorer"):
                open_latent = explorer_tab(data, tabs, app)
            with gr.Tab("Explain", id="explain"):
                explain_tab(data, open_latent)
            with gr.Tab("Retrieve", id="retrieve"):
                retrieve_tab(data, open_latent)
            with gr.Tab("Compare models", id="compare") as compare:
                compare_tab(data, compare, open_latent)
            with gr.Tab("About", id="about"):
                gr.Markdown(data.card or "This model has no card.", sanitize_html=True, elem_id="card")
    app.queue(max_size=QUEUE_SIZE, default_concurrency_limit=AT_ONCE)
    return app


def launch(data: SpaceData, *, host: str | None = None, port: int | None = None, **options: Any) -> gr.Blocks:
    """Serve the page and return it; None takes gradio's own settings from the environment."""
    app = build_app(data)
    guards = {"middleware": [Middleware(NoFetching)]}
    app.launch(server_name=host, server_port=port, app_kwargs=guards, **LAUNCH, **options)
    return app


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("sparc_hf").setLevel(logging.INFO)
    shipped = HERE / SHIPPED_FOLDER
    settings = (os.environ.get("SPARC_MODEL") or None, os.environ.get("SPARC_DATASET") or None)
    launch(open_space(*settings, shipped=shipped if shipped.is_dir() else None))
