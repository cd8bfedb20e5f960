"""From pixels as they were decoded to what a network of images takes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PixelNetwork(nn.Module):
    """A network behind the scaling and normalization of its pixels, so that both are in checkpoints and exports.

    Args:
        body: Takes (B, C, H, W) of its own dtype, normalized.
        mean: Mean of each of the C channels, of pixels in [0, 1].
        std: Standard deviation of each.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """Return (B, C, H, W) pixels, uint8 or in [0, 1], normalized."""
        if images.is_floating_point():
            return (images.to(self.mean.dtype) - self.mean) / self.std
        # in place on the copy: memory, not arithmetic, takes the time (a picture of 224 x 224: 0.3 in place of 1.3 ms)
        return images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)

    def forward(self, images: Tensor) -> Tensor:
        """Return what the body makes of (B, C, H, W) pixels, uint8 or in [0, 1]."""
        return self.body(self.normalize(images))


def as_weights(x: Tensor, network: nn.Module) -> Tensor:
    """Return a network's input in the precision of its weights; noise and latents are of float32 whatever that is."""
    return x.to(next(network.parameters()).dtype)


def statistics(
    channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel: those given, ImageNet's for three channels, else one half."""
    default = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    return (
        tuple(default[0] if mean is None else mean),
        tuple(default[1] if std is None else std),
    )
