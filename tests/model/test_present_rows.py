"""Losses of rows that lack streams, and of rows of which one stream is given alone."""

import itertools
import math

import pytest
import torch
from conftest import planted_features, tiny_model

from sparc_hf import SparcModel
from sparc_hf.model.present_rows import AloneRows, PresentRows
from sparc_hf.training.imputation import add_statistics

ROWS = 24


def imputing_model(**settings) -> SparcModel:
    model = tiny_model(3, **settings)
    add_statistics(model, planted_features(600))
    return model


def planted_rows() -> dict[str, torch.Tensor]:
    features = planted_features(700)
    return {name: torch.from_numpy(features.array(name, slice(600, 600 + ROWS))) for name in features.stream_names}


def drawn_masks(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two streams that rows lack at random, never both; the third is everywhere, and not named."""
    draws = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed))
    return {"dino": draws > 0.3, "clip_txt": draws < 0.8}


def without(rows: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], filler: float) -> dict[str, torch.Tensor]:
    return {name: x.where(masks[name].unsqueeze(1), filler) if name in masks else x for name, x in rows.items()}


def nmse(guess: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (guess - x).square().sum(dim=1) / x.square().sum(dim=1)


@pytest.mark.parametrize("selection", ["global", "local"])
def test_every_term_is_the_mean_over_the_rows_that_have_both_its_streams(selection):
    model, rows, masks = imputing_model(selection=selection).eval(), planted_rows(), drawn_masks()
    output = model(without(rows, masks, math.nan), present=PresentRows(masks))
    normalized = model.normalize(rows)
    for source, target in itertools.product(rows, rows):
        both = masks.get(source, torch.ones(ROWS).bool()) & masks.get(target, torch.ones(ROWS).bool())
        assert both.sum() > 0
        errors = nmse(output.reconstructions[target][source][both], normalized[target][both])
        term = f"self/{target}" if source == target else f"cross/{target}<-{source}"
        assert output.losses[term].item() == pytest.approx(errors.mean().item(), rel=1e-5)
    kinds = {kind: [v for k, v in output.losses.items() if k.startswith(f"{kind}/")] for kind in ("self", "cross")}
    total = sum(torch.stack(terms).mean() for terms in kinds.values())
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_a_row_selects_by_its_imputed_streams():
    model, rows, masks = imputing_model(), planted_rows(), drawn_masks()
    codes = model(without(rows, masks, math.nan), present=PresentRows(masks)).codes
    for row in range(ROWS):
        given = {name: x[row : row + 1] for name, x in rows.items() if name not in masks or masks[name][row]}
        complete = model.impute(given)
        summed = sum(model.encoders[name](complete[name] - model.pre_bias[name]) for name in model.config.stream_names)
        assert set(codes["dino"].indices[row].tolist()) == set(summed.topk(model.config.k).indices[0].tolist())


def test_what_stands_in_place_of_a_missing_stream_changes_nothing(step_kernel):
    gradients = []
    for filler in (math.nan, 0.0, 1e6):
        model, masks = imputing_model().train(), drawn_masks()
        output = model(without(planted_rows(), masks, filler), present=PresentRows(masks))
        output.loss.backward()
        gradients.append([output.loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for values in zip(*gradients, strict=True):
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2])


def test_complete_rows_are_measured_as_without_masks():
    rows = planted_rows()
    plain, masked = imputing_model().eval(), imputing_model().eval()
    masks = {name: torch.ones(ROWS, dtype=torch.bool) for name in rows}
    expected, output = plain(rows), masked(rows, present=PresentRows(masks))
    for name, value in expected.losses.items():
        torch.testing.assert_close(output.losses[name], value, msg=name)


@pytest.mark.parametrize("cuts", [[0, 12, 24], [0, 1, 9, 24]])
def test_gradients_of_parts_add_up_where_rows_lack_streams(step_kernel, cuts):
    """Parts with no row that has some stream among them, too; with dead latents and streams given alone."""
    masks = {"dino": torch.arange(ROWS) >= 12, "clip_txt": torch.arange(ROWS) != 0}
    rows = without(planted_rows(), masks, math.nan)
    shares = {
        (one, other): (masks.get(one, torch.ones(ROWS).bool()) & masks.get(other, torch.ones(ROWS).bool()))
        .float()
        .mean()
        .item()
        for one, other in itertools.product(rows, rows)
    }
    alone = {"clip_img": torch.arange(0, ROWS, 2), "clip_txt": torch.arange(1, ROWS, 2)}
    models = [imputing_model().train() for _ in range(2)]
    for model in models:
        for name in model.config.stream_names:
            getattr(model.steps_since_fired, name)[::2] = model.config.dead_after_steps
    whole, accumulated = models
    expected = whole(rows, present=PresentRows(masks, shares), alone=AloneRows(alone, 1.0, 0.7))
    expected.loss.backward()

    parts, presents, alones = [], [], []
    for start, stop in itertools.pairwise(cuts):
        parts.append({name: x[start:stop] for name, x in rows.items()})
        presents.append(PresentRows({name: mask[start:stop] for name, mask in masks.items()}, shares))
        numbers = {name: at[(at >= start) & (at < stop)] - start for name, at in alone.items()}
        alones.append(AloneRows({name: at for name, at in numbers.items() if len(at)}, 1.0, 0.7))
    selected = accumulated.begin_step(parts, present=presents)
    total = 0.0
    for part, present, given, chosen in zip(parts, presents, alones, selected, strict=True):
        output = accumulated(part, selected=chosen, present=present, alone=given)
        share = len(part["dino"]) / ROWS
        (output.loss * share).backward()
        total += output.loss.item() * share
    assert total == pytest.approx(expected.loss.item(), rel=1e-5)
    for (name, mine), theirs in zip(accumulated.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_the_error_of_streams_alone_against_dense_arithmetic():
    """Two rows of `dino` alone, one of `clip_txt` alone; the first lacks `clip_txt`."""
    model, rows = imputing_model(cross_coef=0.5).eval(), planted_rows()
    masks = {"clip_txt": torch.arange(ROWS) != 3}
    alone = AloneRows({"dino": torch.tensor([3, 5]), "clip_txt": torch.tensor([7])}, share=3 / ROWS, weight=0.25)
    output = model(rows, present=PresentRows(masks), alone=alone)
    without_them = model(rows, present=PresentRows(masks))
    errors = []
    for row, given, targets in [
        (3, "dino", ["dino", "clip_img"]),
        (5, "dino", ["dino", "clip_img", "clip_txt"]),
        (7, "clip_txt", ["dino", "clip_img", "clip_txt"]),
    ]:
        x = {name: value[row : row + 1] for name, value in model.normalize(rows).items()}
        seen = {**model.imputation.complete({given: x[given]}), **model.imputation.shared_rows({given: x[given]})}
        each = torch.stack(
            [model.encoders[name](seen[name] - model.pre_bias[name])[0] for name in model.config.stream_names]
        )
        latents = each.sum(dim=0).topk(model.config.k).indices
        values = each.mean(dim=0)[latents].relu()
        for target in targets:
            guess = values @ model.atoms[target][latents] + model.pre_bias[target]
            weight = 1.0 if target == given else 0.5 / (len(targets) - 1)
            errors.append(weight * nmse(guess.unsqueeze(0), x[target]).item())
    assert output.losses["alone"].item() == pytest.approx(sum(errors) / 3, rel=1e-4)
    assert output.loss.item() == pytest.approx(without_them.loss.item() + 0.25 * output.losses["alone"].item())


def test_a_latent_fires_in_the_rows_that_have_its_stream():
    rows, masks = planted_rows(), {"clip_txt": torch.arange(ROWS) == 0}
    for begun in (False, True):
        model = imputing_model().train()
        for name in model.config.stream_names:
            getattr(model.steps_since_fired, name).fill_(50)
        if begun:
            model.begin_step([rows], present=[PresentRows(masks)])
        else:
            model(rows, present=PresentRows(masks))
        fired = {name: getattr(model.steps_since_fired, name) == 1 for name in model.config.stream_names}
        codes = model.eval()(rows, present=PresentRows(masks)).codes
        assert set(fired["clip_txt"].nonzero().flatten().tolist()) == set(
            codes["clip_txt"].indices[0][codes["clip_txt"].values[0] > model.config.dead_threshold].tolist()
        )
        assert fired["dino"].sum() > fired["clip_txt"].sum()


def test_a_pair_that_no_row_has_is_left_out():
    model, rows = imputing_model().eval(), planted_rows()
    is_first = torch.arange(ROWS) < 12
    masks = {"dino": is_first, "clip_img": is_first, "clip_txt": ~is_first}
    shares = {
        (one, other): (masks[one] & masks[other]).float().mean().item() for one, other in itertools.product(rows, rows)
    }
    losses = model(rows, present=PresentRows(masks, shares)).losses
    crosses = {name: term.item() for name, term in losses.items() if name.startswith("cross/")}
    assert set(crosses) == {"cross/dino<-clip_img", "cross/clip_img<-dino"}
    assert losses["cross"].item() == pytest.approx(sum(crosses.values()) / 2)


def test_as_many_masks_as_micro_batches():
    model, rows = imputing_model().train(), planted_rows()
    with pytest.raises(ValueError, match="shorter"):
        model.begin_step([rows, rows], present=[None])


def test_rows_that_cannot_be_used_are_refused():
    model, rows, masks = imputing_model(), planted_rows(), drawn_masks()
    everywhere_but_5 = torch.arange(ROWS) != 5
    with pytest.raises(ValueError, match="row 5 has none of the streams"):
        model(rows, present=PresentRows(dict.fromkeys(rows, everywhere_but_5)))
    with pytest.raises(ValueError, match=r"mask of stream `dino` must be bool \[24\]"):
        model(rows, present=PresentRows({"dino": masks["dino"][:3]}))
    with pytest.raises(ValueError, match=r"`present` names \['dinosaur'\]"):
        model(rows, present=PresentRows({"dinosaur": masks["dino"]}))
    broken = dict(rows, dino=rows["dino"].clone())
    broken["dino"][1, 2] = math.nan
    with pytest.raises(ValueError, match="row 1 of stream `dino` holds NaN"):
        model(broken, present=PresentRows({"dino": torch.arange(ROWS) != 0}))
    for plain in (tiny_model(3), tiny_model(3, objective="usae", selection="local")):
        with pytest.raises(ValueError, match="no statistics of its streams"):
            plain(rows, present=PresentRows(masks))
