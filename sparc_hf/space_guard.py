"""What a visitor's request may hold, checked before gradio does anything with it."""

import html
import re
from typing import Any

import gradio as gr

from sparc_hf.stranger_input import InputRefused, checked_upload

# Routes by which gradio fetches files of other machines for a visitor.
FETCHING = re.compile(r"/gradio_api/(proxy=|file[=/]/*[A-Za-z][A-Za-z0-9+.-]*:)")


def refusal(error: Exception) -> gr.Error:
    """Return what shows a visitor why something is refused."""
    return gr.Error(html.escape(str(error), quote=False), title="That cannot be used", print_exception=False)


class GuardedBlocks(gr.Blocks):
    """A page whose functions are given plain values and a visitor's own uploads, whichever way a request comes.

    Left alone, gradio downloads what a value names by an address, copies files, and looks at places of this machine
    only where a value has the form that its own page sends.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **options: Any) -> Any:
        """Check the values of one call; see `gradio.Blocks.preprocess_data`.

        Raises:
            gr.Error: for values of another form, and files that are no uploads; nothing is said of other files.
        """
        try:
            named = list(zip(block_fn.inputs, inputs, strict=False))
            values = [_checked_value(block, value) for block, value in named] + inputs[len(named) :]
        except InputRefused as error:
            raise refusal(error) from None
        return await super().preprocess_data(block_fn, values, *args, **options)


def upload(**options: Any) -> gr.Image:
    """Return a place for an image that hands over the file unopened, because it is checked before it is decoded."""
    picture = gr.Image(
        type="filepath", image_mode=None, format="png", sources=["upload", "clipboard"], label="Image", **options
    )

    # Not a subclass: gradio writes an interface file beside the module of each subclass of a component.
    def path_of(payload: Any) -> str | None:
        path = checked_upload(None if payload is None else {"path": payload.path}, picture.GRADIO_CACHE)
        return None if path is None else str(path)

    picture.preprocess = path_of
    return picture


class NoFetching:
    """ASGI middleware: the server fetches nothing from other machines on a visitor's behalf."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 403 to requests for files of elsewhere, and pass all others on."""
        if scope["type"] == "http" and FETCHING.search(scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self.app(scope, receive, send)


def _checked_value(block: Any, value: Any) -> Any:
    if isinstance(block, gr.Image):
        path = checked_upload(value, block.GRADIO_CACHE)
        return None if path is None else {"path": str(path), "meta": {"_type": "gradio.FileData"}}
    if isinstance(value, list | dict):
        raise InputRefused("Only texts, numbers and switches can be sent here.")
    return value
