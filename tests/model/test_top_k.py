"""Top-k in torch, every form against a stable sort of the whole row."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_hf.model import top_k
from sparc_hf.model.top_k import largest

SPECIAL = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0])
FORMS = {"on a CPU": top_k._on_cpu, "in blocks": top_k._in_blocks, "sorted": top_k._stable}


def reference(values: torch.Tensor, k: int) -> torch.Tensor:
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


def rows_of(kind: str, batch: int, latents: int, seed: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, latents, generator=draws)
    if kind == "rounded":
        return values.round()
    if kind == "special":
        places = torch.randint(0, 2 * len(SPECIAL), values.shape, generator=draws)
        return torch.where(places < len(SPECIAL), SPECIAL[places % len(SPECIAL)], values)
    if kind == "equal":
        return torch.full_like(values, -0.25)
    if kind == "hardly finite":
        return values.masked_fill(torch.rand(latents, generator=draws) < 0.95, -torch.inf)
    return values


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["random", "rounded", "special", "equal", "hardly finite"]),
    batch=st.integers(1, 4),
    latents=st.integers(1, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_the_largest_are_those_of_a_stable_sort(form, kind, batch, latents, dtype, seed, data):
    k = data.draw(st.sampled_from([1, latents]) | st.integers(1, latents))
    values = rows_of(kind, batch, latents, seed).to(dtype)
    with mock.patch.object(top_k, "WORTH_GROUPING", 40):  # so that groups are taken in small rows too
        found = FORMS[form](values, k)
    assert torch.equal(found, reference(values, k))
    assert found.is_contiguous()


@pytest.mark.parametrize("latents", [top_k.WORTH_GROUPING - 1, top_k.WORTH_GROUPING, top_k.WIDE + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_wide_rows(latents, dtype):
    values = torch.randn(3, latents, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[1, 7] = values[1, 3] = 9.0
    values[2, -2:] = 9.0
    assert torch.equal(largest(values, 64), reference(values, 64))
    assert largest(values, 2)[1:].tolist() == [[3, 7], [latents - 2, latents - 1]]


def test_only_rows_with_equal_numbers_are_sorted():
    values = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    values[3, 20:30] = 8.0
    with mock.patch.object(top_k, "_stable", wraps=top_k._stable) as sort:
        assert torch.equal(largest(values, 9), reference(values, 9))
    assert [len(call.args[0]) for call in sort.call_args_list] == [1]
