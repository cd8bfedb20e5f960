"""The LightningModules that users name in YAML, one architecture family per file or folder."""

from typing import TYPE_CHECKING

from lightning_bigmodels.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_bigmodels.modules.autoencoder.autoencoder import Autoencoder
    from lightning_bigmodels.modules.autoencoder.variational import VariationalAutoencoder
    from lightning_bigmodels.modules.cnn.classifier import ImageClassifier
    from lightning_bigmodels.modules.cnn.detector import ObjectDetector
    from lightning_bigmodels.modules.cnn.segmenter import ImageSegmenter
    from lightning_bigmodels.modules.cnn.super_resolver import SuperResolver
    from lightning_bigmodels.modules.diffusion.diffusion import Diffusion
    from lightning_bigmodels.modules.diffusion.text_to_image import TextToImage
    from lightning_bigmodels.modules.gan.dcgan import GAN
    from lightning_bigmodels.modules.transformer import CausalLanguageModel

__all__ = [
    "GAN",
    "Autoencoder",
    "CausalLanguageModel",
    "Diffusion",
    "ImageClassifier",
    "ImageSegmenter",
    "ObjectDetector",
    "SuperResolver",
    "TextToImage",
    "VariationalAutoencoder",
]

# a family is imported when it is named: each has a library of its own behind it
__getattr__ = lazy_names(
    __name__,
    {
        "Autoencoder": "autoencoder.autoencoder",
        "VariationalAutoencoder": "autoencoder.variational",
        "ObjectDetector": "cnn.detector",
        "CausalLanguageModel": "transformer",
        "Diffusion": "diffusion.diffusion",
        "GAN": "gan.dcgan",
        "ImageClassifier": "cnn.classifier",
        "ImageSegmenter": "cnn.segmenter",
        "SuperResolver": "cnn.super_resolver",
        "TextToImage": "diffusion.text_to_image",
    },
)
