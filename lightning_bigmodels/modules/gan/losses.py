"""What generator and discriminator learn from, and penalties on the discriminator's slope.

All losses are of a single picture: the caller takes means. Legend: B pictures.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Judge = Callable[[Tensor], Tensor]
"""From pictures (B, C, H, W) to (B,) logits, the higher the more real they seem."""

LossName = Literal["non_saturating", "hinge", "least_squares", "wasserstein"]


class AdversarialLoss(NamedTuple):
    """Each is a function of logits (B,), and returns losses (B,).

    Attributes:
        real: What the discriminator minimizes on real pictures.
        made: What it minimizes on the generator's.
        generator: What the generator minimizes on its own.
    """

    real: Callable[[Tensor], Tensor]
    made: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


LOSSES: dict[str, AdversarialLoss] = {
    "non_saturating": AdversarialLoss(lambda x: F.softplus(-x), F.softplus, lambda x: F.softplus(-x)),
    "hinge": AdversarialLoss(lambda x: F.relu(1 - x), lambda x: F.relu(1 + x), torch.neg),
    "least_squares": AdversarialLoss(
        lambda x: 0.5 * (x - 1).square(), lambda x: 0.5 * x.square(), lambda x: 0.5 * (x - 1).square()
    ),
    "wasserstein": AdversarialLoss(torch.neg, lambda x: x, torch.neg),
}
"""The losses by name.

Source: Goodfellow et al. 2014, section 3, in the form that does not saturate; Miyato et al. 2018, equations 16 and 17
(hinge); Mao et al. 2017, equation 9 (least squares, with a = 0 and b = c = 1); Arjovsky et al. 2017, algorithm 1.
"""


def slopes(judge: Judge, pictures: Tensor) -> Tensor:
    """Return (B, C H W) float32 the gradient of each picture's logit, through which gradients pass.

    Args:
        judge: The discriminator, in which pictures know nothing of each other.
        pictures: (B, C, H, W).
    """
    # half precision has too few digits for a slope's slope, and no loss scaling on the way
    with torch.enable_grad(), torch.autocast(pictures.device.type, enabled=False):
        pictures = pictures.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(judge(pictures).sum(), pictures, create_graph=True)
    return gradient.flatten(1)


def gradient_penalty(slopes: Tensor) -> Tensor:
    """Return (B,) the squared distance from 1 of how steep the discriminator is.

    Source: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", equation 3 without its weight.

    Args:
        slopes: (B, C H W) at mixtures of a real and a made picture each.
    """
    # the root's own slope is infinite at 0
    return ((slopes.square().sum(1) + 1e-12).sqrt() - 1).square()


def r1_penalty(slopes: Tensor) -> Tensor:
    """Return (B,) half the square of how steep the discriminator is.

    Source: Mescheder et al. 2018, "Which Training Methods for GANs do actually Converge?", equation 9 without gamma.

    Args:
        slopes: (B, C H W) at real pictures.
    """
    return 0.5 * slopes.square().sum(1)
