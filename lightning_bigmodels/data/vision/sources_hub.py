"""Data sets of the Hugging Face hub, and folders that its library reads as such."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.data.vision.files import decode_picture, read_picture
from lightning_bigmodels.data.vision.labelled import Labelled
from lightning_bigmodels.data.vision.pictures import Pictures, digest_of
from lightning_bigmodels.data.vision.sources_folders import PART_FOLDERS
from lightning_bigmodels.data.vision.sources_tables import Columns, Table, label_rows
from lightning_bigmodels.errors import InputError, require


class HubPictures(Pictures):
    """The column of pictures of a data set, as files or as what they hold.

    Args:
        name: What the data set is called in messages.
        dataset: Rows with a column `column` of `bytes` and `path`.
        column: The column.
    """

    def __init__(self, name: str, dataset: Any, column: str) -> None:
        self._name = name
        self._cells = dataset.select_columns([column])
        self._column = column

    @override
    def __len__(self) -> int:
        return len(self._cells)

    @override
    def name(self, index: int) -> str:
        cell = self._cells[index][self._column]
        return str(cell["path"]) if cell["bytes"] is None else f"{self._name}, row {index}"

    @override
    def read(self, index: int, channels: int) -> Tensor:
        cell = self._cells[index][self._column]
        if cell["bytes"] is None:
            return read_picture(cell["path"], channels)
        return decode_picture(cell["bytes"], f"{self._name}, row {index}", channels)

    @override
    def digest(self, index: int) -> str:
        cell = self._cells[index][self._column]
        return digest_of(Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"])


class HubTable(NamedTuple):
    """A split of a data set: the columns beside its pictures.

    Attributes:
        table: Names in place of numbers, where the data set has them.
        pictures: The pictures, one for each row.
        names: For each column the names that it declares for its numbers, in their order.
    """

    table: Table
    pictures: HubPictures
    names: dict[str, list[str]]


def read_hub(name: str, columns: Columns) -> dict[str, Labelled]:
    """Return the parts of `hub:<name>[:<configuration>][@<split>]`; one split alone is `train`.

    Raises:
        InputError: it cannot be loaded, or its columns are others.
    """
    found = {}
    for part, (table, pictures, names) in hub_tables(name).items():
        declared = names.get(columns.label, []) if isinstance(columns.label, str) else []
        found[part] = label_rows(table, pictures, columns, declared)["train"]
    return found


def hub_tables(name: str) -> dict[str, HubTable]:
    """Return the parts of `hub:<name>[:<configuration>][@<split>]`; one split alone is `train`.

    Raises:
        InputError: it cannot be loaded, or has not one column of pictures.
    """
    datasets = require("datasets", extra="hub")
    address, _, split = name.removeprefix("hub:").partition("@")
    repository, _, configuration = address.partition(":")
    try:
        loaded = datasets.load_dataset(repository, configuration or None, split=split or None)
    except Exception as error:  # it raises a dozen unrelated types
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"{name} cannot be loaded ({type(error).__name__}: {reason}); check hub:<name>[:<configuration>][@<split>]"
        ) from error
    if split:
        return {"train": _table(name, loaded)}
    parts = {PART_FOLDERS.get(key): f"{name}@{key}" for key in loaded}
    if "train" not in parts:
        raise InputError(f"{name} has no split train but {', '.join(loaded)}; name one of them behind an @")
    return {
        PART_FOLDERS[key]: _table(f"{name}@{key}", dataset) for key, dataset in loaded.items() if key in PART_FOLDERS
    }


def _table(name: str, dataset: Any) -> HubTable:
    datasets = require("datasets", extra="hub")
    pictures = [key for key, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if len(pictures) != 1:
        raise InputError(f"{name} has {len(pictures)} columns of pictures; name a data set with one")
    cells = dataset.cast_column(pictures[0], datasets.Image(decode=False))
    others = {key: feature for key, feature in dataset.features.items() if key not in pictures}
    table = Table(name, {key: _readable(feature, cells[key][:]) for key, feature in others.items()})
    names = {key: _names(feature) for key, feature in others.items()}
    return HubTable(table, HubPictures(name, cells, pictures[0]), names)


def _names(feature: Any) -> list[str]:
    """Return the names that a feature declares for its numbers, in their order."""
    return list(getattr(getattr(feature, "feature", feature), "names", None) or [])


def _readable(feature: Any, values: list[Any]) -> list[Any]:
    """Return values with the names that the feature declares in place of their numbers."""
    names = _names(feature)

    def name_of(value: Any) -> Any:
        if isinstance(value, list):
            return [name_of(inner) for inner in value]
        return "" if value is None or value < 0 else names[value]

    return [name_of(value) for value in values] if names else values
