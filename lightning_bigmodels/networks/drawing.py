"""Boxes and masks drawn into pictures."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from lightning_bigmodels.palette import class_color

_LEGIBLE = 256
"""Pixels of the longer side that a picture needs for the names in it to be read."""


def draw_objects(
    image: Tensor, boxes: Tensor, labels: Sequence[int], texts: Sequence[str], masks: Tensor | None = None
) -> Tensor:
    """Return a picture (3, s H, s W) uint8 with boxes and names in it, small ones enlarged by a whole number s.

    Args:
        image: (3, H, W) uint8.
        boxes: (N, 4) left, top, right, bottom in pixels.
        labels: Class of each, which has a colour of its own.
        texts: What is written at each.
        masks: (N, H, W), not zero where each object is.
    """
    image = image.detach().cpu()
    scale = math.ceil(_LEGIBLE / max(image.shape[1:]))
    colours = [_bright(class_color(label)) for label in labels]
    if masks is not None and len(labels):
        image = draw_segmentation_masks(image, masks.detach().cpu().bool(), alpha=0.5, colors=colours)
    image = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if not len(labels):
        return image
    return draw_bounding_boxes(
        image,
        boxes.detach().cpu().float() * scale,
        list(texts),
        colours,
        width=2,
        label_colors="black",
        label_background_colors=colours,
        fill_labels=True,
    )


def beside(left: Tensor, right: Tensor, gap: int = 4) -> Tensor:
    """Return two pictures of one height, (3, H, W) uint8, in one, a white gap between them."""
    white = torch.full((3, left.shape[1], gap), 255, dtype=torch.uint8)
    return torch.cat([left, white, right], dim=2)


def _bright(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (127 + value // 2 for value in colour)
    return red, green, blue
