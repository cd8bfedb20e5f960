"""What text is: how much of it, in how many documents of which length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_bigmodels.advice.facts import Facts
from lightning_bigmodels.data.sources import Corpus, num_utf8_bytes
from lightning_bigmodels.data.text_files import COMPRESSIONS, first_rows, kind, num_rows
from lightning_bigmodels.data.vision.sources_folders import PART_FOLDERS
from lightning_bigmodels.errors import InputError

_WHOLE = 32 * 2**20
"""Bytes of files up to which all of them are read."""
_ROWS = 1000
COMPRESSED = 3
"""How many times larger text is than what gzip and Zstandard make of it, about."""
_LATIN = "latin-1"


def look_at_text(path: str, column: str = "text") -> Facts:
    """Return the facts of what `Text` reads; a folder with folders `train` and `val` is text with parts.

    Args:
        path: A source of `Text`.
        column: Column of rows that holds the text.

    Raises:
        InputError: it cannot be read.
    """
    folders = _parts(Path(path).expanduser())
    data: dict[str, Any] = {"sources": str(folders["train"]) if folders else path}
    for name in ("val", "test"):
        if name in folders:
            data[f"{name}_sources"] = str(folders[name])
    if column != "text":
        data["column"] = column
    corpus = Corpus(data["sources"], column)
    notes = []
    try:
        found = _measure(corpus)
    except InputError as error:
        if "is not utf-8" not in str(error):
            raise
        corpus = Corpus(data["sources"], column, _LATIN)
        data["encoding"] = _LATIN
        notes.append(f"the text is not UTF-8 and is read as {_LATIN}: look whether its accents are right")
        found = _measure(corpus)
    lengths, num_bytes, num_documents, estimated = found
    if estimated:
        notes.append("there is too much to read it all here: numbers are estimates from file sizes and first rows")
    others = {name: sum(1 for _ in Corpus(str(folders[name])).files()) for name in folders if name != "train"}
    middle = sorted(lengths)
    return Facts(
        "text",
        path,
        data=data,
        unit="documents",
        parts={"train": num_documents, **others},
        num_bytes=num_bytes,
        lengths=(middle[len(middle) // 2], middle[-1]) if middle else None,
        notes=tuple(notes),
    )


def _parts(path: Path) -> dict[str, Path]:
    """Return the folders of a folder's parts; none where it has other folders, or no training part."""
    if not path.is_dir():
        return {}
    inner = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    names = {PART_FOLDERS.get(folder.name.lower(), "") for folder in inner}
    return (
        {PART_FOLDERS[folder.name.lower()]: folder for folder in inner} if "train" in names and "" not in names else {}
    )


def _measure(corpus: Corpus) -> tuple[Sequence[int], int, int, bool]:
    """Return lengths of documents in characters, bytes and documents of all, and whether these are estimates."""
    files = [file for file in corpus.files() if isinstance(file, Path)]
    if sum(file.stat().st_size for file in files) <= _WHOLE:
        lengths, num_bytes = [], 0
        for document in corpus.documents():
            lengths.append(len(document))
            num_bytes += num_utf8_bytes(document)
        if not num_bytes:
            raise InputError(f"{corpus} holds no text; give sources that do")
        return lengths, num_bytes, len(lengths), False
    lengths, num_bytes, num_documents = [], 0, 0
    for file in files:
        own, size, documents = _estimate(file, corpus)
        lengths += own
        num_bytes += size
        num_documents += documents
    return lengths, num_bytes, num_documents, True


def _estimate(file: Path, corpus: Corpus) -> tuple[list[int], int, int]:
    size = file.stat().st_size * (COMPRESSED if file.suffix.lower() in COMPRESSIONS else 1)
    if kind(file) not in (".jsonl", ".parquet"):
        _check_encoding(file, corpus.encoding)
        return [size], size, 1
    texts = [
        text for row in first_rows(file, _ROWS, corpus.encoding) if isinstance(text := row.get(corpus.column), str)
    ]
    if not texts:
        return [], 0, 0
    mean = sum(map(num_utf8_bytes, texts)) / len(texts)
    # what a line has beside its text: quotes, the name of the column
    line = mean + len(corpus.column) + 8
    documents = num_rows(file) if kind(file) == ".parquet" else max(1, round(size / line))
    return [len(text) for text in texts], round(mean * documents), documents


def _check_encoding(file: Path, encoding: str) -> None:
    """Refuse a large file whose beginning is in another encoding."""
    if file.suffix.lower() in COMPRESSIONS:
        return
    with file.open("rb") as stream:
        head = stream.read(2**20)
    try:
        head[: head.rfind(b"\n") + 1].decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not {encoding} at byte {error.start}; convert it to UTF-8") from error
