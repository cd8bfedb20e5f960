"""Enlarging by repetition: the result of one pass is the picture of the next."""

from collections.abc import Callable, Iterator

from torch import Tensor
from tqdm import tqdm

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.networks.tiles import Tiling, enlarge_in_bands, enlarge_whole, num_tiles
from lightning_bigmodels.png import PictureInBands

_MOST = 32


def factor_to_passes(factor: int, scale: int) -> int:
    """Return how often a network of this scale must run to enlarge by a factor.

    Raises:
        InputError: the factor is no power of the scale, or above 32.
    """
    powers = {scale**number: number for number in range(1, 6) if scale**number <= _MOST}
    if factor not in powers:
        known = [str(power) for power in powers]
        one_of = f"{', '.join(known[:-1])} or {known[-1]}" if len(known) > 1 else known[0]
        raise InputError(f"enlarge is {factor}, and a network of scale {scale} enlarges by {one_of}; set it to one")
    return powers[factor]


class Passes:
    """A network run on a picture several times, tile by tile.

    Between two passes a picture has 8 bits, as if it had been written to a file; only a row of tiles is held as float.

    Args:
        network: From (1, 3, h, w) uint8 to (1, 3, s h, s w) in [0, 1], about.
        scale: s.
        number: Passes.
        tiling: How pictures are cut.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], scale: int, number: int, tiling: Tiling) -> None:
        self.network = network
        self.scale = scale
        self.number = number
        self.tiling = tiling

    def whole(self, picture: Tensor) -> Tensor:
        """Return the enlarged picture (3, f H, f W) uint8 of (3, H, W) uint8."""
        for _ in range(self.number):
            picture = enlarge_whole(self.network, picture, self.scale, self.tiling)
        return picture

    def in_bands(self, picture: Tensor, title: str | None = None) -> PictureInBands:
        """Return the enlarged picture, whose rows are made when they are asked for.

        Args:
            picture: (3, H, W) uint8.
            title: What a progress bar over the tiles is called; None: no bar.
        """
        factor = self.scale**self.number
        height, width = picture.shape[1:]
        return PictureInBands(height * factor, width * factor, self._bands(picture, title))

    def num_tiles(self, height: int, width: int) -> int:
        """Return how often the network runs for a picture of this size, over all passes."""
        sizes = [self.scale**number for number in range(self.number)]
        return sum(num_tiles(height * size, width * size, self.tiling) for size in sizes)

    def _bands(self, picture: Tensor, title: str | None) -> Iterator[Tensor]:
        total = self.num_tiles(*picture.shape[1:])
        with tqdm(total=total, desc=title, unit="tile", leave=False, disable=title is None) as bar:

            def network(window: Tensor) -> Tensor:
                large = self.network(window)
                bar.update()
                return large

            for _ in range(self.number - 1):
                picture = enlarge_whole(network, picture, self.scale, self.tiling)
            yield from enlarge_in_bands(network, picture, self.scale, self.tiling)
