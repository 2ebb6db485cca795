"""Figures of maps and words: what an image and its caption show of a concept; arrays in, matplotlib Figures out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sparc_hf.image_files import upright_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 1.75
MARK = "#f4a259"
LONGEST_SIDE = 320


@dataclass(frozen=True)
class ExplainedTarget:
    """One row of an explanation.

    Attributes:
        title: what is explained.
        maps: column title -> float [height, width] over the image, or None where there is no such map.
        words: stream -> (word, score, first character, last character + 1), in the order of the caption.
        notes: stream -> what is told beside its name, such as the value of a latent there.
    """

    title: str
    maps: Mapping[str, np.ndarray | None]
    words: Mapping[str, Sequence[tuple[str, float, int, int]]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SheetCell:
    """One sample of a contact sheet: an image with a map over it where there is one, or a text; and a note below."""

    image: Image.Image | None
    heat: np.ndarray | None = None
    text: str = ""
    note: str = ""


def overlay(image: Image.Image, heat: np.ndarray, opacity: float = 0.75) -> np.ndarray:
    """Return an image with a map over it, uint8 [height, width, 3]; where the map is low the image shows through.

    Args:
        image: of any mode.
        heat: float [height, width] over the upright image, 0 or more; its largest value is drawn strongest.
        opacity: of the strongest places.
    """
    import matplotlib

    pixels = np.asarray(upright_rgb(image), np.float32) / 255
    strength = heat / max(float(heat.max()), 1e-12)
    colours = matplotlib.colormaps["inferno"](0.15 + 0.85 * strength)[..., :3]
    share = opacity * np.sqrt(strength)[..., None]
    # Colours of the image would be taken for the map's: under it the image is half grey.
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    base = 0.5 * pixels + 0.5 * grey[..., None]
    return (255 * ((1 - share) * base + share * colours) + 0.5).astype(np.uint8)


def explanation_panel(image: Image.Image | None, caption: str, targets: Sequence[ExplainedTarget]) -> "Figure":
    """Return a row per target: the image, its maps, and beneath them the caption with its words marked."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(name for target in targets for name in target.maps)) if image is not None else []
    pictures = CELL * 1.05 if columns else 0.3
    heights = [[pictures, *([0.36] * len(target.words))] for target in targets]
    gap = 0.35
    whole = sum(map(sum, heights)) + gap * len(targets)
    figure = Figure(figsize=(max(CELL * (len(columns) + 1), 7.0), whole))
    done = 0.0
    for target, of_target in zip(targets, heights, strict=True):
        inner = figure.add_gridspec(
            len(of_target),
            1,
            height_ratios=of_target,
            left=0.01,
            right=0.99,
            top=1 - (done + 0.8 * gap) / whole,
            bottom=1 - (done + 0.8 * gap + sum(of_target)) / whole,
            hspace=0.02,
        )
        done += gap + sum(of_target)
        top = inner[0].subgridspec(1, max(len(columns), 1) + 1, wspace=0.06)
        first = figure.add_subplot(top[0])
        first.set_title(target.title, fontsize=8, loc="left", pad=3, fontweight="bold")
        _show(first, None if image is None or not columns else _small(image))
        for at, name in enumerate(columns):
            axis = figure.add_subplot(top[at + 1])
            heat = target.maps.get(name)
            _show(axis, None if heat is None or image is None else overlay(*_small_pair(image, heat)))
            axis.set_title(_with_note(target, name) if name in target.maps else "", fontsize=7, pad=3)
            if heat is None and name in target.maps:
                axis.text(0.5, 0.5, "no such map", ha="center", va="center", fontsize=7, color="grey")
        for at, (stream, words) in enumerate(target.words.items()):
            axis = figure.add_subplot(inner[at + 1])
            axis.set_axis_off()
            _write_marked(axis, _with_note(target, stream), caption, words)
    return figure


def contact_sheet(title: str, rows: Mapping[str, Sequence[SheetCell]]) -> "Figure":
    """Return a row of samples per stream, the strongest first."""
    from matplotlib.figure import Figure

    columns = max((len(cells) for cells in rows.values()), default=1) or 1
    figure = Figure(figsize=(CELL * columns + 0.35, CELL * 1.15 * len(rows) + 0.4))
    height, width = figure.get_figheight(), figure.get_figwidth()
    sides = {"left": 0.35 / width, "right": 0.995, "top": 1 - 0.35 / height, "bottom": 0.22 / height}
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=sides | {"hspace": 0.16, "wspace": 0.06})
    figure.suptitle(title, fontsize=10, x=0.01, y=1 - 0.06 / height, ha="left", va="top")
    for of_row, (stream, cells) in zip(axes, rows.items(), strict=True):
        for axis in of_row:
            _show(axis, None)
        of_row[0].text(
            -0.06, 0.5, stream, rotation=90, ha="right", va="center", fontsize=8, transform=of_row[0].transAxes
        )
        for axis, cell in zip(of_row, cells, strict=False):
            _show_cell(axis, cell)
        if not cells:
            of_row[0].text(0.5, 0.5, "never fires", ha="center", va="center", fontsize=7, color="grey")
    return figure


def heatmap_grid(images: Sequence[Image.Image], rows: Mapping[tuple[str, str], np.ndarray]) -> "Figure":
    """Return maps of several concepts and streams over the same images.

    Args:
        images: the columns.
        rows: (concept, stream) -> float [images, height, width], one map an image; a concept's rows stand together.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(CELL * 0.75 * len(images) + 1.6, CELL * 0.75 * (len(rows) + 1)), layout="constrained")
    axes = figure.subplots(len(rows) + 1, len(images), squeeze=False)
    for axis, image in zip(axes[0], images, strict=True):
        _show(axis, _small(image))
    previous = None
    for of_row, ((concept, stream), maps) in zip(axes[1:], rows.items(), strict=True):
        words = stream if concept == previous else f"{concept}\n{stream}"
        previous = concept
        for axis, image, heat in zip(of_row, images, maps, strict=True):
            _show(axis, overlay(*_small_pair(image, heat)))
        of_row[0].set_ylabel(words, fontsize=7, rotation=0, ha="right", va="center")
        of_row[0].set_axis_on()
        of_row[0].set_xticks([])
        of_row[0].set_yticks([])
        for spine in of_row[0].spines.values():
            spine.set_visible(False)
    return figure


def _show(axis: "Axes", picture: Any) -> None:
    axis.set_axis_off()
    if picture is not None:
        axis.imshow(picture)


def _show_cell(axis: "Axes", cell: SheetCell) -> None:
    import textwrap

    if cell.image is not None:
        picture = _small(cell.image) if cell.heat is None else overlay(*_small_pair(cell.image, cell.heat))
        axis.imshow(picture)
    elif cell.text:
        words = "\n".join(textwrap.wrap(cell.text, 26)[:6])
        axis.text(0.5, 0.5, words, ha="center", va="center", fontsize=6.5, parse_math=False, transform=axis.transAxes)
    axis.text(0.5, -0.02, cell.note, ha="center", va="top", fontsize=6.5, parse_math=False, transform=axis.transAxes)


def _with_note(target: ExplainedTarget, stream: str) -> str:
    return f"{stream} ({target.notes[stream]})" if stream in target.notes else stream


def _small(image: Image.Image) -> Image.Image:
    """Return a copy no larger than a figure shows."""
    image = upright_rgb(image)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image


def _small_pair(image: Image.Image, heat: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    small = _small(image)
    resized = Image.fromarray(np.ascontiguousarray(heat, np.float32)).resize(small.size, Image.Resampling.BILINEAR)
    return small, np.maximum(np.asarray(resized), 0)


def _write_marked(axis: "Axes", stream: str, caption: str, words: Sequence[tuple[str, float, int, int]]) -> None:
    """Write a caption on one or two lines; the stronger a word's score the stronger its mark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure: Any = axis.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    width, height = axis.get_window_extent(renderer).width, axis.get_window_extent(renderer).height
    strongest = max((score for _, score, _, _ in words), default=0.0)
    x, y, size = 0.0, 0.95, 8
    label = axis.text(0, y, f"{stream}: ", fontsize=size, color="grey", va="top", parse_math=False)
    x += label.get_window_extent(renderer).width / width
    read_to = words[-1][3] if words else 0
    rest = caption[read_to:].split()
    scored = [(word, score, "black") for word, score, _, _ in words]
    # What lies beyond the end of what the encoder reads is grey.
    for word, score, colour in [*scored, *((word, 0.0, "grey") for word in rest)]:
        share = score / strongest if strongest > 0 else 0.0
        text = axis.text(0, 0, word, fontsize=size, va="top", parse_math=False)
        text.set_color(colour)
        text.set_bbox({"facecolor": MARK, "alpha": float(share), "edgecolor": "none", "pad": 1.2})
        extent = text.get_window_extent(renderer).width / width
        if x + extent > 1:
            x, y = 0.0, y - 2.0 * size / height * figure.dpi / 72
            if y < 0:
                text.set_text("…")
                text.set_position((0.985, y + 2.0 * size / height * figure.dpi / 72))
                return
        text.set_position((x, y))
        x += extent + 0.45 * size * figure.dpi / 72 / width
