"""A loss that compares what a trained classifier sees in two pictures."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.modules.cnn.registry import load_weights, read_weights
from lightning_bigmodels.networks.pixels import IMAGENET_MEAN, IMAGENET_STD

# VGG-19 up to its last convolution, conv5_4, before the activation
_LAST = 34


class PerceptualLoss:
    """Mean absolute difference of VGG-19's features, whose weights are frozen and belong to no checkpoint.

    Source: Johnson et al. 2016, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution"; the features
    before the activation, and L1, as Wang et al. 2018, "ESRGAN", section 3.3.

    Args:
        weights: A file of VGG-19's weights, or the name of torchvision's, which are downloaded: IMAGENET1K_V1.

    Raises:
        InputError: there are no such weights, or they are of another network.
    """

    def __init__(self, weights: str) -> None:
        # on meta, since to draw the classifier's 124 M weights takes seconds, and nobody needs them
        with torch.device("meta"):
            features = torchvision.models.vgg19(weights=None).features[: _LAST + 1]
        network = nn.ModuleDict({"features": features.to_empty(device="cpu")})
        is_file = bool(Path(weights).suffix) or Path(weights).exists()
        tensors = read_weights(weights) if is_file else _from_hub(weights)
        missing = load_weights(network, tensors, weights)
        if missing:
            raise InputError(f"{weights} holds no {missing[0]} of VGG-19; name a file of torchvision's vgg19")
        self._features = network["features"].eval().requires_grad_(False)
        self._mean = torch.tensor(IMAGENET_MEAN).view(-1, 1, 1)
        self._std = torch.tensor(IMAGENET_STD).view(-1, 1, 1)

    def __call__(self, found: Tensor, expected: Tensor) -> Tensor:
        """Return the loss of each picture (B,); found and expected are (B, 3, H, W) in [0, 1]."""
        if self._mean.device != found.device:
            self._features.to(found.device)
            self._mean, self._std = self._mean.to(found.device), self._std.to(found.device)
        with torch.no_grad():
            aim = self._seen(expected)
        return F.l1_loss(self._seen(found), aim, reduction="none").mean((1, 2, 3))

    def _seen(self, images: Tensor) -> Tensor:
        return self._features(((images - self._mean) / self._std).to(self._mean.dtype)).float()


def _from_hub(name: str) -> dict[str, Any]:
    known = [str(weights.name) for weights in torchvision.models.get_model_weights("vgg19")]
    if name not in known:
        raise InputError(
            f"perceptual_weights {name!r} is no file, and torchvision has none of this name{near(name, known)}"
        )
    try:
        return dict(torchvision.models.get_model_weights("vgg19")[name].get_state_dict(progress=False))
    except OSError as error:
        raise InputError(
            f"perceptual_weights {name} cannot be downloaded ({error}); set it to a file of torchvision's vgg19"
        ) from error
