"""Pictures of concepts over a dataset: contact sheets of top samples with maps, and heatmaps of the strongest."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sparc_hf.codes.code_table import CodeTable
from sparc_hf.codes.encoding import sample_codes
from sparc_hf.codes.top_samples import TopSamples
from sparc_hf.codes.universality import latent_universality
from sparc_hf.encoders.inputs import upright_rgb
from sparc_hf.encoders.stream_encoder import StreamEncoder
from sparc_hf.encoders.views import visible_box
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.maps.explanation import SHOWN_SIDE, check_latents
from sparc_hf.maps.patch_maps import image_maps, map_on_image
from sparc_hf.maps.picture_folder import PictureFolder
from sparc_hf.maps.plots import SheetCell, contact_sheet, heatmap_grid
from sparc_hf.maps.targets import ConceptTarget
from sparc_hf.model.modeling_sparc import SparcModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEET_SAMPLES = 8


def latent_sheet(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    features: FeatureDataset,
    best: Mapping[str, TopSamples],
    latent: int,
    *,
    title: str = "",
    samples: int = 8,
    method: str | None = "relevance",
    shifts: int = 1,
) -> "Figure":
    """Return a latent's top samples in every stream side by side, with maps in streams that encode images.

    Args:
        model: the model.
        encoders: stream -> its encoder; streams without one are shown without maps.
        features: the rows of `best`, with images, captions or both.
        best: stream -> top samples, see `top_samples`.
        latent: the latent.
        title: heading; its number by default.
        samples: most samples a stream.
        method: of the maps, see `image_maps`; None for none.
        shifts: likewise.
    """
    texts = features.text
    rows: dict[str, list[SheetCell]] = {}
    for stream, top in best.items():
        top_rows = [int(row) for row in top.rows[latent] if row >= 0][:samples]
        encoder = encoders.get(stream)
        records = {record["name"]: record for record in features.streams}
        is_text = (encoder.modality if encoder else records.get(stream, {}).get("modality")) == "text"
        images = {row: None if is_text else shown_image(features.image(row)) for row in top_rows}
        heats = _maps_of(model, encoder, images, latent, method, shifts)
        rows[stream] = [
            SheetCell(
                images[row],
                heats.get(row),
                texts[row] if texts is not None else f"row {features.number_of(row)}",
                f"{float(value):.3f}",
            )
            for row, value in zip(top_rows, top.values[latent], strict=False)
        ]
    return contact_sheet(title or f"latent {latent}", rows)


def shown_image(image: Image.Image | None) -> Image.Image | None:
    """Make an image no larger than a figure needs, so that a sheet of photographs stays small."""
    if image is not None:
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return image


def _maps_of(
    model: SparcModel,
    encoder: StreamEncoder | None,
    images: Mapping[int, Image.Image | None],
    latent: int,
    method: str | None,
    shifts: int,
) -> dict[int, np.ndarray]:
    """Return row -> map [height, width] of the images there are."""
    shown = {row: image for row, image in images.items() if image is not None}
    if encoder is None or method is None or not shown:
        return {}
    target = [ConceptTarget((latent,))]
    maps = image_maps(model, {encoder.name: encoder}, list(shown.values()), target, method, shifts=shifts)
    return {
        row: map_on_image(grid[0], visible_box(encoder, image), image.size)[0]
        for (row, image), grid in zip(shown.items(), maps[encoder.name], strict=True)
    }


def write_latent_sheets(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    features: FeatureDataset,
    best: Mapping[str, TopSamples],
    latents: Sequence[int],
    pictures: PictureFolder,
    *,
    names: Mapping[int, str],
    method: str | None = "relevance",
    shifts: int = 1,
) -> list[str]:
    """Write `latent-<number>.png` for each latent, those that are there excepted, and return the files' names.

    Raises:
        ValueError: for latents the model does not have.
    """
    check_latents(model, latents)
    files = []
    for latent in tqdm(latents, desc="contact sheets", unit="latent", delay=2, leave=False):
        title = f"latent {latent}" + (f": {names[latent]}" if latent in names else "")
        rows = [[stream, *top.rows[latent].tolist()] for stream, top in best.items()]
        facts = ("sheet", title, rows, len(features), method, shifts)
        files.append(f"latent-{latent:05d}.png")
        if pictures.has(files[-1], *facts):
            continue
        sheet = latent_sheet(model, encoders, features, best, latent, title=title, method=method, shifts=shifts)
        pictures.save(sheet, files[-1], *facts)
    return files


def strongest_latents(model: SparcModel, codes: CodeTable, count: int) -> list[int]:
    """Return the latents of largest energy, summed over streams: the importance ranking of USAE (arXiv 2502.03714)."""
    energy = latent_universality(model, {name: codes.csr(name) for name in codes.streams})["energy"]
    return [int(latent) for latent in np.argsort(-energy, kind="stable")[:count] if energy[latent] > 0]


def concept_heatmaps(
    model: SparcModel,
    encoders: Mapping[str, StreamEncoder],
    images: Sequence[Image.Image],
    latents: Sequence[int],
    *,
    names: Mapping[int, str],
    method: str = "relevance",
    shifts: int = 1,
) -> "Figure":
    """Return maps of several latents over one set of images, in all image streams, in one figure.

    Images in which a latent is not active, each stream alone, are pale and have no map.
    """
    rows: dict[tuple[str, str], np.ndarray] = {}
    values: dict[tuple[str, str], list[float]] = {}
    images = [upright_rgb(image) for image in images]
    targets = [ConceptTarget((latent,)) for latent in latents]
    seeing = {name: encoder for name, encoder in encoders.items() if encoder.modality == "image"}
    stream_maps = image_maps(model, seeing, images, targets, method, shifts=shifts) if seeing else {}
    codes = [sample_codes(model, {name: encoders[name] for name in stream_maps}, image, "") for image in images]
    side = 64
    for at, latent in enumerate(latents):
        title = f"latent {latent}" + (f"\n{names[latent]}" if latent in names else "")
        for name, maps in stream_maps.items():
            placed = []
            for image, grid in zip(images, maps[:, at], strict=True):
                heat, _ = map_on_image(grid, visible_box(encoders[name], image), image.size)
                placed.append(np.asarray(Image.fromarray(heat).resize((side, side), Image.Resampling.BILINEAR)))
            rows[title, name] = np.stack(placed)
            values[title, name] = [float(image_codes[name][latent]) for image_codes in codes]
    return heatmap_grid(images, rows, values)
