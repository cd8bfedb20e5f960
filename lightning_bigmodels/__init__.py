"""LightningModules, LightningDataModules and recipes for the classic large-model families."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bigmodels.data import Text
    from lightning_bigmodels.modules import CausalLanguageModel

__version__ = "0.1.0"
__all__ = ["CausalLanguageModel", "Text", "__version__"]

_HOMES = {"CausalLanguageModel": "lightning_bigmodels.modules", "Text": "lightning_bigmodels.data"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562): `bigmodels --help` must not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
