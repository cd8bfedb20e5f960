"""From a photo to the small picture that a network is to enlarge: by bicubic, or as cameras and the web degrade it.

What is random is drawn from torch's global stream.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import torchvision.io
from torch import Tensor

Degradation = Literal["bicubic", "realistic"]
MARGINS: dict[Degradation, int] = {"bicubic": 2, "realistic": 8}
"""Pixels of the small picture around a crop that have a part in its edge; of bicubic, half its kernel."""

_RESIZES = ("area", "bilinear", "bicubic")


class _Round(NamedTuple):
    """One of the two rounds of blur, resize, noise and JPEG; ranges are (low, high)."""

    blur_probability: float
    sigma: tuple[float, float]
    up_down_keep: tuple[float, float, float]
    factor: tuple[float, float]
    noise: tuple[float, float]
    poisson: tuple[float, float]


# the values of Real-ESRGAN's training
_ROUNDS = (
    _Round(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1.0, 30.0), (0.05, 3.0)),
    _Round(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1.0, 25.0), (0.05, 2.5)),
)
_GRAY_NOISE = 0.4
_QUALITY = (30.0, 95.0)
_LEAST_SIDE = 8


def degrade(photo: Tensor, scale: int, degradation: Degradation) -> Tensor:
    """Return a photo (3, H, W) uint8 as the small picture (3, H / scale, W / scale) uint8; scale divides H and W."""
    return reduce_bicubic(photo, scale) if degradation == "bicubic" else degrade_realistically(photo, scale)


def reduce_bicubic(photo: Tensor, scale: int) -> Tensor:
    """Reduce by bicubic with antialiasing: in the interior what MATLAB's `imresize` gives, the field's protocol."""
    height, width = photo.shape[1] // scale, photo.shape[2] // scale
    return _as_uint8(_resize(photo.float(), (height, width), "bicubic"))


def degrade_realistically(photo: Tensor, scale: int) -> Tensor:
    """Blur, resize, add noise and compress as JPEG, twice, with random strengths, and end at the small size.

    Source: Wang et al. 2021, "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data",
    section 3 and the appendix's values. Where we differ: kernels are Gaussian, isotropic or not, without generalized
    and plateau-shaped ones, and there is no sinc filter.
    """
    size = photo.shape[1] // scale, photo.shape[2] // scale
    picture = photo.float()
    for number, values in enumerate(_ROUNDS):
        if torch.rand(()) < values.blur_probability:
            picture = _blur(picture, values.sigma)
        # the first round resizes from the photo's own size, the second from the size of the result
        base = (photo.shape[1], photo.shape[2]) if number == 0 else size
        picture = _resize(picture, _random_size(base, values), _choice(_RESIZES))
        picture = _noise(picture, values)
        if number == 0:
            picture = _jpeg(picture)
    return _as_uint8(_jpeg(_resize(picture, size, _choice(_RESIZES))))


def _uniform(bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(torch.rand(()))


def _choice(names: tuple[str, ...]) -> str:
    return names[int(torch.randint(len(names), ()))]


def _random_size(base: tuple[int, int], values: _Round) -> tuple[int, int]:
    kind = int(torch.multinomial(torch.tensor(values.up_down_keep), 1))
    low, high = values.factor
    factor = (_uniform((1.0, high)), _uniform((low, 1.0)), 1.0)[kind]
    return max(_LEAST_SIDE, round(base[0] * factor)), max(_LEAST_SIDE, round(base[1] * factor))


def _resize(picture: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if mode == "area":
        return F.interpolate(picture[None], size=size, mode="area")[0]
    return F.interpolate(picture[None], size=size, mode=mode, antialias=True)[0].clamp(0, 255)


def _blur(picture: Tensor, sigma: tuple[float, float]) -> Tensor:
    """Convolve with a Gaussian of random widths along two axes at a random angle."""
    half = int(torch.randint(3, 11, ()))  # kernels of 7 to 21 pixels
    wide, narrow, angle = _uniform(sigma), _uniform(sigma), _uniform((0.0, math.pi))
    if torch.rand(()) < 0.5:
        narrow = wide
    offsets = torch.arange(-half, half + 1, dtype=torch.float32)
    rows, columns = torch.meshgrid(offsets, offsets, indexing="ij")
    along = columns * math.cos(angle) + rows * math.sin(angle)
    across = rows * math.cos(angle) - columns * math.sin(angle)
    kernel = torch.exp(-0.5 * ((along / wide) ** 2 + (across / narrow) ** 2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(picture[None], (half,) * 4, mode="replicate"), kernel, groups=3)[0]


def _noise(picture: Tensor, values: _Round) -> Tensor:
    gray = bool(torch.rand(()) < _GRAY_NOISE)
    if torch.rand(()) < 0.5:
        drawn = torch.randn(1 if gray else 3, *picture.shape[1:]) * _uniform(values.noise)
    else:
        # a count of photons: the mean of 255 levels, its variance grows with the light
        light = picture.mean(0, keepdim=True) if gray else picture
        levels = light.clamp(0, 255).round()
        drawn = (torch.poisson(levels) - levels) * _uniform(values.poisson)
    return (picture + drawn).clamp(0, 255)


def _jpeg(picture: Tensor) -> Tensor:
    quality = round(_uniform(_QUALITY))
    return torchvision.io.decode_jpeg(torchvision.io.encode_jpeg(_as_uint8(picture), quality=quality)).float()


def _as_uint8(picture: Tensor) -> Tensor:
    return picture.round().clamp(0, 255).to(torch.uint8)
