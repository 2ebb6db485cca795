"""Figures of maps and words: what an image and its caption show of a concept; arrays in, matplotlib Figures out."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sparc_hf.encoders.inputs import upright_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparc_hf.maps.scored_words import WordScore

# Inches.
CELL = 1.75
TEXT_CELL = 0.9
GAP = 0.12
LINE = 0.17
WORDS = 0.4
SCALE_WIDTH, SCALE_HEIGHT = 2.0, 0.5
NARROWEST = 7.0
LETTERS_PER_INCH = 14
TEXT_SIZE = 7
# How much white is over an image in which a concept is not active.
PALE = 0.55
MARK = "#f4a259"
LONGEST_SIDE = 320


@dataclass(frozen=True)
class ExplainedTarget:
    """One row of an explanation.

    Attributes:
        title: what is explained.
        maps: column title -> float [height, width] over the image, or None where there is no such map.
        words: stream -> the caption's words in order.
        notes: stream -> what is told beside its name, such as the value of a latent there.
        inactive: streams in which the target is not active at all, which have neither map nor marked words.
        latents: those of a concept.
        grids: image stream -> its map as the stream has it, float32 [rows, columns] over what its encoder sees.
    """

    title: str
    maps: Mapping[str, np.ndarray | None]
    words: Mapping[str, Sequence["WordScore"]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    inactive: Collection[str] = ()
    latents: Sequence[int] = ()
    grids: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class SheetCell:
    """One sample of a contact sheet: an image with a map over it where there is one, or a text; and a note below."""

    image: Image.Image | None
    heat: np.ndarray | None = None
    text: str = ""
    note: str = ""


class _Page:
    """A figure whose axes are placed in inches from its upper left corner."""

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height))

    def axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        """Return axes without ticks or frame."""
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axis = self.figure.add_axes(place)
        axis.set_axis_off()
        return axis

    def write(self, left: float, top: float, words: str, **style: Any) -> None:
        """Write text, its upper left corner at a place."""
        place = left / self.width, 1 - top / self.height
        self.figure.text(*place, words, **{"va": "top", "fontsize": TEXT_SIZE, "parse_math": False} | style)

    def scale(self, left: float, top: float, remark: str = "") -> None:
        """Draw what the colours of maps mean, and beside it a remark."""
        axis = self.axes(left, top + 0.03, SCALE_WIDTH, 0.11)
        ramp = np.linspace(0, 1, 128, dtype=np.float32)[None]
        axis.imshow(overlay(Image.new("RGB", ramp.shape[::-1], (200, 200, 200)), ramp), aspect="auto")
        grey = {"color": "dimgrey"}
        self.write(left, top + 0.17, "0", **grey)
        self.write(left + SCALE_WIDTH, top + 0.17, "largest value of each map", ha="right", **grey)
        self.write(left + SCALE_WIDTH + 2 * GAP, top, remark, **grey)


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


def explanation_panel(
    image: Image.Image | None, caption: str, targets: Sequence[ExplainedTarget], remarks: Sequence[str] = ()
) -> "Figure":
    """Return a row per target: its title, the image, its maps, and beneath them the caption with its words marked.

    Below all of them stand remarks, the beginning of long ones.
    """
    columns = list(dict.fromkeys(name for target in targets for name in target.maps)) if image is not None else []
    width = max((CELL + GAP) * (len(columns) + 1) + GAP, NARROWEST)
    letters = int(width * LETTERS_PER_INCH)
    titles = [textwrap.wrap(target.title, letters) or [""] for target in targets]
    pictures = [LINE * _title_lines(target) + CELL if columns else 0.0 for target in targets]
    heights = [
        LINE * len(lines) + picture + WORDS * len(target.words) + 2 * GAP
        for lines, picture, target in zip(titles, pictures, targets, strict=True)
    ]
    has_maps = any(heat is not None for target in targets for heat in target.maps.values())
    remark_lines = [
        line for remark in remarks for line in textwrap.wrap(textwrap.shorten(remark, 2 * letters), letters)
    ]
    scale_height = SCALE_HEIGHT if has_maps else 0
    page = _Page(width, sum(heights) + GAP + scale_height + LINE * len(remark_lines))
    top = GAP
    for lines, picture, target, height in zip(titles, pictures, targets, heights, strict=True):
        page.write(GAP, top, "\n".join(lines), fontsize=TEXT_SIZE + 1, fontweight="bold")
        below = top + LINE * len(lines)
        if columns and image is not None:
            _draw_maps(page, below, image, target, columns)
        for at, (stream, words) in enumerate(target.words.items()):
            axis = page.axes(GAP, below + picture + GAP + WORDS * at, width - 2 * GAP, WORDS)
            _write_marked(axis, _with_note(target, stream), caption, [] if stream in target.inactive else words)
        top += height
    if has_maps:
        marks = "words: the stronger the mark, the higher the score in its line\n" if caption else ""
        pale = "pale or grey: not active there" if any(target.inactive for target in targets) else ""
        page.scale(GAP, top, marks + pale)
    page.write(GAP, top + scale_height, "\n".join(remark_lines), color="dimgrey")
    return page.figure


def _column_title(target: ExplainedTarget, name: str) -> list[str]:
    return textwrap.wrap(_with_note(target, name), int(CELL * LETTERS_PER_INCH))[:2]


def _title_lines(target: ExplainedTarget) -> int:
    return max((len(_column_title(target, name)) for name in target.maps), default=1)


def _draw_maps(page: _Page, top: float, image: Image.Image, target: ExplainedTarget, columns: Sequence[str]) -> None:
    """Draw the image and, under their titles, a target's maps over it; pale where it is not active."""
    small, titles = _small(image), LINE * _title_lines(target)
    _show(page.axes(GAP, top + titles, CELL, CELL), small)
    for at, name in enumerate(columns, start=1):
        if name not in target.maps:
            continue
        left, heat, title = GAP + at * (CELL + GAP), target.maps[name], _column_title(target, name)
        page.write(left, top + titles - LINE * (len(title) - 0.1), "\n".join(title))
        axis = page.axes(left, top + titles, CELL, CELL)
        if heat is not None:
            _show(axis, overlay(*_small_pair(image, heat)))
        elif name in target.inactive:
            _show(axis, _pale(small))
        else:
            axis.text(0.5, 0.5, "no such map", ha="center", va="center", fontsize=TEXT_SIZE, color="dimgrey")


def contact_sheet(title: str, rows: Mapping[str, Sequence[SheetCell]]) -> "Figure":
    """Return a row of samples per stream, the strongest first."""
    columns = max((len(cells) for cells in rows.values()), default=1) or 1
    heights = {
        stream: (CELL if any(cell.image for cell in cells) else TEXT_CELL) + 2 * LINE for stream, cells in rows.items()
    }
    has_maps = any(cell.heat is not None for cells in rows.values() for cell in cells)
    width = max(columns * (CELL + GAP) + LINE * 2, NARROWEST if has_maps else 0)
    page = _Page(width, LINE * 2 + sum(heights.values()) + (SCALE_HEIGHT if has_maps else 0))
    page.write(GAP, GAP / 2, title, fontsize=TEXT_SIZE + 3, fontweight="bold")
    top = LINE * 2
    for stream, cells in rows.items():
        height = heights[stream] - 2 * LINE
        page.figure.text(
            LINE / page.width,
            1 - (top + height / 2) / page.height,
            stream,
            rotation=90,
            ha="center",
            va="center",
            fontsize=8,
        )
        for at, cell in enumerate(cells):
            _show_cell(page.axes(LINE * 2 + at * (CELL + GAP), top, CELL, height), cell)
        if not cells:
            page.write(LINE * 2, top + height / 2, "never fires", color="dimgrey")
        top += heights[stream]
    if has_maps:
        page.scale(LINE * 2, top)
    return page.figure


def heatmap_grid(
    images: Sequence[Image.Image],
    rows: Mapping[tuple[str, str], np.ndarray],
    values: Mapping[tuple[str, str], Sequence[float]] | None = None,
) -> "Figure":
    """Return maps of several concepts and streams over the same images.

    Args:
        images: the columns.
        rows: (concept, stream) -> float [images, height, width], one map an image; a concept's rows stand together.
        values: (concept, stream) -> how active the concept is in each image; where it is not, the image is pale and
            has no map.
    """
    cell, left = CELL * 0.75, 1.5
    page = _Page(left + (cell + GAP / 2) * len(images), (cell + LINE) * (len(rows) + 1) + SCALE_HEIGHT + GAP)
    small = [_small(image) for image in images]
    for at, image in enumerate(small):
        _show(page.axes(left + at * (cell + GAP / 2), GAP, cell, cell), image)
    previous = None
    for at_row, ((concept, stream), maps) in enumerate(rows.items(), start=1):
        top = GAP + at_row * (cell + LINE)
        lines = (
            [] if concept == previous else [words for line in concept.split("\n") for words in textwrap.wrap(line, 20)]
        )
        page.write(GAP, top, "\n".join(lines), fontweight="bold")
        page.write(GAP, top + LINE * 0.8 * len(lines), stream)
        previous = concept
        for at, (image, heat) in enumerate(zip(images, maps, strict=True)):
            axis = page.axes(left + at * (cell + GAP / 2), top, cell, cell)
            value = None if values is None else values[concept, stream][at]
            if value is not None and value <= 0:
                _show(axis, _pale(small[at]))
            else:
                _show(axis, overlay(*_small_pair(image, heat)))
            note = "" if value is None else f"{value:.2f}" if value > 0 else "not active"
            page.write(left + at * (cell + GAP / 2), top + cell + 0.02, note, color="dimgrey", fontsize=TEXT_SIZE - 1)
    pale = "" if values is None else "pale: not active there"
    page.scale(left, GAP + (len(rows) + 1) * (cell + LINE), pale)
    return page.figure


def _show(axis: "Axes", picture: Any) -> None:
    axis.imshow(picture)


def _show_cell(axis: "Axes", cell: SheetCell) -> None:
    if cell.image is not None:
        _show(axis, _small(cell.image) if cell.heat is None else overlay(*_small_pair(cell.image, cell.heat)))
    elif cell.text:
        words = "\n".join(textwrap.wrap(cell.text, 26)[:6])
        axis.text(0.5, 0.5, words, ha="center", va="center", fontsize=6.5, parse_math=False, transform=axis.transAxes)
    axis.text(0.5, -0.02, cell.note, ha="center", va="top", fontsize=6.5, parse_math=False, transform=axis.transAxes)


def _with_note(target: ExplainedTarget, stream: str) -> str:
    return f"{stream} ({target.notes[stream]})" if stream in target.notes else stream


def _pale(image: Image.Image) -> Image.Image:
    return Image.blend(image, Image.new("RGB", image.size, "white"), PALE)


def _small(image: Image.Image) -> Image.Image:
    """Return a copy no larger than a figure shows."""
    image = upright_rgb(image)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image


def _small_pair(image: Image.Image, heat: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    small = _small(image)
    resized = Image.fromarray(np.ascontiguousarray(heat, np.float32)).resize(small.size, Image.Resampling.BILINEAR)
    return small, np.maximum(np.asarray(resized), 0)


def _write_marked(axis: "Axes", stream: str, caption: str, words: Sequence["WordScore"]) -> None:
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
