"""Masks laid over pictures, and brought back to the size of the file."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.palette import IGNORED_COLOR, NUM_COLORS, class_palette

_ALPHA = 0.6  # of a class's colour over the picture


def overlay(image: Tensor, mask: Tensor) -> Tensor:
    """Return a picture (3, H, W) uint8 in which each pixel has the colour of its class, the picture shining through.

    Class 0, most often the background, is left as it is.

    Args:
        image: (C, H, W) uint8.
        mask: (H, W) int64 class, or `IGNORED`.
    """
    palette = torch.tensor(class_palette(), device=image.device).view(NUM_COLORS, 3).float()
    colors = palette[mask.clamp(min=0) % NUM_COLORS]  # (H, W, 3)
    colors[mask == IGNORED] = torch.tensor(IGNORED_COLOR, device=image.device).float()
    rgb = as_rgb(image).float()
    mixed = rgb * (1 - _ALPHA) + colors.permute(2, 0, 1) * _ALPHA
    return torch.where(mask == 0, rgb, mixed).round().to(torch.uint8)


def as_rgb(image: Tensor) -> Tensor:
    """Return (3, H, W) of (C, H, W): three channels of it, or one thrice."""
    return image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)


def side_by_side(pictures: list[Tensor], gap: int = 2) -> Tensor:
    """Return pictures (3, H, W) of one size in a row, white between them."""
    white = torch.full_like(pictures[0][..., :gap], 255)
    row = [part for picture in pictures for part in (picture, white)]
    return torch.cat(row[:-1], dim=2)


def likeliest_class(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (H, W) int64, the likeliest class of each pixel of a picture enlarged or shrunk to a size.

    Logits are interpolated, one class after another: all of them at the size of a large file would not fit.

    Args:
        logits: (K, h, w).
        size: H and W.
    """
    if tuple(logits.shape[1:]) == size:
        return logits.argmax(0)
    best = torch.full(size, -torch.inf, device=logits.device)
    classes = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for number, values in enumerate(logits.float()):
        scaled = F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        classes[scaled > best] = number
        best = torch.maximum(best, scaled)
    return classes


def nearest(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask (H, W) enlarged or shrunk to a size without new values."""
    rows, columns = (torch.arange(new) * old // new for new, old in zip(size, mask.shape, strict=True))
    return mask[rows[:, None], columns]
