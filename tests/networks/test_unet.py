"""The U-Net: sizes, gradients, what a pixel sees, and its parameters counted by hand."""

import pytest
import torch
from torch import nn

from lightning_bigmodels.networks.unet import UNet


@pytest.mark.parametrize(
    ("depth", "width", "channels", "norm"), [(0, 3, 1, "batch"), (1, 8, 3, "group"), (3, 4, 5, "batch")]
)
def test_any_depth_width_and_number_of_channels_on_meta(depth, width, channels, norm):
    with torch.device("meta"):
        network = UNet(channels, 7, depth=depth, width=width, norm=norm)
        assert network(torch.empty(2, channels, 33, 40)).shape == (2, 7, 33, 40)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 17), (16, 16), (31, 8)])
def test_any_size_goes_through_and_every_parameter_gets_a_gradient(size):
    torch.manual_seed(0)
    network = UNet(3, 4, depth=3, width=4, norm="group")
    output = network(torch.rand(2, 3, *size))
    assert output.shape == (2, 4, *size)
    output.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
    if min(size) > 1:  # at a size of one pixel the norm of a group leaves nothing of some channels
        assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_the_papers_network_has_its_number_of_parameters():
    # 3x3 convolutions of figure 1, a norm of two values for each output channel in place of a bias
    def pair(before, after):
        return 9 * before * after + 9 * after * after + 4 * after

    widths = [64, 128, 256, 512, 1024]
    down = pair(1, 64) + sum(pair(a, 2 * a) for a in widths[:-1])
    up = sum(2 * a * a + a + pair(2 * a, a) for a in widths[:-1])
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(1, 2).parameters()) == down + up + 64 * 2 + 2


def seen(depth):
    """Return how far from the middle pixel the input moves its output."""
    torch.manual_seed(0)
    network = UNet(1, 1, depth=depth, width=4).eval()
    images = torch.rand(1, 1, 65, 65, requires_grad=True)
    network(images)[0, 0, 32, 32].backward()
    rows = images.grad[0, 0].abs().sum(1).nonzero().flatten()
    return int((rows - 32).abs().max())


def test_each_halving_widens_what_a_pixel_sees():
    assert seen(0) == 2  # two convolutions of 3x3
    assert 2 < seen(1) < seen(2) < seen(3)


def test_without_its_steps_beside_fine_detail_would_be_lost():
    # a picture's single pixel moves the output of its own place most, which no map of half the resolution could tell
    torch.manual_seed(0)
    network = UNet(1, 1, depth=2, width=8).eval()
    plain = torch.zeros(1, 1, 32, 32)
    for place in [(16, 16), (17, 16), (16, 17)]:
        other = plain.clone()
        other[0, 0, place[0], place[1]] = 5.0
        change = (network(other) - network(plain)).abs()[0, 0]
        assert (change > 0.2 * change.max()).nonzero().float().mean(0).sub(torch.tensor(place)).abs().max() < 1.5


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="depth is -1, .*set depth to 0 or more"):
        UNet(depth=-1)
    with pytest.raises(ValueError, match="norm 'layer'; .* norm to batch or group"):
        UNet(norm="layer")


def test_the_norm_is_the_one_named():
    assert any(isinstance(module, nn.BatchNorm2d) for module in UNet(width=8, depth=1).modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in UNet(width=8, depth=1, norm="group").modules())
