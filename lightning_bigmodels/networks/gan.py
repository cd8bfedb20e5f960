"""The two networks of a DCGAN, at any power of two, on their own or told the class.

Legend: B pictures, C channels, H = W the picture's side, F features, K classes, L latent numbers.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from typing_extensions import override

Conditioning = Literal["batch_norm", "embedding"]
"""How a generator learns of the class: by gain and bias of each batch norm, or by numbers beside the latent ones."""

Norm = Literal["batch", "layer", "instance", "none"]
"""What a discriminator normalizes over: batch and space, channels and space of each picture, its space, nothing."""

SMALLEST = 8
_FIRST = 4  # the side of what the generator's first layer makes, and of what the discriminator's last one sees
_MOST = 8  # times num_features, at the smallest sides


def is_possible_size(size: int) -> bool:
    """Whether the networks exist for pictures of this side: a power of two from 8 on."""
    return size >= SMALLEST and size & (size - 1) == 0


def next_size(size: int) -> int:
    """Return the smallest side, not below `size`, for which the networks exist."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias belong to the class.

    Source: Dumoulin et al. 2017, "A Learned Representation for Artistic Style", section 2.2.

    Args:
        num_features: F.
        num_classes: K.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, affine=False)
        self.gain = nn.Embedding(num_classes, num_features)
        self.bias = nn.Embedding(num_classes, num_features)
        nn.init.normal_(self.gain.weight, 1.0, 0.02)
        nn.init.zeros_(self.bias.weight)

    @override
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return (B, F, H, W), normalized, of x (B, F, H, W) and labels (B,)."""
        gain, bias = self.gain(labels), self.bias(labels)
        return self.norm(x) * gain[:, :, None, None].to(x.dtype) + bias[:, :, None, None].to(x.dtype)


class Generator(nn.Module):
    """Transposed convolutions of stride 2 from latent numbers to a picture.

    Source: Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
    Networks", figure 1 and section 3: batch norm in all layers but the last, ReLU, tanh at the end, weights from a
    normal distribution of standard deviation 0.02.

    Args:
        image_size: Side of the pictures, a power of two from 8 on.
        channels: C.
        latent_dim: L.
        num_features: F of the last hidden layer; they double towards the first one, up to eight times as many.
        num_classes: K; 0: the pictures are of no class in particular.
        conditioning: How the class comes in.
    """

    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        latent_dim: int = 128,
        num_features: int = 64,
        num_classes: int = 0,
        conditioning: Conditioning = "batch_norm",
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        by_norm = num_classes > 0 and conditioning == "batch_norm"
        self.embedding = None
        inputs = latent_dim
        if num_classes > 0 and not by_norm:
            self.embedding = nn.Embedding(num_classes, latent_dim)
            inputs += latent_dim
        widths = _widths(image_size, num_features)
        layers = [nn.ConvTranspose2d(inputs, widths[0], _FIRST, bias=False)]
        layers += [
            nn.ConvTranspose2d(fewer, more, 4, stride=2, padding=1, bias=False) for fewer, more in pairwise(widths)
        ]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(
            ConditionalBatchNorm(width, num_classes) if by_norm else nn.BatchNorm2d(width) for width in widths
        )
        self.output = nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1)
        _initialize(self)

    @override
    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return pictures (B, C, H, W) in [-1, 1].

        Args:
            latents: (B, L), normally distributed.
            labels: (B,) int64 classes, where there are any.
        """
        x = latents
        if self.embedding is not None:
            x = torch.cat([x, self.embedding(labels).to(x.dtype)], dim=1)
        x = x[:, :, None, None]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer(x)
            x = torch.relu(norm(x, labels) if isinstance(norm, ConditionalBatchNorm) else norm(x))
        return torch.tanh(self.output(x))


class Discriminator(nn.Module):
    """Strided convolutions from a picture to one number, which is high where it seems real.

    Source: Radford et al. 2016, section 3; Miyato and Koyama 2018, "cGANs with Projection Discriminator", equation 4,
    for the class: the inner product of its embedding with the features summed over space; Miyato et al. 2018,
    "Spectral Normalization for Generative Adversarial Networks".

    Args:
        image_size: Side of the pictures, a power of two from 8 on.
        channels: C.
        num_features: F of the first layer; they double with each, up to eight times as many.
        num_classes: K; 0: the class plays no part.
        norm: Normalization of all hidden layers but the first.
        spectral: Whether each layer's weights are divided by their spectral norm.
    """

    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        num_features: int = 64,
        num_classes: int = 0,
        norm: Norm = "batch",
        spectral: bool = False,
    ) -> None:
        super().__init__()
        widths = _widths(image_size, num_features)[::-1]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for fewer, more in pairwise(widths):
            layers += [
                nn.Conv2d(fewer, more, 4, stride=2, padding=1, bias=norm == "none"),
                _NORMS[norm](more),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))
        self.output = nn.Conv2d(widths[-1], 1, _FIRST)
        self.embedding = nn.Embedding(num_classes, widths[-1]) if num_classes > 0 else None
        _initialize(self)
        if self.embedding is not None:
            # as the other weights: with torch's own, of deviation 1, the class would drown the picture
            nn.init.normal_(self.embedding.weight, 0.0, 0.02)
        if spectral:
            for layer in list(self.modules()):
                if isinstance(layer, (nn.Conv2d, nn.Embedding)):
                    spectral_norm(layer)

    @override
    def forward(self, pictures: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return (B,) numbers, the higher the more real pictures (B, C, H, W) in [-1, 1] seem.

        Args:
            pictures: Real ones or a generator's.
            labels: (B,) int64 classes, where there are any.
        """
        features = self.layers(pictures)
        logits = self.output(features).flatten()
        if self.embedding is not None:
            logits = logits + (self.embedding(labels) * features.sum((2, 3))).sum(1)
        return logits


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": lambda width: nn.GroupNorm(1, width),
    "instance": lambda width: nn.InstanceNorm2d(width, affine=True),
    "none": lambda width: nn.Identity(),
}


def _widths(image_size: int, num_features: int) -> list[int]:
    """Return the features at each side from 4 up to half the picture's."""
    sides = [_FIRST << step for step in range((image_size // 2 // _FIRST).bit_length())]
    return [num_features * min(_MOST, image_size // 2 // side) for side in sides]


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
