"""Parity with the earlier SPARC code, from numbers made by running it (see docs/parity.md).

Where a quirk of that code is mended on purpose, the test that compares exactly puts the quirk back, and another shows
both numbers.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.sparse_ops import normalize_rows

WIDTHS = {"dino": 24, "clip_img": 16, "clip_txt": 12}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class LaggingModel(SparcModel):
    """Quirk 7: local models judged deadness by the counters from before the update."""

    def _update_counters(self, micro_batches, new_step):
        self.former = {name: super(LaggingModel, self).dead_latents(name) for name in micro_batches[0]}
        super()._update_counters(micro_batches, new_step)

    def dead_latents(self, stream):
        return self.former[stream] if self.training else super().dead_latents(stream)


class Reference:
    """One kind's golden files, and models set up as they say."""

    def __init__(self, folder, kind: str):
        self.kind = kind
        self.tensors = load_file(folder / f"sparc_{kind}.safetensors")
        self.json = json.loads((folder / f"sparc_{kind}.json").read_text())

    def model(self, cross_coef: float = 1.0, lagging: bool | None = None) -> SparcModel:
        """A model in the state of the file, warmed up by its ten batches."""
        lagging = self.kind == "local" if lagging is None else lagging
        model = blank_model(self.kind, cross_coef, LaggingModel if lagging else SparcModel)
        load_earlier_state(model, self.tensors, "state")
        model.train()
        for batch in range(10):
            model({name: self.tensors[f"warmup.input.{name}"][batch] for name in WIDTHS})
        return model.zero_grad() or model

    def rows(self, batch: str, streams=WIDTHS) -> dict[str, Tensor]:
        return {name: self.tensors[f"{batch}.input.{name}"] for name in streams}


def blank_model(kind: str, cross_coef: float = 1.0, cls: type[SparcModel] = SparcModel) -> SparcModel:
    config = SparcConfig(
        streams={name: {"hidden_size": width} for name, width in WIDTHS.items()},
        num_latents=64,
        k=8,
        auxk=8,
        dead_after_steps=5,
        cross_coef=cross_coef,
        selection=kind,
    )
    return cls(config)


def load_earlier_state(model: SparcModel, tensors: dict[str, Tensor], prefix: str) -> None:
    state = {}
    for name in WIDTHS:
        state[f"encoders.{name}.weight"] = tensors[f"{prefix}.encoders.{name}.weight"]
        state[f"encoders.{name}.bias"] = tensors[f"{prefix}.latent_biases.{name}"]
        state[f"atoms.{name}"] = tensors[f"{prefix}.decoders.{name}.weight"].T
        state[f"pre_bias.{name}"] = tensors[f"{prefix}.pre_biases.{name}"]
        counters = f"{prefix}.stats_last_nonzero_{name}"
        state[f"steps_since_fired.{name}"] = tensors.get(counters, torch.zeros(64, dtype=torch.int64))
    model.load_state_dict(state)


def nmse(reconstruction: Tensor, rows: Tensor) -> Tensor:
    return ((reconstruction - rows).pow(2).mean(dim=1) / rows.pow(2).mean(dim=1)).mean()


def auxiliary_of_nothing(model: SparcModel, rows, out) -> Tensor:
    """Quirk 4: with nothing dead the earlier code still compared the bare pre-bias with the residual."""
    terms = []
    for name, value in rows.items():
        if not model.dead_latents(name).any():
            residual = (value - model.decode(out.codes[name], to=name) + model.pre_bias[name]).detach()
            terms.append(nmse(model.pre_bias[name].expand_as(residual), residual))
    return model.config.auxk_coef * sum(terms) / len(rows) if terms else torch.zeros(())


@pytest.fixture(scope="module", params=["global", "local"])
def reference(request, golden) -> Reference:
    return Reference(golden, request.param)


def test_construction(reference):
    """Atoms start as the encoder rows brought to unit norm; encoder rows as torch's linear layers do."""
    for name, width in WIDTHS.items():
        encoder = reference.tensors[f"ctor.encoders.{name}.weight"]
        expected = encoder / (encoder.norm(dim=1, keepdim=True) + 1e-8)
        torch.testing.assert_close(reference.tensors[f"ctor.decoders.{name}.weight"].T, expected, **CLOSE)
        mine = blank_model(reference.kind)
        assert torch.equal(mine.atoms[name], normalize_rows(mine.encoders[name].weight, "l2"))
        assert mine.encoders[name].weight.abs().max() <= width**-0.5
        assert encoder.abs().max() <= width**-0.5
        assert torch.isclose(mine.encoders[name].weight.std(), encoder.std(), rtol=0.1)


def test_counters_after_every_warmup_batch(reference):
    model = blank_model(reference.kind)
    load_earlier_state(model, reference.tensors, "state")
    model.train()
    for batch in range(10):
        model({name: reference.tensors[f"warmup.input.{name}"][batch] for name in WIDTHS})
        for name in WIDTHS:
            expected = reference.tensors[f"warmup.counters_per_batch.{name}"][batch]
            assert torch.equal(getattr(model.steps_since_fired, name), expected)


@pytest.mark.parametrize("batch", ["unit", "raw"])
@pytest.mark.parametrize("cross_coef", [0.0, 1.0])
def test_forward_losses_and_gradients(reference, batch, cross_coef):
    model = reference.model(cross_coef)
    rows = reference.rows(batch)
    out = model(rows)
    tensors, losses = reference.tensors, reference.json[batch]["losses"][f"cross{cross_coef:.0f}"]
    for name in WIDTHS:
        chosen = tensors[f"{batch}.indices" + ("" if reference.kind == "global" else f".{name}")]
        assert torch.equal(out.codes[name].indices.sort(dim=1).values, chosen.sort(dim=1).values)
        torch.testing.assert_close(out.codes[name].to_dense(), tensors[f"{batch}.codes.{name}"], **CLOSE)
        torch.testing.assert_close(model.decode(out.codes[name], to=name), tensors[f"{batch}.recon.{name}"], **CLOSE)
        assert torch.equal(getattr(model.steps_since_fired, name), tensors[f"{batch}.counters_after.{name}"])
        assert out.losses[f"self/{name}"].item() == pytest.approx(losses[f"mse_loss_{name}"], rel=1e-5)
        assert out.losses[f"auxk/{name}"].item() == pytest.approx(losses[f"auxk_loss_{name}"], rel=1e-5)
        for source in set(WIDTHS) - {name} if cross_coef else ():
            expected = tensors[f"{batch}.cross.{name}_from_{source}"]
            torch.testing.assert_close(model.decode(out.codes[source], to=name), expected, **CLOSE)
            term = losses[f"cross_loss_{name}_from_{source}"]
            assert out.losses[f"cross/{name}<-{source}"].item() == pytest.approx(term, rel=1e-5)
    prefix = f"{batch}.cross{cross_coef:.0f}"
    torch.testing.assert_close(out.loss, tensors[f"{prefix}.total_loss"], **CLOSE)
    out.loss.backward()
    for name in WIDTHS:
        for mine, theirs in (
            (model.encoders[name].weight.grad, tensors[f"{prefix}.grad.encoders.{name}.weight"]),
            (model.encoders[name].bias.grad, tensors[f"{prefix}.grad.latent_biases.{name}"]),
            (model.pre_bias[name].grad, tensors[f"{prefix}.grad.pre_biases.{name}"]),
            (model.atoms[name].grad, tensors[f"{prefix}.grad.decoders.{name}.weight"].T),
        ):
            torch.testing.assert_close(mine, theirs, **CLOSE)


def test_subset_inference(reference):
    model = reference.model().eval()
    subsets = {key.split(".")[1] for key in reference.tensors if key.startswith("subset.")}
    assert subsets == {"dino", "clip_img", "clip_txt", "dino+clip_txt", "clip_img+clip_txt"}
    for subset in subsets:
        names = subset.split("+")
        codes = model.encode(reference.rows("unit", names))
        for name in names:
            expected = reference.tensors[f"subset.{subset}.codes.{name}"]
            torch.testing.assert_close(codes[name].to_dense(), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["global", "local"])
def test_sixty_training_steps(golden, kind):
    """The whole trajectory, with quirks 4 and 7 put back."""
    tensors = load_file(golden / f"sparc_train_{kind}.safetensors")
    batches = load_file(golden / "sparc_train_data.safetensors")
    model = blank_model(kind, cls=LaggingModel if kind == "local" else SparcModel).train()
    load_earlier_state(model, tensors, "init")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for step in range(60):
        rows = {name: batches[f"X.{name}"][step] for name in WIDTHS}
        out = model(rows)
        chosen = [out.codes[name].indices.sort(dim=1).values for name in WIDTHS]
        expected = tensors["topk_sets_sorted"][step].long()
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(chosen, expected, strict=kind == "local"))
        loss = out.loss + auxiliary_of_nothing(model, rows, out)
        torch.testing.assert_close(loss, tensors["total_loss"][step], **CLOSE)
        optimizer.zero_grad()
        loss.backward()
        model.prepare_atoms_for_step()
        optimizer.step()
        if step + 1 in (1, 10, 60):
            _assert_state_equals(model, tensors, {1: "after_step1", 10: "after_step10", 60: "final"}[step + 1])
    for name in WIDTHS:
        mine = optimizer.state[model.atoms[name]]["exp_avg"].T
        torch.testing.assert_close(mine, tensors[f"adam.exp_avg.decoders.{name}.weight"], **CLOSE)


def _assert_state_equals(model: SparcModel, tensors: dict[str, Tensor], prefix: str) -> None:
    for name in WIDTHS:
        for mine, theirs in (
            (model.encoders[name].weight, tensors[f"{prefix}.encoders.{name}.weight"]),
            (model.encoders[name].bias, tensors[f"{prefix}.latent_biases.{name}"]),
            (model.pre_bias[name], tensors[f"{prefix}.pre_biases.{name}"]),
            (model.atoms[name], tensors[f"{prefix}.decoders.{name}.weight"].T),
        ):
            torch.testing.assert_close(mine.detach(), theirs, rtol=1e-5, atol=2e-6)
        assert torch.equal(getattr(model.steps_since_fired, name), tensors[f"{prefix}.stats_last_nonzero_{name}"])


def test_quirk_1_the_reported_self_term(reference):
    """Theirs equals the total; ours is the mean of the self terms."""
    losses = reference.json["unit"]["losses"]["cross1"]
    out = reference.model()(reference.rows("unit"))
    assert losses["avg_mse_loss"] == pytest.approx(losses["total_loss"])
    assert out.losses["self"].item() == pytest.approx(losses["true_mean_of_mse_loss"], rel=1e-5)
    assert abs(out.losses["self"].item() - losses["avg_mse_loss"]) > 0.5


def test_quirk_2_counters_move_in_evaluation(reference):
    """Theirs move in evaluation too; ours stay."""
    assert reference.json["unit"]["eval_mode_moves_counters"]
    model = reference.model().eval()
    before = [counter.clone() for counter in model.steps_since_fired.buffers()]
    model(reference.rows("unit"))
    assert all(torch.equal(*pair) for pair in zip(before, model.steps_since_fired.buffers(), strict=True))
    moved = [reference.tensors[f"unit.counters_after.{name}"] for name in WIDTHS]
    assert not all(torch.equal(*pair) for pair in zip(before, moved, strict=True))


def test_quirk_4_no_auxiliary_term_when_nothing_is_dead(reference):
    """Theirs adds about 1/32 and pushes the pre-biases; ours is zero until something dies."""
    theirs = reference.json["nothing_dead"]
    model = blank_model(reference.kind)
    load_earlier_state(model, reference.tensors, "state")
    rows = reference.rows("unit")
    out = model.train()(rows)
    assert out.losses["auxk"] == 0
    quirky = auxiliary_of_nothing(model, rows, out)
    assert quirky.item() / model.config.auxk_coef == pytest.approx(_find(theirs, "avg_auxk_loss"), rel=1e-5)
    assert (out.loss + quirky).item() == pytest.approx(_find(theirs, "total_loss"), rel=1e-5)
    (out.loss + quirky).backward()
    for name in WIDTHS:
        expected = reference.tensors[f"nothing_dead.grad.pre_biases.{name}"]
        torch.testing.assert_close(model.pre_bias[name].grad, expected, **CLOSE)


def _find(tree: dict, key: str) -> float:
    if key in tree:
        return tree[key]
    return next(_find(value, key) for value in tree.values() if isinstance(value, dict))


def test_quirk_5_an_exactly_reconstructed_row_keeps_the_other_rows_term():
    """0/0 in one row made their auxiliary term NaN, which was dropped without a word; ours counts that row as 0."""
    model = SparcModel(
        SparcConfig(streams={"dino": {"hidden_size": 2}}, num_latents=4, k=1, auxk=1, dead_after_steps=1)
    )
    with torch.no_grad():
        model.atoms["dino"].copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]]))
        model.encoders["dino"].weight.copy_(model.atoms["dino"])
    rows = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    model.steps_since_fired.dino[1] = 9
    out = model({"dino": rows})
    residual = rows - model.decode(out.codes["dino"], to="dino")
    assert residual[0].abs().sum() == 0
    theirs = nmse(torch.zeros_like(residual), residual)
    assert theirs.isnan()
    assert out.losses["auxk"].isfinite()
    assert out.losses["auxk"] > 0


def test_quirk_7_local_models_judge_deadness_after_the_update(golden):
    """Theirs lags by one batch in local models; ours judges both kinds by the counters after the update."""
    local = Reference(golden, "local")
    rows = local.rows("unit")
    expected = local.json["unit"]["losses"]["cross1"]["auxk_loss_dino"]
    lagging = local.model(lagging=True)(rows).losses["auxk/dino"].item()
    mended = local.model(lagging=False)(rows).losses["auxk/dino"].item()
    assert lagging == pytest.approx(expected, rel=1e-5)
    assert abs(mended - expected) > 0.1


def test_quirk_8_the_order_of_streams_is_the_configs(reference):
    """Theirs followed the hash seed; ours gives the same bits however the features dict is ordered."""
    model = reference.model().eval()
    rows = reference.rows("unit")
    backwards = dict(reversed(rows.items()))
    one, other = model(rows), model(backwards)
    assert torch.equal(one.loss, other.loss)
    assert list(one.codes) == list(other.codes) == list(WIDTHS)


def test_quirk_9_an_all_zero_row_is_named(golden):
    """Theirs turns the batch's loss into NaN and skips it; ours names the row."""
    reference = Reference(golden, "global")
    model = reference.model().eval()
    rows = reference.rows("unit")
    rows["clip_img"] = rows["clip_img"].index_fill(0, torch.tensor([5]), 0.0)
    assert nmse(torch.zeros_like(rows["clip_img"]), rows["clip_img"]).isnan()
    with pytest.raises(ValueError, match=r"row 5 of stream `clip_img` holds only zeros"):
        model(rows)
    assert len(model.encode(rows)["clip_img"]) == 32


def test_quirk_10_a_code_always_has_k_selected_latents(golden):
    """Kept: zeros made by the ReLU stay in the code, so k is a count of selections."""
    reference = Reference(golden, "global")
    code = reference.model()(reference.rows("unit")).codes["dino"]
    assert code.indices.shape[1] == reference.json["unit"]["losses"]["cross1"]["num_active_neurons_dino"] == 8
    assert (code.values == 0).any()


def test_row_normalisation(golden):
    tensors = load_file(golden / "sparc_row_normalisation.safetensors")
    torch.testing.assert_close(normalize_rows(tensors["rows"], "l2"), tensors["normalised"], **CLOSE)
