"""How `bigmodels check` reads text: each document of each source, and to which part it belongs."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from typing_extensions import override

from lightning_bigmodels.data.check import Inspector, Reader, Record
from lightning_bigmodels.data.sources import PARTS, Corpus, TextParts
from lightning_bigmodels.data.text_files import kind, read_numbered
from lightning_bigmodels.errors import InputError

_LINES = 10**10
"""More than a file has: a document's place is its file's number times this, and its line or row."""


class _Job(NamedTuple):
    number: int
    source: str | Path


class TextReader(Reader):
    """Reads the documents of a corpus.

    Args:
        corpus: The text.

    Raises:
        InputError: a source is not there.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.sources = corpus.files()

    @override
    def jobs(self) -> Sequence[_Job]:
        return [_Job(number, source) for number, source in enumerate(self.sources)]

    @override
    def read(self, job: _Job) -> Iterator[Record]:
        first, row = job.number * _LINES, 0
        try:
            for row, document in self._documents(job.source):
                if isinstance(document, InputError):
                    yield Record(first + row, None, problem=str(document))
                else:
                    data = document.encode()
                    digest = hashlib.blake2b(data.strip(), digest_size=16).digest() if data.strip() else None
                    yield Record(first + row, digest, size=len(data))
        except InputError as error:
            yield Record(first + row, None, problem=str(error))

    def _documents(self, source: str | Path) -> Iterator[tuple[int, str | InputError]]:
        if isinstance(source, Path):
            return read_numbered(source, self.corpus.column, self.corpus.encoding)
        return enumerate(self.corpus.of(source))

    @override
    def name(self, place: int) -> str:
        number, row = divmod(place, _LINES)
        source = self.sources[number]
        if isinstance(source, str) or kind(source) == ".parquet":
            return f"{source}, row {row}"
        return f"{source}, line {row}" if kind(source) == ".jsonl" else str(source)


def inspect_text(text: TextParts, inspector: Inspector) -> None:
    """Hand all documents of the parts to a check.

    A document in which one part ends and the next begins counts for the first of the two.

    Raises:
        InputError: a source is not there.
    """
    inspector.unit = "documents"
    readers = {part: TextReader(corpus) for part in PARTS if (corpus := getattr(text, part)) is not None}
    train = readers["train"]
    records = sorted(inspector.read(train, "train"), key=lambda record: record.place)
    total = sum(record.size for record in records)
    bounds = text.bounds(total) if total else dict.fromkeys(PARTS, (0, 1))
    position, members = 0, {part: list[Record]() for part in PARTS}
    for record in records:
        part = next((name for name in PARTS if bounds[name][0] <= position < bounds[name][1]), "train")
        members[part].append(record)
        position += record.size
    for part in text.names():
        if part in readers and part != "train":
            _take(inspector, part, readers[part], inspector.read(readers[part], part))
        else:
            _take(inspector, part, train, members[part])


def _take(inspector: Inspector, part: str, reader: TextReader, records: Iterator[Record] | list[Record]) -> None:
    def empty_noted() -> Iterator[Record]:
        for record in records:
            if record.digest is None and record.problem is None:
                name = reader.name(record.place)
                inspector.note("warning", "empty", f"{name} holds no text; remove it", part, name)
            yield record

    inspector.take(part, reader, empty_noted())
