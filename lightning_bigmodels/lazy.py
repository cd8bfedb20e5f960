"""Names of a package that are imported when they are first used, with what is missing for them said in one line."""

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from lightning_bigmodels.errors import InputError

# what an optional module comes with
_EXTRAS = {"torchvision": "vision"}


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__` (PEP 562).

    Args:
        package: Its `__name__`.
        homes: The module below the package that holds each name.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            raise InputError(
                f"{name} needs {error.name}, which is not installed; install it with: "
                f"pip install 'lightning-bigmodels[{extra}]'"
            ) from error

    return get


def import_named(package: Any, text: str) -> None:
    """Import those public names of a package that occur in `text` as words."""
    for name in set(re.findall(r"\w+", text)).intersection(package.__all__):
        getattr(package, name)
