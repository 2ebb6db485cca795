"""Plots: what is drawn is what was given, for panels of unusual content too."""

import io

import numpy as np
import pytest

from sparc_hf import plots

EDGES = np.logspace(-6, 0, 25)


def texts(figure) -> set[str]:
    return {text.get_text() for axis in figure.axes for text in axis.texts}


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
