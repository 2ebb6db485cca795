"""Plots: what is drawn is what was given, for panels of unusual content too."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from sparc_hf import plots

EDGES = np.logspace(-6, 0, 25)


def texts(figure) -> set[str]:
    return {text.get_text() for axis in figure.axes for text in axis.texts}


# Machado et al. 2009, severity 1, on linear RGB; and the eye that lacks nothing.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> np.ndarray:
    parts = np.array(to_rgb(colour))
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(seen: np.ndarray) -> np.ndarray:
    """CIE Lab of linear RGB under D65."""
    ratios = TO_XYZ @ np.clip(seen, 0, 1) / TO_XYZ.sum(axis=1)
    x, y, z = np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISIONS)
def test_lines_are_told_apart_by_every_colour_vision(vision):
    """A difference of 20 in Lab; 2 can just be seen. The former second and third line differed by 8.5."""
    seen = [lab(np.array(VISIONS[vision]) @ linear(colour)) for colour in plots.COLOURS]
    for (one, first), (other, second) in itertools.combinations(zip(plots.COLOURS, seen, strict=True), 2):
        assert np.linalg.norm(first - second) > 20, (one, other)


def test_lines_are_seen_on_white_and_without_colours():
    for colour in plots.COLOURS:
        assert 1.05 / (TO_XYZ[1] @ linear(colour) + 0.05) >= 3, colour
    scores = {depth: np.full(5, 0.5) for depth in range(4)}
    for figure in (
        plots.jaccard_by_depth({"": scores}),
        plots.frequency_histogram({"": (EDGES, {s: np.arange(24) for s in "abc"})}),
    ):
        lines = figure.axes[0].patches
        # Lines that lie on each other: each is thinner than the one it covers, and they are dashed in turn.
        widths = [line.get_linewidth() for line in lines]
        assert widths == sorted(set(widths), reverse=True)
        assert len({str(line.get_linestyle()) for line in lines}) == len(lines)


def test_dark_is_better_in_both_matrices():
    errors = plots.reconstruction_matrix({"": {"a": {"a": 0.1, "b": 0.9}, "b": {"a": 0.5, "b": 0.2}}}, "nmse")
    alike = plots.reconstruction_matrix(
        {"": {"a": {"a": 0.9, "b": 0.1}, "b": {"a": 0.5, "b": 0.8}}}, "cos", better="high"
    )
    for figure in (errors, alike):
        (image,) = figure.axes[0].images
        lightness = image.to_rgba(image.get_array())[..., :3].mean(axis=-1)
        assert np.argsort(lightness.flatten()).tolist() == [0, 3, 2, 1]
        assert figure.axes[1].get_ylabel().endswith("dark is better")
        colours = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
        assert set(colours.values()) == {"white", "black"}


@pytest.mark.parametrize("stacked", [False, True])
def test_panels_stand_side_by_side_or_stacked(stacked):
    panels = {"joint": np.array([0.5]), "single": np.array([0.7])}
    figure = plots.entropy_histogram(panels, stacked=stacked)
    first, second = figure.axes
    figure.draw_without_rendering()
    assert (first.get_position().y0 > second.get_position().y1) == stacked
    assert [axis.get_ylabel() for axis in figure.axes] == ["latents that fire", "latents that fire" if stacked else ""]


def test_a_matrix_shows_its_numbers():
    panels = {
        "joint": {"a": {"a": 0.1, "b": 0.25}, "b": {"a": 0.5, "b": None}},
        "single": {"a": {"a": 1.0, "b": 2.0}, "b": {"a": 3.0, "b": 4.0}},
    }
    figure = plots.reconstruction_matrix(panels, "nmse")
    assert texts(figure) == {"0.100", "0.250", "0.500", "undefined", "1.000", "2.000", "3.000", "4.000"}
    assert [axis.get_title() for axis in figure.axes[:2]] == ["joint", "single"]
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["a", "b"]
    assert (figure.axes[0].get_ylabel(), figure.axes[0].get_xlabel()) == ("target", "source")


def test_histograms_count_every_latent():
    figure = plots.jaccard_by_depth({"joint": {0: np.array([0.0, 0.5, 1.0]), 1: np.array([0.0, 0.0, 0.2])}})
    counts = [patch.get_data().values.sum() for patch in figure.axes[0].patches]
    assert counts == [3, 3]
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["depth 0, mean 0.500", "depth 1, mean 0.067"]
    figure = plots.entropy_histogram({"joint": np.array([0.0, 0.99, 1.0])})
    assert sum(patch.get_height() for patch in figure.axes[0].patches) == 3


def test_bars_name_every_pattern_of_every_panel():
    figure = plots.liveness_bars({"joint": {"all streams": 5, "dead": 1}, "single": {"all streams": 3, "a+b": 2}})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["all streams", "dead", "a+b"]
    widths = [[patch.get_width() for patch in axis.patches] for axis in figure.axes]
    assert widths == [[5, 1, 0], [3, 0, 2]]
    top, bottom = (figure.axes[0].transData.transform((0, place))[1] for place in (0, 2))
    assert top > bottom


def test_points_are_latents_with_energy():
    figure = plots.cofires_against_energy({"joint": (np.array([1.0, 0.0, 2.0]), np.array([5, 0, 9]))})
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[1.0, 5.0], [2.0, 9.0]]


@pytest.mark.parametrize(
    "figure",
    [
        plots.frequency_histogram({"joint": (EDGES, {"a": np.zeros(24, int), "b": np.zeros(24, int)})}),
        plots.frequency_histogram({"joint": (EDGES, {"a": np.arange(24)})}),
        plots.entropy_histogram({"joint": np.array([])}),
        plots.cofires_against_energy({"joint": (np.zeros(3), np.zeros(3))}),
        plots.reconstruction_matrix({"joint": {"a": {"a": None}}}, "fvu"),
    ],
)
def test_unusual_panels_can_be_drawn(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
