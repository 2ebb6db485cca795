"""The tab that finds the samples whose codes are most like those of a query."""

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from sparc_hf.space import fragments as page
from sparc_hf.space.data import SpaceData, spread_rows
from sparc_hf.space.guard import upload
from sparc_hf.space.tabs.controls import Pane, answered, endpoint, fragment
from sparc_hf.space.tabs.picks import PICKS, picked
from sparc_hf.space.visitor_input import InputRefused, checked_image, checked_number, checked_text

DIRECTIONS = {
    "caption to image": ("text", "image"),
    "image to caption": ("image", "text"),
    "image to image": ("image",) * 2,
}


BEFORE_RETRIEVING = "<p class=empty>Type a caption or choose an image, and press Retrieve.</p>"


def retrieve_tab(data: SpaceData, open_latent: Callable[[Callable], None]) -> None:
    """Build the tab of retrieval."""
    directions = {words: kinds for words, kinds in DIRECTIONS.items() if all(data.streams_of(kind) for kind in kinds)}

    @answered
    def retrieved(picture: str | None, caption: str, sample: str, source: str, target: str) -> str:
        return page.retrieval_page(data, source, target, checked_query(data, picture, caption, sample, source))

    @answered
    def sample_picked(event: gr.EventData) -> tuple[Any, str, str]:
        # Without encoders a sample can only be named.
        return *take(event), "" if data.encoders else str((event._data or {})["row"])

    take = picked(data)

    @answered
    def streams(direction: str) -> tuple[Any, Any]:
        if direction not in directions:
            raise InputRefused("Choose one of the directions.")
        sources, targets = (data.streams_of(kind) for kind in directions[direction])
        source, target = first_streams(data, directions[direction])
        return gr.Dropdown(sources, value=source), gr.Dropdown(targets, value=target)

    known = data.streams
    first = next(iter(directions), None)
    source_first, target_first = first_streams(data, directions[first]) if first is not None else (known[0], known[-1])
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


def first_streams(data: SpaceData, kinds: tuple[str, str]) -> tuple[str, str]:
    """Return the query's stream and the searched one that a direction, such as ("text", "image"), starts with."""
    sources, targets = (data.streams_of(kind) for kind in kinds)
    encoders = {stream: data.model.config.stream(stream).get("encoder") for stream in data.streams}
    pairs = [(source, target) for source in sources for target in targets if source != target]
    # Images across models; between images and captions, the model that knows both comes first.
    within = [pair for pair in pairs if sources != targets and encoders[pair[0]] == encoders[pair[1]]]
    return (within or pairs or [(sources[0], targets[0])])[0]


def checked_query(data: SpaceData, picture: str | None, caption: str, sample: str, source: str) -> Any:
    """Return the number of a sample, a caption or an image, whichever a visitor asks with.

    Raises:
        InputRefused: for none or two of them, or one that cannot be used.
    """
    if sample and sample.strip():
        number = checked_number(sample, len(data.features), "sample")
        refuse_second_query(data, source, number, picture, checked_text(caption))
        return number
    if data.modality(source) == "text":
        return checked_text(caption, needed=True)
    if picture:
        return checked_image(picture)[0]
    raise InputRefused("Choose an image first, or pick a sample.")


def refuse_second_query(data: SpaceData, source: str, sample: int, picture: str | None, caption: str) -> None:
    """Raise InputRefused where beside a sample another query is given that its stream could encode."""
    if source not in data.encoders:
        return
    kind = data.modality(source)
    if kind == "image" and picture:
        raise InputRefused(f"Both an image and the number of sample {sample} are given; clear one of them.")
    if kind == "text" and caption not in ("", checked_text(data.caption(sample))):
        raise InputRefused(f"Sample {sample} has another caption than the one that is typed; clear one of them.")
