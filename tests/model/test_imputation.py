"""Streams that are missing: guessed as a Gaussian's conditional mean, encoded with all, whatever is given."""

import itertools
import json

import pytest
import torch
from conftest import planted_features, random_features, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.model.imputation import FIT_RIDGE, ValueFit
from sparc_hf.model.sparse_ops import Selection
from sparc_hf.training.imputation import add_imputation, moments_of, selection_offsets

FOUR = {"a": 3, "b": 2, "c": 4, "d": 1}
SUBSETS = [names for count in (1, 2, 3, 4) for names in itertools.combinations(FOUR, count)]


def gaussian(width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    factor = torch.randn(width, width, generator=draws, dtype=torch.float64)
    return torch.randn(width, generator=draws, dtype=torch.float64), factor @ factor.T


def imputing_model(streams: int = 3, **model_settings) -> SparcModel:
    model = tiny_model(streams, **model_settings)
    add_imputation(model, planted_features(700).select(slice(0, 600)))
    return model


def planted_rows(count: int = 32) -> dict[str, torch.Tensor]:
    """Rows that the statistics were not taken of."""
    features = planted_features(700)
    return {name: torch.from_numpy(features.array(name, slice(600, 600 + count))) for name in features.stream_names}


@pytest.mark.parametrize("names", SUBSETS, ids="".join)
def test_a_missing_row_is_the_conditional_mean_of_a_gaussian(names):
    """By the precision matrix P = C^-1: given M, the mean of T is m_T - P_TT^-1 P_TM (x_M - m_M)."""
    model = SparcModel(
        SparcConfig(streams={name: {"hidden_size": d} for name, d in FOUR.items()}, num_latents=8, k=2, auxk=2)
    )
    mean, covariance = gaussian(10)
    model.set_imputation(mean, covariance, ridge=0.0)
    ends = dict(zip(FOUR, itertools.accumulate(FOUR.values()), strict=True))
    columns = {name: list(range(ends[name] - size, ends[name])) for name, size in FOUR.items()}
    of_given = [column for name in names for column in columns[name]]
    of_missing = [column for column in range(10) if column not in of_given]
    rows = torch.randn(5, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    precision = torch.linalg.inv(covariance)
    expected = rows.clone()
    across = precision[of_missing][:, of_given]
    shift = torch.linalg.solve(precision[of_missing][:, of_missing], across @ (rows[:, of_given] - mean[of_given]).T)
    expected[:, of_missing] = mean[of_missing] - shift.T
    imputed = model.impute({name: rows[:, columns[name]].float() for name in names})
    assert list(imputed) == list(FOUR)
    for name, x in imputed.items():
        torch.testing.assert_close(x, expected[:, columns[name]].float(), rtol=1e-3, atol=1e-3)
    for name in names:
        assert torch.equal(imputed[name], rows[:, columns[name]].float())


@pytest.mark.parametrize("selection", ["global", "local"])
@pytest.mark.parametrize("streams", [2, 3, 5])
def test_joint_codes_and_those_that_ignore_missing_streams_do_not_change_by_a_bit(streams, selection):
    plain = tiny_model(streams, selection=selection)
    model = tiny_model(streams, selection=selection)
    model.set_imputation(*gaussian(sum(model.config.hidden_sizes.values())))
    features = random_features(model)
    for count in range(1, streams + 1):
        for names in itertools.combinations(features, count):
            rows = {name: features[name] for name in names}
            theirs = plain.encode(rows)
            missing = None if count == streams or selection == "local" else "ignore"
            mine = model.encode(rows, missing=missing)
            assert list(mine) == list(theirs)
            for name in names:
                assert torch.equal(mine[name].indices, theirs[name].indices)
                assert torch.equal(mine[name].values, theirs[name].values)


def test_all_streams_given_or_not_select_together():
    model = imputing_model()
    rows = planted_rows()
    codes = model.encode({"dino": rows["dino"]}, streams=model.config.stream_names)
    assert list(codes) == model.config.stream_names
    for code in codes.values():
        assert torch.equal(code.indices, codes["dino"].indices)
        assert (code.values >= 0).all()
    assert list(model.encode({"dino": rows["dino"]})) == ["dino"]


def test_a_code_of_one_stream_is_more_like_the_joint_one_and_says_more_of_the_others():
    model = imputing_model()
    rows = planted_rows()
    joint = model.encode(rows)["dino"].to_dense() > 0
    shared, errors = {}, {}
    for missing in ("impute", "ignore"):
        alone = model.encode({"dino": rows["dino"]}, missing=missing)["dino"]
        shared[missing] = (joint & (alone.to_dense() > 0)).sum() / joint.sum()
        target = model.normalize({"clip_img": rows["clip_img"]})["clip_img"]
        errors[missing] = ((model.decode(alone, to="clip_img") - target) ** 2).sum()
    assert shared["impute"] > 1.2 * shared["ignore"]
    assert errors["impute"] < 0.8 * errors["ignore"]


def test_values_are_fitted_by_one_step_of_steepest_descent():
    """Against dense arithmetic: from z, along g, to where the quadratic error is least."""
    draws = torch.Generator().manual_seed(0)
    atoms = {
        name: torch.nn.functional.normalize(torch.randn(20, d, generator=draws), dim=1) for name, d in FOUR.items()
    }
    centered = {name: torch.randn(6, d, generator=draws) for name, d in FOUR.items()}
    indices = torch.stack([torch.randperm(20, generator=draws)[:5] for _ in range(6)])
    start = torch.rand(6, 5, generator=draws)
    fit = ValueFit(start, centered, atoms, Selection(indices, 20))
    weights = {name: 3.0 if name == "b" else 1.0 for name in FOUR}
    ridge = FIT_RIDGE * sum(weights.values())
    for row in range(6):
        chosen = {name: atoms[name][indices[row]] for name in FOUR}
        matrix = sum(weights[name] * chosen[name] @ chosen[name].T for name in FOUR) + ridge * torch.eye(5)
        right = sum(weights[name] * chosen[name] @ centered[name][row] for name in FOUR)
        downhill = right - matrix @ start[row]
        expected = start[row] + downhill * (downhill @ downhill) / (downhill @ matrix @ downhill)
        torch.testing.assert_close(fit.values_of("b", 3.0, 1)[row], expected.relu())
        halfway = (start[row] + expected) / 2
        torch.testing.assert_close(fit.values_of("b", 3.0, 0.5)[row], halfway.relu())
        best = torch.linalg.solve(matrix, right)
        if (best > 0).all():
            torch.testing.assert_close(fit.values_of("b", 3.0, 200)[row], best, rtol=1e-3, atol=1e-3)
    assert torch.equal(fit.values_of("b", 3.0, 0), start)


@pytest.mark.parametrize("names", [["dino"], ["clip_txt"], ["dino", "clip_txt"]], ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_map_of_given_rows_selects_as_all_streams_do(monkeypatch, names, dtype):
    """With and without gradients; selection offsets and values come out as from every stream's own pre-activations."""
    model = imputing_model().to(dtype).eval()
    given = {name: planted_rows(64)[name] for name in names}
    with_gradients = model.encode(given, streams=["clip_img", "dino"])
    with torch.no_grad():
        by_map = model.encode(given, streams=["clip_img", "dino"])
        monkeypatch.setattr("sparc_hf.model.sparc_objective.LATENTS_OF_ONE_MAP", 0)
        by_streams = model.encode(given, streams=["clip_img", "dino"])
    exact = dtype == torch.float32
    for codes in (by_map, with_gradients):
        for name, code in codes.items():
            theirs = by_streams[name].to_dense().float()
            assert code.values.dtype == dtype
            if exact:
                torch.testing.assert_close(code.to_dense(), theirs, rtol=1e-4, atol=1e-4)
            # Rounded to eight bits, nearly equal latents change places.
            assert (code.to_dense().float() - theirs).abs().sum() < 0.05 * theirs.sum()
    assert with_gradients["dino"].values.requires_grad


@pytest.mark.parametrize("change", ["data", "swap", "bias", "pre_bias", "optimizer", "state_dict", "statistics"])
def test_codes_follow_weights_however_they_are_changed(change):
    rows = {"dino": planted_rows()["dino"]}
    model = imputing_model().eval()
    with torch.no_grad():
        before = model.encode(rows)["dino"].to_dense()
        weight = model.encoders["clip_img"].weight
        if change == "data":
            weight.data[5:20] *= 3
        elif change == "swap":
            weight.data[:32] = weight.data[:32].flip(0).clone()
        elif change == "bias":
            model.encoders["clip_img"].bias.data[3] += 5
        elif change == "pre_bias":
            model.pre_bias["clip_txt"].data += torch.linspace(-3, 3, len(model.pre_bias["clip_txt"]))
        elif change == "statistics":
            model.imputation.covariance.mul_(torch.linspace(0.5, 2, len(model.imputation.mean)))
    if change == "optimizer":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
        model(planted_rows()).loss.backward()
        optimizer.step()
    elif change == "state_dict":
        model.load_state_dict({key: value * 1.5 + 0.1 for key, value in model.state_dict().items()})
    fresh = imputing_model().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        after = model.encode(rows)["dino"].to_dense()
        torch.testing.assert_close(after, fresh.encode(rows)["dino"].to_dense())
    assert not torch.equal(before, after)


def test_gradients_reach_the_rows_that_are_given():
    model = imputing_model().double()
    rows = planted_rows(4)["dino"].double().requires_grad_()
    value = lambda x: model.encode({"dino": x})["dino"].values.sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(value(rows), rows)
    step = 1e-3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        change = value(rows + step) - value(rows - step)
    # Its statistics are float32.
    torch.testing.assert_close(change / 2, (gradient * step).sum(), rtol=2e-2, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(0, 1000))
def test_moments_are_those_of_all_rows_whatever_the_blocks(rows, seed):
    features = planted_features(rows, seed=seed)
    model = tiny_model(3)
    mean, covariance = moments_of(model, features)
    together = torch.cat([torch.from_numpy(features.array(name)).double() for name in features.stream_names], dim=1)
    torch.testing.assert_close(mean, together.mean(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        covariance, torch.cov(together.T, correction=0).reshape(covariance.shape), rtol=1e-4, atol=1e-5
    )


def test_blocks_are_put_together(monkeypatch):
    features, model = planted_features(100), tiny_model(3)
    whole = moments_of(model, features)
    monkeypatch.setattr("sparc_hf.training.imputation.BLOCK_ROWS", 7)
    for mine, theirs in zip(moments_of(model, features), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_offsets_bring_a_stream_alone_to_the_joint_rates():
    model = imputing_model()
    features = planted_features()
    rows = {name: torch.from_numpy(features.array(name)) for name in features.stream_names}

    def rates(codes) -> torch.Tensor:
        return torch.bincount(codes.indices.reshape(-1), minlength=64) / len(codes)

    joint = rates(model.encode(rows)["dino"])
    for at, name in enumerate(model.config.stream_names):
        distances = []
        for offsets in (torch.zeros(64), list(selection_offsets(model, features))[at]):
            model.imputation.offsets[at] = offsets
            distances.append((rates(model.encode({name: rows[name]})[name]) - joint).abs().sum())
        assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32_in_half_precision(tmp_path, dtype):
    model = imputing_model()
    exact = model.imputation.covariance.clone()
    codes = model.encode({"dino": planted_rows()["dino"]})["dino"]
    half = imputing_model().to(dtype)
    assert torch.equal(half.imputation.covariance, exact)
    half.save_pretrained(tmp_path)
    for loaded in (SparcModel.from_pretrained(tmp_path), half):
        assert loaded.dtype == dtype
        assert torch.equal(loaded.imputation.covariance, exact)
        theirs = loaded.encode({"dino": planted_rows()["dino"]})["dino"]
        assert theirs.values.dtype == dtype
        # Of nearly equal latents another may be selected.
        assert (theirs.to_dense().float() - codes.to_dense()).abs().sum() < 0.1 * codes.values.sum()
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(SparcModel.from_pretrained(tmp_path / "whole", dtype=dtype).imputation.covariance, exact)


def test_statistics_travel_with_the_weights(tmp_path):
    model = imputing_model()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 2
    loaded = SparcModel.from_pretrained(tmp_path)
    rows = {"clip_txt": planted_rows()["clip_txt"]}
    assert loaded.config.imputation == model.config.imputation
    assert torch.equal(loaded.encode(rows)["clip_txt"].to_dense(), model.encode(rows)["clip_txt"].to_dense())
    # What older code reads stays as older code writes it.
    tiny_model(3).save_pretrained(tmp_path / "without")
    without = json.loads((tmp_path / "without" / "config.json").read_text())
    assert without["format_version"] == 1
    assert without["imputation"] is None


def test_other_weights_are_not_answered_by_the_statistics_before():
    model, other = imputing_model(), imputing_model()
    other.set_imputation(*gaussian(52))
    rows = {"dino": planted_rows()["dino"]}
    model.impute(rows)
    model.load_state_dict(other.state_dict())
    for name, x in other.impute(rows).items():
        assert torch.equal(model.impute(rows)[name], x)


def test_what_cannot_be_imputed_is_said():
    model = tiny_model(3)
    rows = {"dino": random_features(model)["dino"]}
    with pytest.raises(ValueError, match="sparc impute"):
        model.encode(rows, missing="impute")
    with pytest.raises(ValueError, match="sparc impute"):
        model.impute(rows)
    with pytest.raises(ValueError, match="lack \\['clip_img'\\]"):
        model.encode(rows, streams=["clip_img"])
    with pytest.raises(ValueError, match='"impute" or "ignore"'):
        model.encode(rows, missing="guess")
    with pytest.raises(ValueError, match="no stream `nobody`"):
        model.encode(rows, streams=["nobody"])
    with pytest.raises(ValueError, match=r"\[52\]"):
        model.set_imputation(torch.zeros(3), torch.eye(3))
    usae = tiny_model(3, objective="usae", selection="local")
    with pytest.raises(ValueError, match="usae"):
        usae.set_imputation(*gaussian(52))
    with pytest.raises(ValueError, match="two rows"):
        add_imputation(model, planted_features(1))


@pytest.mark.parametrize(
    "wrong",
    [{"ridge": -1}, {"shared": 1.5}, {"ridge": float("nan")}, {"fit_steps": 101}, {"shared": "all"}, {"rigde": 1}],
)
def test_settings_that_cannot_be_used_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SparcConfig(streams={"a": {"hidden_size": 2}}, imputation=wrong)
