"""The U-Net: a network that gives each pixel of a picture a value for each class."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Convolutions on ever coarser maps and back up again, each step up beside the map of its own resolution.

    Source: Ronneberger et al. 2015, "U-Net", figure 1, whose network has depth 4 and width 64. Here convolutions are
    padded, so that the output is as large as the input and nothing is cropped; a norm follows each convolution; no
    dropout. On the way up the channels are halved by a 1x1 convolution and the map is enlarged bilinearly to exactly
    the size of the map beside it, in place of the paper's 2x2 up-convolution: pictures of any size go through, odd ones
    too, and no checkerboard can form.

    Args:
        channels: Channels of a picture.
        num_classes: Values for each pixel.
        depth: How often the resolution is halved, 0 or more.
        width: Channels at full resolution; they double with each halving.
        norm: `batch`, or `group` (groups of 8 channels, at least one group), which does not depend on the batch's size.
    """

    def __init__(
        self, channels: int = 3, num_classes: int = 2, depth: int = 4, width: int = 64, norm: str = "batch"
    ) -> None:
        super().__init__()
        if depth < 0 or width < 1 or norm not in ("batch", "group"):
            raise ValueError(
                f"depth is {depth}, width {width}, norm {norm!r}; set depth to 0 or more, width to 1 or more, norm to "
                f"batch or group"
            )
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _two_convolutions(before, after, norm)
            for before, after in zip([channels, *widths[:-1]], widths, strict=True)
        )
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # from the coarsest map to the finest
        self.halve = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for coarse, fine in steps)
        self.up = nn.ModuleList(_two_convolutions(2 * fine, fine, norm) for _, fine in steps)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, K, H, W) logits of (B, C, H, W) pictures."""
        x = self.down[0](images)
        finer = []
        for convolutions in self.down[1:]:
            finer.append(x)
            # the last row and column of an odd size are a window too, so that no map vanishes; no value is below the
            # zeros, and `ceil_mode` would tie an export to one size
            x = convolutions(F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2))
        for halve, convolutions in zip(self.halve, self.up, strict=True):
            beside = finer.pop()
            # the 1x1 convolution and the interpolation may change places, and here it has a quarter of the pixels
            x = F.interpolate(halve(x), size=beside.shape[-2:], mode="bilinear", align_corners=False)
            x = convolutions(torch.cat([beside, x], dim=1))
        return self.head(x)


def _two_convolutions(before: int, after: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        # the norm has a bias of its own
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), _norm(norm, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _norm(name: str, channels: int) -> nn.Module:
    if name == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)
