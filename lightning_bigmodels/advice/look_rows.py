"""What rows are: tables and files with a JSON object a line."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_bigmodels.advice.columns import Roles, describe, is_empty, roles_of, target_of
from lightning_bigmodels.advice.facts import Facts
from lightning_bigmodels.advice.look_pictures import look_at_boxes, look_at_captions, look_at_classes
from lightning_bigmodels.advice.look_text import COMPRESSED, look_at_text
from lightning_bigmodels.data.text_files import first_rows, kind, num_rows
from lightning_bigmodels.data.vision.captions import CaptionColumns
from lightning_bigmodels.data.vision.sources import Reading
from lightning_bigmodels.data.vision.sources_tables import Columns, read_table
from lightning_bigmodels.errors import InputError, noting_refusals

_WHOLE = 64 * 2**20
"""Bytes of a CSV file up to which all of it is read."""
_ROWS = 1000


def look_at_rows(path: Path) -> Facts:
    """Return the facts of a `.csv`, `.tsv`, `.parquet` or `.jsonl` file, the last also compressed.

    Raises:
        InputError: it cannot be read.
    """
    columns, total, notes = _read(path)
    roles = roles_of(columns)
    if roles.kind in ("classes", "pictures"):
        return _pictures(path, roles)
    if roles.kind == "captions":
        names = CaptionColumns(roles.path or "file_name", roles.text or "text", roles.split)
        default = CaptionColumns()
        data = {
            "path_column": None if names.path == default.path else names.path,
            "caption_column": None if names.caption == default.caption else names.caption,
            "split_column": names.split,
        }
        return look_at_captions(str(path), names, _given(data))
    if roles.kind == "boxes":
        return look_at_boxes(path, path, None)
    if roles.kind == "text" and path.suffix.lower() not in (".csv", ".tsv"):
        return look_at_text(str(path), column=roles.text or "text")
    missing = {name: count for name, values in columns.items() if (count := sum(map(is_empty, values)))}
    classes: Mapping[str, int] = {}
    if roles.kind == "text":
        notes.append(
            f"text is read from .jsonl and .parquet: write column {roles.text!r} as one of these, and ask again"
        )
    target = target_of(columns)
    if target is not None:
        classes = target[1]
        notes.append(f"column {target[0]!r} looks like what is to be told: {len(classes)} classes")
    lengths = None
    if roles.text is not None:
        sizes = sorted(len(str(value)) for value in columns[roles.text])
        lengths = (sizes[len(sizes) // 2], sizes[-1])
    return Facts(
        "table" if roles.kind == "text" else roles.kind,
        str(path),
        unit="rows",
        parts={"train": total},
        classes=classes,
        columns={name: describe(values) for name, values in columns.items()},
        missing=missing,
        lengths=lengths,
        notes=tuple(notes),
    )


def _pictures(path: Path, roles: Roles) -> Facts:
    default = Columns()
    label = roles.label if roles.kind == "classes" else None
    columns = Columns(roles.path or default.path, label, roles.separator, None, roles.split)
    data = {
        "path_column": None if columns.path == default.path else columns.path,
        "label_column": None if label in (None, default.label) else label,
        "label_separator": roles.separator,
        "split_column": roles.split,
    }
    return look_at_classes(str(path), Reading(columns), _given(data))


def _given(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if value is not None}


def _read(path: Path) -> tuple[dict[str, Sequence[Any]], int, list[str]]:
    """Return the columns, of large files of the first rows, how many rows there are, and what is worth knowing."""
    columns: dict[str, Sequence[Any]]
    if kind(path) == ".jsonl":
        rows = first_rows(path, _ROWS)
        return _by_columns(rows), *_extrapolated(path, rows)
    notes: list[str] = []
    total = 0
    with noting_refusals() as refused:
        if path.stat().st_size <= _WHOLE:
            columns = dict(read_table(path).columns)
        elif path.suffix.lower() == ".parquet":
            columns, total = _by_columns(first_rows(path, _ROWS)), num_rows(path)
            notes.append(f"looked at the first {_ROWS:,} rows")
        else:
            columns, total = _read_head(path)
            notes.append(f"looked at the first {_WHOLE >> 20} MiB; the number of rows is an estimate")
    if refused:
        notes.append(f"{len(refused):,} faulty lines, the first: {refused[0]}")
    return columns, total or len(next(iter(columns.values()))), notes


def _by_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[Any]]:
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _read_head(path: Path) -> tuple[dict[str, Sequence[Any]], int]:
    """Return the columns of a large file's first rows, and about how many rows all of it has."""
    with path.open("rb") as file:
        head = file.read(_WHOLE)
    head = head[: head.rfind(b"\n") + 1]
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, path.name)
        part.write_bytes(head)
        table = read_table(part)
    rows = len(next(iter(table.columns.values())))
    return dict(table.columns), round(rows * path.stat().st_size / len(head))


def _extrapolated(path: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
    if not rows:
        raise InputError(f"{path} holds no row; write a JSON object a line")
    if len(rows) < _ROWS:
        return len(rows), []
    size = sum(len(json.dumps(row, ensure_ascii=False).encode()) + 1 for row in rows) / len(rows)
    factor = 1 if path.suffix.lower() == ".jsonl" else COMPRESSED
    total = max(len(rows), round(factor * path.stat().st_size / size))
    return total, [f"looked at the first {len(rows):,} rows; their number is an estimate"]
