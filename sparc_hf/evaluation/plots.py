"""Figures of an evaluation: arrays in, matplotlib Figures out; nothing is shown and no global state is touched."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_WIDTH = 3.5
# Of the colours' parts, as the eye weighs them.
LUMINANCE = (0.299, 0.587, 0.114)
# Told apart by every kind of colour vision, on white: each two differ by 27 or more in CIE Lab, for dichromats too.
COLOURS = ("#0072b2", "#de7812", "#3d1f0f", "#8c1aff", "#062647", "#b48c64", "#804000", "#767676")
DASHES = ("-", (0, (4, 1.6)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
# Lines that lie on each other show as a thin one inside a thick one.
THICKEST, THINNEST = 4.2, 1.3


def reconstruction_matrix(
    panels: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    name: str,
    *,
    better: Literal["low", "high"] = "low",
    stacked: bool = False,
) -> "Figure":
    """Return one matrix a panel: rows are targets, columns sources, cells numbers; the darker, the better.

    Args:
        panels: panel title -> target -> source -> number, or None where it is not defined.
        name: what the numbers are, for the colour bar.
        better: which numbers are good: low ones, as errors, or high ones, as similarities.
        stacked: one panel below the other, for narrow pages.
    """
    from matplotlib import colormaps

    streams = list(next(iter(panels.values())))
    figure, axes = _panels(panels, height=0.65 * len(streams) + 1.7, stacked=stacked)
    colours = colormaps["Blues_r" if better == "low" else "Blues"]
    grids = {
        title: np.array([[matrix[target][source] for source in streams] for target in streams], np.float64)
        for title, matrix in panels.items()
    }
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()])
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    images = []
    for axis, grid in zip(axes, grids.values(), strict=True):
        images.append(axis.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto"))
        axis.set_xticks(range(len(streams)), streams, rotation=20, ha="right")
        axis.set_yticks(range(len(streams)), streams)
        axis.set_xlabel("source")
        for row, column in np.ndindex(grid.shape):
            defined = np.isfinite(grid[row, column])
            text = f"{grid[row, column]:.3f}" if defined else "undefined"
            dark = defined and np.dot(images[-1].to_rgba(grid[row, column])[:3], LUMINANCE) < 0.5
            axis.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    _label_rows(axes, "target", stacked)
    figure.colorbar(images[0], ax=list(axes), label=f"{name}, dark is better", shrink=0.85)
    return figure


def jaccard_by_depth(panels: Mapping[str, Mapping[int, np.ndarray]], *, stacked: bool = False) -> "Figure":
    """Return histograms of latents over their label Jaccard, one line per depth of the label hierarchy.

    Args:
        panels: panel title -> depth -> scores from 0 to 1, [latents].
        stacked: one panel below the other, for narrow pages.
    """
    figure, axes = _panels(panels, stacked=stacked)
    edges = np.linspace(0, 1, 21)
    for axis, panel in zip(axes, panels.values(), strict=True):
        lines = {
            f"depth {depth}, mean {scores.mean():.3f}": np.histogram(scores, edges)[0]
            for depth, scores in panel.items()
        }
        _draw_steps(axis, edges, lines)
        axis.set_yscale("symlog", linthresh=1)  # most latents lie in the first bin
        axis.set_ylim(bottom=0)
        axis.set_xlabel("label Jaccard between streams")
    _label_rows(axes, "latents", stacked)
    return figure


def liveness_bars(panels: Mapping[str, Mapping[str, int]], *, stacked: bool = False) -> "Figure":
    """Return bars of latents by where they are alive.

    Args:
        panels: panel title -> pattern ("dead", "all streams", "a+b", ...) -> number of latents.
        stacked: one panel below the other, for narrow pages.
    """
    patterns = list(dict.fromkeys(pattern for panel in panels.values() for pattern in panel))
    figure, axes = _panels(panels, height=0.32 * len(patterns) + 1.4, stacked=stacked)
    for axis, panel in zip(axes, panels.values(), strict=True):
        counts = [panel.get(pattern, 0) for pattern in patterns]
        bars = axis.barh(range(len(patterns)), counts, color=COLOURS[0])
        axis.bar_label(bars, padding=3, fontsize=8)
        axis.set_yticks(range(len(patterns)), patterns)
        axis.margins(x=0.15)
        axis.set_xlabel("latents")
    axes[0].invert_yaxis()  # shared by all
    return figure


def frequency_histogram(
    panels: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]], *, stacked: bool = False
) -> "Figure":
    """Return how often live latents fire, one line per stream.

    Args:
        panels: panel title -> (edges [bins + 1], shares of rows; stream -> number of latents [bins]).
        stacked: one panel below the other, for narrow pages.
    """
    figure, axes = _panels(panels, stacked=stacked)
    for axis, (edges, streams) in zip(axes, panels.values(), strict=True):
        _draw_steps(axis, edges, streams)
        filled = np.flatnonzero(np.sum(list(streams.values()), axis=0))
        if len(filled):
            axis.set_xlim(float(edges[filled[0]]), float(edges[filled[-1] + 1]))
        axis.set_xscale("log")
        axis.set_xlabel("share of rows a latent fires on")
    _label_rows(axes, "latents", stacked)
    return figure


def entropy_histogram(panels: Mapping[str, np.ndarray], *, stacked: bool = False) -> "Figure":
    """Return latents over their firing entropy across streams: 0 fires in one stream only, 1 equally in all.

    Args:
        panels: panel title -> entropies from 0 to 1, [latents that fire].
        stacked: one panel below the other, for narrow pages.
    """
    figure, axes = _panels(panels, stacked=stacked)
    for axis, entropies in zip(axes, panels.values(), strict=True):
        axis.hist(entropies, bins=np.linspace(0, 1, 26).tolist(), color=COLOURS[0])
        axis.set_xlabel("firing entropy across streams")
    _label_rows(axes, "latents that fire", stacked)
    return figure


def cofires_against_energy(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]], links: Sequence[str] | None = None, *, stacked: bool = False
) -> "Figure":
    """Return a point per latent: how often it fires in all streams at once, against its energy.

    Args:
        panels: panel title -> (energies [latents], rows on which all streams fire [latents]); latents without
            energy are left out.
        links: address behind each latent's point, for SVG.
        stacked: one panel below the other, for narrow pages.
    """
    figure, axes = _panels(panels, stacked=stacked)
    for axis, (energies, cofires) in zip(axes, panels.values(), strict=True):
        active = np.asarray(energies) > 0
        points = axis.scatter(energies[active], cofires[active], s=8, alpha=0.5, color=COLOURS[0], linewidths=0)
        if links is not None:
            points.set_urls([links[int(latent)] for latent in np.flatnonzero(active)])
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(bottom=-0.2)
        axis.set_xlabel("energy, summed over streams")
    _label_rows(axes, "rows on which all streams fire", stacked)
    return figure


def svg_text(figure: "Figure") -> str:
    """Return a figure as an <svg> element without a background, whose black follows the colour of the page's text."""
    import io

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def _panels(
    panels: Mapping[str, Any], height: float = 3.2, *, stacked: bool = False
) -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib.figure import Figure

    columns, rows = (1, len(panels)) if stacked else (len(panels), 1)
    figure = Figure(figsize=(PANEL_WIDTH * columns, height * rows), layout="constrained")
    if stacked:
        figure.set_layout_engine("constrained", h_pad=0.12)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis, title in zip(axes, panels, strict=True):
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_steps(axis: "Axes", edges: np.ndarray, lines: Mapping[str, np.ndarray]) -> None:
    """Draw histograms of latents, counts [bins] by what the legend calls them."""
    widths = np.linspace(THICKEST, THINNEST, len(lines)) if len(lines) > 1 else [THINNEST]
    for place, ((name, counts), width) in enumerate(zip(lines.items(), widths, strict=True)):
        style = {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place % len(DASHES)]}
        axis.stairs(counts, edges, label=name, linewidth=float(width), **style)
    axis.legend(fontsize=7, frameon=False, handlelength=3.2)


def _label_rows(axes: Sequence["Axes"], words: str, stacked: bool) -> None:
    """Write what the vertical axis is, once for panels side by side."""
    for axis in axes if stacked else axes[:1]:
        axis.set_ylabel(words)
