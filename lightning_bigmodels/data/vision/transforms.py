"""From a picture of any size to one of a batch, on uint8 all the way: crop, resize, flip, augment."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from lightning_bigmodels.errors import InputError

Size = tuple[int, int]


class Transforms:
    """Makes a picture (C, H, W) uint8 as large as its batch, at random where there is an epoch.

    Args:
        size: Height and width of the result.
        eval_resize: Length of the shorter side before the centre is cut out, without an epoch; None: `size` fits
            tightly.
        crop_scale: Least and greatest part of the picture's area that a random crop shows; None: no such crop.
        crop_ratio: Least and greatest width over height of that crop.
        horizontal_flip: Probability of a mirrored picture.
        augmentations: What comes after that.
    """

    def __init__(
        self,
        size: Size,
        eval_resize: int | None = None,
        crop_scale: tuple[float, float] | None = None,
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.0,
        augmentations: Sequence[v2.Transform] = (),
    ) -> None:
        self._size = size
        self.eval_resize = eval_resize
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio
        self.horizontal_flip = horizontal_flip
        self.augmentations = list(augmentations)

    def size(self, epoch: int | None) -> Size:
        """Return height and width of what is made in an epoch, or in evaluation."""
        return self._size

    def __call__(self, picture: Tensor, epoch: int | None) -> Tensor:
        """Return (C, *size) uint8."""
        size = self.size(epoch)
        if epoch is None:
            return fit(picture, size, self.eval_resize)
        if self.crop_scale is None:
            picture = fit(picture, size)
        else:
            top, left, height, width = (
                v2.RandomResizedCrop(size, self.crop_scale, self.crop_ratio).make_params([picture]).values()
            )
            picture = resize(picture[:, top : top + height, left : left + width], size)
        if self.horizontal_flip and torch.rand(()) < self.horizontal_flip:
            picture = picture.flip(-1)
        for augmentation in self.augmentations:
            picture = augmentation(picture)
        if picture.dtype != torch.uint8 or picture.shape[1:] != size:
            raise InputError(
                f"augmentations made {tuple(picture.shape)} {picture.dtype} of a picture; leave it uint8 of "
                f"{size[0]} x {size[1]}: the network scales and normalizes"
            )
        return picture


def resize(picture: Tensor, size: Size) -> Tensor:
    """Return a picture of another size, smoothed where it shrinks."""
    if picture.shape[1:] == size:
        return picture
    return functional.resize(picture, list(size), InterpolationMode.BILINEAR, antialias=True)


def fit(picture: Tensor, size: Size, shorter: int | None = None) -> Tensor:
    """Return the middle of a picture: its shorter side made `shorter` long, or as short as `size` allows; then cut."""
    height, width = picture.shape[1:]
    factor = max(size[0] / height, size[1] / width) if shorter is None else shorter / min(height, width)
    inner = (max(size[0], round(height * factor)), max(size[1], round(width * factor)))
    picture = resize(picture, inner)
    top, left = (inner[0] - size[0]) // 2, (inner[1] - size[1]) // 2
    return picture[:, top : top + size[0], left : left + size[1]]
