"""The classic first network of images."""

import math

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three convolutions, each with max-pooling by two, and one hidden layer of 128 units.

    Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition", figure 2, as it is taught
    today: a third convolution, rectified units in place of sigmoids, maxima in place of means.

    Args:
        channels: Channels of the pictures.
        num_classes: K, the logits.
        image_size: Height and width of the pictures; a side that two does not divide is rounded up by each pooling.
        widths: Channels behind each convolution.
        hidden: Units of the hidden layer.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        image_size: int,
        widths: tuple[int, int, int] = (32, 64, 64),
        hidden: int = 128,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        side = image_size
        for before, after in zip((channels, *widths[:2]), widths, strict=True):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            side = math.ceil(side / 2)
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(widths[-1] * side * side, hidden)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of pictures (B, C, H, W)."""
        features = self.features(images).flatten(1)  # (B, 64 H/8 W/8)
        return self.head(self.hidden(features).relu())
