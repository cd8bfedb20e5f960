"""A discriminator that judges each patch of a picture.

Legend: B pictures, H rows and W columns.
"""

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Strided convolutions, each with spectral normalization, down to one logit for each patch.

    Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", section 3.2.2 (the
    patches); Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks". No other normalization:
    a picture's logits do not depend on the others in its batch.

    Args:
        num_features: Channels of the first layer; they double with each layer, up to eight times as many.
        num_layers: Convolutions of stride 2.
    """

    def __init__(self, num_features: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for number in range(num_layers):
            features = num_features * min(2**number, 8)
            layers += [spectral_norm(nn.Conv2d(channels, features, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            channels = features
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels, 1, 3, padding=1)))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 1, h, w), above zero where a patch of images (B, 3, H, W) in [0, 1] seems real."""
        return self.layers(2 * images - 1)
