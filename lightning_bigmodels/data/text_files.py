"""Files of text: how each kind is opened, and the documents in it."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lightning_bigmodels.errors import InputError, near, require

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")


def kind(path: Path) -> str:
    """Return the suffix that decides how a file is read, without its compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def read_file(path: Path, column: str, encoding: str) -> Iterator[str]:
    """Yield a file's documents: one per row of `.jsonl` and `.parquet`, else the whole file."""
    for _, document in read_numbered(path, column, encoding):
        if isinstance(document, InputError):
            raise document
        yield document


def read_numbered(path: Path, column: str, encoding: str) -> Iterator[tuple[int, str | InputError]]:
    """Yield each document, or what is wrong with its line, with its number: of a line of `.jsonl`, else a row from 0.

    Raises:
        InputError: what follows in the file cannot be read.
    """
    suffix = kind(path)
    if suffix == ".parquet":
        yield from enumerate(_parquet_rows(path, column))
        return
    with _reading(path), _open(path) as stream:
        if suffix == ".jsonl":
            yield from _json_rows(path, stream, column, encoding)
        else:
            yield 0, _decode(stream.read(), path, encoding)


def first_rows(path: Path, count: int, encoding: str = "utf-8") -> list[dict[str, Any]]:
    """Return the first rows of a `.jsonl` or `.parquet` file, for a look at what columns it has.

    Raises:
        InputError: one of them cannot be read.
    """
    if kind(path) == ".parquet":
        with _reading_parquet(path) as file:
            return next((batch.to_pylist() for batch in file.iter_batches(batch_size=count)), [])
    rows: list[dict[str, Any]] = []
    with _reading(path), _open(path) as stream:
        for number, line in enumerate(islice(stream, count), start=1):
            text = _decode(line, path, encoding, number)
            if text.strip():
                rows.append(_json_object(text, f"{path}, line {number}"))
    return rows


def num_rows(path: Path) -> int:
    """Return the number of rows of a `.parquet` file.

    Raises:
        InputError: it cannot be read.
    """
    with _reading_parquet(path) as file:
        return file.metadata.num_rows


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the failures of streams into a message that names the file."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}; it is damaged or cut short: fetch it again") from error


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(path))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path))
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """Reads Zstandard frames and, unlike zstandard's own stream reader, complains when the last one is cut short."""

    def __init__(self, path: Path) -> None:
        self._zstandard = require("zstandard", extra="zstd")
        self._file = path.open("rb")
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = b"" if self._frame is None or not self._frame.eof else self._frame.unused_data
            chunk = chunk or self._file.read(1 << 20)
            if not chunk:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the compressed file ended before its end-of-stream marker was reached")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(chunk)
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _decode(data: bytes, path: Path, encoding: str, line: int = 1, offset: int = 0) -> str:
    """Decode strictly what begins in a line of the (uncompressed) file, behind `offset` bytes."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}, line {line}: byte {offset + error.start} (0x{data[error.start]:02x}) of the file is not "
            f"{encoding}; convert it to UTF-8 or set `encoding`, for example to latin-1"
        ) from error


def _json_rows(path: Path, stream: IO[bytes], column: str, encoding: str) -> Iterator[tuple[int, str | InputError]]:
    """Yield the number of each line that is not blank, and the document or what is wrong."""
    offset = 0
    for number, line in enumerate(stream, start=1):
        try:
            row = _json_row(path, line, number, offset, column, encoding)
        except InputError as error:
            yield number, error
        else:
            if row is not None:
                yield number, row
        offset += len(line)


def _json_row(path: Path, line: bytes, number: int, offset: int, column: str, encoding: str) -> str | None:
    text = _decode(line, path, encoding, number, offset)
    place = f"{path}, line {number}"
    if not text.strip():
        return None
    row = _json_object(text, place)
    if column not in row:
        raise InputError(f"{place}: no column {column!r}{near(column, row)}; set `column` to the one with the text")
    return checked(row[column], place, column)


def _json_object(text: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: {error.msg} at column {error.colno}; write one JSON object per line") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: a {type(row).__name__}, not an object; write one JSON object per line")
    return row


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    with _reading_parquet(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise InputError(
                f"{path}: no column {column!r}{near(column, names)}; set `column` to the one with the text"
            )
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield checked(value, f"{path}, row {number}", column)
                number += 1


@contextmanager
def _reading_parquet(path: Path) -> Iterator[Any]:
    require("pyarrow", extra="parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}; fetch or write it again") from error


def checked(value: Any, place: str, column: str) -> str:
    """Return the value of a cell.

    Raises:
        InputError: it is no text, or none that UTF-8 can hold.
    """
    if not isinstance(value, str):
        raise InputError(f"{place}: column {column!r} holds {value!r:.80}, not a string; mend or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: column {column!r} holds half a surrogate pair ({value[error.start]!a}) at character "
            f"{error.start}; mend or remove the row"
        ) from error
    return value
