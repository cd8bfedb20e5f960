"""Recipes by name: `text/quickstart` is the file `recipes/text/quickstart.yaml` of this package.

Imports neither torch nor Lightning: `bigmodels recipes` answers at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_bigmodels.errors import InputError, near


@dataclass(frozen=True)
class Recipe:
    """A recipe, the file that holds it, and the first line of the file's header."""

    name: str
    path: Path
    summary: str


def recipes_folder() -> Path:
    """Return the folder of recipes: inside an installed wheel, beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def list_recipes() -> list[Recipe]:
    """Return all recipes, sorted by name; the summary of a file without a header is empty."""
    folder = recipes_folder()
    return [
        Recipe(path.relative_to(folder).with_suffix("").as_posix(), path, _summary(path))
        for path in sorted(folder.glob("*/*.yaml"))
    ]


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        InputError: there is no recipe of this name.
    """
    recipes = {recipe.name: recipe.path for recipe in list_recipes()}
    if name not in recipes:
        raise InputError(f"no recipe is named {name!r}{near(name, recipes)}")
    return recipes[name]


def find_config(value: str) -> str:
    """Return the file that `--config` means: `value` itself where such a file exists, else the recipe of this name.

    Raises:
        InputError: `value` is neither.
    """
    if "://" in value or Path(value).is_file():
        return value
    recipes = {recipe.name: recipe.path for recipe in list_recipes()}
    if value not in recipes:
        raise InputError(
            f"--config {value}: no such file, and no recipe of this name{near(value, recipes) if recipes else ''}"
        )
    return str(recipes[value])


def settles_model(args: Sequence[str]) -> bool:
    """Return whether a command line's configurations alone say which class the model is; parsing them all is slow.

    Args:
        args: The command line.
    """
    import yaml

    # libyaml's, ten times as fast, where PyYAML was built with it
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    settled = False
    for place, arg in enumerate(args):
        option, _, value = arg.partition("=")
        if option not in ("-c", "--config"):
            continue
        try:
            text = Path(find_config(value or args[place + 1])).read_text(encoding="utf-8")
            content = yaml.load(text, Loader=loader)
        except (InputError, OSError, IndexError, ValueError, yaml.YAMLError):
            return False  # an address, or an error that parsing tells
        if isinstance(content, dict) and "model" in content:
            if not isinstance(content["model"], dict):
                return False
            settled = settled or "class_path" in content["model"]
    return settled


def display_name(config: str | Path) -> str:
    """Return what to write after `--config` to mean this file: the recipe's name if it is one, else its path."""
    path = Path(config)
    folder = recipes_folder().resolve()
    if path.suffix == ".yaml" and path.resolve().parent.parent == folder:
        return path.resolve().relative_to(folder).with_suffix("").as_posix()
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        first = file.readline().strip()
    return first.removeprefix("#").strip() if first.startswith("#") else ""
