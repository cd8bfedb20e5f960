"""From a picture of any size to one of a batch, on uint8 all the way: crop, resize, flip, augment."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from lightning_bigmodels.errors import InputError

Size = tuple[int, int]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
_MODES: dict[str, dict[str, object]] = {
    "nearest": {"mode": "nearest-exact"},
    "bilinear": {"mode": "bilinear", "align_corners": False, "antialias": True},
    "bicubic": {"mode": "bicubic", "align_corners": False, "antialias": True},
}


class Transforms:
    """Makes a picture (C, H, W) uint8 as large as its batch, at random where there is an epoch.

    Scaling and normalization are the network's: uint8 is a quarter of the memory and of the way between processes, and
    torch resizes it several times faster than float32.

    Args:
        size: Height and width of the result.
        eval_resize: Length of the shorter side before the centre is cut out, without an epoch; None: `size` fits
            tightly.
        crop_scale: Least and greatest part of the picture's area that a random crop shows; None: no such crop.
        crop_ratio: Least and greatest width over height of that crop.
        crop_padding: Black pixels round a picture of `size`, from which it is cut out again at a random place.
        horizontal_flip: Probability of a mirrored picture.
        augmentations: What comes after that.
        progressive_sizes: From which epoch on training pictures have which height and width.
        interpolation: How pixels between pixels are made.

    Raises:
        InputError: a value is out of its range, or two exclude each other.

    Source: random crops as in Szegedy et al. 2015, "Going deeper with convolutions", section 6; padded ones as in He et
        al. 2016, "Deep residual learning for image recognition", section 4.2.
    """

    def __init__(
        self,
        size: Size,
        eval_resize: int | None = None,
        crop_scale: tuple[float, float] | None = None,
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        crop_padding: int = 0,
        horizontal_flip: float = 0.0,
        augmentations: Sequence[v2.Transform] = (),
        progressive_sizes: Mapping[int, Size] | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(f"crop_scale is {list(crop_scale)}; set two numbers above 0 and up to 1, the least first")
        if not 0 < crop_ratio[0] <= crop_ratio[1]:
            raise InputError(f"crop_ratio is {list(crop_ratio)}; set two numbers above 0, the least first")
        if crop_scale is not None and crop_padding:
            raise InputError(
                f"crop_padding is {crop_padding} and crop_scale is set; set crop_scale to null, or no padding"
            )
        if not 0 <= horizontal_flip <= 1:
            raise InputError(f"horizontal_flip is {horizontal_flip}; it is a probability: set it from 0 to 1")
        if eval_resize is not None and eval_resize < min(size):
            raise InputError(f"eval_resize is {eval_resize}; set it to at least image_size, {min(size)}")
        if interpolation not in _MODES:
            raise InputError(f"interpolation is {interpolation!r}; set it to {', '.join(_MODES)}")
        self._size = size
        self._sizes = dict(sorted((progressive_sizes or {}).items()))
        self.eval_resize = eval_resize
        self.crop = None if crop_scale is None else v2.RandomResizedCrop(size, tuple(crop_scale), tuple(crop_ratio))
        self.crop_padding = crop_padding
        self.horizontal_flip = horizontal_flip
        self.augmentations = list(augmentations)
        self.interpolation = _MODES[interpolation]

    def size(self, epoch: int | None) -> Size:
        """Return height and width of what is made in an epoch, or in evaluation."""
        size = self._size
        for first, other in self._sizes.items():
            size = other if epoch is not None and epoch >= first else size
        return size

    def largest_size(self) -> Size:
        """Return height and width of the largest pictures that training sees."""
        return max((self.size(epoch) for epoch in (0, *self._sizes)), key=math.prod)

    def __call__(self, picture: Tensor, epoch: int | None) -> Tensor:
        """Return (C, height, width) uint8."""
        size = self.size(epoch)
        if epoch is None:
            return self.fit(picture, size, self.eval_resize)
        picture = self._cropped(picture, size)
        if self.horizontal_flip and torch.rand(()) < self.horizontal_flip:
            picture = picture.flip(-1)
        for augmentation in self.augmentations:
            picture = augmentation(picture)
        return picture

    def _cropped(self, picture: Tensor, size: Size) -> Tensor:
        if self.crop is not None:
            place = self.crop.make_params([picture])
            top, left = place["top"], place["left"]
            picture = picture[:, top : top + place["height"], left : left + place["width"]]
            return self.resize(picture, size)
        picture = self.fit(picture, size)
        if self.crop_padding:
            shift = 2 * self.crop_padding + 1
            top, left = torch.randint(shift, (2,)).tolist()
            picture = F.pad(picture, (self.crop_padding,) * 4)[:, top : top + size[0], left : left + size[1]]
        return picture

    def resize(self, picture: Tensor, size: Size) -> Tensor:
        """Return a picture of another size, smoothed where it shrinks."""
        if picture.shape[1:] == size:
            return picture
        # of a crop that decoders left with channels innermost the kernel makes planes on the way
        return F.interpolate(picture[None], size, **self.interpolation)[0]  # type: ignore[arg-type]

    def fit(self, picture: Tensor, size: Size, shorter: int | None = None) -> Tensor:
        """Return the middle of a picture, its shorter side made `shorter` long, or as short as `size` allows.

        The longer side is rounded down, and the middle to the nearest pixel, as torchvision does.
        """
        height, width = picture.shape[1:]
        if shorter is not None:
            wanted, found = shorter, min(height, width)
        else:
            wanted, found = max((size[0], height), (size[1], width), key=lambda pair: pair[0] / pair[1])
        inner = (max(size[0], height * wanted // found), max(size[1], width * wanted // found))
        picture = self.resize(picture, inner)
        top, left = (round((inner[axis] - size[axis]) / 2) for axis in (0, 1))
        return picture[:, top : top + size[0], left : left + size[1]]

    def check(self, channels: int) -> None:
        """Try the augmentations on a gray picture.

        Raises:
            InputError: one fails, or leaves something else than uint8 of the same size.
        """
        size = self.size(0)
        gray = torch.full((channels, *size), 128, dtype=torch.uint8)
        with torch.random.fork_rng(devices=[]):
            for augmentation in self.augmentations:
                name = type(augmentation).__name__
                try:
                    result = augmentation(gray)
                except Exception as error:  # each transform has errors of its own
                    raise InputError(
                        f"data.augmentations: {name} fails on a picture of {channels} x {size[0]} x {size[1]} uint8 "
                        f"({error}); remove it or change its arguments"
                    ) from error
                kind = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
                if kind != f"{gray.dtype} {tuple(gray.shape)}":
                    raise InputError(
                        f"data.augmentations: {name} makes {kind} of a picture {gray.dtype} {tuple(gray.shape)}; "
                        f"remove it: sizes are set by image_size, and the network scales and normalizes pixels"
                    )
