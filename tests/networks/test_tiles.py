"""Tiles: the whole picture's result where they see enough, no seams where they see less, little memory."""

import pytest
import torch

from lightning_bigmodels.networks.edsr import EDSR, MEAN, STD, Enlarger
from lightning_bigmodels.networks.tiles import Tiling, enlarge_in_bands, enlarge_whole, num_tiles, to_uint8


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = Enlarger(EDSR(2, 2, 8), MEAN, STD)
    return lambda window: network(window).detach()


def photo(height, width):
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def untiled(network, picture):
    return to_uint8(network(picture[None])[0])


SIZES = [(70, 93), (16, 16), (5, 64), (33, 1), (1, 1)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("overlap", [8, 11])
def test_an_overlap_that_covers_the_reach_gives_the_whole_pictures_result(network, height, width, overlap):
    picture = photo(height, width)
    found = enlarge_whole(network, picture, 2, Tiling(16, overlap, exact=True))
    expected = untiled(network, picture)
    assert found.shape == expected.shape
    # float sums in another order may fall on the other side of a half
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


def test_an_overlap_that_covers_less_does_not(network):
    picture = photo(70, 93)
    found = enlarge_whole(network, picture, 2, Tiling(16, 3, exact=True))
    assert (found.int() - untiled(network, picture).int()).abs().max() > 1


def nearest(window):
    return (window / 255).repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("multiple", [1, 4])
def test_blended_weights_sum_to_one_everywhere(height, width, multiple):
    picture = photo(height, width)
    tiling = Tiling(16, 4, exact=False, multiple=multiple)
    assert torch.equal(enlarge_whole(nearest, picture, 2, tiling), untiled(nearest, picture))


def test_blending_leaves_no_seam():
    """Of tiles that differ by a constant, neighbours run into each other in even steps."""
    calls = []

    def drifting(window):
        calls.append(window.shape)
        return torch.full((1, 3, 2 * window.shape[2], 2 * window.shape[3]), 0.2 * len(calls))

    large = enlarge_whole(drifting, photo(16, 64), 2, Tiling(16, 4, exact=False)).int()
    assert len(calls) == 4
    steps = (large[0, 0, 1:] - large[0, 0, :-1]).abs()
    # 51 levels over 2 x 4 x 2 pixels
    assert 3 <= steps.max() <= 4
    assert large[0, 0, 0] == 51
    assert large[0, 0, -1] == 204


def test_tiles_begin_where_windows_begin():
    starts = []

    def remember(window):
        starts.append((int(window[0, 0, 0, 0]), window.shape[-1]))
        return nearest(window)

    picture = torch.arange(90, dtype=torch.uint8).expand(3, 1, 90)
    enlarge_whole(remember, picture, 2, Tiling(32, 8, exact=False, multiple=8))
    assert all(start % 8 == 0 for start, _ in starts)
    assert all((start + width) % 8 == 0 for start, width in starts[:-1])


def test_bands_follow_each_other_and_only_a_row_of_tiles_is_held(network):
    picture = photo(100, 40)
    tiling = Tiling(16, 8, exact=True)
    bands = list(enlarge_in_bands(network, picture, 2, tiling))
    assert len(bands) == 7
    assert all(band.dtype == torch.uint8 and band.shape[1] <= 32 for band in bands)
    assert torch.equal(torch.cat(bands, dim=1), enlarge_whole(network, picture, 2, tiling))


def test_the_number_of_tiles_is_that_of_the_networks_calls():
    calls = []

    def count(window):
        calls.append(1)
        return nearest(window)

    for exact in (True, False):
        tiling = Tiling(16, 4, exact)
        calls.clear()
        enlarge_whole(count, photo(50, 70), 2, tiling)
        assert num_tiles(50, 70, tiling) == len(calls)


def test_no_tile_is_larger_than_it_may_be():
    shapes = []

    def remember(window):
        shapes.append(window.shape[-2:])
        return nearest(window)

    for length in range(1, 70):
        enlarge_whole(remember, photo(3, length), 2, Tiling(16, 8, exact=True))
    assert max(max(shape) for shape in shapes) <= 16 + 2 * 8 + 8
