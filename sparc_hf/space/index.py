"""The index behind the Space: what it shows of a model and a dataset, computed once and kept in a folder."""

import hashlib
import io
import json
import logging
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from tqdm.auto import tqdm

from sparc_hf.codes.code_table import CodeTable, encode_features
from sparc_hf.codes.concepts import CONCEPTS_FILE, Concept, load_concepts, name_concepts, save_concepts
from sparc_hf.codes.incomplete import check_complete
from sparc_hf.codes.search import CodeSearch
from sparc_hf.codes.top_samples import TopSamples, top_samples
from sparc_hf.evaluation.suite import EvaluationSettings, LatentFigures, evaluate_model
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.shards import FileChecksums
from sparc_hf.files.atomic_files import checksums_of, first_damage, write_json
from sparc_hf.files.atomic_folders import everything, new_folder
from sparc_hf.files.checked_reading import Limit, read_json
from sparc_hf.files.folder_lock import locked_folder
from sparc_hf.model.configuration_sparc import SparcConfig
from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.version import __version__

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
FACTS_FILE = "index.json"
STATISTICS_FILE = "statistics.npz"
TOP_FILE = "top_samples.npz"
THUMBNAILS_FILE = "thumbnails.arrow"
CODES_FOLDER = "codes"
COMPARED_FILES = (STATISTICS_FILE, TOP_FILE, THUMBNAILS_FILE, CONCEPTS_FILE)
TOP_SAMPLES = 24
THUMBNAIL_SIDE = 192
RETRIEVAL_ROWS = 1000
ROWS_AT_ONCE = 256
# Columns of the statistics, each [N]; those of an encoding are called column/encoding.
COLUMNS = ("alignment", "energy", "entropy", "cofires", "cofire_jaccard", "live", "fires")


class _Facts(TypedDict):
    """What the facts of an index must have."""

    results: dict[str, Any]
    files: Annotated[FileChecksums, Limit("an object with all files of an index", set(COMPARED_FILES).issubset)]


class SpaceIndex:
    """A finished index, read from its folder and compared with its checksums; arrays are mapped or small.

    Args:
        folder: where it lies.

    Raises:
        ValueError: where a file is not the one that was written.
        FileNotFoundError: where codes are missing.

    Attributes:
        folder: where it lies.
        results: the figures of `evaluate_model`, without intervals and probes.
        concepts: latent -> what the samples it fires on say of it.
        statistics: "column/encoding" -> float64 [N] for the columns of `COLUMNS` and the encodings joint and single;
            `alignment` is the label Jaccard at full depth (nan without labels), `live` the number of streams the
            latent fires in, `fires` the share of samples it fires on, mean over streams; and that share of each
            stream as "frequency/stream/encoding".
        top: stream -> the strongest samples of every latent under single-stream encoding.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        facts = read_json(self.folder / FACTS_FILE, _Facts)
        if problem := first_damage(self.folder, facts["files"]):
            raise ValueError(f"the index `{self.folder}` is damaged: {problem}; make it again")
        self._codes = CodeTable.load(self.folder / CODES_FOLDER)
        self.results: dict[str, Any] = facts["results"]
        self.concepts = {concept.latent: concept for concept in load_concepts(self.folder)}
        with np.load(self.folder / STATISTICS_FILE) as stored:
            self.statistics = {name: stored[name] for name in stored.files}
        with np.load(self.folder / TOP_FILE) as stored:
            streams = [name.removeprefix("rows/") for name in stored.files if name.startswith("rows/")]
            self.top = {name: TopSamples(stored[f"rows/{name}"], stored[f"values/{name}"]) for name in streams}
        with pa.memory_map(str(self.folder / THUMBNAILS_FILE)) as source:
            self._thumbnails = pa.ipc.open_file(source).read_all().column("image")

    @cached_property
    def search(self) -> CodeSearch:
        """The single-stream codes, ready to be searched."""
        return CodeSearch(self._codes)

    def thumbnail(self, row: int) -> bytes | None:
        """Return the small image of a sample as PNG or JPEG, or None where it has none."""
        return self._thumbnails[row].as_py()


def open_index(
    model: SparcModel,
    features: FeatureDataset,
    cache: str | Path,
    *,
    names: list[Concept] | None = None,
    shipped: Path | None = None,
) -> SpaceIndex:
    """Return the index of a model and a dataset, made now where `cache` does not have it.

    Args:
        model: with streams the dataset has.
        features: the samples; with `image`, `text` and `labels` where they have them.
        cache: folder of indexes, each in a folder called by a digest of model and dataset.
        names: names of latents that come with the model; they win over those the dataset suggests.
        shipped: another folder of indexes, looked into first and never written to.

    Raises:
        ValueError: as `evaluate_model`, and for rows that lack a stream of the model (`with_complete_rows`).
    """
    check_complete(features, model.config.stream_names)
    name = index_name(model, features, names)
    if shipped is not None and (shipped / name / FACTS_FILE).is_file():
        return SpaceIndex(shipped / name)
    folder = Path(cache) / name
    if (index := _whole_index(folder)) is not None:
        return index
    with locked_folder(folder, wait=True):
        if (index := _whole_index(folder)) is not None:  # another process was first
            return index
        if (folder / FACTS_FILE).is_file():
            logger.warning("the index %s is damaged, and made again", folder)
        with new_folder(folder, everything, last=FACTS_FILE) as unfinished:
            _make(model, features, names, unfinished)
    return SpaceIndex(folder)


def _whole_index(folder: Path) -> SpaceIndex | None:
    """Return the index in a folder, or None where it is missing or damaged."""
    if not (folder / FACTS_FILE).is_file():
        return None
    try:
        return SpaceIndex(folder)
    except (OSError, ValueError):
        return None


def index_name(model: SparcModel, features: FeatureDataset, names: list[Concept] | None = None) -> str:
    """Return a name that differs wherever the index would: by weights, settings, names, and every row of the dataset.

    The whole dataset is read for it.
    """
    digest = hashlib.sha256()
    # Every setting counts, those of later versions too.
    settings = {name: getattr(model.config, name) for name in SparcConfig.__annotations__}
    facts = [features.streams, features.label_names, features.taxonomy, len(features)]
    facts += [features.rows_left_out] if features.rows_left_out else []
    concepts = [asdict(concept) for concept in names or []]
    digest.update(json.dumps([FORMAT_VERSION, __version__, settings, facts, concepts], sort_keys=True).encode())
    for name, weights in sorted(model.state_dict().items()):
        digest.update(name.encode() + _bytes_of(weights))
    for start in range(0, len(features), ROWS_AT_ONCE):
        digest.update(features.record_batch(slice(start, start + ROWS_AT_ONCE)).serialize())
    return digest.hexdigest()[:20]


def _bytes_of(weights: torch.Tensor) -> bytes:
    # As bytes, because numpy has no bfloat16.
    return weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _make(model: SparcModel, features: FeatureDataset, names: list[Concept] | None, folder: Path) -> None:
    settings = EvaluationSettings(
        replicates=0, retrieval_rows=min(RETRIEVAL_ROWS, len(features)), probes=False, dataset="indexed samples"
    )
    evaluation = evaluate_model(model, features, settings)
    codes = encode_features(model, features, encoding="single", output=folder / CODES_FOLDER)
    np.savez(folder / STATISTICS_FILE, **_statistics(evaluation.latent_figures, model.config.num_latents))  # pyright: ignore[reportArgumentType]
    best = top_samples(codes, TOP_SAMPLES)
    arrays = {f"rows/{stream}": top.rows for stream, top in best.items()}
    np.savez(folder / TOP_FILE, **arrays, **{f"values/{stream}": top.values for stream, top in best.items()})  # pyright: ignore[reportArgumentType]
    save_concepts(_concepts(codes, features, names or []), folder, rows=len(features))
    _write_thumbnails(features, folder / THUMBNAILS_FILE)
    facts = {"results": evaluation.results, "files": checksums_of(folder, COMPARED_FILES)}
    write_json(folder / FACTS_FILE, {"format_version": FORMAT_VERSION, **facts})


def _statistics(latent_figures: dict[str, LatentFigures], count: int) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for encoding, figures in latent_figures.items():
        shares = np.stack(list(figures.frequency.values()))
        columns[f"alignment/{encoding}"] = figures.jaccard[-1] if len(figures.jaccard) else np.full(count, np.nan)
        columns[f"live/{encoding}"] = (shares > 0).sum(axis=0)
        columns[f"fires/{encoding}"] = shares.mean(axis=0)
        columns |= {f"{name}/{encoding}": values for name, values in figures.universality.items()}
        columns |= {f"frequency/{stream}/{encoding}": share for stream, share in figures.frequency.items()}
    return {name: np.asarray(column, np.float64) for name, column in columns.items()}


def _concepts(codes: CodeTable, features: FeatureDataset, names: list[Concept]) -> list[Concept]:
    """Return what the indexed samples say of every latent that fires, under the names the model has for them."""
    described = ("labels" in features.column_names and features.label_names is not None) or features.text is not None
    if not described:
        return names
    own = {concept.latent: concept for concept in names}
    return [
        Concept(**vars(found) | {"name": own[found.latent].name, "score": own[found.latent].score})
        if found.latent in own
        else found
        for found in name_concepts(codes, features, samples=TOP_SAMPLES)
    ]


def _write_thumbnails(features: FeatureDataset, path: Path) -> None:
    schema = pa.schema({"image": pa.binary()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in tqdm(range(0, len(features), 256), desc="thumbnails", unit="block", leave=False):
            rows = range(start, min(start + 256, len(features)))
            images = [_thumbnail(features, row) for row in rows]
            writer.write_batch(pa.record_batch([pa.array(images, pa.binary())], schema=schema))


def _thumbnail(features: FeatureDataset, row: int) -> bytes | None:
    image = features.image(row)
    if image is None:
        return None
    small = max(image.size) <= THUMBNAIL_SIDE
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return encoded_image(image, exact=small)


def encoded_image(image: Image.Image, *, exact: bool = False) -> bytes:
    """Return an image as a JPEG, or as a PNG where it shall be exact."""
    buffer = io.BytesIO()
    if exact:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
