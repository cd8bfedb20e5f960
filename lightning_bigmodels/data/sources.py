"""Sources of text: what a name stands for, and its documents one after another."""

import hashlib
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_bigmodels.data.text_files import SUFFIXES, checked, kind, read_file
from lightning_bigmodels.errors import InputError, near, require

PARTS = ("train", "val", "test")
PYTHON_DOCS = "python-docs"


class Corpus:
    """The documents of one or more sources, read anew at each pass and never held in memory together.

    Args:
        names: `python-docs`; a file, folder or glob; `hub:<name>[:<configuration>][@<split>]`. Plain text is one
            document per file, `.jsonl` and `.parquet` one per row.
        column: Column of `.jsonl`, `.parquet` and hub rows that holds the text.
        encoding: How plain text and `.jsonl` files turn bytes into characters.
    """

    def __init__(self, names: str | Sequence[str], column: str = "text", encoding: str = "utf-8") -> None:
        self.names = [names] if isinstance(names, str) else list(names)
        self.column = column
        self.encoding = encoding
        self._hub_datasets: dict[str, Any] = {}

    def __str__(self) -> str:
        return ", ".join(self.names)

    def fingerprint(self) -> list[list[str | int]]:
        """Return plain values that change when the text may have changed."""
        marks: list[list[str | int]] = []
        for name in self.names:
            if name == PYTHON_DOCS:
                digest = hashlib.sha256("\0".join(_python_docs()).encode()).hexdigest()
                marks.append([name, platform.python_version(), digest])
            elif name.startswith("hub:"):
                marks.append([name, self._hub_dataset(name)._fingerprint])
            else:
                for path in expand(name):
                    stat = path.stat()
                    marks.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
        return marks

    def documents(self) -> Iterator[str]:
        """Yield the documents in order.

        Raises:
            InputError: a source cannot be read; the message names the file and the line, row or byte.
        """
        for name in self.names:
            yield from self.of(name)

    def of(self, name: str) -> Iterator[str]:
        """Yield the documents of one source."""
        if name == PYTHON_DOCS:
            yield from _python_docs()
        elif name.startswith("hub:"):
            yield from _hub_rows(name, self._hub_dataset(name), self.column)
        else:
            for path in expand(name):
                yield from read_file(path, self.column, self.encoding)

    def files(self) -> list[str | Path]:
        """Return the files, and the names of those sources that have none.

        Raises:
            InputError: a source is not there.
        """
        found: list[str | Path] = []
        for name in self.names:
            found += [name] if name == PYTHON_DOCS or name.startswith("hub:") else expand(name)
        return found

    def _hub_dataset(self, name: str) -> Any:
        if name not in self._hub_datasets:
            self._hub_datasets[name] = _load_hub(name)
        return self._hub_datasets[name]


@dataclass(frozen=True)
class TextParts:
    """The text and how it is parted.

    The end of the training corpus is the validation part and what lies just before it the test part, cut by UTF-8
    bytes, where these have no corpus of their own.
    """

    train: Corpus
    val: Corpus | None = None
    test: Corpus | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.0

    def fingerprint(self) -> dict[str, Any]:
        """Return plain values that change when a part may have changed."""
        corpora = {"train": self.train, "val": self.val, "test": self.test}
        return {
            **{part: None if corpus is None else corpus.fingerprint() for part, corpus in corpora.items()},
            "fractions": [0.0 if self.val else self.val_fraction, 0.0 if self.test else self.test_fraction],
            "column": self.train.column,
            "encoding": self.train.encoding,
        }

    def names(self) -> list[str]:
        """Return the parts that there are."""
        there = {"train": True, "val": self.val or self.val_fraction, "test": self.test or self.test_fraction}
        return [part for part in PARTS if there[part]]

    def documents(self, part: str) -> Iterator[str]:
        """Yield the documents of a part; one that lies across a cut is cut."""
        own = {"val": self.val, "test": self.test}.get(part)
        return cut(self.train.documents(), *self._bounds[part]) if own is None else own.documents()

    @cached_property
    def _bounds(self) -> dict[str, tuple[int, int]]:
        return self.bounds(sum(map(num_utf8_bytes, self.train.documents())))

    def bounds(self, total: int) -> dict[str, tuple[int, int]]:
        """Return where each part begins and ends in `total` bytes."""
        if total == 0:
            raise InputError(f"{self.train} holds no text; give sources that do")
        val = total if self.val else total - round(total * self.val_fraction)
        test = val if self.test else val - round(total * self.test_fraction)
        return {"train": (0, test), "test": (test, val), "val": (val, total)}


def num_utf8_bytes(text: str) -> int:
    """Return the length of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def cut(documents: Iterator[str], begin: int, end: int) -> Iterator[str]:
    """Yield what lies between two UTF-8 byte positions of all documents together.

    A position inside a character stands for the character's beginning, so that neighbouring cuts share no character and
    lose none.
    """
    position = 0
    for document in documents:
        if position >= end:
            return
        size = num_utf8_bytes(document)
        start, stop = max(begin - position, 0), min(end - position, size)
        if start == 0 and stop == size:
            yield document
        elif start < stop:
            data = document.encode()
            yield data[_character_start(data, start) : _character_start(data, stop)].decode()
        position += size


def _character_start(data: bytes, position: int) -> int:
    while position < len(data) and data[position] & 0xC0 == 0x80:  # a continuation byte
        position -= 1
    return position


def _python_docs() -> list[str]:
    """Return the language reference that comes with every CPython: a document per topic."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def expand(name: str) -> list[Path]:
    """Return the files that a path, folder or glob stands for, sorted."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; give a file that holds text")
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if kind(file) in SUFFIXES and not _hidden(file.relative_to(path))]
        remedy = f"put files with the suffixes {', '.join(SUFFIXES)} into it, or name its files one by one"
    elif any(character in name for character in "*?["):
        root = Path(path.anchor)
        found = list(root.glob(str(path.relative_to(root))))
        remedy = "check the pattern"
    else:
        raise InputError(f"there is no file or folder {name}{_near_source(name, path)}; check the path")
    files = sorted(file for file in found if file.is_file() and file.stat().st_size > 0)
    if not files:
        raise InputError(f"no file with text matches {name}; {remedy}")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _near_source(name: str, path: Path) -> str:
    known = [PYTHON_DOCS, *(file.name for file in path.parent.iterdir())] if path.parent.is_dir() else [PYTHON_DOCS]
    hint = near(path.name, known) if path.name else ""
    return hint if "did you mean" in hint else ""


def _load_hub(name: str) -> Any:
    """Load `hub:<name>[:<configuration>][@<split>]`."""
    datasets = require("datasets", extra="hub")
    address, _, split = name.removeprefix("hub:").partition("@")
    repository, _, configuration = address.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None, split=split or "train")
    except Exception as error:  # it raises a dozen unrelated types
        raise InputError(
            f"{name} cannot be loaded ({type(error).__name__}: {error}); check hub:<name>[:<configuration>][@<split>]"
        ) from error


def _hub_rows(name: str, dataset: Any, column: str) -> Iterator[str]:
    if column not in dataset.column_names:
        raise InputError(
            f"{name}: no column {column!r}{near(column, dataset.column_names)}; set `column` to the one with the text"
        )
    number = 0
    for batch in dataset.select_columns([column]).iter(batch_size=1024):
        for value in batch[column]:
            yield checked(value, f"{name}, row {number}", column)
            number += 1
