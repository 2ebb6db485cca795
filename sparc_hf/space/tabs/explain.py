"""The tab that shows where concepts are in a visitor's image and caption."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace

import gradio as gr

from sparc_hf.codes.concept_search import LatentMatch
from sparc_hf.space import fragments as page
from sparc_hf.space.data import SpaceData, spread_rows
from sparc_hf.space.guard import upload
from sparc_hf.space.seen_maps import explain
from sparc_hf.space.tabs.controls import EXPLAINING, FIRST_ORDER, Pane, answered, endpoint, fragment
from sparc_hf.space.tabs.picks import PICKS, picked
from sparc_hf.space.visitor_input import InputRefused, checked_image, checked_number, checked_text

SIMILARITY = "similarity of image and caption"


LISTED_LATENTS = 300


SET_OPACITY = "(share) => { document.documentElement.style.setProperty('--heat-opacity', share); }"


BEFORE_EXPLAINING = "<p class=empty>Pick an image below the upload, or bring your own, and press Explain.</p>"


def explain_tab(data: SpaceData, open_latent: Callable[[Callable], None]) -> None:
    """Build the tab of maps and words."""

    @answered
    def explained(picture: str | None, caption: str, target: str) -> str:
        image, remarks = checked_image(picture) if picture else (None, [])
        match = target_match(data, target)
        explanation = explain(data, image, checked_text(caption), latent=None if match is None else match.latent)
        if match is not None and match.reason:
            remarks.append(f"{data.title(match.latent)} is shown because of its {match.reason}.")
        return page.explanation_page(data, replace(explanation, remarks=[*remarks, *explanation.remarks]))

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
