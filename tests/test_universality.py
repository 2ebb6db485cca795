"""Energies of latents: one definition, that of what `decode` adds, in the report, the pictures and the Space."""

import numpy as np
import pytest
import torch
from conftest import planted_features, tiny_model

from sparc_hf.codes import encode_features
from sparc_hf.concept_sheets import strongest_latents
from sparc_hf.evaluation import EvaluationSettings, evaluate_model
from sparc_hf.outputs_sparc import SparseCodes
from sparc_hf.space_index import open_index
from sparc_hf.universality import latent_universality

QUICK = EvaluationSettings(replicates=0, probes=False)


def stretched_model(objective: str):
    """A model whose atoms have lengths from 0.1 to 10."""
    usae = {"objective": "usae", "selection": "local"} if objective == "usae" else {}
    model = tiny_model(2, **usae)
    lengths = torch.logspace(-1, 1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        for atoms in model.atoms.values():
            atoms.copy_(torch.nn.functional.normalize(atoms, dim=1) * lengths[:, None])
    return model


@pytest.mark.parametrize("objective", ["sparc", "usae"])
def test_the_energy_of_a_latent_is_the_length_of_what_it_adds_on_average(objective, tmp_path):
    model, features = stretched_model(objective), planted_features(120)
    table = encode_features(model, features, encoding="single")
    expected = np.zeros(64)
    for stream in table.streams:
        mean_codes = torch.from_numpy(table.csr(stream).toarray().mean(axis=0, dtype=np.float64))
        alone = SparseCodes(torch.arange(64)[:, None], mean_codes.float()[:, None], 64)
        added = model.decode(alone, to=stream) - model.pre_bias[stream]
        expected += added.norm(dim=1).detach().numpy()
    figures = latent_universality(model, {stream: table.csr(stream) for stream in table.streams})
    np.testing.assert_allclose(figures["energy"], expected, rtol=1e-4)
    reported = evaluate_model(model, features, QUICK).latents["single"]["energy"]
    np.testing.assert_allclose(reported, expected, rtol=1e-4)
    assert strongest_latents(model, table, 5) == np.argsort(-figures["energy"], kind="stable")[:5].tolist()
    shown = open_index(model, features, tmp_path).statistics["energy/single"]
    np.testing.assert_allclose(shown, expected, rtol=1e-4)
