"""How likely pixels are, by what a decoder says of them: probabilities of 8-bit values, not densities.

Legend: B pictures, C channels, H rows and W columns.

A density of pixels in [0, 1] has no upper bound where many pixels share a value, so its bits per dimension can be
below what any file could reach. These are probabilities of the values that pixels can have, which add up to 1.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.networks.autoencoder import as_pixels

Likelihood = Literal["logistic", "bernoulli"]

NUMBERS: dict[str, int] = {"logistic": 2, "bernoulli": 1}
"""What a decoder says of each pixel and channel: location and log scale; the logit of white."""

# half the distance of two pixel values in [-1, 1]
_HALF_STEP = 1 / 255
# below it all of a logistic's probability is one value's: as in Salimans et al. 2017
_LEAST_LOG_SCALE = -7.0
# a new network's scale is a seventh of the range
_FIRST_LOG_SCALE = -2.0


def log_likelihood(name: Likelihood, pixels: Tensor, images: Tensor) -> Tensor:
    """Return (B,) float32 the log probability of each picture in nats, summed over its pixels.

    Args:
        name: Which distribution.
        pixels: (B, P C, H, W) what the decoder says.
        images: (B, C, H, W) uint8.
    """
    if name == "bernoulli":
        # of white log sigmoid(logit), of black log(1 - sigmoid(logit))
        found = -F.binary_cross_entropy_with_logits(pixels, images.to(pixels.dtype) / 255, reduction="none")
    else:
        location, raw = pixels.chunk(2, dim=1)
        found = discretized_logistic(images, location, log_scale(raw))
    return found.flatten(1).sum(1)


def discretized_logistic(images: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log probability of each pixel: that of a logistic variable which falls nearest to its value.

    The lowest and the highest value have everything beyond them too.

    Source:
        Salimans et al. 2017, "PixelCNN++", equation 2, of one component. For cdf(a) - cdf(b) we write
        cdf(a) cdf(-b) (1 - exp(b - a)), which is the same and loses no digits where both are near 0 or 1.

    Args:
        images: uint8.
        location: In [-1, 1] for the pixels that there are.
        log_scale: Logarithm of the scale, in the same unit.
    """
    values = images.to(location.dtype) / 127.5 - 1
    inverse = (-log_scale).exp()
    above = (values + _HALF_STEP - location) * inverse
    below = (values - _HALF_STEP - location) * inverse
    lowest, highest = images == 0, images == 255
    inside = torch.log(-torch.expm1(-2 * _HALF_STEP * inverse))
    return (
        F.logsigmoid(above).masked_fill(highest, 0.0)
        + F.logsigmoid(-below).masked_fill(lowest, 0.0)
        + inside.masked_fill(lowest | highest, 0.0)
    )


def log_scale(raw: Tensor) -> Tensor:
    """Return what a decoder says of scales as their logarithms, which stay above -7."""
    return F.softplus(raw + _FIRST_LOG_SCALE - _LEAST_LOG_SCALE) + _LEAST_LOG_SCALE


def most_likely(name: Likelihood, pixels: Tensor) -> Tensor:
    """Return (B, C, H, W) uint8, the picture without the noise of its pixels: the location, or black and white."""
    if name == "bernoulli":
        return (pixels > 0).to(torch.uint8) * 255
    return as_pixels(pixels.chunk(2, dim=1)[0])


def check_binary(images: Tensor) -> None:
    """Refuse gray pixels, of which a Bernoulli distribution gives no probability.

    Raises:
        InputError: a pixel is neither 0 nor 255.
    """
    gray = (images != 0) & (images != 255)
    if bool(gray.any()):
        raise InputError(
            f"the pictures hold the pixel value {int(images[gray][0])}, and likelihood bernoulli is of black and white "
            f"alone, 0 and 255: of gray pixels its numbers are no probabilities; set model.likelihood to logistic"
        )


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return for each latent dimension the KL divergence in nats of its distribution from the standard normal one.

    Source:
        Kingma and Welling 2013, "Auto-Encoding Variational Bayes", equation 10 and appendix B: the terms of its sum
        over dimensions j with the other sign, 1/2 (mean^2 + variance - 1 - log variance).
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def bits_per_dim(nats: Tensor, num_values: int) -> Tensor:
    """Return nats of a picture as bits for each of its values, C H W of them."""
    return nats / (num_values * math.log(2))
