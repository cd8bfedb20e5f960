"""LightningModules, LightningDataModules and recipes for the classic large-model families."""

from typing import TYPE_CHECKING

from lightning_bigmodels.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_bigmodels.data import Images, Text
    from lightning_bigmodels.modules import CausalLanguageModel, ImageClassifier

__version__ = "0.1.0"
__all__ = ["CausalLanguageModel", "ImageClassifier", "Images", "Text", "__version__"]

# `bigmodels --help` must not wait for torch
__getattr__ = lazy_names(
    __name__, {"CausalLanguageModel": "modules", "ImageClassifier": "modules", "Images": "data", "Text": "data"}
)


def __dir__() -> list[str]:
    return sorted(__all__)
