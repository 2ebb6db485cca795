"""Search by codes: cosines worked by hand, and equal to dense ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_hf.codes.code_table import CodeTable
from sparc_hf.codes.search import CodeSearch


def search_over(**streams: tuple[list, list]) -> CodeSearch:
    indices = {name: np.array(found[0], np.int32) for name, found in streams.items()}
    values = {name: np.array(found[1], np.float32) for name, found in streams.items()}
    return CodeSearch(CodeTable.from_arrays(indices, values, 5, "single"))


@pytest.fixture
def search():
    # Image codes: (3, 4), (0, 1 at latent 2), (1 at latent 0), and one without a positive value.
    return search_over(
        image=([[0, 1], [1, 2], [0, 4], [3, 4]], [[3, 4], [0, 1], [1, 0], [0, 0]]),
        text=([[0, 1], [2, 3], [0, 1], [1, 2]], [[4, 3], [1, 1], [2, 0], [1, 0]]),
    )


def test_values_by_hand(search):
    found = search.search("image", search.query("text", 0))
    # (4, 3) / 5 with (3, 4) / 5: 24 / 25, half of it from each; with (1, 0): 4 / 5.
    assert [match.row for match in found] == [0, 2]
    assert [match.similarity for match in found] == pytest.approx([0.96, 0.8])
    assert found[0].shared == [(0, pytest.approx(0.5)), (1, pytest.approx(0.5))]
    assert found[1].shared == [(0, pytest.approx(1.0))]


def test_shares_are_sorted_and_sum_to_one(search):
    query = np.array([1, 3, 2, 0, 0], np.float32)
    for match in search.search("image", query):
        shares = [share for _, share in match.shared]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)


def test_the_length_of_a_query_does_not_matter(search):
    query = search.query("text", 0)
    assert search.search("image", 100 * query) == search.search("image", query)


def test_a_sample_can_be_left_out_and_nothing_shared_is_nothing_found(search):
    assert search.search("image", search.query("image", 0))[0].row == 0
    assert 0 not in [match.row for match in search.search("image", search.query("image", 0), without=0)]
    assert search.search("image", search.query("image", 3)) == []
    assert search.search("text", np.eye(5, dtype=np.float32)[4]) == []


def test_count_and_ties(search):
    # Rows 2 of both streams and row 3 of the text are unit codes of one latent.
    tied = search_over(one=([[0, 1]] * 6, [[2, 0], [1, 0], [3, 0], [0, 1], [5, 0], [1, 1]]))
    found = tied.search("one", np.eye(5, dtype=np.float32)[0], 3)
    assert [match.row for match in found] == [0, 1, 2]
    assert len(search.search("image", search.query("text", 0), 1)) == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 20))
def test_same_as_dense_cosines(seed, count):
    draws = np.random.default_rng(seed)
    indices = np.stack([draws.permutation(12)[:4] for _ in range(40)]).astype(np.int32)
    values = draws.random((40, 4), np.float32)
    search = CodeSearch(CodeTable.from_arrays({"one": indices}, {"one": values}, 12, "single"))
    dense = np.zeros((40, 12))
    np.put_along_axis(dense, indices.astype(int), values, axis=1)
    query = draws.random(12)
    cosines = dense @ query / np.linalg.norm(dense, axis=1) / np.linalg.norm(query)
    found = search.search("one", query, count)
    assert [match.similarity for match in found] == pytest.approx(sorted(cosines, reverse=True)[:count], abs=1e-5)
    assert [cosines[match.row] for match in found] == pytest.approx([match.similarity for match in found], abs=1e-5)


def test_unknown_streams_and_rows(search):
    with pytest.raises(ValueError, match="there is no stream `sound`; the streams are"):
        search.search("sound", np.ones(5))
    for row in (-1, 4):
        with pytest.raises(ValueError, match="numbered from 0 to 3"):
            search.query("image", row)
