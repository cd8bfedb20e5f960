"""What pictures are compared by: their pixels, or what a trained network sees in them."""

import importlib
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_bigmodels.errors import InputError, near, require

PIXELS, INCEPTION = "pixels", "inception"
_SIDE = 8
CHECKPOINT = ".ckpt"
_INCEPTION_FEATURES = 2048


class PixelFeatures(nn.Module):
    """The pixels themselves, in [-1, 1], averaged to 8 x 8."""

    @override
    def forward(self, pictures: Tensor) -> Tensor:
        """Return (B, 64 C) float32 of (B, C, H, W) uint8."""
        return F.adaptive_avg_pool2d(pictures.float() / 127.5 - 1, _SIDE).flatten(1)


class ClassifierFeatures(nn.Module):
    """What the output layer of an `ImageClassifier` sees.

    Args:
        classifier: The trained one; it gets pictures of the size that it was trained on.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier
        self._seen = torch.empty(0)
        classifier.output_modules()[0].register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen = inputs[0]

    @override
    def forward(self, pictures: Tensor) -> Tensor:
        """Return (B, D) float32 of (B, C, H, W) uint8.

        Raises:
            InputError: the classifier was trained on pictures with fewer channels.
        """
        channels, size = self.classifier.channels, (self.classifier.image_size,) * 2
        if pictures.shape[1] not in (1, channels):
            raise InputError(
                f"the pictures have {pictures.shape[1]} channels and the classifier in features was trained on "
                f"{channels}; train one on the same data"
            )
        pictures = pictures.expand(-1, channels, -1, -1)
        if tuple(pictures.shape[2:]) != size:
            resize = require("torchvision.transforms.v2.functional", extra="vision").resize
            pictures = resize(pictures, list(size), antialias=True)
        self.classifier.network(pictures)
        seen, self._seen = self._seen.float(), torch.empty(0)
        # of an output layer that is a convolution
        return seen if seen.ndim == 2 else seen.mean(tuple(range(2, seen.ndim)))


class InceptionFeatures(nn.Module):
    """The features that FID was made for, by torchmetrics and torch-fidelity.

    Args:
        network: torchmetrics' Inception, which takes (B, 3, H, W) uint8 of any size.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @override
    def forward(self, pictures: Tensor) -> Tensor:
        """Return (B, 2048) float32 of (B, C, H, W) uint8, gray or in colour."""
        return self.network(pictures.expand(-1, 3, -1, -1)).float()


def load_features(features: str, inception_weights: str | None = None) -> nn.Module:
    """Return a frozen network from pictures (B, C, H, W) uint8 to features (B, D) float32.

    Args:
        features: pixels, inception, or a checkpoint of an `ImageClassifier`.
        inception_weights: File of the weights that torch-fidelity publishes; None: it downloads them.

    Raises:
        InputError: there are no such features, or a package or file that they need is missing.
    """
    if features == PIXELS:
        return PixelFeatures()
    network = _inception(inception_weights) if features == INCEPTION else _classifier(features)
    return network.eval().requires_grad_(False)


def metric_name(features: str) -> str:
    """Return what metrics call features: their name, or that of a checkpoint without folder and ending."""
    return re.sub(r"\W+", "_", Path(features).name.removesuffix(CHECKPOINT))


def _classifier(path: str) -> ClassifierFeatures:
    if Path(path).suffix != CHECKPOINT:
        raise InputError(
            f"features is {path!r}{near(path, (PIXELS, INCEPTION))}; set it to {PIXELS}, {INCEPTION} or a checkpoint "
            f"(.ckpt) of an ImageClassifier"
        )
    if not Path(path).is_file():
        raise InputError(f"features names {path}, which is not there; correct the path, or train an ImageClassifier")
    # callbacks know no family; this one is found by its public name
    family = importlib.import_module("lightning_bigmodels").ImageClassifier
    try:
        return ClassifierFeatures(family.load_from_checkpoint(path, map_location="cpu", weights_only=True))
    except (UnpicklingError, KeyError, TypeError, RuntimeError, ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{path} holds no ImageClassifier ({type(error).__name__}: {str(error).splitlines()[0]}); set features to "
            f"a checkpoint of one"
        ) from error


def _inception(weights: str | None) -> InceptionFeatures:
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"inception_weights names {weights}, which is not there; correct the path")
    metric = importlib.import_module("torchmetrics.image.fid").FrechetInceptionDistance
    try:
        made = metric(feature=_INCEPTION_FEATURES, feature_extractor_weights_path=weights)
    except ModuleNotFoundError as error:
        raise InputError(
            "features inception needs torch-fidelity, which is not installed; install it with: pip install "
            "torch-fidelity"
        ) from error
    except (UnpicklingError, OSError, RuntimeError) as error:
        raise InputError(
            f"inception's weights cannot be had ({error}); set inception_weights to torch-fidelity's file "
            f"weights-inception-2015-12-05-6726825d.pth"
        ) from error
    return InceptionFeatures(made.inception)
