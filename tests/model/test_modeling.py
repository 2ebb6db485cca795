"""The model's contracts, over selections and stream counts."""

import inspect

import pytest
import torch
from conftest import random_features, tiny_model
from transformers import AutoModel

import sparc_hf.model.modeling_sparc as modeling
from sparc_hf import SparcConfig, SparcModel

EVERY_FORM = [(streams, selection) for streams in (1, 2, 3, 5) for selection in ("global", "local")]


@pytest.fixture(params=EVERY_FORM, ids=lambda form: f"{form[0]}-{form[1]}")
def model(request) -> SparcModel:
    streams, selection = request.param
    return tiny_model(streams, selection=selection)


def test_state_dict_names_and_shapes(model):
    expected = {}
    for name, width in model.config.hidden_sizes.items():
        expected |= {
            f"encoders.{name}.weight": (64, width),
            f"encoders.{name}.bias": (64,),
            f"atoms.{name}": (64, width),
            f"pre_bias.{name}": (width,),
            f"steps_since_fired.{name}": (64,),
        }
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert all(model.state_dict()[key].dtype == torch.int64 for key in expected if key.startswith("steps_since"))


def test_codes_are_the_masked_dense_codes(model):
    features = random_features(model)
    dense = {
        name: (rows - model.pre_bias[name]) @ model.encoders[name].weight.T + model.encoders[name].bias
        for name, rows in features.items()
    }
    codes = model.encode(features)
    for name, code in codes.items():
        ranked = sum(dense.values()) if model.config.selection == "global" else dense[name]
        chosen = torch.zeros_like(ranked).scatter(1, ranked.topk(8).indices, 1.0)
        torch.testing.assert_close(code.to_dense(), dense[name].relu() * chosen)
        assert code.indices.shape == code.values.shape == (6, 8)
        assert code.indices.dtype == torch.int64
        assert len(code) == 6


def test_losses_are_the_formula(model):
    features = random_features(model)
    out = model(features)
    names = list(features)

    def nmse(a, x):
        return ((a - x).pow(2).mean(1) / x.pow(2).mean(1)).mean()

    for source in names:
        for target in names:
            decoded = out.codes[source].to_dense() @ model.atoms[target] + model.pre_bias[target]
            torch.testing.assert_close(out.reconstructions[target][source], decoded)
            torch.testing.assert_close(model.decode(out.codes[source], to=target), decoded)
            key = f"self/{source}" if source == target else f"cross/{target}<-{source}"
            torch.testing.assert_close(out.losses[key], nmse(decoded, features[target]))
    own = sum(out.losses[f"self/{name}"] for name in names) / len(names)
    crossed = [value for key, value in out.losses.items() if key.startswith("cross/")]
    assert len(crossed) == len(names) * (len(names) - 1)
    cross = sum(crossed) / max(len(crossed), 1)
    torch.testing.assert_close(out.loss, own + cross + 0 * out.losses["auxk"])


def test_save_load_save_gives_identical_bytes(model, tmp_path):
    model.save_pretrained(tmp_path / "one")
    for loaded in (SparcModel.from_pretrained(tmp_path / "one"), AutoModel.from_pretrained(tmp_path / "one")):
        assert type(loaded) is SparcModel
        assert not loaded.training
        loaded.save_pretrained(tmp_path / "two")
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        features = random_features(model)
        assert torch.equal(loaded(features).loss, model(features).loss)


def test_evaluation_changes_nothing(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    model(random_features(model))
    model.encode(random_features(model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())


def test_training_counts_steps_since_a_latent_fired(model):
    model.train()
    expected = {name: torch.zeros(64, dtype=torch.int64) for name in model.config.stream_names}
    for step in range(8):
        out = model(random_features(model, seed=step))
        for name, code in out.codes.items():
            fired = (code.to_dense() > model.config.dead_threshold).any(dim=0)
            expected[name] = torch.where(fired, 1, expected[name] + 1)
            assert torch.equal(getattr(model.steps_since_fired, name), expected[name])
            assert torch.equal(model.dead_latents(name), expected[name] > 5)
    assert any(model.dead_latents(name).any() for name in expected)


def test_a_micro_batch_notes_what_fired_without_counting():
    model = tiny_model(1).train()
    model(random_features(model, seed=1))
    model(random_features(model, seed=2), new_step=True)
    silent = model.steps_since_fired.dino == 2
    out = model(random_features(model, seed=3), new_step=False)
    fired = (out.codes["dino"].to_dense() > 1e-3).any(dim=0)
    assert torch.equal(model.steps_since_fired.dino, torch.where(fired | ~silent, 1, 2))


def test_any_subset_of_streams_encodes_alone(model):
    features = random_features(model)
    for name in features:
        alone = model.encode({name: features[name]})
        assert list(alone) == [name]
        local = model.encode(features, selection="local")[name]
        torch.testing.assert_close(alone[name].to_dense(), local.to_dense())


def test_auxiliary_term_uses_dead_latents_only():
    model = tiny_model(2).train()
    features = random_features(model)
    assert model(features).losses["auxk"] == 0
    dead = torch.arange(10)
    model.steps_since_fired.dino[dead] = 100
    model.zero_grad()
    output = model(features)
    still_dead = model.dead_latents("dino")
    assert still_dead.sum() > 0
    assert output.losses["auxk/dino"] > 0
    assert output.losses["auxk/clip_img"] == 0
    torch.testing.assert_close(output.losses["auxk"], output.losses["auxk/dino"] / 2)
    output.losses["auxk/dino"].backward()
    touched = model.atoms["dino"].grad.abs().sum(dim=1) > 0
    assert touched.any()
    assert not touched[~still_dead].any()


def test_reinitialisation_touches_dead_latents_only_and_is_seeded():
    results = []
    for _ in range(2):
        model = tiny_model(2)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.steps_since_fired.dino[:3] = 6
        counts = model.reinitialize_dead_latents(torch.Generator().manual_seed(4))
        assert {name: int(count) for name, count in counts.items()} == {"dino": 3, "clip_img": 0}
        assert torch.equal(model.encoders["dino"].weight[3:], before["encoders.dino.weight"][3:])
        assert torch.equal(model.atoms["dino"], before["atoms.dino"])
        assert model.encoders["dino"].bias[:3].abs().sum() == 0
        assert model.steps_since_fired.dino[:3].sum() == 0
        results.append(model.encoders["dino"].weight[:3].detach().clone())
    assert torch.equal(*results)
    assert 0.005 < results[0].std() < 0.02


def test_standardised_and_l2_streams_repeat_the_normalisation(tmp_path):
    mean, std = [0.5] * 4, [2.0] * 4
    config = SparcConfig(
        streams={
            "patches": {"hidden_size": 4, "normalize": "standardize", "mean": mean, "std": std},
            "clip": {"hidden_size": 3, "normalize": "l2"},
        },
        num_latents=16,
        k=4,
        auxk=4,
    )
    SparcModel(config).save_pretrained(tmp_path)
    model = SparcModel.from_pretrained(tmp_path)
    features = {"patches": torch.randn(5, 4), "clip": torch.randn(5, 3)}
    rows = model.normalize(features)
    torch.testing.assert_close(rows["patches"], (features["patches"] - 0.5) / (2.0 + 1e-5))
    torch.testing.assert_close(rows["clip"].norm(dim=1), torch.ones(5))
    scaled = model.encode({"clip": 100 * features["clip"]})["clip"]
    torch.testing.assert_close(scaled.values, model.encode({"clip": features["clip"]})["clip"].values)


def test_nothing_keeps_the_preactivations_for_backward():
    # 4 rows of 4096 latents: anything N wide that autograd kept would have 16384 elements.
    model = tiny_model(2, num_latents=4096).train()
    model.steps_since_fired.dino[:100] = 100
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        model(random_features(model, rows=4)).loss.backward()
    assert kept
    assert not [shape for shape in kept if shape[:1] == (4,) and shape[-1] == 4096]


@pytest.mark.parametrize("selection", ["global", "local"])
@pytest.mark.parametrize("budget_rows", [1, 4])
def test_blocks_of_rows_change_nothing(selection, budget_rows):
    """A budget of a few rows against one that holds the whole batch: the same codes, losses and gradients."""
    whole, blocked = (tiny_model(3, selection=selection).train() for _ in range(2))
    blocked.max_preactivation_mb = budget_rows * 4 * 64 * 4 / 2**20
    for model in (whole, blocked):
        model.steps_since_fired.dino[:20] = 100
    outputs = [model(random_features(whole, rows=10)) for model in (whole, blocked)]
    for name, code in outputs[0].codes.items():
        assert torch.equal(code.indices, outputs[1].codes[name].indices)
        assert outputs[1].codes[name].indices.shape == (10, 8)
    for output in outputs:
        output.loss.backward()
    assert outputs[0].losses["auxk/dino"] > 0
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    for one, other in zip(whole.parameters(), blocked.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_codes_slice_move_and_convert():
    model = tiny_model(1)
    with torch.no_grad():
        code = model.encode(random_features(model))["dino"]
    before = code.values.clone()
    sparse = code.to_scipy()
    assert sparse.shape == (6, 64)
    torch.testing.assert_close(torch.from_numpy(sparse.toarray()), code.to_dense())
    assert torch.equal(code.values, before)
    assert sparse.nnz == int((code.values > 0).sum())
    assert torch.equal(code[2:4].indices, code.indices[2:4])
    assert len(code[-1]) == 1
    assert code.to(torch.float16).values.dtype == torch.float16
    assert code.to(torch.float16).indices.dtype == torch.int64


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: f | {"siglip": f["dino"]}, ["siglip", "dino", "clip_img"]),
        (lambda f: {}, ["at least one"]),
        (lambda f: f | {"dino": f["dino"][:, :20]}, ["dino", "24", "20"]),
        (lambda f: f | {"dino": f["dino"][0]}, ["dino", "24"]),
        (lambda f: f | {"dino": f["dino"].tolist()}, ["dino", "list"]),
        (lambda f: f | {"dino": f["dino"][:0], "clip_img": f["clip_img"][:0]}, ["dino", "empty batch", "0"]),
        (lambda f: f | {"dino": f["dino"][:3]}, ["'dino': 3", "'clip_img': 6"]),
        (lambda f: f | {"dino": f["dino"].index_fill(0, torch.tensor([4]), float("nan"))}, ["row 4", "dino", "NaN"]),
        (lambda f: f | {"dino": f["dino"].index_fill(0, torch.tensor([2]), float("inf"))}, ["row 2", "infinite"]),
    ],
)
def test_bad_features_are_value_errors_that_name_the_stream(spoil, words):
    model = tiny_model(2)
    features = spoil(random_features(model))
    for call in (model, model.encode):
        with pytest.raises(ValueError) as error:  # noqa: PT011 the words are checked below
            call(features)
        for word in words:
            assert word in str(error.value)


def test_training_needs_every_stream():
    model = tiny_model(2)
    features = {"dino": random_features(model)["dino"]}
    assert set(model(features).losses) == {"self", "cross", "auxk", "self/dino", "auxk/dino"}
    with pytest.raises(ValueError, match=r"needs every stream.*clip_img"):
        model.train()(features)


def test_wrong_calls_are_value_errors():
    model = tiny_model(2)
    features = random_features(model)
    codes = model.encode(features)["dino"]
    with pytest.raises(ValueError, match="no stream `vit`"):
        model.decode(codes, to="vit")
    with pytest.raises(ValueError, match="no stream `vit`"):
        model.dead_latents("vit")
    with pytest.raises(ValueError, match="'both'"):
        model.encode(features, selection="both")
    with pytest.raises(ValueError, match="32 latents but the model has 64"):
        model.decode(type(codes)(codes.indices % 32, codes.values, 32), to="dino")
    with pytest.raises(ValueError, match="at least one stream"):
        SparcModel(SparcConfig())
    with pytest.raises(ValueError, match=r"no folder `/no/such/model`"):
        SparcModel.from_pretrained("/no/such/model")


def test_functions_stay_short():
    for _, function in inspect.getmembers(SparcModel, inspect.isfunction):
        if function.__module__ == modeling.__name__:
            assert len(inspect.getsource(function).splitlines()) <= 75
