"""The tab that lists latents and shows the samples of one."""

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from sparc_hf.space import fragments as page
from sparc_hf.space.data import ORDERS, SpaceData
from sparc_hf.space.seen_maps import latent_maps
from sparc_hf.space.tabs.controls import EXPLAINING, FIRST_ORDER, Pane, answered, endpoint, fragment
from sparc_hf.space.visitor_input import checked_number, checked_text


class LatentAnswers:
    """What the explorer answers: lists of latents, and one latent with its samples.

    Args:
        data: what is shown.
    """

    def __init__(self, data: SpaceData):
        self.data = data
        self.samples_with_maps = functools.lru_cache(maxsize=128)(self._samples_with_maps)

    @answered
    def find(self, search: str, order: str) -> str:
        return page.latents_table(self.data, self.data.match_latents(checked_text(search), order))

    @answered
    def turned(self, event: gr.EventData, search: str, order: str) -> str:
        number = checked_number((event._data or {}).get("page"), 10**6, "page")
        return page.latents_table(self.data, self.data.match_latents(checked_text(search), order), number)

    def samples(self, latent: int, wanted: bool) -> str:
        return self.samples_with_maps(latent) if wanted else page.latent_samples(self.data, self.data.latent(latent))

    def _samples_with_maps(self, latent: int) -> str:
        facts = self.data.latent(latent)
        rows = {stream: [row for row, _ in samples] for stream, samples in facts.samples.items()}
        return page.latent_samples(self.data, facts, latent_maps(self.data, latent, rows))

    @answered
    def show(self, number: str) -> tuple[str, str]:
        latent = checked_number(number, self.data.num_latents, "latent")
        return page.latent_page(self.data, self.data.latent(latent)), self.samples(latent, False)

    @answered
    def show_maps(self, number: str, wanted: bool) -> str:
        return self.samples(checked_number(number, self.data.num_latents, "latent"), wanted)

    @answered
    def shown_again(self, number: str, wanted: bool) -> str:
        latent = checked_number(number, self.data.num_latents, "latent")
        samples = self.samples(latent, wanted)
        return page.latent_with_samples(self.data, self.data.latent(latent), samples, with_maps=wanted)

    @answered
    def opened(self, number: Any) -> tuple[Any, str, str]:
        latent = checked_number(number, self.data.num_latents, "latent")
        return gr.Tabs(selected="explorer"), str(latent), self.shown_again(str(latent), False)

    @answered
    def clicked(self, event: gr.EventData) -> tuple[Any, ...]:
        data = event._data or {}
        return self.opened(data.get("open", data.get("latent")))

    @answered
    def linked(self, request: gr.Request) -> tuple[Any, ...]:
        number = dict(request.query_params).get("latent")
        return (gr.skip(),) * 3 if number is None else self.opened(number)


def explorer_tab(data: SpaceData, tabs: gr.Tabs, app: gr.Blocks) -> Callable[[Callable], None]:
    """Build the explorer and return what makes another fragment's event open the latent that was chosen there."""
    answers = LatentAnswers(data)
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
            latent = fragment(answers.shown_again(first, False), elem_id="latent")
            arrived = gr.HTML(visible=False)
    searched = {"show_progress": "hidden"}
    table.ask(
        functools.partial(gr.on, [search.submit, search.change, order.input]),
        answers.find,
        [search, order],
        **searched,
    )
    table.ask(table.shown.select, answers.turned, [search, order], **searched)

    # Heading and samples are one fragment, and maps are for the latent that it shows, whatever the number's box says.
    def draw_maps(listener: Callable) -> None:
        listener(
            answers.shown_again,
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

    def open_from(listener: Callable, handler: Callable = answers.clicked, inputs: Any = None) -> None:
        event = listener(handler, inputs, [tabs, number, latent], api_visibility="private", trigger_mode="always_last")
        event.success(None, latent, None, js="(shown) => sparc.opened(shown)", trigger_mode="multiple")
        draw_maps(event.success)

    open_from(number.submit, answers.opened, number)
    open_from(table.shown.click)
    open_from(latent.click)
    draw_maps(wanted.input)
    link = app.load(answers.linked, None, [tabs, number, latent], api_visibility="private")
    link.success(None, None, None, js="() => location.search.includes('latent=') && sparc.reveal('latent-page')")
    draw_maps(link.success)
    endpoint("find_latents", answers.find, [search, order])
    endpoint("latent", answers.show, [number], pieces=2)
    endpoint("latent_maps", answers.show_maps, [number, wanted], **EXPLAINING)
    return open_from
