"""From a picture and its mask of any size to those of a batch: scaled, cut, flipped, augmented together."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.errors import InputError

Size = tuple[int, int]


class MaskTransforms:
    """Makes a picture and its mask as large as a batch, at random where there is an epoch.

    The picture lies in the upper left; what it does not fill is black and ignored. Nothing is ever distorted.

    Args:
        size: Height and width in training.
        eval_size: Height and width in evaluation.
        own_scale: Whether a pixel of the file is a pixel of the batch (in evaluation a picture that does not fit is
            shrunk), or each picture is made as large as fits.
        scale_range: Least and greatest factor on that in training, drawn for each picture; None: 1.
        horizontal_flip: Probability of a mirrored picture.
        augmentations: What comes after that: transforms of torchvision.transforms.v2, which move pixels and masks
            together. What they fill in with zeros is ignored.
    """

    def __init__(
        self,
        size: Size,
        eval_size: Size,
        own_scale: bool = False,
        scale_range: tuple[float, float] | None = None,
        horizontal_flip: float = 0.0,
        augmentations: Sequence[v2.Transform] = (),
    ) -> None:
        self.train_size = size
        self.eval_size = eval_size
        self.own_scale = own_scale
        self.scale_range = scale_range
        self.horizontal_flip = horizontal_flip
        self.augmentations = list(augmentations)

    def size(self, epoch: int | None) -> Size:
        """Return height and width of what is made in an epoch, or in evaluation."""
        return self.eval_size if epoch is None else self.train_size

    def region(self, size: Size) -> Size:
        """Return height and width that a picture of a size fills in evaluation."""
        factor = self._factor(size, self.eval_size)
        if self.own_scale:
            factor = min(factor, 1.0)
        return _scaled(size, factor, self.eval_size)

    def __call__(self, image: Tensor, mask: Tensor, epoch: int | None) -> tuple[Tensor, Tensor]:
        """Return (C, H, W) uint8 and (H, W) int64 of `size(epoch)`.

        Args:
            image: (C, h, w) uint8.
            mask: (h, w), the class of each pixel or `IGNORED`.
            epoch: None in evaluation.
        """
        size = self.size(epoch)
        # what a transform fills in with zeros must be no class
        known = torch.where(mask == IGNORED, 0, mask + 1)
        if epoch is None:
            image, known = _resize(image, known, self.region((image.shape[1], image.shape[2])))
        else:
            image, known = self._random_part(image, known)
        image, known = _pad(image, size), _pad(known, size)
        if epoch is not None:
            image, known = self._augment(image, known)
        classes = known.long() - 1
        return image, classes.masked_fill(classes < 0, IGNORED)

    def _factor(self, size: Size, target: Size) -> float:
        return min(target[0] / size[0], target[1] / size[1])

    def _random_part(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cut out what fills the batch at a random scale, and only then scale it: that costs no more than it must."""
        size = (image.shape[1], image.shape[2])
        factor = 1.0 if self.own_scale else self._factor(size, self.train_size)
        if self.scale_range is not None:
            factor *= float(torch.empty(()).uniform_(*self.scale_range))
        window = [min(side, math.ceil(target / factor)) for side, target in zip(size, self.train_size, strict=True)]
        top, left = (int(torch.randint(side - part + 1, ())) for side, part in zip(size, window, strict=True))
        rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
        part = _scaled((window[0], window[1]), factor, self.train_size)
        return _resize(image[:, rows, columns], mask[rows, columns], part)

    def _augment(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.horizontal_flip and torch.rand(()) < self.horizontal_flip:
            image, mask = image.flip(-1), mask.flip(-1)
        if not self.augmentations:
            return image, mask
        pair = tv_tensors.Image(image), tv_tensors.Mask(mask)
        for augmentation in self.augmentations:
            pair = augmentation(*pair)
        image, mask = (part.as_subclass(Tensor) for part in pair)
        height, width = self.train_size
        if image.dtype != torch.uint8 or image.shape[1:] != mask.shape or mask.shape != self.train_size:
            raise InputError(
                f"augmentations made {tuple(image.shape)} {image.dtype} of a picture and {tuple(mask.shape)} of its "
                f"mask; leave them uint8 and of {height} x {width}: the network scales and normalizes"
            )
        return image, mask


def _scaled(size: Size, factor: float, limit: Size) -> Size:
    height, width = (min(most, max(1, round(side * factor))) for side, most in zip(size, limit, strict=True))
    return height, width


def _resize(image: Tensor, mask: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    if mask.shape == size:
        return image, mask
    image = functional.resize(image, list(size), v2.InterpolationMode.BILINEAR, antialias=True)
    # of an output pixel's middle, as bilinear interpolation has it
    mask = F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0].to(mask.dtype)
    return image, mask


def _pad(picture: Tensor, size: Size) -> Tensor:
    return F.pad(picture, (0, size[1] - picture.shape[-1], 0, size[0] - picture.shape[-2]))
