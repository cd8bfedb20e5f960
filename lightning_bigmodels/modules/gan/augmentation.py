"""Differentiable augmentation: the discriminator sees all pictures, real and made, altered at random.

Legend: B pictures, C channels, H rows and W columns.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bigmodels.tasks.sample_noise import SampleNoise

Alteration = Literal["color", "translation", "cutout"]


def alter(pictures: Tensor, names: Sequence[Alteration], noise: SampleNoise) -> Tensor:
    """Return (B, C, H, W) pictures altered at random, each in its own way; gradients pass.

    Source: Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training", section 4 and appendix.

    Args:
        pictures: (B, C, H, W) in [-1, 1].
        names: color shifts brightness, saturation and contrast; translation shifts by up to an eighth of the side and
            fills with gray; cutout turns a square of half the side gray.
        noise: Of the B pictures.
    """
    for name in names:
        pictures = _ALTERATIONS[name](pictures, noise)
    return pictures


def _color(pictures: Tensor, noise: SampleNoise) -> Tensor:
    brightness, saturation, contrast = noise.uniform(3).to(pictures.dtype)[:, :, None, None, None].unbind(1)
    pictures = pictures + brightness - 0.5
    gray = pictures.mean(1, keepdim=True)
    pictures = gray + (pictures - gray) * 2 * saturation
    mean = pictures.mean((1, 2, 3), keepdim=True)
    return mean + (pictures - mean) * (contrast + 0.5)


def _translation(pictures: Tensor, noise: SampleNoise) -> Tensor:
    number, channels, height, width = pictures.shape
    most_down, most_right = (height + 4) // 8, (width + 4) // 8
    down, right = noise.integers(2 * most_down + 1), noise.integers(2 * most_right + 1)
    padded = F.pad(pictures, (most_right, most_right, most_down, most_down))
    rows = (down[:, None] + torch.arange(height, device=noise.device))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width, device=noise.device))[:, None, None, :]
    whole_rows = padded.gather(2, rows.expand(number, channels, height, padded.shape[3]))
    return whole_rows.gather(3, columns.expand(number, channels, height, width))


def _cutout(pictures: Tensor, noise: SampleNoise) -> Tensor:
    rows = _in_window(noise, pictures.shape[2])[:, None, :, None]
    columns = _in_window(noise, pictures.shape[3])[:, None, None, :]
    return pictures.masked_fill(rows & columns, 0.0)


def _in_window(noise: SampleNoise, length: int) -> Tensor:
    """Return (B, length): whether a place lies in a window of half the length, whose centre is anywhere."""
    window = length // 2
    start = noise.integers(length + 1 - window % 2)[:, None] - window // 2
    places = torch.arange(length, device=noise.device)
    return (start <= places) & (places < start + window)


_ALTERATIONS: dict[str, Callable[[Tensor, SampleNoise], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}
