"""EDSR: shapes, gradients, how far it sees, and that it begins near bicubic."""

import pytest
import torch
import torch.nn.functional as F

from lightning_bigmodels.networks.edsr import EDSR, MEAN, SCALES, STD, Enlarger


def enlarger(scale=2, num_blocks=2, num_features=4):
    torch.manual_seed(0)
    return Enlarger(EDSR(scale, num_blocks, num_features), MEAN, STD)


@pytest.mark.parametrize("scale", SCALES)
def test_it_enlarges_any_size_by_its_scale(scale):
    with torch.device("meta"):
        network = Enlarger(EDSR(scale), MEAN, STD)
        assert network(torch.zeros(2, 3, 5, 7)).shape == (2, 3, 5 * scale, 7 * scale)


def test_the_baseline_has_the_papers_number_of_parameters():
    with torch.device("meta"):
        # table 1 of Lim et al. 2017 says 1.5 M for the baseline and 43 M for the large one, at scale 4
        baseline, large = EDSR(4), EDSR(4, num_blocks=32, num_features=256, residual_scale=0.1)
    assert sum(p.numel() for p in baseline.parameters()) == 1_517_571
    assert sum(p.numel() for p in large.parameters()) == 43_089_923


@pytest.mark.parametrize("scale", SCALES)
def test_every_parameter_gets_a_gradient(scale):
    network = enlarger(scale)
    network(torch.rand(1, 3, 8, 8)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_an_output_pixel_sees_just_as_far_as_the_radius_says(scale, num_blocks):
    network = enlarger(scale, num_blocks).double()
    for parameter in network.parameters():
        parameter.data.abs_()  # no path through the network cancels another
    radius, middle = network.body.radius, 20
    seen = torch.zeros(41, dtype=torch.bool)
    for phase in range(scale):
        images = torch.rand(1, 3, 41, 41, dtype=torch.float64, requires_grad=True)
        network(images)[0, :, middle * scale + phase, middle * scale + phase].sum().backward()
        seen |= images.grad.abs().sum((0, 1, 2)) > 0
    places = seen.nonzero().flatten()
    assert middle - places.min() <= radius
    assert places.max() - middle <= radius
    # and it is no larger than it must be, since tiles pay for it
    assert max(middle - places.min(), places.max() - middle) == radius


def test_pixels_may_be_bytes_or_fractions():
    network = enlarger()
    pixels = torch.randint(256, (1, 3, 6, 6), dtype=torch.uint8)
    assert torch.allclose(network(pixels), network(pixels / 255))


def test_without_its_last_layer_it_is_bicubic():
    network = enlarger()
    torch.nn.init.zeros_(network.body.tail.weight)
    torch.nn.init.zeros_(network.body.tail.bias)
    images = torch.rand(1, 3, 6, 6)
    assert torch.allclose(network(images), F.interpolate(images, scale_factor=2.0, mode="bicubic"), atol=1e-6)


def test_another_scale_is_refused():
    with pytest.raises(ValueError, match="scale is 5; EDSR enlarges by 2, 3, 4"):
        EDSR(5)
