"""Large pictures through an enlarging network tile by tile, without seams and in bounded memory.

Legend: H rows and W columns of the small picture, s the scale.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Tiling(NamedTuple):
    """How a picture is cut.

    Attributes:
        size: Pixels of the small picture on each side of a tile, at most (but for `multiple`, and a narrow rest).
        overlap: Pixels around a tile that the network sees too.
        exact: Whether the overlap is thrown away, since it covers all that has a part in the tile; else neighbouring
            tiles are blended over it, and it may be at most a quarter of the size.
        multiple: Tiles begin at multiples of this: the window of a network of windows.
    """

    size: int
    overlap: int
    exact: bool
    multiple: int = 1


class _Span(NamedTuple):
    """A tile along one axis: its own pixels from `start` to `stop`, and what the network sees."""

    start: int
    stop: int
    first: int
    last: int


def num_tiles(height: int, width: int, tiling: Tiling) -> int:
    """Return how often the network runs for a picture of this size."""
    return len(_spans(height, tiling)) * len(_spans(width, tiling))


def enlarge_in_bands(
    network: Callable[[Tensor], Tensor], picture: Tensor, scale: int, tiling: Tiling
) -> Iterator[Tensor]:
    """Yield the enlarged picture from top to bottom, in bands (3, h, s W) uint8; a band is all that is held as float.

    Args:
        network: From (1, 3, h, w) uint8 to (1, 3, s h, s w) in [0, 1], about.
        picture: (3, H, W) uint8.
        scale: Factor of the network.
        tiling: How it is cut.
    """
    rows, columns = _spans(picture.shape[1], tiling), _spans(picture.shape[2], tiling)
    carried: Tensor | None = None
    for row in rows:
        top, bottom = (row.start, row.stop) if tiling.exact else (row.first, row.last)
        band = torch.zeros(3, (bottom - top) * scale, picture.shape[2] * scale, device=picture.device)
        for column in columns:
            window = picture[None, :, row.first : row.last, column.first : column.last]
            tile = network(window)[0].float()
            left, right = (column.start, column.stop) if tiling.exact else (column.first, column.last)
            tile = tile[
                :,
                (top - row.first) * scale : (bottom - row.first) * scale,
                (left - column.first) * scale : (right - column.first) * scale,
            ]
            if not tiling.exact:
                tile = tile * _weights(column, columns, scale).to(tile.device)
                tile = tile * _weights(row, rows, scale).to(tile.device)[:, None]
            band[:, :, left * scale : right * scale] += tile
        if carried is not None:
            band[:, : carried.shape[1]] += carried
        # what the next row of tiles blends into waits for it
        shared = 0 if tiling.exact or row is rows[-1] else 2 * (row.last - row.stop) * scale
        done = band.shape[1] - shared
        carried = band[:, done:].clone() if shared else None
        yield to_uint8(band[:, :done])


def enlarge_whole(network: Callable[[Tensor], Tensor], picture: Tensor, scale: int, tiling: Tiling) -> Tensor:
    """Return the enlarged picture (3, s H, s W) uint8 of (3, H, W) uint8."""
    large = torch.empty(3, picture.shape[1] * scale, picture.shape[2] * scale, dtype=torch.uint8, device=picture.device)
    row = 0
    for band in enlarge_in_bands(network, picture, scale, tiling):
        large[:, row : row + band.shape[1]] = band
        row += band.shape[1]
    return large


def to_uint8(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 1], about, as uint8."""
    return (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8)


def _spans(length: int, tiling: Tiling) -> list[_Span]:
    """Cut an axis into nearly equal tiles, about as large as the tiling's size or smaller."""
    number = -(-length // tiling.size)
    size = -(-length // number)
    size = -(-size // tiling.multiple) * tiling.multiple
    overlap = -(-tiling.overlap // tiling.multiple) * tiling.multiple
    starts = list(range(0, length, size))
    if len(starts) > 1 and length - starts[-1] < overlap:
        # too narrow to blend over: the tile before takes it in
        starts.pop()
    stops = [*starts[1:], length]
    return [
        _Span(start, stop, max(0, start - overlap), min(stop + overlap, length))
        for start, stop in zip(starts, stops, strict=True)
    ]


def _weights(span: _Span, spans: list[_Span], scale: int) -> Tensor:
    """Return the weight of each large pixel that the network made along an axis; over all tiles they sum to one."""
    weights = torch.ones((span.last - span.first) * scale)
    before, after = 2 * (span.start - span.first) * scale, 0
    if span is not spans[-1]:
        after = 2 * (span.last - span.stop) * scale
    if before:
        weights[:before] = _ramp(before)
    if after:
        weights[-after:] *= _ramp(after).flip(0)
    return weights


def _ramp(length: int) -> Tensor:
    return (torch.arange(length) + 0.5) / length
