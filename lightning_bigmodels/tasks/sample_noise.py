"""Random numbers that belong to examples, not to processes: the same on any device and any number of processes."""

import math

import torch
from torch import Tensor

EVALUATION = -1
"""The epoch of numbers that are the same in each evaluation, sample grid and prediction."""

# SplitMix64's, as signed numbers of 64 bits
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_SHIFTS = (30, 27, 31)


class SampleNoise:
    """A stream of random numbers for each example of a batch, fixed by (seed, epoch, index).

    A loss whose noise comes from here is the same on one process and on many, and in a run that was broken off and
    resumed. Each call goes on in the streams. The numbers are made by tensor operations from a counter, so that a whole
    batch costs a few passes over it, on any device.

    Args:
        indices: (B,) int64 places of the examples in their part; where they lie, the numbers are made.
        seed: Chooses the noise of a run.
        epoch: Training draws anew in each; `EVALUATION` always draws the same.

    Source:
        Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", SplitMix64; Box and Muller 1958.
        Numbers have 24 random bits, so a normal one stays below 5.8.
    """

    def __init__(self, indices: Tensor, seed: int, epoch: int = EVALUATION) -> None:
        keys = torch.zeros_like(indices)
        for part in (seed, epoch, indices):
            keys = _mix(keys + part + _GOLDEN)
        self._keys = keys
        self._num_drawn = 0

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self._keys.device

    def normal(self, *shape: int) -> Tensor:
        """Return (B, *shape) float32 of mean 0 and variance 1."""
        size = math.prod(shape)
        bits = self._bits((size + 1) // 2)
        radius = ((bits >> 40) & 0xFFFFFF).float().add_(1).mul_(2**-24).log_().mul_(-2).sqrt_()
        angle = ((bits >> 16) & 0xFFFFFF).float().mul_(2 * math.pi * 2**-24)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pairs[:, :size].reshape(-1, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Return (B, *shape) float32, from 0 to below 1."""
        bits = self._bits(math.prod(shape))
        return ((bits >> 40) & 0xFFFFFF).float().mul_(2**-24).reshape(-1, *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return (B, *shape) int64, from 0 to below `high`."""
        bits = self._bits(math.prod(shape))
        return ((bits >> 31) & 0xFFFFFFFF).remainder_(high).reshape(-1, *shape)

    def _bits(self, count: int) -> Tensor:
        """Return (B, count) int64, the next ones of each stream."""
        places = torch.arange(self._num_drawn + 1, self._num_drawn + count + 1, device=self._keys.device)
        self._num_drawn += count
        return _mix(self._keys[:, None] + places * _GOLDEN)


def _mix(x: Tensor) -> Tensor:
    """Return int64 whose every bit depends on every bit of `x`; products wrap around."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        x = (x ^ _shifted(x, shift)).mul_(multiplier)
    return x ^ _shifted(x, _SHIFTS[-1])


def _shifted(x: Tensor, by: int) -> Tensor:
    """Return `x` as an unsigned number, shifted to the right."""
    return (x >> by).bitwise_and_(2 ** (64 - by) - 1)
