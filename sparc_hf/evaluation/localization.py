"""How well maps find classes: mask IoU, average precision and the pointing game, against masks."""

import contextlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sparc_hf.codes.code_table import CodeTable
from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.encoders.views import visible_box
from sparc_hf.evaluation.intervals import plain_figure, share_figure, unit_sums
from sparc_hf.evaluation.masked_images import MaskedImages
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.maps.methods import check_map_settings, map_method
from sparc_hf.maps.patch_maps import image_maps, map_on_image
from sparc_hf.maps.targets import ConceptTarget, SimilarityTarget, Target
from sparc_hf.model.modeling_sparc import SparcModel

# Average precision sorts all rows, which is too slow for every latent.
CANDIDATES = 8
DETECTION_IOU = 0.2


@dataclass(frozen=True)
class LocalizationSettings:
    """How maps are made and compared.

    Attributes:
        methods: kinds of maps, see `image_maps`.
        shifts: as of `image_maps`, for every map.
        start_layer: likewise.
        prompt: the text for a class, whose name stands in place of {}.
        batch_size: images at a time.
        intervals: whether miou and pointing have intervals.

    Raises:
        ValueError: for a kind of map there is not, fewer than one shift, or a prompt without a place for the class.
    """

    methods: Sequence[str] = ("relevance",)
    shifts: int = 1
    start_layer: int = 0
    prompt: str = "a {}"
    batch_size: int = 16
    intervals: bool = True

    def __post_init__(self) -> None:
        for method in self.methods:
            check_map_settings(method, self.shifts)
        if "{}" not in self.prompt:
            raise ValueError(f"`prompt` needs {{}} where the class goes, but it is {self.prompt!r}")


@dataclass
class _PairScores:
    """What was found of one kind of map, a pair of image and class after the other."""

    iou: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)
    defined: bool = False


def otsu_threshold(values: np.ndarray, bins: int = 256) -> float:
    """Return the threshold that parts values best into two classes (Otsu 1979); infinity where all are equal."""
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return float("inf")
    counts, edges = np.histogram(values, bins, (low, high))
    below, mass = np.cumsum(counts)[:-1], np.cumsum(np.histogram(values, edges, weights=values)[0])
    above = values.size - below
    between = np.zeros(bins - 1)
    parted = (below > 0) & (above > 0)
    between[parted] = (mass[-1] * below - mass[:-1] * values.size)[parted] ** 2 / (below * above)[parted]
    # A value on the edge belongs to the bin above it.
    return float(np.nextafter(edges[1 + int(between.argmax())], -np.inf))


def latents_of_classes(
    codes: CodeTable, features: FeatureDataset, classes: Sequence[str]
) -> dict[str, dict[str, ConceptTarget]]:
    """Return stream -> class -> the one latent whose values rank the rows of the class best (average precision).

    The latents that differ most in mean between rows with and without the class are compared.

    Args:
        codes: single-stream codes of rows that no map is measured on.
        features: those rows, with labels.
        classes: names; those that no row has are left out.

    Raises:
        ValueError: for features without labels, or of other rows.
    """
    from sklearn.metrics import average_precision_score

    check_labelled(features)
    names = features.label_names or []
    if len(codes) != len(features) or codes.encoding != "single":
        raise ValueError(
            f"choosing latents needs single-stream codes of the same {len(features)} rows, but there are "
            f"{codes.encoding} codes of {len(codes)} rows"
        )
    labels: Any = features.labels_csr().astype(bool)
    latents: dict[str, dict[str, ConceptTarget]] = {}
    known = [name for name in classes if name in names]
    for stream in codes.streams:
        values: Any = codes.csr(stream).tocsc()
        latents[stream] = {}
        for name in known:
            has = labels[:, [names.index(name)]].toarray().ravel()
            if not 0 < has.sum() < len(has):
                continue
            inside = np.asarray(values.T @ has) / has.sum()
            difference = inside - np.asarray(values.T @ ~has) / (~has).sum()
            candidates = np.argsort(-difference, kind="stable")[:CANDIDATES]
            scores = [average_precision_score(has, values[:, [latent]].toarray().ravel()) for latent in candidates]
            latents[stream][name] = ConceptTarget((int(candidates[int(np.argmax(scores))]),))
    return latents


def check_labelled(features: FeatureDataset) -> None:
    """Raise ValueError for features by which no latents of classes can be chosen."""
    if features.label_names is None or "labels" not in features.column_names:
        raise ValueError("choosing a latent for each class needs features with `labels` and label names")


def localize(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    images: MaskedImages,
    latents: Mapping[str, Mapping[str, ConceptTarget]],
    settings: LocalizationSettings | None = None,
) -> dict[str, Any]:
    """Measure maps of every pair of an image and a class with a mask in it.

    A map becomes a mask by Otsu's threshold over the part of the image that the encoder sees; a missing or constant
    map finds nothing. The pointing game counts the pairs whose map is largest inside the mask (Zhang et al. 2016,
    without its tolerance). Average precision, by pycocotools at IoU 0.2, takes a class in an image as one object and
    the map's peak as its score; it is None where pycocotools is not installed.

    Args:
        model: the model.
        encoders: stream -> its encoder.
        images: the images.
        latents: stream -> class -> latent, see `latents_of_classes`.
        settings: how.

    Returns:
        "images", "pairs", "settings", and "maps", a list of {"target", "stream", "method", "miou", "pointing",
        "ap"}: "latent", "codes of <text stream>" (similarity of codes) or "embeddings of <text stream>" (the
        baseline), with 95 % intervals over images for miou and pointing.

    Raises:
        ValueError: as `image_maps`.
    """
    settings = settings or LocalizationSettings()
    names = sorted({name for classes in images.classes for name in classes})
    texts = [name for name, encoder in encoders.items() if encoder.modality == "text"]
    targets = _similarity_targets(texts, names, settings.prompt)
    scores: dict[tuple[str, str, str], _PairScores] = defaultdict(_PairScores)
    truth: list[dict[str, Any]] = []
    streams = [name for name, encoder in encoders.items() if encoder.modality == "image"]
    for start in tqdm(range(0, len(images), settings.batch_size), desc="localization", unit="batch", leave=False):
        indices = range(start, min(start + settings.batch_size, len(images)))
        samples = [images.read(index) for index in indices]
        for index, (_, masks) in zip(indices, samples, strict=True):
            truth += [{"image": index, "class": names.index(name), "mask": masks[name]} for name in sorted(masks)]
        for stream in streams:
            used = {name: encoders[name] for name in (stream, *texts)}
            kinds = {"latent": latents.get(stream, {}), **targets}
            for method in dict.fromkeys(map_method(encoders[stream], name) for name in settings.methods):
                _measure(scores, model, used, stream, method, indices, samples, kinds, names, settings)
    with_masks = _Truth(truth, names, len(images))
    return {
        "images": len(images),
        "pairs": len(truth),
        "settings": {"shifts": settings.shifts, "start_layer": settings.start_layer, "prompt": settings.prompt},
        "maps": [
            {"target": kind, "stream": stream, "method": method, **with_masks.figures(map_scores, settings)}
            for (kind, stream, method), map_scores in sorted(scores.items(), key=lambda item: (item[0][2], item[0]))
            if map_scores.defined
        ],
    }


def _similarity_targets(texts: Sequence[str], names: Sequence[str], prompt: str) -> dict[str, dict[str, Target]]:
    """Return kind of target -> class -> target: the class as a text, by its code and by its embedding."""
    return {
        f"{kind} of {text}": {
            name: SimilarityTarget(text, prompt.replace("{}", name), kind == "embeddings") for name in names
        }
        for text in texts
        for kind in ("codes", "embeddings")
    }


def _measure(
    scores: dict[tuple[str, str, str], _PairScores],
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    stream: str,
    method: str,
    indices: range,
    samples: Sequence[tuple[Any, dict[str, np.ndarray]]],
    kinds: Mapping[str, Mapping[str, Target]],
    names: Sequence[str],
    settings: LocalizationSettings,
) -> None:
    """Add what the maps of one stream and method find in some images; all kinds of targets share their passes."""
    pairs_by_image = [
        [(kind, name) for kind in kinds for name in sorted(masks) if name in kinds[kind]] for _, masks in samples
    ]
    targets = [[kinds[kind][name] for kind, name in pairs] for pairs in pairs_by_image]
    if not any(targets):
        return
    maps = image_maps(
        model,
        encoders,
        [image for image, _ in samples],
        targets,
        method,
        start_layer=settings.start_layer,
        shifts=settings.shifts,
        batch_size=settings.batch_size,
    )[stream]
    for at, (index, (image, masks)) in enumerate(zip(indices, samples, strict=True)):
        box = visible_box(encoders[stream], image)
        slots = {pair: slot for slot, pair in enumerate(pairs_by_image[at])}
        for kind in kinds:
            map_scores = scores[kind, stream, method]
            for name in sorted(masks):
                slot = slots.get((kind, name))
                grid = None if slot is None or not np.isfinite(maps[at, slot]).all() else maps[at, slot]
                _add_pair(map_scores, grid, box, masks[name], index, names.index(name))


def _add_pair(
    scores: _PairScores, grid: np.ndarray | None, box: Sequence[float], mask: np.ndarray, index: int, label: int
) -> None:
    scores.defined |= grid is not None
    if grid is None or not grid.max() > grid.min():
        scores.iou.append(0.0)
        scores.hits.append(0.0)
        return
    values, seen = map_on_image(grid, box, (mask.shape[1], mask.shape[0]))
    inside = (values > otsu_threshold(values[seen])) & seen
    scores.iou.append(float((inside & mask).sum() / max((inside | mask).sum(), 1)))
    scores.hits.append(float(mask.flat[int(np.where(seen, values, -np.inf).argmax())]))
    scores.detections.append({"image": index, "class": label, "mask": inside, "score": float(grid.max())})


class _Truth:
    """The true masks, and figures of what was found against them."""

    def __init__(self, truth: Sequence[Mapping[str, Any]], names: Sequence[str], images: int):
        self.image_of_pair = np.array([pair["image"] for pair in truth])
        self.images = images
        self.names = names
        self.annotations = _coco_records(truth)
        self.sizes = {pair["image"]: pair["mask"].shape for pair in truth}

    def figures(self, scores: _PairScores, settings: LocalizationSettings) -> dict[str, Any]:
        """Return miou and pointing with intervals, and ap."""
        measured = {"miou": np.array(scores.iou), "pointing": np.array(scores.hits)}
        figures = {name: share_figure(*unit_sums(values, self.image_of_pair)) for name, values in measured.items()}
        if not settings.intervals:
            figures = {name: plain_figure(figure["value"]) for name, figure in figures.items()}
        return {**figures, "ap": self._average_precision(scores.detections)}

    def _average_precision(self, detections: Sequence[Mapping[str, Any]]) -> float | None:
        records: Any = _coco_records(detections)
        if self.annotations is None or records is None:
            return None
        if not records:
            return 0.0
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by printing
            truth: Any = COCO()
            truth.dataset = {
                "images": [
                    {"id": index + 1, "height": height, "width": width}
                    for index, (height, width) in self.sizes.items()
                ],
                "categories": [{"id": index + 1, "name": name} for index, name in enumerate(self.names)],
                "annotations": [{**record, "id": index + 1} for index, record in enumerate(self.annotations)],
                "info": {},
            }
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(records), "segm")
            evaluation.params.iouThrs = np.array([DETECTION_IOU])
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][0, :, :, 0, -1]  # recall levels, classes; all areas
        return float(precision[precision > -1].mean())


def _coco_records(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return COCO's records of masks, run-length coded; None without pycocotools."""
    try:
        from pycocotools import mask as coco_mask
    except ImportError:
        return None
    records = []
    for pair in pairs:
        code = coco_mask.encode(np.asfortranarray(pair["mask"].astype(np.uint8)))
        area, box = float(coco_mask.area(code)), coco_mask.toBbox(code).tolist()
        record = {"image_id": pair["image"] + 1, "category_id": pair["class"] + 1, "segmentation": code}
        records.append(
            record | {"area": area, "bbox": box, "iscrowd": 0} | ({"score": pair["score"]} if "score" in pair else {})
        )
    return records
