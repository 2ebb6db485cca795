"""Figures of an evaluation: arrays in, matplotlib Figures out; nothing is shown and no global state is touched."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_WIDTH = 3.5
COLOURS = ("#2a6f97", "#e07a5f", "#6a994e", "#9d4edd", "#bc8034", "#577590", "#c9184a", "#3d5a40")


def reconstruction_matrix(panels: Mapping[str, Mapping[str, Mapping[str, float | None]]], name: str) -> "Figure":
    """Return one matrix a panel: rows are targets, columns sources, cells numbers.

    Args:
        panels: panel title -> target -> source -> number, or None where it is not defined.
        name: what the numbers are, for the colour bar.
    """
    streams = list(next(iter(panels.values())))
    figure, axes = _panels(panels, height=0.65 * len(streams) + 1.7)
    grids = {
        title: np.array([[_number(found[target][source]) for source in streams] for target in streams])
        for title, found in panels.items()
    }
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()])
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    images = []
    for axis, grid in zip(axes, grids.values(), strict=True):
        images.append(axis.imshow(grid, cmap="Blues", vmin=low, vmax=high, aspect="auto"))
        axis.set_xticks(range(len(streams)), streams, rotation=20, ha="right")
        axis.set_yticks(range(len(streams)), streams)
        axis.set_xlabel("source")
        for row, column in np.ndindex(grid.shape):
            dark = grid[row, column] > (low + high) / 2
            text = f"{grid[row, column]:.3f}" if np.isfinite(grid[row, column]) else "undefined"
            axis.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    axes[0].set_ylabel("target")
    figure.colorbar(images[0], ax=axes, label=name, shrink=0.85)
    return figure


def jaccard_by_depth(panels: Mapping[str, Mapping[int, np.ndarray]]) -> "Figure":
    """Return histograms of latents over their label Jaccard, one line per depth of the label hierarchy.

    Args:
        panels: panel title -> depth -> scores from 0 to 1, [latents].
    """
    figure, axes = _panels(panels)
    edges = np.linspace(0, 1, 21)
    for axis, found in zip(axes, panels.values(), strict=True):
        for colour, (depth, scores) in zip(_cycled(found), found.items(), strict=True):
            counts = np.histogram(scores, edges)[0]
            axis.stairs(counts, edges, color=colour, label=f"depth {depth}, mean {scores.mean():.3f}", linewidth=1.6)
        axis.set_xlabel("label Jaccard between streams")
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("latents")
    return figure


def liveness_bars(panels: Mapping[str, Mapping[str, int]]) -> "Figure":
    """Return bars of latents by where they are alive.

    Args:
        panels: panel title -> pattern ("dead", "all streams", "a+b", ...) -> number of latents.
    """
    patterns = list(dict.fromkeys(pattern for found in panels.values() for pattern in found))
    figure, axes = _panels(panels, height=0.32 * len(patterns) + 1.4)
    for axis, found in zip(axes, panels.values(), strict=True):
        numbers = [found.get(pattern, 0) for pattern in patterns]
        bars = axis.barh(range(len(patterns)), numbers, color=COLOURS[0])
        axis.bar_label(bars, padding=3, fontsize=8)
        axis.set_yticks(range(len(patterns)), patterns)
        axis.margins(x=0.15)
        axis.set_xlabel("latents")
    axes[0].invert_yaxis()  # shared by all
    return figure


def frequency_histogram(panels: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]]) -> "Figure":
    """Return how often live latents fire, one line per stream.

    Args:
        panels: panel title -> (edges [bins + 1], shares of rows; stream -> number of latents [bins]).
    """
    figure, axes = _panels(panels)
    for axis, (edges, streams) in zip(axes, panels.values(), strict=True):
        for colour, (stream, counts) in zip(_cycled(streams), streams.items(), strict=True):
            axis.stairs(counts, edges, color=colour, label=stream, linewidth=1.6)
        filled = np.flatnonzero(np.sum(list(streams.values()), axis=0))
        if len(filled):
            axis.set_xlim(float(edges[filled[0]]), float(edges[filled[-1] + 1]))
        axis.set_xscale("log")
        axis.set_xlabel("share of rows a latent fires on")
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("latents")
    return figure


def entropy_histogram(panels: Mapping[str, np.ndarray]) -> "Figure":
    """Return latents over their firing entropy across streams: 0 fires in one stream only, 1 equally in all.

    Args:
        panels: panel title -> entropies from 0 to 1, [latents that fire].
    """
    figure, axes = _panels(panels)
    for axis, entropies in zip(axes, panels.values(), strict=True):
        axis.hist(entropies, bins=np.linspace(0, 1, 26).tolist(), color=COLOURS[0])
        axis.set_xlabel("firing entropy across streams")
    axes[0].set_ylabel("latents that fire")
    return figure


def cofires_against_energy(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]], links: Sequence[str] | None = None
) -> "Figure":
    """Return a point per latent: how often it fires in all streams at once, against its energy.

    Args:
        panels: panel title -> (energies [latents], rows on which all streams fire [latents]); latents without
            energy are left out.
        links: address behind each latent's point, for SVG.
    """
    figure, axes = _panels(panels)
    for axis, (energies, cofires) in zip(axes, panels.values(), strict=True):
        active = np.asarray(energies) > 0
        points = axis.scatter(energies[active], cofires[active], s=8, alpha=0.5, color=COLOURS[0], linewidths=0)
        if links is not None:
            points.set_urls([links[int(latent)] for latent in np.flatnonzero(active)])
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(bottom=-0.2)
        axis.set_xlabel("energy, summed over streams")
    axes[0].set_ylabel("rows on which all streams fire")
    return figure


def svg_text(figure: "Figure") -> str:
    """Return a figure as an <svg> element without a background, whose black follows the colour of the page's text."""
    import io

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def _panels(panels: Mapping[str, Any], height: float = 3.2) -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL_WIDTH * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, title in zip(axes, panels, strict=True):
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _cycled(found: Mapping[Any, Any]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(found))]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
