"""A codebook: vectors rounded to the nearest of a learned set, which follows the vectors by moving averages.

Legend: B pictures, D values of a vector, h rows and w columns of a map of vectors; K codes; N vectors.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override


class Rounded(NamedTuple):
    """Vectors (B, D, h, w) of the codebook, through which gradients pass unchanged, and their places (B, h, w)."""

    vectors: Tensor
    chosen: Tensor


class Usage(NamedTuple):
    """What some vectors say about the codebook; usages of several processes add up.

    Attributes:
        counts: (K,), how many vectors chose each code.
        sums: (K, D), the sums of these.
    """

    counts: Tensor
    sums: Tensor


class VectorQuantizer(nn.Module):
    """Rounds each vector of a map to the nearest of K codes.

    A code is the moving average of the vectors that chose it. One that hardly any choose is put on a vector of the
    present batch; a new codebook is made of vectors of the first batch.

    Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", section 3.1 (straight-through
    gradients) and appendix A.1, equations 6 to 8 (moving averages); restarts as in Dhariwal et al. 2020, "Jukebox",
    section 3.1.

    Args:
        num_codes: K.
        dim: D.
        decay: What remains of the averages at each update.
        restart_below: Share of the mean use of a code under which it is put elsewhere.
    """

    codes: Tensor
    usage: Tensor
    sums: Tensor
    num_updates: Tensor

    def __init__(self, num_codes: int, dim: int, decay: float = 0.99, restart_below: float = 0.03) -> None:
        super().__init__()
        self.decay = decay
        self.restart_below = restart_below
        # buffers and no parameters: no gradient ever moves them
        self.register_buffer("codes", torch.randn(num_codes, dim))
        self.register_buffer("usage", torch.zeros(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, dim))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @override
    def forward(self, vectors: Tensor) -> Rounded:
        """Round vectors (B, D, h, w)."""
        rows = vectors.detach().permute(0, 2, 3, 1).float()  # (B, h, w, D)
        # the nearest code is no place for 8 bits of mantissa; meta, where shapes alone count, has no autocast
        device = "cpu" if rows.is_meta else rows.device.type
        with torch.autocast(device, enabled=False):
            # |v - e|^2 without |v|^2, which is the same for all codes
            distances = self.codes.square().sum(1) - 2 * rows @ self.codes.T  # (B, h, w, K)
        chosen = distances.argmin(-1)
        nearest = self.vectors_of(chosen)
        return Rounded(vectors + (nearest - vectors).detach(), chosen)

    def vectors_of(self, chosen: Tensor) -> Tensor:
        """Return (B, D, h, w) of places (B, h, w) in the codebook."""
        return self.codes[chosen].permute(0, 3, 1, 2)

    @torch.no_grad()
    def count(self, vectors: Tensor, chosen: Tensor, counted: Tensor) -> Usage:
        """Return what a batch says about the codebook.

        Args:
            vectors: (B, D, h, w), not rounded.
            chosen: (B, h, w).
            counted: (B,) float32, 1, or 0 for pictures that count for nothing.
        """
        rows = vectors.permute(0, 2, 3, 1).flatten(0, 2).float()  # (N, D)
        weights = counted.view(-1, 1, 1).expand(chosen.shape).flatten()  # (N,)
        places = chosen.flatten()
        counts = torch.zeros_like(self.usage).index_add_(0, places, weights)
        return Usage(counts, torch.zeros_like(self.sums).index_add_(0, places, rows * weights[:, None]))

    @torch.no_grad()
    def candidates(self, vectors: Tensor, keys: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors on which codes may be put: those of the least keys.

        Args:
            vectors: (B, D, h, w), not rounded.
            keys: (B, h, w) random numbers that belong to the vectors.
            counted: (B,) float32, 1, or 0 for pictures that count for nothing.

        Returns:
            (n,) keys, infinite for what does not count, and (n, D) vectors; n is at most K.
        """
        rows = vectors.permute(0, 2, 3, 1).flatten(0, 2).float()
        keys = keys.masked_fill(counted.view(-1, 1, 1) == 0, torch.inf).flatten()
        least = keys.topk(min(len(keys), len(self.codes)), largest=False)
        return least.values, rows[least.indices]

    @torch.no_grad()
    def update(self, usage: Usage, keys: Tensor, vectors: Tensor) -> None:
        """Move the codes.

        Args:
            usage: Of all pictures of a step.
            keys: (n,) keys of the candidates, of all processes.
            vectors: (n, D) candidates.
        """
        # at first the vectors move faster than a long average could follow
        new = (9 / (10 + self.num_updates)).clamp(min=1 - self.decay)
        self.num_updates += 1
        self.usage.lerp_(usage.counts, new)
        self.sums.lerp_(usage.sums, new)
        mean = self.usage.mean()
        dead = self.usage <= self.restart_below * mean
        # no branch on what the data are: a step has the same operations whether a code is dead or not
        order = keys.argsort(stable=True)
        rank = (dead.cumsum(0) - 1).clamp(min=0, max=len(keys) - 1)
        dead = dead & (dead.cumsum(0) <= keys.isfinite().sum())
        fresh = vectors[order][rank]
        # what the averages would hold if the batch's vectors were spread evenly, so that it is not dead at once again
        share = usage.counts.sum() / len(self.codes)
        self.usage.copy_(torch.where(dead, share, self.usage))
        self.sums.copy_(torch.where(dead[:, None], share * fresh, self.sums))
        alive = self.usage[:, None] > 0
        means = self.sums / self.usage[:, None].clamp(min=torch.finfo(torch.float32).tiny)
        self.codes.copy_(torch.where(alive, means, self.codes))
