"""The plain form of a SPARC step: dense codes, dense decodes of all pairs, plain autograd, plain Adam.

It is what `bench_step.py` measures against; its losses and gradients equal the model's (tests/test_dense_baseline.py).
"""

import torch
from torch import Tensor, nn

from sparc_hf import SparcConfig


class DenseSparc(nn.Module):
    """SPARC with every array N wide. Parameters have the names and shapes of SparcModel's, so states are exchangeable.

    Args:
        config: sizes and settings; rows are taken as already normalised.
    """

    def __init__(self, config: SparcConfig):
        super().__init__()
        self.config = config
        sizes = config.hidden_sizes
        self.encoders = nn.ModuleDict({name: nn.Linear(size, config.num_latents) for name, size in sizes.items()})
        self.atoms = nn.ParameterDict(
            [(name, nn.functional.normalize(self.encoders[name].weight.detach())) for name in sizes]
        )
        self.pre_bias = nn.ParameterDict([(name, torch.zeros(size)) for name, size in sizes.items()])
        self.steps_since_fired = nn.Module()
        for name in sizes:
            self.steps_since_fired.register_buffer(name, torch.zeros(config.num_latents, dtype=torch.int64))

    def forward(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss and its terms for normalised rows, stream -> [batch, d]."""
        config = self.config
        dense = {name: self.encoders[name](x - self.pre_bias[name]) for name, x in rows.items()}
        total = torch.stack(list(dense.values())).sum(dim=0)
        codes, terms = {}, {}
        for name, h in dense.items():
            chosen = (total if config.selection == "global" else h).topk(config.k, dim=1).indices
            codes[name] = h.relu() * torch.zeros_like(h).scatter(1, chosen, 1.0)
            fired = (codes[name] > config.dead_threshold).any(dim=0)
            counter = getattr(self.steps_since_fired, name)
            counter.copy_(torch.where(fired, 1, counter + 1))
        decoded = {}
        for target, x in rows.items():
            for source, code in codes.items():
                decoded[target, source] = code @ self.atoms[target] + self.pre_bias[target]
                key = f"self/{target}" if source == target else f"cross/{target}<-{source}"
                terms[key] = self._nmse(decoded[target, source], x)
        for name, x in rows.items():
            dead = getattr(self.steps_since_fired, name) > config.dead_after_steps
            terms[f"auxk/{name}"] = x.new_zeros(())
            if dead.any():
                masked = torch.where(dead, dense[name], -torch.inf)
                top = masked.topk(config.auxk, dim=1)
                values = top.values.clamp(min=0)
                code = torch.zeros_like(masked).scatter(1, top.indices, values)
                residual = (x - decoded[name, name] + self.pre_bias[name]).detach()
                terms[f"auxk/{name}"] = self._nmse(code @ self.atoms[name] + self.pre_bias[name], residual)

        def mean(kind: str) -> Tensor:
            values = [value for key, value in terms.items() if key.startswith(kind)]
            return torch.stack(values).mean() if values else next(iter(rows.values())).new_zeros(())

        loss = mean("self/") + config.cross_coef * mean("cross/") + config.auxk_coef * mean("auxk/")
        return {"loss": loss, **terms}

    def prepare_atoms_for_step(self) -> None:
        """Unit norm, then the gradients without their part along the atom."""
        with torch.no_grad():
            for atoms in self.atoms.values():
                atoms.data = atoms.data / (atoms.data.norm(dim=1, keepdim=True) + 1e-8)
                if atoms.grad is not None:
                    atoms.grad -= (atoms.grad * atoms).sum(dim=1, keepdim=True) * atoms

    @staticmethod
    def _nmse(a: Tensor, x: Tensor) -> Tensor:
        return ((a - x).pow(2).mean(dim=1) / x.pow(2).mean(dim=1)).mean()
