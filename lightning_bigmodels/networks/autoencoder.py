"""Autoencoders of pictures: from pixels to a code and back.

Legend: B pictures, C channels, H rows and W columns; D values of a code; F features, h rows and w columns of the
coarsest map. Codes are vectors (B, D) or maps (B, D, h, w). P numbers describe a pixel of a channel: 1 its value, 2 a
distribution of it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_bigmodels.networks.codebook import VectorQuantizer

# of a variance's logarithm: exp of it is neither 0 nor infinite in float32, as in diffusers
_LEAST_LOG_VARIANCE, _MOST_LOG_VARIANCE = -30.0, 20.0


class ResidualBlock(nn.Module):
    """Adds to a map what a ReLU, a 3x3 convolution, a ReLU and a 1x1 convolution make of it.

    Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", section 4.1.

    Args:
        width: F, in and out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, width, 3, padding=1)
        self.narrow = nn.Conv2d(width, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, F, h, w) of (B, F, h, w)."""
        return features + self.narrow(self.wide(features.relu()).relu())


class ConvolutionalEncoder(nn.Module):
    """Convolutions of stride 2, then residual blocks, then one layer to the code.

    Source: van den Oord et al. 2017, section 4.1. Where we differ: windows of 3 in place of 4, with which a side that
    two does not divide is rounded up, so that pictures of any size go through; and a code that is a vector has a linear
    layer of its own.

    Args:
        image_shape: C, H and W.
        num_out: Values of the code: D, or 2 D where mean and variance are wanted.
        widths: Features behind each halving.
        num_blocks: Residual blocks at the coarsest size.
        flat: Whether the code is a vector.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_out: int,
        widths: Sequence[int] = (32, 64),
        num_blocks: int = 2,
        flat: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((image_shape[0], *widths[:-1]), widths, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        layers.pop()  # a residual block begins with one
        layers += [*(ResidualBlock(widths[-1]) for _ in range(num_blocks)), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        rows, columns = halved_sizes(image_shape[1:], len(widths))[-1]
        self.head = (
            nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * rows * columns, num_out))
            if flat
            else nn.Conv2d(widths[-1], num_out, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the code's values, (B, num_out) or (B, num_out, h, w), of pictures (B, C, H, W) in [-1, 1]."""
        return self.head(self.features(images))


class ConvolutionalDecoder(nn.Module):
    """The mirror of `ConvolutionalEncoder`, with transposed convolutions, whose maps are cut to the encoder's sizes.

    Source: van den Oord et al. 2017, section 4.1.

    Args:
        image_shape: C, H and W.
        num_in: D.
        num_out: P, numbers for each pixel and channel.
        widths: Features before each halving is undone, as the encoder's.
        num_blocks: Residual blocks at the coarsest size.
        flat: Whether the code is a vector.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_in: int,
        num_out: int = 1,
        widths: Sequence[int] = (32, 64),
        num_blocks: int = 2,
        flat: bool = True,
    ) -> None:
        super().__init__()
        *finer, coarsest = halved_sizes(image_shape[1:], len(widths))
        width = widths[-1]
        self.sizes = finer[::-1]
        self.stem = (
            nn.Sequential(nn.Linear(num_in, width * coarsest[0] * coarsest[1]), nn.Unflatten(1, (width, *coarsest)))
            if flat
            else nn.Conv2d(num_in, width, 3, padding=1)
        )
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(num_blocks)))
        channels = (*widths[::-1], num_out * image_shape[0])
        # windows of 4 at stride 2 overlap evenly: no checkerboard
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(channels)
        )

    def forward(self, code: Tensor) -> Tensor:
        """Return (B, P C, H, W) of codes (B, D) or (B, D, h, w)."""
        features = self.blocks(self.stem(code))
        for (rows, columns), enlarge in zip(self.sizes, self.enlarge, strict=True):
            features = enlarge(features.relu())[..., :rows, :columns]
        return features


class DenseEncoder(nn.Sequential):
    """Linear layers with ReLUs between them.

    Args:
        image_shape: C, H and W.
        num_out: Values of the code: D, or 2 D where mean and variance are wanted.
        widths: Units of each hidden layer.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_out: int, widths: Sequence[int] = (512, 256)) -> None:
        channels, rows, columns = image_shape
        super().__init__(nn.Flatten(), *_linear_layers([channels * rows * columns, *widths, num_out]))


class DenseDecoder(nn.Sequential):
    """The mirror of `DenseEncoder`.

    Args:
        image_shape: C, H and W.
        num_in: D.
        num_out: P, numbers for each pixel and channel.
        widths: Units of each hidden layer, as the encoder's.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], num_in: int, num_out: int = 1, widths: Sequence[int] = (512, 256)
    ) -> None:
        channels, rows, columns = image_shape
        shape = (num_out * channels, rows, columns)
        super().__init__(
            *_linear_layers([num_in, *widths[::-1], num_out * channels * rows * columns]), nn.Unflatten(1, shape)
        )


class Coded(NamedTuple):
    """What an autoencoder makes of pictures.

    Attributes:
        code: (B, D) or (B, D, h, w); the mean of its distribution where it has one.
        log_variance: As `code`; None: the code is a point.
        chosen: (B, h, w) int64, places in the codebook; None: there is none.
        unquantized: (B, D, h, w), what the codebook has rounded; None: there is none.
        pixels: (B, P C, H, W), what the decoder says of each pixel.
    """

    code: Tensor
    log_variance: Tensor | None
    chosen: Tensor | None
    unquantized: Tensor | None
    pixels: Tensor


class PictureCoder(nn.Module):
    """An encoder and a decoder of pictures, with pixels going in: a plain, a variational or a quantized autoencoder.

    Source: the variational one is Kingma and Welling 2013, "Auto-Encoding Variational Bayes", section 3; the quantized
    one van den Oord et al. 2017, section 3.

    Args:
        encoder: From (B, C, H, W) in [-1, 1] to the code, or to its mean and log variance, one after the other in
            dimension 1.
        decoder: From codes to (B, P C, H, W).
        latent_shape: (D,) or (D, h, w).
        gaussian: Whether a code has a variance.
        quantizer: Rounds codes (B, D, h, w); None: they are not rounded.
        pixel_scales: C where one log scale for each channel is learned apart from the decoder; 0: none is.
    """

    zero: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: tuple[int, ...],
        gaussian: bool = False,
        quantizer: VectorQuantizer | None = None,
        pixel_scales: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = latent_shape
        self.gaussian = gaussian
        self.quantizer = quantizer
        # of the weights' dtype, whatever that becomes, and on their device
        self.register_buffer("zero", torch.zeros(()), persistent=False)
        # a matrix of one row would be decayed
        self.pixel_scales = nn.Parameter(torch.zeros(pixel_scales)) if pixel_scales else None

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the code of each picture, before any rounding, and its log variance if it has one.

        Args:
            images: (B, C, H, W), uint8 or in [-1, 1].
        """
        found = self.encoder(scaled(images).to(self.zero.dtype)).float()
        if not self.gaussian:
            return found, None
        mean, log_variance = found.chunk(2, dim=1)
        return mean, log_variance.clamp(_LEAST_LOG_VARIANCE, _MOST_LOG_VARIANCE)

    def quantize(self, code: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the code and its places in the codebook; without a codebook what is given, and None."""
        return (code, None) if self.quantizer is None else self.quantizer(code)

    def decode(self, code: Tensor) -> Tensor:
        """Return (B, P C, H, W) of codes."""
        pixels = self.decoder(code.to(self.zero.dtype)).float()
        if self.pixel_scales is None:
            return pixels
        scales = self.pixel_scales.float().view(-1, 1, 1).expand_as(pixels)
        return torch.cat([pixels, scales], dim=1)

    @override
    def forward(self, images: Tensor, normal: Tensor | None = None) -> Coded:
        """Encode and decode.

        Args:
            images: (B, C, H, W), uint8 or in [-1, 1].
            normal: As the code, of mean 0 and variance 1: where in the code's distribution the decoder looks; None: at
                the mean.
        """
        code, log_variance = self.encode(images)
        point = code
        if log_variance is not None and normal is not None:
            point = code + (0.5 * log_variance).exp() * normal
        rounded, chosen = self.quantize(point)
        pixels = self.decode(rounded)
        if chosen is None:
            return Coded(code, log_variance, None, None, pixels)
        return Coded(rounded, None, chosen, code, pixels)


def scaled(images: Tensor) -> Tensor:
    """Return pixels in [-1, 1]: of uint8 scaled, of floating point as they are."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def as_pixels(values: Tensor) -> Tensor:
    """Return uint8 pixels of values in [-1, 1]; what lies outside is cut off."""
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def halved_sizes(size: Sequence[int], num_halvings: int) -> list[tuple[int, int]]:
    """Return height and width before and behind each halving, which rounds up."""
    rows, columns = size
    sizes = [(rows, columns)]
    for _ in range(num_halvings):
        rows, columns = -(-rows // 2), -(-columns // 2)
        sizes.append((rows, columns))
    return sizes


def _linear_layers(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]
