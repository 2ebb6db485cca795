"""What a SparcModel returns: sparse codes, losses and reconstructions."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class SparseCodes:
    """Codes of a batch in one stream: k latents a row and their values, never N wide.

    Attributes:
        indices: int64 [batch, k], the selected latents.
        values: [batch, k], non-negative; 0 where a selected pre-activation was negative.
        num_latents: N.
    """

    indices: Tensor
    values: Tensor
    num_latents: int

    def __len__(self) -> int:
        return self.indices.shape[0]

    def __getitem__(self, rows: Any) -> "SparseCodes":
        """Return the codes of some rows, chosen by a slice, a mask or a tensor of row numbers."""
        rows = slice(rows, rows + 1 or None) if isinstance(rows, int) else rows
        return SparseCodes(self.indices[rows], self.values[rows], self.num_latents)

    def to(self, *args: Any, **kwargs: Any) -> "SparseCodes":
        """Move to a device or dtype; the indices stay int64."""
        values = self.values.to(*args, **kwargs)
        return SparseCodes(self.indices.to(values.device), values, self.num_latents)

    def to_dense(self) -> Tensor:
        """Return [batch, N] with the values in place and 0 elsewhere."""
        dense = self.values.new_zeros(len(self), self.num_latents)
        return dense.scatter(1, self.indices, self.values)

    def to_scipy(self) -> Any:
        """Return a scipy CSR array [batch, N] of the positive values, on the CPU and without gradient."""
        try:
            from scipy.sparse import csr_array
        except ImportError as error:
            raise ImportError("SparseCodes.to_scipy needs scipy: `pip install scipy`") from error
        batch, k = self.indices.shape
        values = self.values.detach().cpu().float().numpy().reshape(-1)
        latents = self.indices.cpu().numpy().reshape(-1)
        starts = range(0, batch * k + 1, k)
        # Copied, because the arrays share the tensors' memory and the clean-up below works in place.
        csr = csr_array((values, latents, starts), shape=(batch, self.num_latents), copy=True)
        csr.eliminate_zeros()
        csr.sort_indices()
        return csr


@dataclass
class SparcOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: scalar.
        losses: name -> scalar: "self", "cross", "auxk" and one entry per stream and pair ("self/dino",
            "cross/clip_img<-dino", "auxk/dino").
        codes: stream -> SparseCodes.
        reconstructions: target -> source -> [batch, hidden_size of the target], of normalised rows and outside the
            graph; None while training, which needs only their errors (`SparcModel.decode` gives any of them).
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    codes: dict[str, SparseCodes] | None = None
    reconstructions: dict[str, dict[str, Tensor]] | None = None
