"""LightningModules, LightningDataModules and recipes for the classic large-model families."""

from typing import TYPE_CHECKING

from lightning_bigmodels.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_bigmodels.data import (
        CaptionedImages,
        DetectionImages,
        Images,
        SegmentationImages,
        SuperResolutionImages,
        Text,
    )
    from lightning_bigmodels.modules import (
        GAN,
        Autoencoder,
        CausalLanguageModel,
        Diffusion,
        ImageClassifier,
        ImageSegmenter,
        ObjectDetector,
        SuperResolver,
        TextToImage,
        VariationalAutoencoder,
    )

__version__ = "0.1.0"
__all__ = [
    "GAN",
    "Autoencoder",
    "CaptionedImages",
    "CausalLanguageModel",
    "DetectionImages",
    "Diffusion",
    "ImageClassifier",
    "ImageSegmenter",
    "Images",
    "ObjectDetector",
    "SegmentationImages",
    "SuperResolutionImages",
    "SuperResolver",
    "Text",
    "TextToImage",
    "VariationalAutoencoder",
    "__version__",
]

# `bigmodels --help` must not wait for torch
__getattr__ = lazy_names(
    __name__,
    {
        "ObjectDetector": "modules",
        "DetectionImages": "data",
        "CaptionedImages": "data",
        "CausalLanguageModel": "modules",
        "Diffusion": "modules",
        "GAN": "modules",
        "ImageClassifier": "modules",
        "ImageSegmenter": "modules",
        "Images": "data",
        "SegmentationImages": "data",
        "SuperResolutionImages": "data",
        "SuperResolver": "modules",
        "Text": "data",
        "TextToImage": "modules",
        "Autoencoder": "modules",
        "VariationalAutoencoder": "modules",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
