"""The plain form of a step of Universal Sparse Autoencoders: every array [batch, N], autograd, an AdamW per stream.

It is what `bench_usae_step.py` measures against; its losses and gradients equal the model's
(tests/test_usae_dense_baseline.py).
"""

import torch
from torch import Tensor, nn

from sparc_hf import SparcConfig


class DenseUsae(nn.Module):
    """Universal Sparse Autoencoders with every array N wide. Parameters are named as SparcModel's.

    Args:
        config: sizes and settings; rows are taken as already normalised.
    """

    def __init__(self, config: SparcConfig):
        super().__init__()
        self.config = config
        sizes = config.hidden_sizes
        self.encoders = nn.ModuleDict({name: nn.Linear(size, config.num_latents) for name, size in sizes.items()})
        self.encoder_norm = nn.ModuleDict({name: nn.BatchNorm1d(config.num_latents) for name in sizes})
        self.atoms = nn.ParameterDict([(name, torch.randn(config.num_latents, size)) for name, size in sizes.items()])

    def forward(self, rows: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """Return the loss and its terms for normalised rows, stream -> [batch, d], and the source that is decoded."""
        positive = self.encoder_norm[source](self.encoders[source](rows[source])).relu()
        top = positive.topk(self.config.k, dim=1)
        code = torch.zeros_like(positive).scatter(1, top.indices, top.values)
        left = positive - code
        kept = left.topk(self.config.auxk, dim=1)
        more = torch.zeros_like(left).scatter(1, kept.indices, kept.values)
        terms = {}
        for target, x in rows.items():
            atoms = self.atoms[target] / (self.atoms[target].norm(dim=1, keepdim=True) + 1e-8)
            residual = x - code @ atoms
            main = f"self/{target}" if source == target else f"cross/{target}<-{source}"
            terms[main] = self._distance(residual)
            terms[f"auxk/{target}<-{source}"] = self._distance(residual - more @ atoms)
        weights = [self.config.auxk_coef if name.startswith("auxk") else 1.0 for name in terms]
        loss = torch.stack([weight * term for weight, term in zip(weights, terms.values(), strict=True)]).sum()
        return {"loss": loss, **terms}

    def optimizers(self, lr: float, weight_decay: float) -> dict[str, torch.optim.Optimizer]:
        """Return stream -> AdamW of its parameters."""
        return {
            name: torch.optim.AdamW(self.parameters_of(name), lr=lr, weight_decay=weight_decay) for name in self.atoms
        }

    def parameters_of(self, stream: str) -> list[nn.Parameter]:
        return [value for name, value in self.named_parameters() if name.split(".")[1] == stream]

    def train_step(
        self, rows: dict[str, Tensor], source: str, optimizers: dict[str, torch.optim.Optimizer], max_norm: float
    ) -> dict[str, Tensor]:
        """Make a step as the earlier code: gradients and clipping for all streams, a step for the source only."""
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        terms = self(rows, source)
        terms["loss"].backward()
        for name in optimizers:
            nn.utils.clip_grad_norm_(self.parameters_of(name), max_norm)
        optimizers[source].step()
        return terms

    def _distance(self, residual: Tensor) -> Tensor:
        return residual.abs().mean() if self.config.distance == "l1" else residual.square().mean()
