"""Handwritten digits pasted on textured canvases, with the digit that each pixel belongs to."""

import copy
import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_bigmodels.data.loading import sample_generator
from lightning_bigmodels.data.vision.mask_pairs import Pairs
from lightning_bigmodels.data.vision.pictures import with_channels
from lightning_bigmodels.errors import InputError, require

NAME = "digits"
CLASS_NAMES = ["background", *(str(digit) for digit in range(10))]
DEFAULT_SIZE = 2000
_SIDE = 64  # of a canvas, in pixels
_INK = 0.35  # of the darkest stroke: from there on a pixel belongs to the digit
# of scikit-learn's 1,797 digits, in the order of their writers: no hand is in two parts
_WRITERS = {"train": (0, 1200), "val": (1200, 1500), "test": (1500, 1797)}
_SEEDS = {"train": 0, "val": 1, "test": 2}


class DigitCanvases(Pairs):
    """Canvases of 64 x 64 with one to four digits, each drawn anew from its place alone.

    Strokes are lighter than the canvas, both in colours of their own, and later digits may cover earlier ones.

    Args:
        part: `train`, `val` or `test`, which show the digits of different writers.
        length: Number of canvases.
    """

    def __init__(self, part: str, length: int) -> None:
        self.part = part
        self.places = np.arange(length)
        start, stop = _WRITERS[part]
        digits = require("sklearn.datasets", extra="vision").load_digits()
        self._strokes = torch.from_numpy(digits.images[start:stop].astype(np.float32) / 16)
        self._digits = digits.target[start:stop]

    @override
    def __len__(self) -> int:
        return len(self.places)

    @override
    def name(self, index: int) -> str:
        return f"{NAME}/{self.short_name(index)}"

    @override
    def short_name(self, index: int) -> str:
        return f"{self.part}_{self.places[index]:05d}"

    @override
    def read(self, index: int, channels: int) -> tuple[Tensor, Tensor | None]:
        generator = sample_generator(_SEEDS[self.part], 0, int(self.places[index]))
        canvas = _texture(generator)
        mask = torch.zeros(_SIDE, _SIDE, dtype=torch.int16)
        for _ in range(_draw(generator, 1, 5)):
            which = _draw(generator, 0, len(self._digits))
            side = _draw(generator, 18, 33)
            stroke = self._strokes[which][None, None]
            stroke = F.interpolate(stroke, size=(side, side), mode="bilinear", align_corners=False)[0, 0]
            top, left = (_draw(generator, 0, _SIDE - side + 1) for _ in range(2))
            rows, columns = slice(top, top + side), slice(left, left + side)
            part = canvas[:, rows, columns]
            color = torch.rand(3, 1, 1, generator=generator) * 0.35 + 0.65
            cover = (stroke / _INK).clamp(max=1.0)
            canvas[:, rows, columns] = part * (1 - cover) + color * cover
            mask[rows, columns][stroke > _INK] = int(self._digits[which]) + 1
        image = (canvas.clamp(0, 1) * 255).round().to(torch.uint8)
        return with_channels(image, channels), mask

    @override
    def digest(self, index: int) -> str:
        image, _ = self.read(index, 3)
        return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).hexdigest()

    @override
    def take(self, rows: NDArray[np.int64]) -> "DigitCanvases":
        part = copy.copy(self)
        part.places = self.places[rows]
        return part


def digit_parts(source: str) -> dict[str, Pairs]:
    """Return the three parts of `digits` or `digits:N`, which has N training canvases and a tenth of it in the others.

    Raises:
        InputError: N is no number above 0.
    """
    _, _, number = source.partition(":")
    if number and (not number.isdecimal() or int(number) < 1):
        raise InputError(f"{source!r}: {number!r} is no number of canvases; write {NAME}:{DEFAULT_SIZE}")
    length = int(number or DEFAULT_SIZE)
    lengths = {"train": length, "val": max(1, length // 10), "test": max(1, length // 10)}
    return {part: DigitCanvases(part, count) for part, count in lengths.items()}


def is_digits(source: str) -> bool:
    """Return whether a source is the generated one."""
    return source.partition(":")[0] == NAME


def _texture(generator: torch.Generator) -> Tensor:
    """Return (3, H, W): a colour that changes over the canvas, and noise of a coarse and a fine grain."""
    canvas = torch.rand(3, 1, 1, generator=generator) * 0.4 + 0.1
    for cells, height in ((3, 0.15), (12, 0.1), (_SIDE, 0.05)):
        noise = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
        canvas = canvas + height * F.interpolate(noise, size=_SIDE, mode="bilinear", align_corners=False)[0] * 2
    return canvas.clamp(0, 1)


def _draw(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=generator))
