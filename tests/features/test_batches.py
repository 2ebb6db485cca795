import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_hf.features.batches import FeatureBatches
from sparc_hf.features.dataset import FeatureDataset


def features(rows: int, chunk: int | None = None, dtype: str = "float32") -> FeatureDataset:
    """Row i holds i (and -i in the second stream), so that a batch tells its rows."""
    numbers = np.arange(rows, dtype=dtype)[:, None]
    made = FeatureDataset.from_arrays({"b": np.repeat(numbers, 3, 1), "a": np.repeat(-numbers, 2, 1)})
    if chunk is None:
        return made
    copies = [
        pa.Table.from_pylist(made.table.slice(i, chunk).to_pylist(), made.table.schema) for i in range(0, rows, chunk)
    ]
    return FeatureDataset(pa.concat_tables(copies), made.streams)


def row_numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    assert list(batch) == ["b", "a"]
    assert all(tensor.dtype == torch.float32 for tensor in batch.values())
    assert torch.equal(batch["b"][:, 0], -batch["a"][:, 0])
    assert torch.equal(batch["b"][:, 0], batch["b"][:, 2])
    return [int(number) for number in batch["b"][:, 0]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 4),
    chunk=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_every_row_once_for_any_number_of_processes(rows, batch_size, world_size, chunk, seed):
    data = features(rows, chunk)
    if batch_size < world_size or rows < world_size:
        with pytest.raises(ValueError, match="each needs at least one"):
            FeatureBatches(data, batch_size=batch_size, world_size=world_size)
        return
    ranks = [
        FeatureBatches(data, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    alone = FeatureBatches(data, batch_size=batch_size, seed=seed)
    order = [row for batch in alone for row in row_numbers(batch)]
    assert sorted(order) == list(range(rows))
    shares = [[row_numbers(batch) for batch in rank] for rank in ranks]
    assert {len(share) for share in shares} == {len(ranks[0])}
    seen = []
    for number, parts in enumerate(zip(*shares, strict=True)):
        assert all(parts), "no rank may get an empty batch"
        joined = [row for part in parts for row in part]
        expected = np.array_split(joined, world_size)
        assert [len(part) for part in parts] == [len(part) for part in expected]
        ranks[0].set_epoch(0)
        assert ranks[0].global_batch_rows(number) == len(joined)
        seen += joined
    assert seen == order


def test_tail_joins_the_batch_before_it():
    def sizes(**kwargs):
        batches = FeatureBatches(features(21), batch_size=10, **kwargs)
        return [batches.global_batch_rows(t) for t in range(len(batches))]

    assert sizes() == [10, 10, 1]
    assert sizes(rank=1, world_size=2) == [10, 11]


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_batches_hold_the_rows_they_say(chunk, dtype):
    data = features(50, chunk, dtype).select(np.arange(49, -1, -1))
    batches = FeatureBatches(data, batch_size=8, seed=3)
    for number, batch in enumerate(batches):
        assert row_numbers(batch) == [49 - row for row in batches.batch_rows(number)]
        assert batch["b"].is_contiguous()
        batch["b"].zero_()  # memory of its own
    assert data.array("b", [0])[0, 0] == 49


def test_seeds_and_epochs():
    def order(seed, epoch):
        batches = FeatureBatches(features(40), batch_size=16, seed=seed)
        batches.set_epoch(epoch)
        return [row for batch in batches for row in row_numbers(batch)]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    batches = FeatureBatches(features(40), batch_size=16, seed=1)
    epochs = [[row for batch in batches for row in row_numbers(batch)] for _ in range(3)]
    assert epochs == [order(1, 0), order(1, 1), order(1, 2)]
    plain = FeatureBatches(features(5), batch_size=2, shuffle=False)
    assert [row_numbers(batch) for batch in plain] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("stop", range(9))
def test_resume_at_any_step(stop):
    def run(batches, steps):
        for _ in range(9):
            for batch in batches:
                yield row_numbers(batch), batches.state_dict()
                steps -= 1
                if not steps:
                    return

    whole = list(run(FeatureBatches(features(37), batch_size=10), 9))
    state = whole[stop][1]
    resumed = FeatureBatches(features(37), batch_size=10)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(state["epoch"])  # what a training loop does first
    assert [rows for rows, _ in run(resumed, 8 - stop)] == [rows for rows, _ in whole[stop + 1 :]] or stop == 8
    assert whole[3][1] == {"epoch": 1, "batch": 0}


def test_leaving_early_starts_the_epoch_again():
    batches = FeatureBatches(features(37), batch_size=10)
    first = row_numbers(next(iter(batches)))
    assert batches.state_dict() == {"epoch": 0, "batch": 1}
    assert row_numbers(next(iter(batches))) == first
    batches.load_state_dict({"epoch": 0, "batch": 2})
    batches.set_epoch(1)
    assert batches.state_dict() == {"epoch": 1, "batch": 0}


def test_bad_settings():
    data = features(10)
    with pytest.raises(ValueError, match="must be among"):
        FeatureBatches(data, batch_size=2, streams=["c"])
    with pytest.raises(ValueError, match="`rank`"):
        FeatureBatches(data, batch_size=2, rank=2, world_size=2)
    with pytest.raises(ValueError, match="`seed`"):
        FeatureBatches(data, batch_size=2, seed=-1)
    batches = FeatureBatches(data, batch_size=2, streams=["a"])
    assert list(next(iter(batches))) == ["a"]
    with pytest.raises(ValueError, match="no batch 5"):
        batches.batch_rows(5)
    with pytest.raises(ValueError, match="cannot resume at batch 5"):
        batches.load_state_dict({"epoch": 0, "batch": 5})
