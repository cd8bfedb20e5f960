"""LightningDataModules, one data type per file; `batches` declares what they yield."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bigmodels.data.datamodule import DataModule
    from lightning_bigmodels.data.text import Text
    from lightning_bigmodels.data.uneven import EvenBatches

__all__ = ["DataModule", "EvenBatches", "Text"]

_HOMES = {"DataModule": "datamodule", "EvenBatches": "uneven", "Text": "text"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: sources and token caches are usable without waiting for Lightning."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
