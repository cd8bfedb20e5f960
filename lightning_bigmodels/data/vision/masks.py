"""The class of each pixel from a file of values or colours."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.errors import InputError

Color = tuple[int, int, int]
NO_CLASS = -1
_MAX_VALUE = 65535


class MaskValues:
    """What the values of a mask's pixels mean.

    Args:
        class_names: The classes, in order.
        values: The value in files that each class has; None: its place.
        ignored: Values that no loss and no metric counts.
        colors: Red, green and blue of each class in coloured masks; None: masks hold values.
        ignored_color: The colour that no loss and no metric counts.

    Raises:
        InputError: lists of different lengths, a value or colour twice, or one out of range.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        values: Sequence[int] | None = None,
        ignored: Sequence[int] = (255,),
        colors: Sequence[Sequence[int]] | None = None,
        ignored_color: Sequence[int] | None = None,
    ) -> None:
        self.num_classes = len(class_names)
        # a class of this very number, where there are so many, is one
        ignored = [v for v in ignored if values is not None or v >= self.num_classes]
        values = list(range(self.num_classes)) if values is None else list(values)
        self._check("class_values", values)
        for value in [*values, *ignored]:
            if not 0 <= value <= _MAX_VALUE:
                raise InputError(f"the mask value {value} is none that a file can have; set one from 0 to {_MAX_VALUE}")
        both = sorted(set(values) & set(ignored))
        if both:
            raise InputError(
                f"{both[0]} is both the value of a class and ignored; set data.ignored_value to another or to null"
            )
        self.table = np.full(_MAX_VALUE + 1, NO_CLASS, dtype=np.int16)
        self.table[list(ignored)] = IGNORED
        self.table[values] = np.arange(self.num_classes)
        self.colors: dict[int, int] | None = None
        if colors is not None:
            self._check("class_colors", [tuple(color) for color in colors])
            self.colors = {_code(color): number for number, color in enumerate(colors)}
            if ignored_color is not None:
                self.colors.setdefault(_code(ignored_color), IGNORED)

    def _check(self, name: str, given: Sequence[Any]) -> None:
        if len(given) != self.num_classes:
            raise InputError(f"{name} has {len(given)} entries for {self.num_classes} classes; give one for each")
        if len(set(given)) < len(given):
            twice = next(value for value in given if list(given).count(value) > 1)
            raise InputError(f"{name} has {twice} twice; give each class one of its own")


def _code(color: Sequence[int]) -> int:
    if len(color) != 3 or not all(0 <= value <= 255 for value in color):
        raise InputError(f"{list(color)} is no colour; give red, green and blue, each from 0 to 255")
    return color[0] << 16 | color[1] << 8 | color[2]


def read_mask(path: Path, meaning: MaskValues, size: tuple[int, int]) -> Tensor:
    """Return (H, W) int16: the class of each pixel, or `IGNORED`.

    A palette's entries are not looked at: the value of a pixel is its class, as in the masks of Pascal VOC.

    Args:
        path: PNG or another format that keeps values, of one channel, or of three where classes have colours.
        meaning: Which value or colour is which class.
        size: Height and width of the picture.

    Raises:
        InputError: the file is missing, broken, of another size than its picture, coloured where values are wanted, or
            has a value or colour without a class.
    """
    image = _open(path)
    if (image.height, image.width) != size:
        raise InputError(
            f"{path} is {image.height} x {image.width} pixels and its picture {size[0]} x {size[1]}; make a mask "
            f"of the picture's size"
        )
    if meaning.colors is not None:
        return _from_colors(path, image, meaning.colors)
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise InputError(
            f"{path} has {len(image.getbands())} channels ({image.mode}), where a mask has one whose values are "
            f"classes; write a gray or paletted PNG, or set data.class_colors to the colour of each class"
        )
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > _MAX_VALUE:
        raise InputError(f"{path} has the value {values.max()}, beyond 16 bits; write a mask whose values are classes")
    mask = meaning.table[values]
    wrong = mask == NO_CLASS
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise InputError(
            f"{path} has the value {values[row, column]} at row {row}, column {column}, and "
            f"{meaning.num_classes} classes have no such value; correct the mask, add the class to data.class_names, "
            f"or set data.ignored_value to it"
        )
    return torch.from_numpy(mask)


def _open(path: Path) -> Image.Image:
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise InputError(f"{path} is a JPEG, which changes the values of a mask; write masks as PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(path.read_bytes()))
            image.load()
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is no picture that Pillow knows; write the mask as PNG") from error
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing, the mask of a picture; add it or remove the picture") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged or cut off ({error}); replace the mask or remove its picture") from error
    return image


def _from_colors(path: Path, image: Image.Image, colors: dict[int, int]) -> Tensor:
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    found, places = np.unique(codes, return_inverse=True)
    unknown = [code for code in found.tolist() if code not in colors]
    if unknown:
        row, column = np.argwhere(codes == unknown[0])[0]
        raise InputError(
            f"{path} has the colour {pixels[row, column].tolist()} at row {row}, column {column}, which no class has; "
            f"correct the mask, or set data.class_colors or data.ignored_color to it"
        )
    classes = np.array([colors[code] for code in found.tolist()], dtype=np.int16)
    return torch.from_numpy(classes[places.reshape(codes.shape)])
