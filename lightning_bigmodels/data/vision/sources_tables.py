"""Tables of pictures and their labels: CSV, Parquet, or columns from elsewhere."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bigmodels.data.vision.labelled import Labelled, labelled, sorted_names, unlabelled
from lightning_bigmodels.data.vision.pictures import FilePictures, Pictures
from lightning_bigmodels.data.vision.sources_folders import PART_FOLDERS
from lightning_bigmodels.errors import InputError, near, refuse, require

_ONES = {"1", "1.0", "true"}
_ZEROS = {"0", "0.0", "false"}


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called.

    Attributes:
        path: The picture's file.
        label: The picture's class, or several columns of 0 and 1, whose names are the classes; None: there is none.
        label_separator: What stands between the classes in `label`, where a picture may have several.
        group: Group by which fairness is judged; None: there is none.
        split: The picture's part: train, val or test; None: there is none.
    """

    path: str = "path"
    label: str | list[str] | None = "label"
    label_separator: str | None = None
    group: str | None = None
    split: str | None = None

    @property
    def multi_label(self) -> bool:
        """Whether a picture may have several classes."""
        return self.label is not None and (isinstance(self.label, list) or self.label_separator is not None)


class Table:
    """Columns of values, each row with its place in a file.

    Args:
        name: The file.
        columns: For each name the values.
        numbers: Number of each row in the file; None: from 0.
        unit: What the file's rows are called.
    """

    def __init__(
        self, name: str, columns: dict[str, Sequence[Any]], numbers: Sequence[int] | None = None, unit: str = "row"
    ) -> None:
        self.name = name
        self.columns = columns
        self.numbers = numbers
        self.unit = unit

    def place(self, row: int) -> str:
        """Return where the user finds a row."""
        return f"{self.name}, {self.unit} {row if self.numbers is None else self.numbers[row]}"

    def column(self, name: str, setting: str) -> Sequence[Any]:
        """Return the values of a column.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self.columns:
            raise InputError(f"{self.name}: no column {name!r}{near(name, self.columns)}; set {setting} to one it has")
        return self.columns[name]

    def texts(self, name: str, setting: str) -> list[str]:
        """Return the values of a column as text without blanks around it.

        Raises:
            InputError: there is no such column, or an empty value in it.
        """
        values = ["" if value is None else str(value).strip() for value in self.column(name, setting)]
        for row, value in enumerate(values):
            if not value:
                refuse(f"{self.place(row)}: column {name!r} is empty; fill it in or remove the row")
        return values


def read_table(path: Path) -> Table:
    """Read a `.csv`, `.tsv` or `.parquet` file.

    Raises:
        InputError: it cannot be read; the message names the line.
    """
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)


def _read_csv(path: Path) -> Table:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # of the file without its mark, if it has one: the number of lines is the same
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file to UTF-8"
        ) from error
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    rows: list[list[str]] = []
    numbers: list[int] = []
    try:
        for row in reader:
            if not any(value.strip() for value in row):
                continue
            if header is None:
                header = [value.strip() for value in row]
            elif len(row) != len(header):
                refuse(
                    f"{path}, line {reader.line_num}: {len(row)} values where the first line names {len(header)} "
                    f"columns; correct the line (a value with a {delimiter!r} in it needs quotes)"
                )
            else:
                rows.append(row)
                numbers.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; correct the line") from error
    if not rows or header is None:
        raise InputError(f"{path} holds no rows; write a line of column names and one line for each picture")
    return Table(str(path), dict(zip(header, zip(*rows, strict=True), strict=True)), numbers, "line")


def _read_parquet(path: Path) -> Table:
    require("pyarrow", extra="parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        content = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}; fetch or write it again") from error
    if content.num_rows == 0:
        raise InputError(f"{path} holds no rows; write one for each picture")
    return Table(str(path), {name: content[name].to_pylist() for name in content.column_names})


def read_labelled_table(path: Path, columns: Columns, root: Path | None, check_files: bool) -> dict[str, Labelled]:
    """Return the parts of a table of files; one without a split column is all `train`.

    Args:
        path: The table.
        columns: What its columns are called.
        root: Folder that its paths start from; None: the table's own.
        check_files: Whether a file that is not there is an error now.

    Raises:
        InputError: the table cannot be read, or a row is wrong; the message names the line.
    """
    table = read_table(path)
    start = path.parent if root is None else root
    files = [start / name for name in table.texts(columns.path, "data.path_column")]
    if check_files:
        for row, file in enumerate(files):
            if not file.is_file():
                raise InputError(
                    f"{table.place(row)}: there is no file {file}; correct the path, remove the row, or set data.root "
                    f"to the folder that the paths start from"
                )
    return label_rows(table, FilePictures(files), columns)


def label_rows(table: Table, pictures: Pictures, columns: Columns, order: Sequence[str] = ()) -> dict[str, Labelled]:
    """Return the parts of a table whose rows belong to `pictures`, one to one.

    Args:
        table: The rows.
        pictures: Their pictures.
        columns: What the columns of the table are called.
        order: The classes, or more than these, in their order; empty: they are sorted.

    Raises:
        InputError: a column is missing or a value is wrong.
    """
    groups = None if columns.group is None else table.texts(columns.group, "data.group_column")
    parts = parts_of(table, columns.split, len(pictures))
    found = {}
    for part, rows in parts.items():
        if columns.label is None:
            one = unlabelled(pictures, rows)
        elif isinstance(columns.label, list):
            values = np.stack([_zeros_and_ones(table, name) for name in columns.label], axis=1)
            one = Labelled(pictures, rows, list(columns.label), values[rows])
        elif columns.label_separator is not None:
            one = _separated(table, pictures, rows, columns.label, columns.label_separator, order)
        else:
            names = table.texts(columns.label, "data.label_column")
            chosen = [names[row] for row in rows]
            one = labelled(pictures, chosen, _in_order(set(chosen), order), rows)
        found[part] = one if groups is None else one.with_groups([groups[row] for row in rows])
    return found


def parts_of(table: Table, split: str | None, num_rows: int) -> dict[str, NDArray[np.int64]]:
    """Return the rows of each part that a column names; all are `train` where there is none.

    Raises:
        InputError: a row names something else, or none is for training.
    """
    if split is None:
        return {"train": np.arange(num_rows)}
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(table.texts(split, "data.split_column")):
        if name.lower() not in PART_FOLDERS:
            refuse(f"{table.place(row)}: column {split!r} holds {name!r}; write train, val or test")
            continue
        rows.setdefault(PART_FOLDERS[name.lower()], []).append(row)
    if "train" not in rows:
        raise InputError(f"{table.name}: no row has train in column {split!r}; name the training examples so")
    return {part: np.array(values) for part, values in rows.items()}


def _zeros_and_ones(table: Table, name: str) -> NDArray[np.bool_]:
    values = [value.lower() for value in table.texts(name, "data.label_column")]
    for row, value in enumerate(values):
        if value not in _ONES | _ZEROS:
            refuse(
                f"{table.place(row)}: column {name!r} holds {value!r}; write 1 for a picture that shows {name}, else 0"
            )
    return np.array([value in _ONES for value in values])


def _separated(
    table: Table, pictures: Pictures, rows: NDArray[np.int64], column: str, separator: str, order: Sequence[str]
) -> Labelled:
    """Read cells of several names; an empty one is a picture of no class."""
    cells = table.column(column, "data.label_column")
    sets = []
    for row in rows:
        value = cells[row]
        names = value if isinstance(value, (list, tuple)) else str("" if value is None else value).split(separator)
        sets.append({str(name).strip() for name in names} - {""})
    class_names = _in_order(set().union(*sets), order)
    if not class_names:
        raise InputError(f"{table.name}: column {column!r} is empty in every row; name the classes there")
    places = {name: place for place, name in enumerate(class_names)}
    labels = np.zeros((len(rows), len(class_names)), dtype=np.bool_)
    for number, shown in enumerate(sets):
        labels[number, [places[name] for name in shown]] = True
    return Labelled(pictures, rows, class_names, labels)


def _in_order(names: set[str], order: Sequence[str]) -> list[str]:
    return [name for name in order if name in names] if order else sorted_names(names)
