"""The Space: look at the concepts of a SPARC model instead of reading about them.

`SPARC_MODEL` names the model (Hub id or folder) and `SPARC_DATASET` the feature dataset it is shown on; without
them it is the embedded demo, which lies beside this file in a pushed Space and is prepared once elsewhere. Nothing a
visitor sends is ever loaded as a model.
"""

import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Default
from starlette.middleware import Middleware

from sparc_hf import space_page as page
from sparc_hf.concept_search import LatentMatch
from sparc_hf.space_controls import EXPLAINING, Pane, answered, endpoint, fragment
from sparc_hf.space_data import ORDERS, SHIPPED_FOLDER, SpaceData, open_space, spread_rows
from sparc_hf.space_guard import GuardedBlocks, NoFetching, upload
from sparc_hf.space_maps import explain, latent_maps
from sparc_hf.stranger_input import InputRefused, checked_image, checked_number, checked_text

HERE = Path(__file__).parent
FIRST_ORDER = "alignment, single-stream"
SIMILARITY = "similarity of image and caption"
DIRECTIONS = {
    "caption to image": ("text", "image"),
    "image to caption": ("image", "text"),
    "image to image": ("image",) * 2,
}
LISTED_LATENTS = 300
PICKS = 16
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
SET_OPACITY = "(share) => { document.documentElement.style.setProperty('--heat-opacity', share); }"
BEFORE_EXPLAINING = "<p class=empty>Pick an image below the upload, or bring your own, and press Explain.</p>"
BEFORE_RETRIEVING = "<p class=empty>Type a caption or choose an image, and press Retrieve.</p>"


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


def explorer_tab(data: SpaceData, tabs: gr.Tabs, app: gr.Blocks) -> Callable[[Callable], None]:
    """Build the explorer and return what makes another fragment's event open the latent that was chosen there."""

    @answered
    def find(search: str, order: str) -> str:
        return page.latents_table(data, data.match_latents(checked_text(search), order))

    @answered
    def turned(event: gr.EventData, search: str, order: str) -> str:
        number = checked_number((event._data or {}).get("page"), 10**6, "page")
        return page.latents_table(data, data.match_latents(checked_text(search), order), number)

    def samples(latent: int, wanted: bool) -> str:
        return samples_with_maps(latent) if wanted else page.latent_samples(data, data.latent(latent))

    @functools.lru_cache(maxsize=128)
    def samples_with_maps(latent: int) -> str:
        facts = data.latent(latent)
        rows = {stream: [row for row, _ in samples] for stream, samples in facts.samples.items()}
        return page.latent_samples(data, facts, latent_maps(data, latent, rows))

    @answered
    def show(number: str) -> tuple[str, str]:
        latent = checked_number(number, data.num_latents, "latent")
        return page.latent_page(data, data.latent(latent)), samples(latent, False)

    @answered
    def show_maps(number: str, wanted: bool) -> str:
        return samples(checked_number(number, data.num_latents, "latent"), wanted)

    @answered
    def shown_again(number: str, wanted: bool) -> str:
        latent = checked_number(number, data.num_latents, "latent")
        return page.latent_with_samples(data, data.latent(latent), samples(latent, wanted), with_maps=wanted)

    @answered
    def opened(number: Any) -> tuple[Any, str, str]:
        latent = checked_number(number, data.num_latents, "latent")
        return gr.Tabs(selected="explorer"), str(latent), shown_again(str(latent), False)

    @answered
    def clicked(event: gr.EventData) -> tuple[Any, ...]:
        chosen = event._data or {}
        return opened(chosen.get("open", chosen.get("latent")))

    @answered
    def linked(request: gr.Request) -> tuple[Any, ...]:
        number = dict(request.query_params).get("latent")
        return (gr.skip(),) * 3 if number is None else opened(number)

    latents = data.match_latents("", FIRST_ORDER)
    first = str(latents[0].latent if latents else 0)
    with gr.Row(elem_classes="explorer"):
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                search = gr.Textbox(label="Search latents", placeholder="name, label or word", elem_id="search")
                order = gr.Dropdown(list(ORDERS), value=FIRST_ORDER, label="Sort by", elem_id="order")
            table = Pane("latents", page.latents_table(data, latents))
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                number = gr.Textbox(first, label="Latent number", max_lines=1, elem_id="number")
                wanted = gr.Checkbox(True, label="maps on images", elem_id="with-maps")
            latent = fragment(shown_again(first, False), elem_id="latent")
            arrived = gr.HTML(visible=False)
    searched = {"show_progress": "hidden"}
    table.ask(functools.partial(gr.on, [search.submit, search.change, order.input]), find, [search, order], **searched)
    table.ask(table.shown.select, turned, [search, order], **searched)

    # Heading and samples are one fragment, and maps are for the latent that it shows, whatever the number's box says.
    def draw_maps(listener: Callable) -> None:
        listener(
            shown_again,
            [latent, wanted],
            arrived,
            js="(shown, wanted) => [sparc.latentOf(shown), wanted]",
            api_visibility="private",
            show_progress="hidden",
            trigger_mode="always_last",
            **EXPLAINING,
        ).success(
            None,
            [arrived, latent, wanted],
            latent,
            js="(arrived, shown, wanted) => sparc.sameLatent(arrived, shown, wanted)",
            show_progress="hidden",
            trigger_mode="multiple",
        )

    def open_from(listener: Callable, handler: Callable = clicked, inputs: Any = None) -> None:
        event = listener(handler, inputs, [tabs, number, latent], api_visibility="private", trigger_mode="always_last")
        event.success(None, latent, None, js="(shown) => sparc.opened(shown)", trigger_mode="multiple")
        draw_maps(event.success)

    open_from(number.submit, opened, number)
    open_from(table.shown.click)
    open_from(latent.click)
    draw_maps(wanted.input)
    link = app.load(linked, None, [tabs, number, latent], api_visibility="private")
    link.success(None, None, None, js="() => location.search.includes('latent=') && sparc.reveal('latent-page')")
    draw_maps(link.success)
    endpoint("find_latents", find, [search, order])
    endpoint("latent", show, [number], pieces=2)
    endpoint("latent_maps", show_maps, [number, wanted], **EXPLAINING)
    return open_from


def explain_tab(data: SpaceData, open_latent: Callable[[Callable], None]) -> None:
    """Build the tab of maps and words."""

    @answered
    def explained(picture: str | None, caption: str, target: str) -> str:
        image, remarks = checked_image(picture) if picture else (None, [])
        meant = target_match(data, target)
        found = explain(data, image, checked_text(caption), latent=None if meant is None else meant.latent)
        if meant is not None and meant.reason:
            remarks.append(f"{data.title(meant.latent)} is shown because of its {meant.reason}.")
        found.remarks = remarks + found.remarks
        return page.explanation_page(data, found)

    @answered
    def bar_clicked(event: gr.EventData) -> str:
        return data.title(checked_number((event._data or {}).get("latent"), data.num_latents, "latent"))

    named = [latent for latent in data.find_latents("", FIRST_ORDER) if data.name(latent)][:LISTED_LATENTS]
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            picture = upload(elem_id="explain-image", height=220)
            strip = fragment(page.sample_strip(data, spread_rows(data, PICKS)), elem_id="explain-strip")
            caption = gr.Textbox(label="Caption", lines=2, elem_id="explain-caption")
            target = gr.Dropdown(
                [SIMILARITY, *(data.title(latent) for latent in named)],
                value=SIMILARITY,
                label="Look for",
                info="a concept by name or number, or the similarity",
                allow_custom_value=True,
                elem_id="explain-target",
            )
            button = gr.Button("Explain", variant="primary", elem_id="explain-button")
            opacity = gr.Slider(0, 1, 0.65, label="Opacity of maps", elem_id="opacity")
        with gr.Column(scale=3, min_width=320):
            pane = Pane("explanation", BEFORE_EXPLAINING, scrolled=True)
    inputs = [picture, caption, target]
    asked_by = functools.partial(gr.on, [button.click, caption.submit, target.input])
    pick = strip.click(picked(data), None, [picture, caption], api_visibility="private", trigger_mode="always_last")
    bar = pane.shown.click(bar_clicked, None, target, api_visibility="private", trigger_mode="always_last")
    for listener in (asked_by, pick.success, bar.success):
        pane.ask(listener, explained, inputs, **EXPLAINING)
    gr.on(
        [picture.upload, picture.clear],
        None,
        caption,
        [caption, pane.shown],
        js=f"""(caption) => {{
          sparc.forget('explanation');
          return [sparc.captionOfNewPicture('explanation', caption), {json.dumps(BEFORE_EXPLAINING)}];
        }}""",
        show_progress="hidden",
    )
    open_latent(pane.shown.select)
    opacity.input(None, opacity, None, js=SET_OPACITY)
    endpoint("explain", explained, inputs, **EXPLAINING)


def retrieve_tab(data: SpaceData, open_latent: Callable[[Callable], None]) -> None:
    """Build the tab of retrieval."""
    directions = {words: kinds for words, kinds in DIRECTIONS.items() if all(data.streams_of(kind) for kind in kinds)}

    @answered
    def retrieved(picture: str | None, caption: str, sample: str, source: str, target: str) -> str:
        query: Any = None
        if sample and sample.strip():
            query = checked_number(sample, len(data.features), "sample")
            refuse_second_query(data, source, query, picture, checked_text(caption))
        elif data.modality(source) == "text":
            query = checked_text(caption, needed=True)
        elif picture:
            query, _ = checked_image(picture)
        else:
            raise InputRefused("Choose an image first, or pick a sample.")
        return page.retrieval_page(data, source, target, query)

    @answered
    def sample_picked(event: gr.EventData) -> tuple[Any, str, str]:
        # Without encoders a sample can only be named.
        return *take(event), "" if data.encoders else str((event._data or {})["row"])

    take = picked(data)

    def first_streams(direction: str) -> tuple[str, str]:
        sources, targets = (data.streams_of(kind) for kind in directions[direction])
        encoders = {stream: data.model.config.stream(stream).get("encoder") for stream in data.streams}
        pairs = [(source, target) for source in sources for target in targets if source != target]
        # Images across models; between images and captions, the model that knows both comes first.
        within = [pair for pair in pairs if sources != targets and encoders[pair[0]] == encoders[pair[1]]]
        return (within or pairs or [(sources[0], targets[0])])[0]

    @answered
    def streams(direction: str) -> tuple[Any, Any]:
        if direction not in directions:
            raise InputRefused("Choose one of the directions.")
        sources, targets = (data.streams_of(kind) for kind in directions[direction])
        source, target = first_streams(direction)
        return gr.Dropdown(sources, value=source), gr.Dropdown(targets, value=target)

    known = data.streams
    first = next(iter(directions), None)
    source_first, target_first = first_streams(first) if first is not None else (known[0], known[-1])
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            direction = gr.Radio(
                list(directions), value=first, label="From, to", elem_id="direction", visible=first is not None
            )
            caption = gr.Textbox(label="Caption", lines=2, elem_id="retrieve-caption")
            picture = upload(elem_id="retrieve-image", height=220)
            strip = fragment(page.sample_strip(data, spread_rows(data, PICKS)), elem_id="retrieve-strip")
            sample = gr.Textbox(label="or the number of an indexed sample", max_lines=1, elem_id="retrieve-sample")
            with gr.Row():
                source = gr.Dropdown(known, value=source_first, label="Query's stream", elem_id="source")
                target = gr.Dropdown(known, value=target_first, label="Searched stream", elem_id="target")
            button = gr.Button("Retrieve", variant="primary", elem_id="retrieve-button")
        with gr.Column(scale=3, min_width=320):
            pane = Pane("matches", BEFORE_RETRIEVING, scrolled=True)
    inputs = [picture, caption, sample, source, target]
    pick = strip.click(
        sample_picked, None, [picture, caption, sample], api_visibility="private", trigger_mode="always_last"
    )
    pane.ask(functools.partial(gr.on, [button.click, caption.submit, sample.submit]), retrieved, inputs)
    pane.ask(pick.success, retrieved, inputs)
    if data.encoders:
        # Whatever a visitor gives last is the query. (The event `input` does not tell of pasted text.)
        typed = "(caption, sample) => [caption ? '' : sample]"
        caption.change(None, [caption, sample], sample, js=typed, show_progress="hidden")
        picture.upload(None, None, sample, js="() => ['']", show_progress="hidden")
        numbered = "(sample, picture, caption) => sample ? [null, ''] : [picture, caption]"
        former = [sample, picture, caption]
        sample.change(None, former, [picture, caption], js=numbered, show_progress="hidden")
    if first is not None:
        direction.input(streams, direction, [source, target], api_visibility="private", show_progress="hidden")
    open_latent(pane.shown.click)
    endpoint("retrieve", retrieved, inputs)


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


def picked(data: SpaceData) -> Callable:
    """Return the handler that takes a sample's image and caption over."""

    @answered
    def pick(event: gr.EventData) -> tuple[Any, str]:
        row = checked_number((event._data or {}).get("row"), len(data.features), "sample")
        return data.image(row), data.caption(row) or ""

    return pick


def refuse_second_query(data: SpaceData, source: str, sample: int, picture: str | None, caption: str) -> None:
    """Raise InputRefused where beside a sample another query is given that its stream could encode."""
    if source not in data.encoders:
        return
    kind = data.modality(source)
    if kind == "image" and picture:
        raise InputRefused(f"Both an image and the number of sample {sample} are given; clear one of them.")
    if kind == "text" and caption not in ("", checked_text(data.caption(sample))):
        raise InputRefused(f"Sample {sample} has another caption than the one that is typed; clear one of them.")


def target_match(data: SpaceData, target: str) -> LatentMatch | None:
    """Return the latent that is meant by a title, a number or a word, with why; None for the similarity."""
    words = checked_text(target)
    if words in ("", SIMILARITY):
        return None
    number = words.split(" · ")[0]
    if number.isascii() and number.isdigit():
        return LatentMatch(checked_number(number, data.num_latents, "latent"))
    matches = data.match_latents(words, FIRST_ORDER)
    if not matches:
        raise InputRefused(f"No latent has {words[:60]!r} as its name, label or word.")
    return matches[0]


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
