"""Probabilities of pixels that add up to one, and the KL divergence as in the paper."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.autoencoder.likelihoods import (
    bits_per_dim,
    check_binary,
    discretized_logistic,
    gaussian_kl,
    log_likelihood,
    log_scale,
    most_likely,
)

VALUES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("location", [-7.0, -1.0, 0.013, 0.9, 3.0])
@pytest.mark.parametrize("scale", [-7.0, -3.0, 0.0, 2.0])
def test_probabilities_of_all_values_add_up_to_one(location, scale):
    one = torch.ones(256, dtype=torch.float64)
    probabilities = discretized_logistic(VALUES, location * one, scale * one).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-9)


def test_a_probability_is_that_of_a_logistic_variable_nearest_to_the_value():
    location, scale = 0.2, 0.05
    values = VALUES.double() / 127.5 - 1
    upper = torch.sigmoid((values + 1 / 255 - location) / scale)
    lower = torch.sigmoid((values - 1 / 255 - location) / scale)
    upper[255], lower[0] = 1, 0
    one = torch.ones(256)
    found = discretized_logistic(VALUES, location * one, math.log(scale) * one).exp()
    assert torch.allclose(found.double(), upper - lower, atol=1e-6)


def test_no_pixel_is_likelier_than_certain():
    torch.manual_seed(0)
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    pixels = torch.randn(3, 2, 4, 4) * 20
    assert (log_likelihood("logistic", pixels, images) <= 0).all()
    assert (log_scale(torch.tensor([-1e4, 0.0, 1e4])) >= -7).all()


def test_a_bernoulli_is_torch_s():
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 4, 4)
    images = torch.randint(2, (3, 2, 4, 4), dtype=torch.uint8) * 255
    expected = Bernoulli(logits=logits).log_prob(images / 255).flatten(1).sum(1)
    assert torch.allclose(log_likelihood("bernoulli", logits, images), expected, atol=1e-5)
    assert torch.equal(most_likely("bernoulli", logits) == 255, logits > 0)


def test_pictures_are_the_locations():
    pixels = torch.cat([torch.tensor([-2.0, 0.0, 1.0]).view(1, 1, 1, 3), torch.randn(1, 1, 1, 3)], dim=1)
    assert most_likely("logistic", pixels).flatten().tolist() == [0, 128, 255]


def test_gray_pixels_have_no_bernoulli():
    check_binary(torch.tensor([0, 255], dtype=torch.uint8))
    with pytest.raises(InputError, match="pixel value 7, .* set model.likelihood to logistic"):
        check_binary(torch.tensor([0, 7, 255], dtype=torch.uint8))


def test_the_kl_divergence_is_that_of_the_paper():
    # by hand: mean 1 and variance 1 cost half a nat; mean 0 and variance e^2 cost (e^2 - 1 - 2) / 2
    found = gaussian_kl(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 2.0]))
    assert found.tolist() == pytest.approx([0, 0.5, (math.e**2 - 3) / 2])
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 5, 6)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    assert torch.allclose(gaussian_kl(mean, log_variance), expected, atol=1e-5)


def test_bits_of_uniform_pixels_are_eight():
    assert bits_per_dim(torch.tensor(12 * math.log(256)), 12).item() == pytest.approx(8)
