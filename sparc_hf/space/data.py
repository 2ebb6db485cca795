"""What the Space shows: a model, its encoders and an indexed dataset, asked for latents, explanations and matches."""

import base64
import copy
import logging
import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.utils import WeakFileLock
from PIL import Image

from sparc_hf.codes.code_table import check_streams
from sparc_hf.codes.concept_search import NUMBER, ConceptSearch, LatentMatch
from sparc_hf.codes.concepts import Evidence, load_concepts
from sparc_hf.codes.encoding import sample_code
from sparc_hf.codes.incomplete import with_complete_rows
from sparc_hf.codes.search import Match
from sparc_hf.demo.run import DemoArguments, encoders_checksum, run_demo
from sparc_hf.encoders.stream_encoder import StreamEncoder, load_encoders
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.model.modeling_sparc import SparcModel
from sparc_hf.space.index import SpaceIndex, open_index
from sparc_hf.version import __version__

logger = logging.getLogger(__name__)

ORDERS = {
    "number": None,
    "alignment, single-stream": "alignment/single",
    "alignment, joint": "alignment/joint",
    "liveness": "fires/single",
    "energy": "energy/single",
    "entropy": "entropy/single",
    "co-firing": "cofire_jaccard/single",
}
# Where a pushed Space has its prepared demo, beside app.py.
SHIPPED_FOLDER = "demo"
INDEXES_FOLDER = "indexes"
MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "concepts.json", "README.md", "*.png")


@dataclass(frozen=True)
class LatentFacts:
    """One latent as the explorer shows it.

    Attributes:
        latent: its number.
        name: what it is called, or None.
        figures: "column/encoding" -> number, of `SpaceIndex.statistics`.
        labels: labels of the samples it fires on, the surest first.
        words: words of the captions of its top samples, the surest first.
        samples: stream -> (row, value) of its top samples, the strongest first.
        neighbours: stream -> (latent, cosine of the atoms), the nearest first.
    """

    latent: int
    name: str | None
    figures: dict[str, float]
    labels: list[Evidence] = field(default_factory=list)
    words: list[Evidence] = field(default_factory=list)
    samples: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    neighbours: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


class SpaceData:
    """A model with its index; safe to be asked by several threads at once.

    Args:
        model: the model, in eval mode.
        features: the indexed samples.
        index: their index.
        encoders: stream -> its encoder; without them nothing can be explained, and only indexed samples retrieved.
        card: the model card, Markdown without its header.
    """

    def __init__(
        self,
        model: SparcModel,
        features: FeatureDataset,
        index: SpaceIndex,
        *,
        encoders: dict[str, StreamEncoder] | None = None,
        card: str = "",
    ):
        self.model, self.features, self.index, self.card = model, features, index, card
        self.encoders = encoders or {}
        self.streams: list[str] = model.config.stream_names
        self.num_latents: int = model.config.num_latents
        self.atoms = {name: model.atoms[name].detach().float().cpu().numpy() for name in self.streams}
        # Explaining changes a model's way of attending and watches its inside, so it is done on modules of their own,
        # one explanation at a time; whoever only encodes waits for nobody.
        self.watched_encoders = with_own_modules(self.encoders)
        self.explaining = threading.Lock()

    def modality(self, stream: str) -> str:
        """Return "image" or "text", what a stream's encoder takes; "features" where the record does not say."""
        return str(self.model.config.stream(stream).get("modality") or "features")

    def streams_of(self, modality: str) -> list[str]:
        """Return the streams of one modality."""
        return [name for name in self.streams if self.modality(name) == modality]

    def name(self, latent: int) -> str | None:
        """Return what a latent is called."""
        concept = self.index.concepts.get(latent)
        return concept.name if concept else None

    def title(self, latent: int) -> str:
        """Return number and name of a latent, as it is written everywhere."""
        name = self.name(latent)
        return f"{latent} · {name}" if name else f"{latent}"

    def find_latents(self, search: str = "", order: str = "alignment, single-stream") -> list[int]:
        """Return the latents that match, see `match_latents`."""
        return [match.latent for match in self.match_latents(search, order)]

    def match_latents(self, search: str = "", order: str = "alignment, single-stream") -> list[LatentMatch]:
        """Return the latents whose number, name, labels or words match, the most directly meant first.

        Of those of the same name the largest in `order` comes first; of those with the same label or word the one that
        goes most surely with it; without a search `order` alone counts. Every word of the search must occur; a number
        means the latent of that number. Latents that never fire are left out unless they are asked for by number.

        Raises:
            ValueError: for an unknown order.
        """
        if order not in ORDERS:
            raise ValueError(f"latents are ordered by one of {list(ORDERS)}, not by {order[:40]!r}")
        live = self.index.statistics["live/single"] + self.index.statistics["live/joint"] > 0
        if search.strip():
            matches = [
                match for match in self._concepts.search(search) if live[match.latent] or match.reason == NUMBER
            ]
        else:
            matches = [LatentMatch(latent) for latent in np.flatnonzero(live).tolist()]
        column = ORDERS[order]
        values = (
            -np.arange(self.num_latents) if column is None else np.nan_to_num(self.index.statistics[column], nan=-1)
        )
        if order == "liveness":  # first in how many streams, then how often
            values = values + self.index.statistics["live/single"]
        return sorted(
            matches, key=lambda match: (match.rank, -(values[match.latent] if match.is_by_name else match.z))
        )

    def latent(self, latent: int, samples: int = 9, neighbours: int = 6) -> LatentFacts:
        """Return what is known of one latent."""
        concept = self.index.concepts.get(latent)
        best = {
            stream: [
                (int(row), float(value))
                for row, value in zip(top.rows[latent][:samples], top.values[latent][:samples], strict=True)
                if row >= 0
            ]
            for stream, top in self.index.top.items()
        }
        return LatentFacts(
            latent=latent,
            name=concept.name if concept else None,
            figures={name: float(column[latent]) for name, column in self.index.statistics.items()},
            labels=list(concept.labels) if concept else [],
            words=list(concept.words) if concept else [],
            samples=best,
            neighbours={stream: self._nearest(stream, latent, neighbours) for stream in self.streams},
        )

    def image(self, row: int) -> Image.Image | None:
        """Return an indexed sample's image at its full size, or None."""
        return self.features.image(row)

    def caption(self, row: int) -> str | None:
        """Return an indexed sample's text, or None."""
        return self.features.column("text", [row])[0] if "text" in self.features.column_names else None

    def sample_name(self, row: int) -> str:
        """Return an indexed sample's id, or its number."""
        return (
            str(self.features.column("id", [row])[0])
            if "id" in self.features.column_names
            else str(self.features.number_of(row))
        )

    def code(self, stream: str, sample: Image.Image | str) -> np.ndarray:
        """Return the code a stream gives an image or a text on its own, float32 [N]; of patch tokens the largest.

        Raises:
            ValueError: for a stream without an encoder, or one that takes something else.
        """
        if stream not in self.encoders:
            raise ValueError(f"the model does not say which encoder makes the stream `{stream}`")
        return sample_code(self.model, self.encoders[stream], sample).numpy()

    def strongest(self, code: np.ndarray, count: int = 10) -> list[tuple[int, float]]:
        """Return (latent, value) of the largest values of a code [N], the largest first."""
        active = np.flatnonzero(code > 0)
        order = active[np.argsort(-code[active], kind="stable")][:count]
        return [(int(latent), float(code[latent])) for latent in order]

    def query_code(self, source: str, sample: Image.Image | str | int) -> np.ndarray:
        """Return the code of a query in a stream, float32 [N].

        Args:
            source: stream of the query.
            sample: an image, a text, or the row of an indexed sample.

        Raises:
            ValueError: for an unknown stream or row, or a stream without an encoder.
        """
        self._check_stream(source)
        return self.index.search.query(source, sample) if isinstance(sample, int) else self.code(source, sample)

    def retrieve(
        self,
        source: str,
        target: str,
        sample: Image.Image | str | int,
        count: int = 12,
        *,
        code: np.ndarray | None = None,
    ) -> list[Match]:
        """Return the indexed samples whose code in the target stream is most like a query's in the source stream.

        Args:
            source: stream of the query.
            target: stream that is searched.
            sample: as in `query_code`; an indexed sample is left out of its own stream.
            count: most samples to return.
            code: what `query_code` returned for it, where that is known.

        Raises:
            ValueError: as `query_code`, for the searched stream too.
        """
        self._check_stream(target)
        code = self.query_code(source, sample) if code is None else code
        own = sample if isinstance(sample, int) and source == target else None
        return self.index.search.search(target, code, count, without=own)

    def _check_stream(self, stream: str) -> None:
        if stream not in self.streams:
            raise ValueError(f"there is no stream {stream[:40]!r}; the streams are {self.streams}")

    @cached_property
    def _concepts(self) -> ConceptSearch:
        return ConceptSearch(list(self.index.concepts.values()), self.num_latents)

    def _nearest(self, stream: str, latent: int, count: int) -> list[tuple[int, float]]:
        atoms = self.atoms[stream]
        norms = np.linalg.norm(atoms, axis=1)
        cosines = atoms @ atoms[latent] / np.maximum(norms * norms[latent], 1e-8)
        cosines[latent] = -np.inf
        order = np.argsort(-cosines, kind="stable")[:count]
        return [(int(other), float(cosines[other])) for other in order if np.isfinite(cosines[other])]


def open_space(
    model: str | None = None,
    dataset: str | None = None,
    cache: str | None = None,
    *,
    shipped: Path | None = None,
) -> SpaceData:
    """Load what a Space shows; without a model it is the embedded demo, which the first call prepares.

    Args:
        model: folder or Hub id of a model.
        dataset: folder or Hub id of the feature dataset that is indexed: samples with their images, texts and labels.
        cache: folder for the demo and the indexes (default: `SPARC_CACHE`, or ~/.cache/sparc_hf).
        shipped: folder that `ship_demo` wrote, whose demo is shown as it is; nothing is written there.

    Raises:
        ValueError: for a model without a dataset, and as `SparcModel.from_pretrained` and `open_index`.
    """
    folder = _cache_folder(cache)
    if model is None and dataset is not None:
        raise ValueError("a dataset is given but no model; give both, or none for the embedded demo")
    if model is not None and dataset is None:
        raise ValueError(
            "a model is given but no feature dataset to show it on; name one (`--features`, SPARC_DATASET), such as "
            "the rows it was evaluated on"
        )
    # Of several processes one prepares, and the others wait.
    with WeakFileLock(folder / "space.lock"):
        if model is not None and dataset is not None:
            model_folder, address = _downloaded(model), _address(dataset)
        elif shipped is not None:
            model_folder, address = str(shipped / "model"), str(shipped / "features")
        else:
            model_folder, address = _demo(folder)
        loaded = SparcModel.from_pretrained(model_folder).eval()
        features = FeatureDataset.load(address)
        check_streams(loaded, features)
        features = with_complete_rows(features, loaded.config.stream_names, "the Space")
        index = open_index(
            loaded,
            features,
            folder / INDEXES_FOLDER,
            names=load_concepts(model_folder),
            shipped=None if shipped is None else shipped / INDEXES_FOLDER,
        )
    return SpaceData(
        loaded, features, index, encoders=_encoders(loaded), card=card_text(Path(model_folder) / "README.md")
    )


def ship_demo(target: Path, cache: str | None = None) -> None:
    """Write the embedded demo with its index into a new folder, for `open_space` on another machine.

    Args:
        target: the folder.
        cache: as in `open_space`; the demo is prepared there where it is missing.
    """
    data = open_space(cache=cache)
    model_folder, features_folder = _demo(_cache_folder(cache))
    (target / "model").mkdir(parents=True)
    for pattern in MODEL_FILES:
        for file in Path(model_folder).glob(pattern):
            shutil.copyfile(file, target / "model" / file.name)
    card = target / "model" / "README.md"
    # It says where the model lies, which is somewhere else now.
    text = card.read_text(encoding="utf-8").replace(model_folder, f"{SHIPPED_FOLDER}/model")
    card.write_text(text, encoding="utf-8")
    shutil.copytree(features_folder, target / "features")
    shutil.copytree(data.index.folder, target / INDEXES_FOLDER / data.index.folder.name)


def card_text(path: Path) -> str:
    """Return a card without its YAML header and with the pictures beside it put into the text; nothing without one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.startswith("---\n") and "\n---\n" in text[3:]:
        text = text[3:].split("\n---\n", 1)[1]

    def embedded(link: re.Match[str]) -> str:
        file = path.parent / link.group(2)
        # A card is written by whoever published the model, so only small pictures of this folder are taken.
        if file.name != link.group(2) or file.suffix != ".png" or not file.is_file() or file.stat().st_size > 1 << 20:
            return link.group(0)
        return f"![{link.group(1)}](data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()})"

    return re.sub(r"!\[([^\]]*)\]\(([^)\s]+)\)", embedded, text.strip())


def _cache_folder(cache: str | None) -> Path:
    folder = Path(cache or os.environ.get("SPARC_CACHE") or Path.home() / ".cache" / "sparc_hf").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _demo(cache: Path) -> tuple[str, str]:
    """Return model and held-out features of the embedded demo, of this version of the package and its encoders."""
    folder = cache / f"demo-{__version__}-{encoders_checksum()}"
    finished = folder / "finished"
    if not finished.exists():
        logger.info("preparing the embedded demo in %s; this takes a few minutes, once", folder)
        run_demo(DemoArguments(output=str(folder)))
        finished.touch()
    return str(folder / "model"), str(folder / "features" / "test")


def _downloaded(model: str) -> str:
    """Return the folder of a model, fetched from the Hub where it is not on this disk."""
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(model, allow_patterns=list(MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"`{model}` is neither a folder nor a model on the Hub that can be reached: {error}"
        ) from error


def _address(dataset: str) -> str:
    """Return a Hub id, with or without a split, as `FeatureDataset.load` takes it; folders stay."""
    is_id = dataset.count("/") in (1, 2) and not Path(dataset).exists() and not dataset.startswith((".", "~", "/"))
    return f"hf://datasets/{dataset}" if is_id else dataset


def with_own_modules(encoders: Mapping[str, StreamEncoder]) -> dict[str, StreamEncoder]:
    """Return the encoders on modules of their own over the same weights; those that share a model still do."""
    memo: dict[int, Any] = {}
    for encoder in encoders.values():
        # What deepcopy takes for copied already is shared.
        memo |= {id(weight): weight for weight in (*encoder.model.parameters(), *encoder.model.buffers())}
    copies = {name: copy.copy(encoder) for name, encoder in encoders.items()}
    for encoder in copies.values():
        encoder.model = copy.deepcopy(encoder.model, memo)
    return copies


def _encoders(model: SparcModel) -> dict[str, StreamEncoder]:
    try:
        return load_encoders(model.config.streams or [])
    except ValueError as error:
        logger.warning("the Space can show its samples only, not new ones: %s", error)
        return {}


def spread_rows(data: SpaceData, count: int) -> Sequence[int]:
    """Return rows spread evenly over the indexed samples, for a visitor to pick from."""
    rows = len(data.features)
    return np.unique(np.linspace(0, rows - 1, min(count, rows)).astype(int)).tolist()
