"""Questions for objects: which scenes are right for them, and how precision counts those that were retrieved."""

import pytest
from conftest import ROOT  # noqa: F401 the offline switches are set there

from sparc_hf.demo.encoder_training.queries import QUERIES, precision_at_depth, precision_by_chance, right_scenes
from sparc_hf.demo.scenes import SPLITS, make_scene
from sparc_hf.demo.taxonomy import COLOUR_IDS, SHAPE_IDS, TEXTURE_IDS


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(index) for index in SPLITS["test"][:60]]


def test_there_is_a_question_for_every_pair():
    assert len({query.text for query in QUERIES["colour"]}) == len(SHAPE_IDS) * len(COLOUR_IDS)
    assert len({query.text for query in QUERIES["texture"]}) == len(SHAPE_IDS) * len(TEXTURE_IDS)
    texts = {query.text: query for query in QUERIES["colour"]}
    assert {"a red circle", "an orange circle"} <= set(texts)
    assert texts["a red circle"].shape == texts["a blue circle"].shape
    assert texts["a red circle"].attribute == texts["a red star"].attribute


@pytest.mark.parametrize("kind", ["colour", "texture"])
def test_right_scenes_have_the_object(scenes, kind):
    right = right_scenes(QUERIES[kind], scenes)
    for row, query in enumerate(QUERIES[kind]):
        for column, scene in enumerate(scenes):
            attributes = [getattr(item, kind) for item in scene.objects]
            shapes = [item.shape for item in scene.objects]
            assert right["shape"][row, column] == (query.shape in shapes)
            assert right["attribute"][row, column] == (query.attribute in attributes)
            assert right["both"][row, column] == (
                (query.shape, query.attribute) in zip(shapes, attributes, strict=True)
            )
    assert right["both"].any()
    # A scene with a red box and a blue circle has no red circle.
    assert (right["shape"] & right["attribute"] & ~right["both"]).any()


def test_precision_counts_the_first_five(scenes):
    queries = QUERIES["colour"]
    right = right_scenes(queries, scenes)["shape"]
    common = [row for row in range(len(queries)) if 5 <= right[row].sum() <= 55]
    asked = [queries[row] for row in common]
    good = [right[row].nonzero()[0].tolist() for row in common]
    bad = [(~right[row]).nonzero()[0].tolist() for row in common]
    assert precision_at_depth([rows[:5] for rows in good], asked, scenes)["shape"] == 1
    assert precision_at_depth([rows[:5] for rows in bad], asked, scenes)["shape"] == 0
    mixed = [[*wrong[:2], *rows[:3], *rows[3:]] for rows, wrong in zip(good, bad, strict=True)]
    assert precision_at_depth(mixed, asked, scenes)["shape"] == pytest.approx(0.6)
    assert precision_at_depth([rows[:2] for rows in good], asked, scenes)["shape"] == pytest.approx(0.4)
    assert precision_by_chance(queries, scenes)["shape"] == pytest.approx(right.mean())
