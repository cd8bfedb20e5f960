"""EDSR: a plain residual network that enlarges pictures by 2, 3 or 4.

Legend: B pictures, C features, H rows and W columns of the small picture, s the scale.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bigmodels.networks.pixels import PixelNetwork

SCALES = (2, 3, 4)
# of DIV2K's training photos (Lim et al. 2017); pixels keep their spread
MEAN = (0.4488, 0.4371, 0.4040)
STD = (1.0, 1.0, 1.0)


class Enlarger(PixelNetwork):
    """A network that enlarges, with pixels going in and coming out.

    Args:
        body: From (B, 3, H, W), normalized, to (B, 3, s H, s W), normalized.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 3, s H, s W) pixels, about in [0, 1], of (B, 3, H, W) pixels, uint8 or in [0, 1]."""
        return self.body(self.normalize(images)) * self.std + self.mean


class ResidualBlock(nn.Module):
    """Two convolutions with a ReLU between them and no normalization (Lim et al. 2017, figure 2c).

    Args:
        num_features: Channels in and out.
        residual_scale: Factor on what the block adds.
    """

    def __init__(self, num_features: int, residual_scale: float) -> None:
        super().__init__()
        self.first = _convolution(num_features, num_features)
        self.second = _convolution(num_features, num_features)
        self.residual_scale = residual_scale

    def forward(self, features: Tensor) -> Tensor:
        """Return features (B, C, H, W) of (B, C, H, W)."""
        return features + self.residual_scale * self.second(F.relu(self.first(features)))


class EDSR(nn.Module):
    """Residual blocks at the small size, then sub-pixel convolutions up to the large one.

    Source: Lim et al. 2017, "Enhanced Deep Residual Networks for Single Image Super-Resolution", figure 3. Where we
    differ: the network's output is added to a bicubic enlargement of its input, so that it learns only what bicubic
    lacks. It begins near bicubic's error, and under bfloat16 only this small part is computed in 8 bits of mantissa.
    Their baseline has 16 blocks of 64 features; their large network 32 of 256, with a residual scale of 0.1.

    Args:
        scale: 2, 3 or 4.
        num_blocks: Residual blocks.
        num_features: Channels of every layer.
        residual_scale: Factor on what each block adds; 0.1 steadies networks of 256 features.

    Raises:
        ValueError: the scale is another one.
    """

    def __init__(
        self, scale: int = 2, num_blocks: int = 16, num_features: int = 64, residual_scale: float = 1.0
    ) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"scale is {scale}; EDSR enlarges by {', '.join(map(str, SCALES))}")
        self.scale = scale
        self.head = _convolution(3, num_features)
        blocks = [ResidualBlock(num_features, residual_scale) for _ in range(num_blocks)]
        self.blocks = nn.Sequential(*blocks)
        self.neck = _convolution(num_features, num_features)
        stages: list[nn.Module] = []
        for factor in (2, 2) if scale == 4 else (scale,):
            stages += [_convolution(num_features, factor**2 * num_features), nn.PixelShuffle(factor)]
        self.upsampler = nn.Sequential(*stages)
        self.tail = _convolution(num_features, 3)

    @property
    def radius(self) -> int:
        """Pixels of the input, in each direction, beyond which none has a part in an output pixel."""
        # one each: head, neck, the upsampler's first convolution, and all that lies at larger sizes
        return 2 * len(self.blocks) + 4

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 3, s H, s W) of (B, 3, H, W), both normalized."""
        features = self.head(images)
        features = features + self.neck(self.blocks(features))
        details = self.tail(self.upsampler(features))
        return details + F.interpolate(images, scale_factor=float(self.scale), mode="bicubic")


def _convolution(num_in: int, num_out: int) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, kernel_size=3, padding=1)
