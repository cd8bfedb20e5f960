"""PNG files written while their rows are made, so that a picture of any size needs little memory."""

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = 2  # red, green, blue
_BITS = 8
_BYTES_PER_PIXEL = 3
_ROWS_AT_A_TIME = 64


class PictureInBands(NamedTuple):
    """A picture whose rows come in bands, from top to bottom, and are made when they are asked for.

    Attributes:
        height: Rows of the whole.
        width: Columns.
        bands: (3, h, W) uint8 each.
    """

    height: int
    width: int
    bands: Iterable[Tensor]


class PictureWithText(NamedTuple):
    """A picture whose file also holds texts, which Pillow reads as `image.info`.

    Attributes:
        picture: (C, H, W) uint8, with 1 or 3 channels.
        texts: By their names.
    """

    picture: Tensor
    texts: dict[str, str]


Drawn = Tensor | PictureInBands | PictureWithText
"""What becomes a PNG file."""


def write_png(path: Path, picture: PictureInBands) -> None:
    """Write a picture as PNG, band by band; a file of that name appears when it is whole.

    Source: W3C, "Portable Network Graphics (PNG) Specification", second edition; each row has the filter of least
    absolute sum (section 12.8).

    Raises:
        ValueError: the bands do not make up the height and width.
    """
    half = path.with_name(f".{path.name}.part")
    try:
        with half.open("wb") as file:
            file.write(_SIGNATURE)
            header = struct.pack(">IIBBBBB", picture.width, picture.height, _BITS, _COLOURS, 0, 0, 0)
            file.write(_chunk(b"IHDR", header))
            compressor = zlib.compressobj()
            above = np.zeros((picture.width, 3), np.uint8)
            rows = 0
            for band in picture.bands:
                pixels = band.permute(1, 2, 0).cpu().numpy()
                if pixels.shape[1:] != (picture.width, 3):
                    raise ValueError(f"a band is {pixels.shape[1]} pixels wide, and the picture {picture.width}")
                for start in range(0, len(pixels), _ROWS_AT_A_TIME):
                    part = np.ascontiguousarray(pixels[start : start + _ROWS_AT_A_TIME])
                    file.write(_chunk(b"IDAT", compressor.compress(_filtered(part, above))))
                    above = part[-1]
                rows += len(pixels)
            if rows != picture.height:
                raise ValueError(f"the bands have {rows} rows, and the picture {picture.height}")
            file.write(_chunk(b"IDAT", compressor.flush()) + _chunk(b"IEND", b""))
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _filtered(rows: NDArray[np.uint8], above: NDArray[np.uint8]) -> bytes:
    """Return rows (h, W, 3) as PNG's bytes: each begins with the number of its filter.

    Args:
        rows: The pixels.
        above: (W, 3), the row before the first.
    """
    height = len(rows)
    here = rows.reshape(height, -1).astype(np.int16)
    up = np.concatenate([above.reshape(1, -1).astype(np.int16), here[:-1]])
    left, corner = (np.pad(pixels, ((0, 0), (_BYTES_PER_PIXEL, 0)))[:, :-_BYTES_PER_PIXEL] for pixels in (here, up))
    guesses = (left, up, (left + up) // 2, _paeth(left, up, corner))
    # kept modulo 256, and judged as signed bytes
    candidates = np.stack([(here - guess).astype(np.uint8) for guess in guesses])
    sums = np.abs(candidates.view(np.int8).astype(np.int16)).sum(axis=2, dtype=np.int64)
    best = sums.argmin(axis=0)
    lines = np.empty((height, 1 + here.shape[1]), np.uint8)
    lines[:, 0] = best + 1  # filter 0 leaves a row as it is
    lines[:, 1:] = candidates[best, np.arange(height)]
    return lines.tobytes()


def _paeth(left: NDArray[np.int16], up: NDArray[np.int16], corner: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return whichever of the three is nearest to left + up - corner, ties in this order."""
    by_left, by_up = np.abs(up - corner), np.abs(left - corner)
    by_corner = np.abs(left + up - 2 * corner)
    choice = np.where(by_up <= by_corner, up, corner)
    return np.where((by_left <= by_up) & (by_left <= by_corner), left, choice)
