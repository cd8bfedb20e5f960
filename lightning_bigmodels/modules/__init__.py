"""The LightningModules that users name in YAML, one architecture family per file or folder."""

from typing import TYPE_CHECKING

from lightning_bigmodels.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_bigmodels.modules.cnn.classifier import ImageClassifier
    from lightning_bigmodels.modules.cnn.detector import ObjectDetector
    from lightning_bigmodels.modules.cnn.segmenter import ImageSegmenter
    from lightning_bigmodels.modules.cnn.super_resolver import SuperResolver
    from lightning_bigmodels.modules.transformer import CausalLanguageModel

__all__ = ["CausalLanguageModel", "ImageClassifier", "ImageSegmenter", "ObjectDetector", "SuperResolver"]

# a family is imported when it is named: each has a library of its own behind it
__getattr__ = lazy_names(
    __name__,
    {
        "ObjectDetector": "cnn.detector",
        "CausalLanguageModel": "transformer",
        "ImageClassifier": "cnn.classifier",
        "ImageSegmenter": "cnn.segmenter",
        "SuperResolver": "cnn.super_resolver",
    },
)
