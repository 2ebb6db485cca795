"""What a map is of: latents, the similarity to another sample, or the baseline; and their values in a stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sparc_hf.codes.encoding import sample_code
from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.model.modeling_sparc import SparcModel


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
# What a target is on a row x of a stream: {i: w_i} stands for sum_i w_i h_i(x), a unit vector u for cos(u, x).
Form = dict[int, float] | Tensor


def targets_per_sample(
    samples: Sequence[Any], targets: Sequence[Target] | Sequence[Sequence[Target]], kind: str
) -> list[list[Target]]:
    """Return a list of targets a sample, of targets that are the same for all or given a sample.

    Raises:
        ValueError: for no samples, no targets, or another number of lists than of samples.
    """
    if not len(samples) or not len(targets):
        raise ValueError(
            f"maps need {kind} and targets, but there are {len(samples)} {kind} and {len(targets)} targets"
        )
    if isinstance(targets[0], ConceptTarget | SimilarityTarget):
        return [list(targets) for _ in samples]  # pyright: ignore[reportReturnType]
    if len(targets) != len(samples):
        raise ValueError(f"there are {len(samples)} {kind} but {len(targets)} lists of targets; give one for each")
    return [list(sample_targets) for sample_targets in targets]  # pyright: ignore[reportArgumentType]


def check_concept(model: SparcModel, target: ConceptTarget) -> None:
    """Raise ValueError for a concept without latents, or with some that a model does not have."""
    if not target.latents or not all(0 <= latent < model.config.num_latents for latent in target.latents):
        raise ValueError(
            f"a concept needs latents from 0 to {model.config.num_latents - 1}, but it has {list(target.latents)}"
        )


def one_space(first: StreamEncoder, second: StreamEncoder) -> bool:
    """Return whether the vectors of two encoders can be compared, because one checkpoint makes both alike."""
    facts = [(encoder.encoder, encoder.revision, encoder.pooling) for encoder in (first, second)]
    return facts[0] == facts[1]


class StreamTargets:
    """The targets of every sample as one stream's rows show them.

    Attributes:
        slots: most targets of a sample.

    Raises:
        ValueError: for latents or streams that do not exist.
    """

    def __init__(
        self,
        model: SparcModel,
        encoders: Mapping[str, StreamEncoder],
        stream: str,
        targets: Sequence[Sequence[Target]],
    ):
        self.model, self.stream, self.encoder = model, stream, encoders[stream]
        self.slots = max(len(sample_targets) for sample_targets in targets)
        # A similarity encodes its other sample, so a target that many samples share takes its form once.
        forms: dict[int, Form | None] = {}
        for target in (target for sample_targets in targets for target in sample_targets):
            if id(target) not in forms:
                forms[id(target)] = _form(model, encoders, stream, target)
        self.forms = [[forms[id(target)] for target in sample_targets] for sample_targets in targets]

    def values(self, rows: Tensor, batch: slice, positive: bool = False) -> Tensor:
        """Return the value of each target for each row, differentiable.

        All are linear in few pre-activations and in the unit vector of the row, so that no code is made.

        Args:
            rows: float [batch, tokens, hidden_size].
            batch: the samples that the rows are of.
            positive: whether latents below 0 count as 0, as they do in a code.

        Returns:
            float [batch, tokens, slots].
        """
        weights, latents, vectors = self._weights(batch)
        hidden = self.model.preactivations(self.stream, rows.flatten(0, 1), latents).unflatten(0, rows.shape[:2])
        linear = (hidden.clamp(min=0) if positive else hidden) @ weights.transpose(1, 2)
        return linear + F.normalize(rows.float(), dim=-1) @ vectors.transpose(1, 2)

    def masked(self, scores: Tensor, batch: slice) -> np.ndarray:
        """Return scores [batch, slots, tokens] as an array, with NaN where a sample has no such target."""
        masked = scores.detach().float().cpu().numpy()
        for at, row in enumerate(self.forms[batch]):
            for slot in range(self.slots):
                if slot >= len(row) or row[slot] is None:
                    masked[at, slot] = np.nan
        return masked

    def _weights(self, batch: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights [batch, slots, latents], those latents [latents], and vectors [batch, slots, hidden_size]."""
        forms = self.forms[batch]
        latents = sorted({latent for row in forms for form in row if isinstance(form, dict) for latent in form})
        position = {latent: at for at, latent in enumerate(latents)}
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


def _form(model: SparcModel, encoders: Mapping[str, StreamEncoder], stream: str, target: Target) -> Form | None:
    """Return what a target is on rows of a stream; None where it has no meaning there."""
    if isinstance(target, ConceptTarget):
        check_concept(model, target)
        return {latent: 1.0 for latent in target.latents}
    if target.stream not in encoders:
        raise ValueError(f"there is no encoder of stream `{target.stream}`; there are those of {list(encoders)}")
    other = encoders[target.stream]
    if target.embeddings:
        if not one_space(other, encoders[stream]):
            return None
        rows = other.rows(other.prepare([target.sample]))  # pyright: ignore[reportArgumentType]
        return F.normalize(rows[0], dim=-1)
    code = sample_code(model, other, target.sample)
    code = code / code.norm().clamp(min=1e-8)
    return {int(latent): float(code[latent]) for latent in code.nonzero()[:, 0] if code[latent] > 0}
