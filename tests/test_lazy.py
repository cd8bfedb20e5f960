"""Names that are imported when they are used, and what is said where an optional library is missing."""

import sys
from types import ModuleType

import pytest

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.lazy import import_named, lazy_names


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `zoo` with three families, of which one wants torchvision and one a library that nobody knows."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").write_text("")
    (tmp_path / "zoo" / "cat.py").write_text("Cat = 'cat'")
    (tmp_path / "zoo" / "dog.py").write_text("import torchvision.nowhere")
    (tmp_path / "zoo" / "emu.py").write_text("import emulib")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    zoo = ModuleType("zoo")
    zoo.__all__ = ["Cat", "Dog", "Emu"]
    zoo.__getattr__ = lazy_names("zoo", {"Cat": "cat", "Dog": "dog", "Emu": "emu"})
    yield zoo
    for name in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        del sys.modules[name]


def test_only_what_is_named_is_imported(package):
    import_named(package, "class_path: lightning.Catalogue, Cats")
    assert "zoo.cat" not in sys.modules
    import_named(package, "class_path: Cat")
    assert "zoo.cat" in sys.modules
    assert package.Cat == "cat"


def test_what_is_missing_is_named_with_its_extra(package):
    with pytest.raises(InputError, match=r"Dog needs torchvision.*pip install 'lightning-bigmodels\[vision\]'"):
        _ = package.Dog
    with pytest.raises(ModuleNotFoundError, match="emulib"):
        _ = package.Emu
    with pytest.raises(AttributeError, match="module 'zoo' has no attribute 'Fox'"):
        _ = package.Fox
