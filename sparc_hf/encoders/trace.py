"""What happens inside a frozen transformer: attention maps, hidden states and norms of a pass, with gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparc_hf.encoders.stream_encoder import StreamEncoder


@dataclass(frozen=True)
class Trace:
    """One pass through an encoder; where gradients are enabled all of it is in one graph.

    Attributes:
        vectors: float32 [batch, hidden_size], the rows that `StreamEncoder.pooled` gives.
        attentions: attention maps [batch, heads, tokens, tokens] of the blocks from the start layer on.
        hidden: output of the last block, [batch, tokens, hidden].
        normed: output of the last block's first norm, [batch, tokens, hidden].
    """

    vectors: Tensor
    attentions: tuple[Tensor, ...]
    hidden: Tensor
    normed: Tensor


def blocks_of(encoder: StreamEncoder) -> nn.ModuleList:
    """Return the transformer blocks of an encoder.

    Raises:
        ValueError: where it has none, or does not say how many.
    """
    depth = getattr(encoder.tower_config, "num_hidden_layers", None)
    for module in encoder.tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"`{encoder.encoder}` ({encoder.config.model_type}) shows no transformer blocks, which these maps need"
    )


def trace(encoder: StreamEncoder, inputs: Mapping[str, Tensor], start_layer: int = 0) -> Trace:
    """Run an encoder once and keep its inside; the model computes its attention the plain way for this call.

    Args:
        encoder: of pooled vectors.
        inputs: what `StreamEncoder.prepare` made.
        start_layer: first block that gradients reach, counted from the end where negative; earlier ones keep nothing.

    Raises:
        ValueError: for a stream of patch tokens, a model without attention maps, or a start layer it does not have.
    """
    blocks = blocks_of(encoder)
    if not -len(blocks) <= start_layer < len(blocks):
        raise ValueError(
            f"`start_layer` must be from {-len(blocks)} to {len(blocks) - 1} for `{encoder.encoder}`, "
            f"but it is {start_layer}"
        )
    first = range(len(blocks))[start_layer]
    last = blocks[-1]
    norm = next((module for module in last.modules() if isinstance(module, nn.LayerNorm)), None)
    if norm is None:
        raise ValueError(f"the blocks of `{encoder.encoder}` ({encoder.config.model_type}) have no layer norm")
    states: dict[str, Tensor] = {}
    inputs = encoder.placed(inputs)
    with _eager_attention(encoder), ExitStack() as hooks:
        hooks.callback(blocks[first].register_forward_pre_hook(_start_graph, with_kwargs=True).remove)
        hooks.callback(norm.register_forward_hook(_keep(states, "normed")).remove)
        hooks.callback(last.register_forward_hook(_keep(states, "hidden")).remove)
        output = encoder.output(inputs, output_attentions=True)
        vectors = encoder.vectors(output, inputs)
    attentions: tuple[Tensor | None, ...] = tuple(getattr(output, "attentions", None) or ())
    maps = tuple(attention for attention in attentions if attention is not None)
    if len(maps) != len(blocks):
        raise ValueError(f"`{encoder.encoder}` ({encoder.config.model_type}) gives no attention maps")
    return Trace(vectors, maps[first:], states["hidden"], states["normed"])


@torch.no_grad()
def patch_vectors(encoder: StreamEncoder, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return each patch token brought to the space of the stream's rows, float32 [batch, patches, hidden_size].

    A token goes the way that the pooled token goes: through the final norm and projection, or alone through the
    pooling head.

    Raises:
        ValueError: for a text stream, or a model whose way from tokens to rows is not known.
    """
    tokens = encoder.patch_tokens(inputs)
    if encoder.pooling in ("cls", "mean", "tokens"):
        return tokens
    weight = next(encoder.model.parameters())
    hidden, tower = tokens.to(weight.dtype), encoder.tower
    steps: list[Callable[[Tensor], Tensor]] = []
    if hasattr(tower, "post_layernorm") and not hasattr(tower, "head"):
        steps.append(tower.post_layernorm)  # pyright: ignore[reportArgumentType]
    if hasattr(tower, "head"):
        head: Any = tower.head
        steps.append(lambda value: head(value.reshape(-1, 1, value.shape[-1])).unflatten(0, value.shape[:2]))
    if encoder.pooling == "projection" and hasattr(encoder.model, "visual_projection"):
        steps.append(encoder.model.visual_projection)  # pyright: ignore[reportArgumentType]
    if not steps:
        raise ValueError(
            f"there is no known way from a patch token of `{encoder.encoder}` ({encoder.config.model_type}) to its "
            f"`{encoder.pooling}` vector; use another map"
        )
    for step in steps:
        hidden = step(hidden)
    return hidden.float()


def _start_graph(_: nn.Module, args: tuple, options: dict) -> tuple[tuple, dict]:
    """Cut the graph before a block: the weights are frozen, so without this nothing would be in a graph."""
    if not torch.is_grad_enabled():
        return args, options
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), options
    return args, options | {"hidden_states": options["hidden_states"].detach().requires_grad_()}


def _keep(states: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, _args: Any, output: Tensor | Sequence[Tensor]) -> None:
        states[name] = output if isinstance(output, Tensor) else output[0]

    return hook


@contextmanager
def _eager_attention(encoder: StreamEncoder) -> Iterator[None]:
    """Let the model return its attention maps."""
    model: Any = encoder.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
