"""SparcPipeline: images and texts in, the active concepts of every stream out.

Importing this module registers it with transformers, as the task "concept-extraction".
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from sparc_hf.codes.concepts import concept_names as names_of_model
from sparc_hf.codes.encoding import encode_samples
from sparc_hf.encoders.inputs import open_image
from sparc_hf.encoders.stream_encoder import StreamEncoder, load_encoders
from sparc_hf.model.modeling_sparc import SparcModel

TASK = "concept-extraction"
ImageLike = Image.Image | str | os.PathLike


class SparcPipeline(Pipeline):
    """A model together with the encoders its stream records name.

    Args:
        model: the model.
        encoders: stream -> its encoder; by default those the records name, loaded on the model's device.
        concept_names: latent -> name, where latents have names.
        dtype: of the encoders' weights; the model keeps its own.
        top: most concepts to tell of a sample in a stream; all active ones by default.
        trust_remote_code: whether to run code from the encoders' repositories; see `StreamEncoder`.
        **options: as of `transformers.Pipeline`: `device`, `batch_size` (samples at a time, default 32).

    Raises:
        ValueError: where a record does not name its encoder or the encoder cannot be loaded.
    """

    model: SparcModel
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(
        self,
        model: SparcModel,
        *,
        encoders: Mapping[str, StreamEncoder] | None = None,
        concept_names: Mapping[int, str] | None = None,
        dtype: torch.dtype | str | None = None,
        top: int | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ):
        super().__init__(model=model, **options)
        self.model.eval()
        self.top = top
        self.concept_names = dict(names_of_model(model) if concept_names is None else concept_names)
        weights = dtype if isinstance(dtype, torch.dtype) else None
        if encoders is None:
            encoders = load_encoders(model.config.streams or [], dtype=weights, trust_remote_code=trust_remote_code)
        self.encoders = {name: encoder.to(self.device) for name, encoder in encoders.items()}

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike, *, revision: str | None = None, **options: Any
    ) -> "SparcPipeline":
        """Load a model, the encoders its config names, and its concept names where it has them.

        Args:
            model: folder or Hub id.
            revision: branch, tag or commit of the model on the Hub.
            **options: as of the class; `device` is where everything runs, a GPU by default where there is one.

        Raises:
            ValueError: as SparcModel.from_pretrained and the class.
        """
        loaded = SparcModel.from_pretrained(model, **({"revision": revision} if revision else {}))
        return cls(model=loaded, task=TASK, **options)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        top: int | None = None,
        batch_size: int | None = None,
        selection: str | None = None,
    ) -> Any:
        """Return the active concepts of samples, each given by an image, a text, or both.

        With both, image i and text i are one sample, and with global selection its streams choose their latents
        together. A sample given by its image alone has codes of the image streams only.

        Args:
            images: PIL images, or files of images.
            text: one text a sample.
            top: as of the class.
            batch_size: as of the class.
            selection: "global" or "local" in place of the model's.

        Returns:
            Per sample, stream -> its concepts, the strongest first, each {"latent", "value", "name"}; `name` is None
            where the latent has none. For a single image or text in place of a list, one sample.

        Raises:
            ValueError: for no samples, lists of different lengths, or a file that is no image.
        """
        single = isinstance(text, str) or isinstance(images, Image.Image | str | os.PathLike)
        given: dict[str, list[Any]] = {}
        if images is not None:
            given["image"] = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        if text is not None:
            given["text"] = [text] if isinstance(text, str) else list(text)
        counts = {kind: len(samples) for kind, samples in given.items()}
        if not counts or min(counts.values()) == 0 or len(set(counts.values())) > 1:
            raise ValueError(f"give `images`, `text`, or both with one of each per sample, but there are {counts}")
        streams = [name for name, encoder in self.encoders.items() if encoder.modality in given]
        if not streams:
            modalities = sorted({encoder.modality for encoder in self.encoders.values()})
            raise ValueError(f"this model's streams encode {modalities}, and only {sorted(given)} is given")
        size = batch_size or self._batch_size or 32
        starts = range(0, next(iter(counts.values())), size)
        sample_concepts = [
            concepts
            for start in tqdm(starts, desc="concepts", unit=" batches", delay=2, leave=False)
            for concepts in self._concepts(
                {kind: samples[start : start + size] for kind, samples in given.items()},
                streams,
                self.top if top is None else top,
                selection,
            )
        ]
        return sample_concepts[0] if single else sample_concepts

    def _concepts(
        self, given: Mapping[str, list[Any]], streams: Sequence[str], top: int | None, selection: str | None
    ) -> Iterator[dict[str, list[dict[str, Any]]]]:
        samples: dict[str, list[Any]] = dict(given)
        if "image" in given:
            files = str | os.PathLike
            samples["image"] = [open_image(image) if isinstance(image, files) else image for image in given["image"]]
        stream_samples = {name: samples[self.encoders[name].modality] for name in streams}
        codes = encode_samples(self.model, self.encoders, stream_samples, selection)
        per_sample = {encoder.rows_per_sample for encoder in (self.encoders[name] for name in streams)}.pop()
        for first in range(0, len(next(iter(codes.values()))), per_sample):
            # The rows of one sample: one, or its patch tokens, of which the strongest counts.
            rows = slice(first, first + per_sample)
            yield {name: self._strongest(code.indices[rows], code.values[rows], top) for name, code in codes.items()}

    def _strongest(self, indices: torch.Tensor, values: torch.Tensor, top: int | None) -> list[dict[str, Any]]:
        strongest: dict[int, float] = {}
        for latent, value in zip(indices.flatten().tolist(), values.flatten().tolist(), strict=True):
            if value > strongest.get(latent, 0.0):
                strongest[latent] = value
        ranked = sorted(strongest.items(), key=lambda item: -item[1])[:top]
        return [{"latent": latent, "value": value, "name": self.concept_names.get(latent)} for latent, value in ranked]

    # The three stages of transformers' own pipelines, which work on one input at a time; `__call__` above replaces
    # their order, because a sample here is an image and a text together.
    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict, dict, dict]:
        if parameters:
            raise ValueError(f"unknown options {sorted(parameters)}")
        return {}, {}, {}

    def preprocess(self, input_: Any, **_: Any) -> Any:
        raise NotImplementedError

    def _forward(self, input_tensors: Any, **_: Any) -> Any:
        raise NotImplementedError

    def postprocess(self, model_outputs: Any, **_: Any) -> Any:
        raise NotImplementedError


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=SparcPipeline, pt_model=AutoModel, type="multimodal")
