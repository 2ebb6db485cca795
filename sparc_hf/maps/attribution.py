"""Where a concept is: maps on images and scores of words for latents, for similarities of codes, and for a baseline.

Relevance is gradient-weighted attention, rolled out over blocks (Chefer et al. 2021, arXiv 2103.15679, equations 5
and 6), which SPARC (arXiv 2507.06265) aims at latents and at similarities between streams.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sparc_hf.codes.encoding import sample_code
from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.encoders.trace import Trace, patch_vectors, trace
from sparc_hf.model.modeling_sparc import SparcModel

MAP_METHODS = ("relevance", "grad_cam", "patch_codes")
WORD_METHODS = ("relevance", "gradient")


@dataclass(frozen=True)
class ConceptTarget:
    """The sum of the pre-activations of some latents."""

    latents: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SimilarityTarget:
    """Likeness to another sample, an image or a text.

    Attributes:
        stream: the stream that encodes the other sample.
        sample: a PIL image or a text, as the stream's modality is.
        embeddings: the baseline: the cosine of the encoders' vectors, for the streams whose vectors lie in one space
            with those of `stream` because both come from one checkpoint. Otherwise, the product of the codes: of the
            other sample's code, which its stream makes alone (of patch tokens, each latent's largest value), with the
            pre-activations.
    """

    stream: str
    sample: Image.Image | str
    embeddings: bool = False


Target = ConceptTarget | SimilarityTarget


class WordScore(NamedTuple):
    """A word, how much of a target it carries (0 or more), and its first and last + 1 character in the text."""

    word: str
    score: float
    start: int
    end: int


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
    for attention, gradient in reversed(list(zip(attentions, gradients, strict=True))[start_layer:]):
        rows = rows + rows @ (attention * gradient).clamp(min=0).mean(dim=1)
    return rows


def map_method(encoder: StreamEncoder, wanted: str = "relevance") -> str:
    """Return the kind of map a stream can have: "patch_codes" for streams of patch tokens, otherwise `wanted`."""
    return "patch_codes" if encoder.pooling == "tokens" else wanted


def check_map_settings(method: str, shifts: int) -> None:
    """Raise ValueError for a kind of map there is not, or fewer than one shift."""
    _check_choice("method", method, MAP_METHODS)
    if shifts < 1:
        raise ValueError(f"`shifts` must be at least 1, but it is {shifts}")


def image_maps(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    images: Sequence[Image.Image],
    targets: Sequence[Target] | Sequence[Sequence[Target]],
    method: str = "relevance",
    *,
    start_layer: int = 0,
    shifts: int = 1,
    batch_size: int = 16,
) -> dict[str, np.ndarray]:
    """Return where in each image each target is, as the image streams see it.

    All targets of an image share one pass through its encoder.

    Args:
        model: the model.
        encoders: stream -> its encoder, see `load_encoders`; those of text streams only serve similarity targets.
        images: PIL images of any mode and size.
        targets: the same for all images, or a list an image.
        method: "relevance"; "grad_cam", at the first norm of the last block; or "patch_codes", which encodes each
            patch token by itself, without gradients, and reads the latents there. Streams of patch tokens have the
            last only (`map_method`).
        start_layer: first block that relevance counts, from the end where negative.
        shifts: with n above 1, the mean of maps of the image shifted by 0, 1/n, ... of a patch along both axes, which
            shows more than one map's grid does and costs n * n times its time.
        batch_size: images at a time.

    Returns:
        stream -> float32 [images, targets, rows, columns], 0 or more, of the stream's patch grid, or with shifts, of
        one 2n times as fine; see `visible_box` for the part of the image that it covers. NaN where an image has fewer
        targets, and for a similarity of embeddings in streams that have no space in common with its stream.

    Raises:
        ValueError: for no images, targets, latents or streams that do not exist, or a backbone without such maps.
    """
    check_map_settings(method, shifts)
    lists = _targets_of(images, targets, "images")
    forms = {name: _Forms(model, encoders, name, lists) for name, one in encoders.items() if one.modality == "image"}
    if not forms:
        raise ValueError(f"none of the streams {list(encoders)} encodes images")
    found: dict[str, list[np.ndarray]] = {name: [] for name in forms}
    for start in tqdm(range(0, len(images), batch_size), desc="maps", unit="batch", delay=2, leave=False):
        part = slice(start, start + batch_size)
        for name, form in forms.items():
            encoder = encoders[name]
            kind = map_method(encoder, method)
            pixels = encoder.prepare(images[part])["pixel_values"]
            offsets = [(row, column) for row in range(shifts) for column in range(shifts)]
            maps = [
                _moved_back(
                    form.of_image(_moved(pixels, offset, shifts, encoder), part, kind, start_layer), offset, shifts
                )
                for offset in offsets
            ]
            found[name].append(np.mean(maps, axis=0))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def word_scores(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    texts: Sequence[str],
    targets: Sequence[Target] | Sequence[Sequence[Target]],
    method: str = "relevance",
    *,
    start_layer: int = 0,
    batch_size: int = 16,
) -> dict[str, list[list[list[WordScore]]]]:
    """Return how much of each target each word of each text carries, as the text streams see it.

    A word is what the tokenizer calls one; its score is the mean of its tokens'. Special tokens and padding have none,
    nor have words beyond the longest text the encoder reads.

    Args:
        model: the model.
        encoders: stream -> its encoder, see `load_encoders`.
        texts: the texts.
        targets: the same for all texts, or a list a text.
        method: "relevance", or "gradient" (gradient times activation, at the first norm of the last block).
        start_layer: as in `image_maps`.
        batch_size: texts at a time.

    Returns:
        stream -> text -> target -> its words in order; an empty list where an image map would be NaN.

    Raises:
        ValueError: as `image_maps`.
    """
    _check_choice("method", method, WORD_METHODS)
    lists = _targets_of(texts, targets, "texts")
    forms = {name: _Forms(model, encoders, name, lists) for name, one in encoders.items() if one.modality == "text"}
    if not forms:
        raise ValueError(f"none of the streams {list(encoders)} encodes text")
    found: dict[str, list[list[list[WordScore]]]] = {name: [] for name in forms}
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        for name, form in forms.items():
            scores = form.of_tokens(encoders[name].prepare(texts[part]), part, method, start_layer)
            for text, of_text in zip(texts[part], scores, strict=True):
                found[name].append(_words(encoders[name], text, of_text))
    return found


def map_on_image(grid: np.ndarray, box: Sequence[float], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Bring a map to the pixels of its image, bilinearly.

    Args:
        grid: float [rows, columns].
        box: left, top, right, bottom of the part of the image it covers, see `visible_box`.
        size: width and height of the image.

    Returns:
        float32 [height, width], 0 outside the box, and bool [height, width], the pixels in it.
    """
    width, height = size
    left, top, right, bottom = box
    columns = (np.arange(width) + 0.5 - left) / (right - left)
    rows = (np.arange(height) + 0.5 - top) / (bottom - top)
    places = torch.from_numpy(np.stack(np.broadcast_arrays(columns[None], rows[:, None]), axis=-1) * 2 - 1).float()
    source = torch.from_numpy(np.ascontiguousarray(grid, np.float32))[None, None]
    values = F.grid_sample(source, places[None], mode="bilinear", padding_mode="border", align_corners=False)[0, 0]
    seen = ((rows >= 0) & (rows <= 1))[:, None] & ((columns >= 0) & (columns <= 1))[None]
    return np.where(seen, values.numpy(), 0.0).astype(np.float32), seen


class _Forms:
    """The targets of every sample as forms on the rows x of one stream: sum_i w_i h_i(x), or cos(u, x)."""

    def __init__(
        self,
        model: SparcModel,
        encoders: Mapping[str, StreamEncoder],
        stream: str,
        targets: Sequence[Sequence[Target]],
    ):
        self.model, self.stream, self.encoder = model, stream, encoders[stream]
        self.slots = max(len(of_sample) for of_sample in targets)
        resolved: dict[int, dict[int, float] | Tensor | None] = {}
        for target in (target for of_sample in targets for target in of_sample):
            if id(target) not in resolved:
                resolved[id(target)] = _resolved(model, encoders, stream, target)
        self.forms = [[resolved[id(target)] for target in of_sample] for of_sample in targets]

    def of_image(self, pixels: Tensor, part: slice, method: str, start_layer: int) -> np.ndarray:
        """Return maps [batch, slots, rows, columns]."""
        inputs, encoder = {"pixel_values": pixels}, self.encoder
        grid = encoder.grid_of(pixels)
        if method == "patch_codes":
            scores, grid = self.of_patches(patch_vectors(encoder, inputs), part), encoder.grid or grid
        else:
            scores = self.of_tokens(inputs, part, method, start_layer)[:, :, encoder.prefix_tokens :]
        return scores.reshape(*scores.shape[:2], *grid)

    def of_tokens(self, inputs: Mapping[str, Tensor], part: slice, method: str, start_layer: int) -> np.ndarray:
        """Return a score a token, [batch, slots, tokens], 0 or more; NaN without a target."""
        weights, latents, vectors = self._batch(part)
        with torch.enable_grad():
            seen = trace(self.encoder, inputs, start_layer if method == "relevance" else -1)
            values = self._values(seen.vectors[:, None], weights, latents, vectors)
        found = []
        for slot in range(self.slots):
            sources = (seen.normed,) if method != "relevance" else (*seen.attentions, seen.hidden)
            again = slot + 1 < self.slots
            gradients = torch.autograd.grad(values[:, 0, slot].sum(), sources, retain_graph=again)
            found.append(
                _token_scores(seen, gradients, method, self.encoder.prefix_tokens if method == "grad_cam" else 0)
            )
        return self._without_targets(torch.stack(found, dim=1), part)

    @torch.no_grad()
    def of_patches(self, patches: Tensor, part: slice) -> np.ndarray:
        """Return the same for vectors of patches [batch, patches, hidden_size], each taken by itself."""
        values = self._values(patches, *self._batch(part), positive=True).clamp(min=0)
        return self._without_targets(values.transpose(1, 2), part)

    def _values(
        self, rows: Tensor, weights: Tensor, latents: Tensor, vectors: Tensor, positive: bool = False
    ) -> Tensor:
        """Return the targets' values [batch, tokens, slots] for rows [batch, tokens, hidden_size]."""
        hidden = self.model.preactivations(self.stream, rows.flatten(0, 1), latents).unflatten(0, rows.shape[:2])
        linear = (hidden.clamp(min=0) if positive else hidden) @ weights.transpose(1, 2)
        return linear + F.normalize(rows.float(), dim=-1) @ vectors.transpose(1, 2)

    def _batch(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights [batch, slots, latents], those latents [latents], and vectors [batch, slots, hidden_size]."""
        forms = self.forms[part]
        latents = sorted({latent for row in forms for form in row if isinstance(form, dict) for latent in form})
        position = {latent: number for number, latent in enumerate(latents)}
        weights = torch.zeros(len(forms), self.slots, len(latents))
        vectors = torch.zeros(len(forms), self.slots, self.encoder.hidden_size)
        for at, row in enumerate(forms):
            for slot, form in enumerate(row):
                if isinstance(form, dict):
                    for latent, weight in form.items():
                        weights[at, slot, position[latent]] = weight
                elif form is not None:
                    vectors[at, slot] = form
        device = self.model.device
        return weights.to(device), torch.tensor(latents, dtype=torch.int64, device=device), vectors.to(device)

    def _without_targets(self, scores: Tensor, part: slice) -> np.ndarray:
        found = scores.detach().float().cpu().numpy()
        for at, row in enumerate(self.forms[part]):
            for slot in range(self.slots):
                if slot >= len(row) or row[slot] is None:
                    found[at, slot] = np.nan
        return found


def _resolved(
    model: SparcModel, encoders: Mapping[str, StreamEncoder], stream: str, target: Target
) -> dict[int, float] | Tensor | None:
    """Return latent -> weight, a unit vector [hidden_size], or None where the target has no meaning in the stream."""
    if isinstance(target, ConceptTarget):
        if not target.latents or not all(0 <= latent < model.config.num_latents for latent in target.latents):
            raise ValueError(
                f"a concept needs latents from 0 to {model.config.num_latents - 1}, but it has {list(target.latents)}"
            )
        return {latent: 1.0 for latent in target.latents}
    if target.stream not in encoders:
        raise ValueError(f"there is no encoder of stream `{target.stream}`; there are those of {list(encoders)}")
    other = encoders[target.stream]
    if target.embeddings:
        same = (other.encoder, other.revision, other.pooling) == (
            encoders[stream].encoder,
            encoders[stream].revision,
            encoders[stream].pooling,
        )
        rows = other.rows(other.prepare([target.sample]))  # pyright: ignore[reportArgumentType]
        return F.normalize(rows[0], dim=-1) if same else None
    code = sample_code(model, other, target.sample)
    code = code / code.norm().clamp(min=1e-8)
    return {int(latent): float(code[latent]) for latent in code.nonzero()[:, 0] if code[latent] > 0}


def _moved(pixels: Tensor, offset: tuple[int, int], shifts: int, encoder: StreamEncoder) -> Tensor:
    """Move images [batch, 3, height, width] down and to the right by offset / shifts of a patch; edges repeat."""
    down, right = (round(n * side / shifts) for n, side in zip(offset, encoder.patch_size, strict=True))
    return F.pad(pixels, (right, 0, down, 0), mode="replicate")[..., : pixels.shape[-2], : pixels.shape[-1]]


def _moved_back(maps: np.ndarray, offset: tuple[int, int], shifts: int) -> np.ndarray:
    """Bring maps of moved images to a grid 2 * shifts times as fine, and to their place."""
    if shifts == 1:
        return maps
    fine = F.interpolate(torch.from_numpy(maps), scale_factor=2.0 * shifts, mode="bilinear", align_corners=False)
    down, right = 2 * offset[0], 2 * offset[1]
    return F.pad(fine, (0, right, 0, down), mode="replicate")[..., down:, right:].numpy()


def _token_scores(seen: Trace, gradients: Sequence[Tensor], method: str, prefix: int) -> Tensor:
    """Return [batch, tokens]."""
    if method == "relevance":
        # How much the target depends on each token of the last block: on the class token alone, or the end of a text,
        # where these stand for the sample; otherwise on all, as the pooling weighs them.
        shares = gradients[-1].float().norm(dim=-1)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        maps = [one.detach().float() for one in seen.attentions]
        return attention_relevance(shares[:, None], maps, [one.float() for one in gradients[:-1]])[:, 0]
    (gradient,), activations = gradients, seen.normed.detach()
    if method == "grad_cam":
        gradient = gradient[:, prefix:].mean(dim=1, keepdim=True)
    return (gradient * activations).sum(dim=-1).clamp(min=0).float()


def _words(encoder: StreamEncoder, text: str, scores: np.ndarray) -> list[list[WordScore]]:
    """Merge scores of tokens [targets, tokens] into words."""
    inputs: Any = encoder.inputs_of
    told = inputs.tokenizer([text], return_offsets_mapping=True, **inputs.settings)
    offsets = told["offset_mapping"][0]
    groups: dict[tuple[int, int], list[int]] = {}
    for token, word in enumerate(told.word_ids(0)):
        start, end = offsets[token]
        if word is None or not text[start:end].strip():
            continue
        # Some tokenizers take a whole text for one word, so what stands between spaces is a word too.
        blank = len(text[start:end]) - len(text[start:end].lstrip())
        groups.setdefault((word, len((text[: start + blank] + "x").split())), []).append(token)
    return [
        [_word(text, offsets, tokens, of_target) for tokens in groups.values()] if np.isfinite(of_target).all() else []
        for of_target in scores
    ]


def _word(text: str, offsets: Sequence[tuple[int, int]], tokens: Sequence[int], scores: np.ndarray) -> WordScore:
    start, end = offsets[tokens[0]][0], offsets[tokens[-1]][1]
    word = text[start:end].strip()
    start = text.index(word, start)
    return WordScore(word, float(np.mean(scores[tokens])), start, start + len(word))


def _targets_of(
    samples: Sequence[Any], targets: Sequence[Target] | Sequence[Sequence[Target]], kind: str
) -> list[list[Target]]:
    if not len(samples) or not len(targets):
        raise ValueError(
            f"maps need {kind} and targets, but there are {len(samples)} {kind} and {len(targets)} targets"
        )
    if isinstance(targets[0], ConceptTarget | SimilarityTarget):
        return [list(targets) for _ in samples]  # pyright: ignore[reportReturnType]
    if len(targets) != len(samples):
        raise ValueError(f"there are {len(samples)} {kind} but {len(targets)} lists of targets; give one for each")
    return [list(of_sample) for of_sample in targets]  # pyright: ignore[reportArgumentType]


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {list(allowed)}, but it is {value!r}")
