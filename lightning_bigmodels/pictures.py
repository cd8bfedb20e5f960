"""Pictures to look at: as many colours as a screen has, enlarged, with a line of text below."""

import textwrap
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_bigmodels.errors import require

_LINE = 14
_LETTER = 6  # pixels, about
_LEAST = 112


def as_rgb(picture: Tensor) -> Tensor:
    """Return (3, H, W) uint8 of (C, H, W), uint8 or in [0, 1]; of other numbers of channels than 1 and 3 the first."""
    if picture.is_floating_point():
        picture = (picture * 255).round().clamp(0, 255)
    picture = picture.to(torch.uint8)
    if picture.shape[0] < 3:
        return picture[:1].expand(3, -1, -1)
    return picture[:3]


def captioned(picture: Tensor, lines: Sequence[str], colour: str = "black") -> Tensor:
    """Return (3, h, w) uint8: a picture (C, H, W), enlarged by a whole number if it is tiny, above lines of text.

    Args:
        picture: uint8, or in [0, 1].
        lines: Texts, each cut off where the picture ends.
        colour: Of the text.
    """
    image_module = require("PIL.Image", extra="vision")
    draw_module = require("PIL.ImageDraw", extra="vision")
    rgb = as_rgb(picture).cpu()
    factor = max(1, -(-_LEAST // rgb.shape[2]))
    rgb = rgb.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    width = rgb.shape[2]
    page = image_module.new("RGB", (width, _LINE * len(lines)), "white")
    draw = draw_module.Draw(page)
    for number, line in enumerate(lines):
        while line and draw.textlength(line) > width - 4:
            line = line.removesuffix("..")[:-1] + ".." if len(line) > 3 else ""
        draw.text((2, _LINE * number + 1), line, fill=colour)
    text = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(_LINE * len(lines), width, 3)
    return torch.cat([rgb, text.permute(2, 0, 1)], dim=1)


def wrapped(text: str, picture: Tensor, most: int = 4) -> list[str]:
    """Return a text as lines for `captioned`, about as wide as it will show the picture (C, H, W).

    Args:
        text: Cut off behind the last line.
        picture: What stands above.
        most: Lines.
    """
    width = picture.shape[2] * max(1, -(-_LEAST // picture.shape[2]))
    lines = textwrap.wrap(text, max(8, width // _LETTER), max_lines=most, placeholder=" ..")
    return lines or [""]
