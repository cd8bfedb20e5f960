"""The classic first networks of images: a small CNN, and a residual network for pictures of about 32 pixels."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


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


class SmallResNet(nn.Module):
    """Residual network for small pictures: stages of basic blocks, each after the first at half the resolution.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2, of which the default is the
    network of 20 layers; shortcuts that change width are convolutions (option B) in place of padding.

    Args:
        channels: Channels of the pictures.
        num_classes: K, the logits.
        widths: Channels of each stage.
        num_blocks: Blocks of each stage, of two convolutions each.
        stem_stride: Step of the first convolution; 2 quarters the time.
        dropout: Probability with which a feature before the output layer is left out.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        widths: Sequence[int] = (16, 32, 64),
        num_blocks: int = 3,
        stem_stride: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        blocks: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for number in range(num_blocks):
                stride = 2 if stage and number == 0 else 1
                shortcut = None
                if stride > 1 or before != width:
                    shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
                blocks.append(BasicBlock(before, width, stride, shortcut))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of pictures (B, C, H, W)."""
        features = self.pool(self.blocks(self.stem(images))).flatten(1)  # (B, widths[-1])
        return self.head(self.dropout(features))
