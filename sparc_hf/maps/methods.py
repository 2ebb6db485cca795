"""Ways to tell how much of a target each token of a pass carries.

Relevance is gradient-weighted attention, rolled out over blocks (Chefer et al. 2021, arXiv 2103.15679, equations 5
and 6), which SPARC (arXiv 2507.06265) aims at latents and at similarities between streams.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.encoders.trace import Trace, patch_vectors, trace
from sparc_hf.maps.targets import StreamTargets

MAP_METHODS = ("relevance", "grad_cam", "patch_codes")
WORD_METHODS = ("relevance", "gradient")


def map_method(encoder: StreamEncoder, wanted: str = "relevance") -> str:
    """Return the kind of map a stream can have: "patch_codes" for streams of patch tokens, otherwise `wanted`."""
    return "patch_codes" if encoder.pooling == "tokens" else wanted


def check_map_settings(method: str, shifts: int) -> None:
    """Raise ValueError for a kind of map there is not, or fewer than one shift."""
    check_method(method, MAP_METHODS)
    if shifts < 1:
        raise ValueError(f"`shifts` must be at least 1, but it is {shifts}")


def check_method(method: str, methods: Sequence[str]) -> None:
    """Raise ValueError for a method that is not among those there are."""
    if method not in methods:
        raise ValueError(f"`method` must be one of {list(methods)}, but it is {method!r}")


def attention_relevance(
    rows: Tensor, attentions: Sequence[Tensor], gradients: Sequence[Tensor], start_layer: int = 0
) -> Tensor:
    """Return rows of the relevance R = (I + M_last) ... (I + M_start), M = mean over heads of max(0, A * dA).

    Args:
        rows: float [batch, queries, tokens], combinations of rows of R to return; the identity gives R itself.
        attentions: maps A of the blocks, each [batch, heads, tokens, tokens].
        gradients: of the target with respect to them.
        start_layer: first block that counts.

    Returns:
        [batch, queries, tokens].
    """
    # From the last block back, so that only the rows asked for are multiplied and not [tokens, tokens] matrices.
    for attention, gradient in reversed(list(zip(attentions, gradients, strict=True))[start_layer:]):
        rows = rows + rows @ (attention * gradient).clamp(min=0).mean(dim=1)
    return rows


def patch_scores(
    targets: StreamTargets, inputs: Mapping[str, Tensor], batch: slice, method: str, start_layer: int
) -> np.ndarray:
    """Return a score a patch, float32 [batch, slots, patches], 0 or more; NaN without a target.

    Args:
        targets: of an image stream.
        inputs: what its encoder prepared.
        batch: the samples they are of.
        method: one of `MAP_METHODS`.
        start_layer: first block that relevance counts.
    """
    if method != "patch_codes":
        return token_scores(targets, inputs, batch, method, start_layer)[:, :, targets.encoder.prefix_tokens :]
    with torch.no_grad():
        values = targets.values(patch_vectors(targets.encoder, inputs), batch, positive=True).clamp(min=0)
    return targets.masked(values.transpose(1, 2), batch)


def token_scores(
    targets: StreamTargets, inputs: Mapping[str, Tensor], batch: slice, method: str, start_layer: int
) -> np.ndarray:
    """Return a score a token, float32 [batch, slots, tokens], as `patch_scores` does for methods with gradients."""
    encoder = targets.encoder
    with torch.enable_grad():
        seen = trace(encoder, inputs, start_layer if method == "relevance" else -1)
        values = targets.values(seen.vectors[:, None], batch)
    sources = (*seen.attentions, seen.hidden) if method == "relevance" else (seen.normed,)
    scores = []
    for slot in range(targets.slots):
        more = slot + 1 < targets.slots
        # Samples do not meet inside an encoder, so the gradient of their sum is that of each.
        gradients = torch.autograd.grad(values[:, 0, slot].sum(), sources, retain_graph=more)
        scores.append(_scores(seen, gradients, method, encoder.prefix_tokens if method == "grad_cam" else 0))
    return targets.masked(torch.stack(scores, dim=1), batch)


def _scores(seen: Trace, gradients: Sequence[Tensor], method: str, prefix: int) -> Tensor:
    """Return [batch, tokens]."""
    if method == "relevance":
        # How much the target depends on each token of the last block: on the class token alone, or the end of a text,
        # where these stand for the sample; otherwise on all, as the pooling weighs them.
        shares = gradients[-1].float().norm(dim=-1)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        attentions = [attention.detach().float() for attention in seen.attentions]
        return attention_relevance(shares[:, None], attentions, [grad.float() for grad in gradients[:-1]])[:, 0]
    (gradient,), activations = gradients, seen.normed.detach()
    if method == "grad_cam":
        gradient = gradient[:, prefix:].mean(dim=1, keepdim=True)
    return (gradient * activations).sum(dim=-1).clamp(min=0).float()
