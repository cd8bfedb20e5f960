"""Text is turned into tokens once: memory-mapped files in a folder that is either whole or not there."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_bigmodels.data.sources import TextParts
from lightning_bigmodels.data.tokenizer import Encoder, tokenizer_rules, tokenizer_to_files, train_tokenizer
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.files import sync_folder

FORMAT = 1  # of the files; a cache of another format has another key
REPORT_SECONDS = 10.0

Report = Callable[[str], None]


class ArrayFile:
    """A one-dimensional array in a file, mapped when it is first read and anew in each process it is sent to."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return self.path.stat().st_size // self.dtype.itemsize if "array" not in self.__dict__ else len(self.array)

    def __getstate__(self) -> dict[str, Any]:
        # NumPy would send the mapped file's content.
        return {"path": self.path, "dtype": self.dtype}

    @cached_property
    def array(self) -> NDArray[Any]:
        """The array, read-only."""
        return np.memmap(self.path, self.dtype, mode="r")


class TokenCache:
    """What a preparation has written: the tokens of each part, the bytes they spell, and the tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that wrote the tokens."""
        return AutoTokenizer.from_pretrained(str(self.folder / "tokenizer"))

    @property
    def num_tokens(self) -> dict[str, int]:
        """Tokens of each part, with the end-of-text token before each document."""
        return {part: counts["tokens"] for part, counts in self.meta["parts"].items()}

    def tokens(self, part: str) -> ArrayFile:
        """Return the token stream of a part."""
        return ArrayFile(self.folder / f"{part}.bin", self.meta["dtype"])

    def num_bytes(self, part: str) -> ArrayFile:
        """Return the UTF-8 bytes that each token of the validation or test part spells."""
        return ArrayFile(self.folder / f"{part}.bytes.bin", "uint32")

    def is_whole(self) -> bool:
        """Tell whether every file has the length that was written."""
        return all(
            file.path.is_file() and len(file) == self.num_tokens[part]
            for part in self.num_tokens
            for file in ([self.tokens(part)] if part == "train" else [self.tokens(part), self.num_bytes(part)])
        )


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/lightning_bigmodels`, or `~/.cache/lightning_bigmodels`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_bigmodels"


def prepare(
    cache_dir: Path, text: TextParts, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, report: Report
) -> TokenCache:
    """Return the token cache of a text, written if there is none; of several processes at once one writes.

    Args:
        cache_dir: Folder of the caches.
        text: The text and its parts.
        tokenizer: None trains one on the training part.
        vocab_size: Most tokens of the trained tokenizer.
        report: Called with a sentence where the user has to wait.
    """
    chosen = vocab_size if tokenizer is None else digest(tokenizer_rules(tokenizer))
    fingerprint = {"format": FORMAT, "text": text.fingerprint(), "tokenizer": chosen}
    folder = cache_dir / digest(fingerprint)[:24]
    cache = _open(folder)
    if cache is not None:
        return cache
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"another process is tokenizing {text.train}; waiting for it")
            lock.acquire()
    except OSError as error:
        raise InputError(f"cache_dir {cache_dir} cannot be written ({error}); set another cache_dir") from error
    try:
        return _open(folder) or _write(folder, text, tokenizer, vocab_size, fingerprint, report)
    finally:
        shutil.rmtree(folder.with_suffix(".partial"), ignore_errors=True)  # mended input has another key
        lock.release()


def digest(value: Any) -> str:
    """Return a name for plain values that changes when they do."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _open(folder: Path) -> TokenCache | None:
    if not (folder / "meta.json").is_file():
        return None
    cache = TokenCache(folder)
    return cache if cache.is_whole() else None


def _write(
    folder: Path,
    text: TextParts,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    fingerprint: dict[str, Any],
    report: Report,
) -> TokenCache:
    """Write beside, then rename: what a kill leaves behind never has the name of a whole cache."""
    partial = folder.with_suffix(".partial")
    for left in (partial, folder):  # by a killed preparation, for we hold the lock; by a hand that deleted some files
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    if tokenizer is None:
        report(f"training a tokenizer of at most {vocab_size:,} tokens on {text.train}")
        tokenizer = train_tokenizer(text.documents("train"), vocab_size)
    (partial / "tokenizer").mkdir()
    for name, content in tokenizer_to_files(tokenizer).items():
        _save(partial / "tokenizer" / name, content.encode())
    dtype = "uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "uint32"
    encoder = Encoder(tokenizer)
    parts = {part: _write_part(partial, part, text, encoder, dtype, report) for part in text.names()}
    for part, counts in parts.items():
        if part != "train" and counts["tokens"] < 2:
            raise InputError(f"the {part} part has no tokens (sources: {text.train}); give it more text")
    meta = {"dtype": dtype, "parts": parts, "fingerprint": fingerprint}
    _save(partial / "meta.json", json.dumps(meta, indent=1).encode())
    sync_folder(partial)
    partial.rename(folder)
    sync_folder(folder.parent)
    report(f"tokenized {text.train}: " + ", ".join(f"{part} {c['tokens']:,} tokens" for part, c in parts.items()))
    return TokenCache(folder)


def _write_part(
    folder: Path, part: str, text: TextParts, encoder: "Encoder", dtype: str, report: Report
) -> dict[str, int]:
    counts = {"tokens": 0, "bytes": 0, "documents": 0}
    told = time.monotonic()
    with (folder / f"{part}.bin").open("wb") as tokens, (folder / f"{part}.bytes.bin").open("wb") as num_bytes:
        for batch in encoder.encode(text.documents(part), count_bytes=part != "train"):
            tokens.write(batch.tokens.astype(dtype).tobytes())
            num_bytes.write(batch.num_bytes.astype(np.uint32).tobytes())
            counts["tokens"] += len(batch.tokens)
            counts["bytes"] += batch.size
            counts["documents"] += batch.num_documents
            if time.monotonic() - told > REPORT_SECONDS:
                told = time.monotonic()
                report(f"tokenizing the {part} part of {text.train}: {counts['bytes'] / 1e6:,.0f} MB so far")
        _sync(tokens)
        _sync(num_bytes)
    if part == "train":
        (folder / "train.bytes.bin").unlink()
    return counts


def _save(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _sync(file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
