"""Sources of labelled pictures: what a name stands for."""

from dataclasses import dataclass, field
from pathlib import Path

from lightning_bigmodels.data.vision.labelled import Labelled, unlabelled
from lightning_bigmodels.data.vision.sources_arrays import has_idx, read_digits, read_idx, read_numpy
from lightning_bigmodels.data.vision.sources_folders import read_folder
from lightning_bigmodels.data.vision.sources_hub import read_hub
from lightning_bigmodels.data.vision.sources_tables import Columns, read_labelled_table
from lightning_bigmodels.data.vision.sources_torchvision import read_torchvision
from lightning_bigmodels.errors import InputError, near

DIGITS = "sklearn-digits"
_TABLES = (".csv", ".tsv", ".parquet")
_ARRAYS = (".npy", ".npz")
_TORCHVISION = "torchvision:"
_HUB = "hub:"


@dataclass(frozen=True)
class Reading:
    """How sources are read.

    Attributes:
        columns: What the columns of tables are called.
        root: Folder of torchvision's data sets and of the paths in tables; None: `data`, and the table's folder.
        download: Whether torchvision may fetch a data set that is not there.
        check_files: Whether a file that a table names and that is not there is an error at once.
    """

    columns: Columns = field(default_factory=Columns)
    root: Path | None = None
    download: bool = False
    check_files: bool = True


def read_source(name: str, how: Reading) -> dict[str, Labelled]:
    """Return the parts of a source by their names; one that knows no parts is all `train`.

    Without a column of labels the examples have no classes.

    Raises:
        InputError: there is no such source, or it is broken.
    """
    parts = _read(name, how)
    if how.columns.label is None:
        return {part: unlabelled(examples.pictures, examples.rows) for part, examples in parts.items()}
    return parts


def _read(name: str, how: Reading) -> dict[str, Labelled]:
    if name == DIGITS:
        return {"train": read_digits()}
    if name.startswith(_TORCHVISION):
        return read_torchvision(name.removeprefix(_TORCHVISION), how.root or Path("data"), how.download)
    if name.startswith(_HUB):
        return read_hub(name, how.columns)
    path = Path(name).expanduser()
    if path.is_dir():
        return read_idx(path) if has_idx(path) else read_folder(path, how.columns.label is not None)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in _TABLES:
            return read_labelled_table(path, how.columns, how.root, how.check_files)
        if suffix in _ARRAYS:
            return read_numpy(path)
        raise InputError(f"{path} is no source of labelled pictures; name a folder, {_known(_TABLES + _ARRAYS)}")
    known = [DIGITS, *(file.name for file in path.parent.iterdir())] if path.parent.is_dir() else [DIGITS]
    hint = near(path.name, known)
    raise InputError(
        f"there is no source {name}{hint if 'did you mean' in hint else ''}; name a folder of pictures, a file "
        f"({_known(_TABLES + _ARRAYS)}), {_TORCHVISION}NAME, {_HUB}NAME or {DIGITS}"
    )


def _known(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
