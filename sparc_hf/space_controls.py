"""What the tabs of the Space are made of: fragments that can be clicked, panes of answers, endpoints for programs."""

import functools
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from sparc_hf.space_guard import refusal

logger = logging.getLogger(__name__)

# Every fragment reports which latent, sample or page was chosen in it; with a modifier key the browser opens a link.
ON_CLICK = """
element.addEventListener('click', (event) => {
  const chosen = event.target.closest('[data-latent],[data-open],[data-row],[data-page]');
  if (!chosen || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const second = 'open' in chosen.dataset || 'page' in chosen.dataset;
  trigger(second ? 'select' : 'click', {...chosen.dataset});
});
"""
# Requests that make maps; they take turns, and while they wait they hold no thread that others need.
EXPLAINING: dict[str, Any] = {"concurrency_id": "explaining", "concurrency_limit": 1}


def answered(handler: Callable) -> Callable:
    """Turn what a handler raises into a message in the page."""

    @functools.wraps(handler)
    def answer(*args: Any, **options: Any) -> Any:
        try:
            return handler(*args, **options)
        except ValueError as error:
            raise refusal(error) from None
        except Exception:
            logger.exception("a request failed")
            raise gr.Error(
                "Something went wrong here. The server goes on; try something else.", print_exception=False
            ) from None

    return answer


def fragment(value: str = "", **options: Any) -> gr.HTML:
    """Return a piece of the page whose links and buttons can be clicked.

    Those with `data-open` or `data-page` are its event `select`, those with `data-latent` or `data-row` its `click`.
    """
    return gr.HTML(value, js_on_load=ON_CLICK, **options)


class Pane:
    """A piece of the page with the answer to what was asked last, in whichever order the answers arrive.

    Args:
        name: its id in the page.
        value: what it shows first.
        scrolled: scroll to new answers.

    Attributes:
        shown: the fragment.
    """

    def __init__(self, name: str, value: str = "", *, scrolled: bool = False):
        self.name, self.scrolled = name, scrolled
        self.ticket = gr.Textbox(visible=False)
        self.arrived = gr.HTML(visible=False)
        self.shown = fragment(value, elem_id=name)

    def ask(self, listener: Callable, handler: Callable, inputs: Sequence[Any] = (), **options: Any) -> None:
        """Let an event ask for what the pane shall show.

        Args:
            listener: such as `button.click`.
            handler: input values -> HTML.
            inputs: its input components.
            options: of the listener.
        """
        values = [*inputs, self.ticket]
        event = listener(
            _ticketed(handler),
            values,
            self.arrived,
            js=f"(...values) => sparc.ask({json.dumps(self.name)}, values.slice(0, {len(values)}))",
            **{"show_progress_on": self.shown, "trigger_mode": "always_last", "api_visibility": "private"} | options,
        )
        settings = f"{json.dumps(self.name)}, arrived, shown, {json.dumps(self.scrolled)}"
        event.success(
            None,
            [self.arrived, self.shown],
            self.shown,
            js=f"(arrived, shown) => sparc.newest({settings})",
            trigger_mode="multiple",
            show_progress="hidden",
        )


def endpoint(name: str, handler: Callable, inputs: Sequence[Any], pieces: int = 1, **options: Any) -> None:
    """Offer a handler to programs; the page does not use it."""
    outputs = [gr.HTML(visible=False) for _ in range(pieces)]
    gr.Button(visible=False).click(handler, list(inputs), outputs, api_name=name, **options)


def _ticketed(handler: Callable) -> Callable:
    """Return a handler that takes a ticket too, and marks its answer with it."""

    # gradio reads from names and annotations which arguments it has to add.
    @functools.wraps(handler)
    def answer(*values: Any) -> str:
        *given, ticket = values
        number = ticket if isinstance(ticket, str) and ticket.isascii() and ticket.isdigit() else ""
        return f'<div data-ticket="{number}">{handler(*given)}</div>'

    parameters = inspect.signature(handler).parameters.values()
    ticket = inspect.Parameter("ticket", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    answer.__signature__ = inspect.Signature([*parameters, ticket])  # pyright: ignore[reportAttributeAccessIssue]
    return answer
