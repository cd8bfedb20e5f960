"""Networks of autoencoders: pictures of any size to a code and back."""

import pytest
import torch

from lightning_bigmodels.networks.autoencoder import (
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    DenseDecoder,
    DenseEncoder,
    PictureCoder,
    as_pixels,
    halved_sizes,
    scaled,
)
from lightning_bigmodels.networks.codebook import VectorQuantizer

SHAPES = [(1, 28, 28), (3, 5, 7), (5, 1, 1), (3, 33, 16)]


def coder(kind, shape=(3, 5, 7)):
    """Return a small network of each kind; its codes have four values."""
    if kind == "dense":
        return PictureCoder(DenseEncoder(shape, 8, (6,)), DenseDecoder(shape, 4, 2, (6,)), (4,), gaussian=True)
    flat = kind == "vector"
    encoder = ConvolutionalEncoder(shape, 8 if flat else 4, (4, 6), 1, flat)
    decoder = ConvolutionalDecoder(shape, 4, 2, (4, 6), 1, flat)
    place = halved_sizes(shape[1:], 2)[-1]
    if flat:
        return PictureCoder(encoder, decoder, (4,), gaussian=True)
    return PictureCoder(encoder, decoder, (4, *place), quantizer=VectorQuantizer(5, 4))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["dense", "vector", "codebook"])
def test_codes_and_pictures_have_their_shapes(kind, shape):
    with torch.device("meta"):
        network = coder(kind, shape)
        coded = network(torch.zeros(2, *shape, dtype=torch.uint8))
    assert coded.code.shape == (2, *network.latent_shape)
    assert coded.pixels.shape == (2, 2 * shape[0], *shape[1:])
    assert (coded.log_variance is None) == (coded.unquantized is not None) == (kind == "codebook")


@pytest.mark.parametrize("kind", ["dense", "vector", "codebook"])
def test_every_parameter_gets_a_gradient(kind):
    torch.manual_seed(0)
    network = coder(kind)
    images = torch.randint(256, (4, 3, 5, 7), dtype=torch.uint8)
    coded = network(images, torch.randn(4, 4) if network.gaussian else None)
    (coded.pixels.square().sum() + coded.code.square().sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_side_is_halved_rounding_up():
    assert halved_sizes((5, 28), 3) == [(5, 28), (3, 14), (2, 7), (1, 4)]


def test_pixels_survive_scaling():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert scaled(pixels).aminmax() == (-1, 1)
    assert torch.equal(as_pixels(scaled(pixels)), pixels)
    assert torch.equal(as_pixels(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8))


def test_the_decoder_sees_the_mean_or_as_far_from_it_as_the_noise_says():
    torch.manual_seed(0)
    network = coder("vector").eval()
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, log_variance = network.encode(images)
    assert torch.equal(network(images).pixels, network.decode(mean))
    assert torch.equal(network(scaled(images)).pixels, network(images).pixels)
    normal = torch.randn(2, 4)
    point = mean + log_variance.exp().sqrt() * normal
    assert torch.allclose(network(images, normal).pixels, network.decode(point), atol=1e-6)


def test_a_variance_stays_a_number():
    network = coder("dense")
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.mul_(1e6)
        _, log_variance = network.encode(torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8))
    assert log_variance.exp().isfinite().all()
    assert (log_variance.exp() > 0).all()
