"""Two networks against each other in one backward pass and under one optimizer."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdversarialLoss(NamedTuple):
    """What both networks learn from; the sum of `total` is to be minimized by both.

    Attributes:
        total: Its gradient is, for the generator, that of `weight` times `generator`, and, for the discriminator, that
            of `discriminator`.
        generator: How surely the discriminator tells that what was made is not real; detached.
        discriminator: How wrong the discriminator is; detached.
    """

    total: Tensor
    generator: Tensor
    discriminator: Tensor


def adversarial_loss(
    judge: nn.Module, real: Tensor, made: Tensor, weight: float, counted: Tensor | None = None
) -> AdversarialLoss:
    """Return the loss of both networks, computed from one forward pass of the discriminator.

    Source: Ledig et al. 2017, "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network"
    (SRGAN), equations 2 and 6: cross entropy, in its form that does not saturate. Where we differ: both networks step
    at once, from gradients at the same point, and not in turns; so any Trainer, accumulation, clipping and resume work
    as for a single network. Wang et al. 2018, "ESRGAN", add a relativistic discriminator, which we leave out.

    Args:
        judge: The discriminator, from (B, 3, H, W) in [0, 1] to logits (B, 1, h, w).
        real: (B, 3, H, W), in [0, 1].
        made: (B, 3, H, W), by the generator.
        weight: Of the generator's part.
        counted: (B,) 1 for pictures that count, 0 for others; None: all count.
    """
    # one call, in which the weights are the same throughout: spectral norm moves on with each call
    logits = judge(torch.cat([real.to(made.dtype), made.detach(), made])).float()
    of_real, of_made, of_made_with_gradient = logits.chunk(3)
    counts = torch.ones(len(made), device=made.device) if counted is None else counted.to(logits.dtype)

    def mean(losses: Tensor) -> Tensor:
        return (losses.mean((1, 2, 3)) * counts).sum() / counts.sum().clamp(min=1)

    discriminator = mean(F.softplus(-of_real)) + mean(F.softplus(of_made))
    generator = mean(F.softplus(-of_made_with_gradient))
    # the generator's part would teach the discriminator the contrary; the same on detached pictures takes that back
    takes_back = mean(F.softplus(-of_made))
    total = discriminator + weight * (generator - takes_back)
    return AdversarialLoss(total, generator.detach(), discriminator.detach())
