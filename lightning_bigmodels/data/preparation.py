"""Text is tokenized into shards by many processes; killed anywhere, it goes on when it is started again.

The corpus is divided into units, runs of whole files that depend on nothing but the sources. A unit is tokenized by one
process and recorded in the store once its shards lie there. So the shards are the same however many processes wrote
them and however often they were interrupted, and the local disk holds a shard or two per process.

litdata's writer makes the shards, but its `optimize` does not drive it (0.2.76): where a worker process is killed, it
writes an index without that worker's tokens and reports success; it cannot go on with inputs that yield several shards;
Ctrl-C ends it with exit code 0.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_bigmodels.data import token_cache
from lightning_bigmodels.data.shards import EVALUATION, FORMAT, HEADER_BYTES, MARKER, PLAN, SHARDS, fetch_file
from lightning_bigmodels.data.sources import PYTHON_DOCS, Corpus, TextParts, cut, expand, num_utf8_bytes
from lightning_bigmodels.data.stores import Store, StoredFile, open_store
from lightning_bigmodels.data.token_cache import Report, TokenCache, digest
from lightning_bigmodels.data.tokenizer import EncodedBatch, Encoder, tokenizer_rules, train_tokenizer
from lightning_bigmodels.data.worker_pool import WorkerPool, advance
from lightning_bigmodels.errors import InputError, require

UNIT_BYTES = 1 << 26  # of files, as they lie on the disk
TOKENIZER_BYTES = 1 << 30  # of text: what a tokenizer is trained on at most
PATIENCE_SECONDS = 600.0

_ADVANCE_BYTES = 1 << 22
_RECORDS = "units/"
_EVALUATION_RECORD = "units/evaluation.json"


def prepare_shards(
    text: TextParts,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    output: str,
    cache_dir: Path,
    shard_bytes: int,
    num_workers: int,
    report: Report,
) -> None:
    """Write a text as shards of tokens.

    Args:
        text: The text and its parts.
        tokenizer: None trains one on the training part, of a text over 1 GiB on the beginnings of its units.
        vocab_size: Most tokens of the trained tokenizer.
        output: A folder or `s3://BUCKET/PREFIX`: empty, or with what an interrupted preparation of the same text left.
        cache_dir: Local folder for what is under way.
        shard_bytes: Size of a shard.
        num_workers: Processes; 0: this one.
        report: Called with a sentence now and then.

    Raises:
        InputError: the output holds something else, the text cannot be read, or litdata is not installed.
        RunError: the output cannot be written, or a process died.
    """
    require("litdata", extra="streaming")
    store = open_store(output, PATIENCE_SECONDS)
    chosen = vocab_size if tokenizer is None else digest(tokenizer_rules(tokenizer))
    fingerprint = {"format": FORMAT, "text": text.fingerprint(), "tokenizer": chosen, "shard_bytes": shard_bytes}
    sizes = _open_plan(store, fingerprint)
    staging = cache_dir / f"preparing-{digest([str(store), fingerprint])[:24]}"
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache_dir {cache_dir} cannot be written ({error}); set another cache_dir") from error
    units = _units(text.train)
    with WorkerPool(num_workers, report) as pool:
        if sizes is None:
            sizes = pool.run(_measure, units, f"measured {text.train}")
            store.write(PLAN, json.dumps({"fingerprint": fingerprint, "sizes": sizes}).encode())
        else:
            report(f"going on with the preparation in {store}")
        units = [unit._replace(end=size) for unit, size in zip(units, sizes, strict=True)]
        parts = MeasuredText(text.train, text.val, text.test, text.val_fraction, text.test_fraction, tuple(units))
        evaluation, files = _evaluation(store, parts, tokenizer, vocab_size, staging, report)
        done = {name for name in store.names(_RECORDS) if name != _EVALUATION_RECORD}
        tokenizer_folder, dtype = evaluation.folder / "tokenizer", evaluation.meta["dtype"]
        jobs = [_Job(piece, output, staging, tokenizer_folder, dtype, shard_bytes) for piece in parts.slices("train")]
        missing = [job for job in jobs if job.record not in done]
        pool.run(_write, missing, f"tokenized {text.train}", sum(job.slice.num_bytes for job in missing))
    _finish(store, [job.record for job in jobs], files, evaluation, fingerprint, report)
    shutil.rmtree(staging)


class Slice(NamedTuple):
    """A part of the corpus that one process can read on its own.

    Attributes:
        number: Place of its unit in the corpus.
        names: Sources of the unit.
        column: As in `Corpus`.
        encoding: As in `Corpus`.
        begin: First UTF-8 byte of the unit that belongs to the slice.
        end: The byte behind its last; None: all the rest.
    """

    number: int
    names: tuple[str, ...]
    column: str
    encoding: str
    begin: int = 0
    end: int | None = None

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of a slice whose end is known."""
        assert self.end is not None
        return self.end - self.begin

    def documents(self) -> Iterator[str]:
        """Yield the documents of the slice."""
        documents = Corpus(self.names, self.column, self.encoding).documents()
        return documents if self.end is None else cut(documents, self.begin, self.end)


@dataclass(frozen=True)
class MeasuredText(TextParts):
    """A text whose units have been measured: each part is found without reading what lies before it.

    It counts its evaluation parts only, for these are what a token cache beside the shards holds.
    """

    units: tuple[Slice, ...] = ()

    def names(self) -> list[str]:
        """Return the evaluation parts that there are."""
        return [part for part in super().names() if part != "train"]

    def fingerprint(self) -> dict[str, Any]:
        """Return plain values that change when a part may have changed."""
        return {**super().fingerprint(), "parts": self.names()}

    def documents(self, part: str) -> Iterator[str]:
        """Yield the documents of a part."""
        own = {"val": self.val, "test": self.test}.get(part)
        if own is not None:
            yield from own.documents()
        else:
            for piece in self.slices(part):
                yield from piece.documents()

    def slices(self, part: str) -> Iterator[Slice]:
        """Yield what of each unit belongs to a part of the corpus, in order."""
        first, last = self._bounds[part]
        for unit in self.units:
            begin, end = max(first, 0), min(last, unit.num_bytes)
            if begin < end:
                yield unit._replace(begin=begin, end=end)
            first, last = first - unit.num_bytes, last - unit.num_bytes

    def beginnings(self, num_bytes: int) -> Iterator[str]:
        """Yield the beginning of each slice of the training part, together at most about `num_bytes` long."""
        slices = list(self.slices("train"))
        share = min(1.0, num_bytes / max(1, sum(piece.num_bytes for piece in slices)))
        for piece in slices:
            yield from piece._replace(end=piece.begin + round(piece.num_bytes * share)).documents()

    @cached_property
    def _bounds(self) -> dict[str, tuple[int, int]]:
        return self.bounds(sum(unit.num_bytes for unit in self.units))


class _Job(NamedTuple):
    slice: Slice
    output: str
    staging: Path
    tokenizer: Path
    dtype: str
    shard_bytes: int

    @property
    def record(self) -> str:
        return f"{_RECORDS}{self.slice.number:06d}.json"


def _open_plan(store: Store, fingerprint: dict[str, Any]) -> list[int] | None:
    """Return the units' sizes where this preparation has begun before, None where there is nothing yet."""
    if store.read(MARKER) is not None:
        raise InputError(f"{store} holds prepared text already; give another --output, or delete it first")
    content = store.read(PLAN)
    if content is None:
        if store.names(""):
            raise InputError(f"{store} is not empty and holds no preparation; give an empty place as --output")
        return None
    plan = json.loads(content)
    if plan["fingerprint"] != json.loads(json.dumps(fingerprint)):
        raise InputError(
            f"{store} holds an unfinished preparation of other text or with other settings; give another --output, or "
            "delete it first"
        )
    sizes: list[int] = plan["sizes"]
    return sizes


def _units(corpus: Corpus) -> list[Slice]:
    """Divide the corpus into runs of whole files, a source of another kind being a unit of its own."""
    groups: list[list[str]] = []
    room = 0
    for name in corpus.names:
        if name == PYTHON_DOCS or name.startswith("hub:"):
            groups.append([name])
            room = 0
            continue
        for path in expand(name):
            if room <= 0:
                groups.append([])
                room = UNIT_BYTES
            groups[-1].append(str(path))
            room -= path.stat().st_size
    return [Slice(number, tuple(names), corpus.column, corpus.encoding) for number, names in enumerate(groups)]


def _measure(unit: Slice) -> int:
    total = waiting = 0
    for document in unit.documents():
        waiting += num_utf8_bytes(document)
        if waiting > _ADVANCE_BYTES:
            advance(waiting)
            total, waiting = total + waiting, 0
    advance(waiting)
    return total + waiting


def _write(job: _Job) -> None:
    """Tokenize a slice, put its shards into the store, and then its record."""
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    store = open_store(job.output, PATIENCE_SECONDS)
    folder = job.staging / f"unit-{job.slice.number}"
    shutil.rmtree(folder, ignore_errors=True)
    length = (job.shard_bytes - HEADER_BYTES) // np.dtype(job.dtype).itemsize
    writer = BinaryWriter(str(folder), chunk_size=length, item_loader=TokensLoader())
    shards: list[StoredFile] = []

    def keep(chunk: str) -> None:
        path = Path(chunk)
        name = f"{SHARDS}{job.slice.number:06d}-{len(shards):05d}.bin"
        shards.append(StoredFile.of(path, name))
        store.put(path, name)
        path.unlink()

    counts = {"bytes": 0, "documents": 0}
    for number, tokens in enumerate(_rows(_encoded(job, counts), length)):
        # One item fills a shard: the writer writes a chunk when the next item comes.
        if chunk := writer.add_item(number, tokens.astype(job.dtype)):
            keep(chunk)
    for chunk in writer.done():
        keep(chunk)
    record = {"shards": shards, "config": writer.get_config(), **counts}
    store.write(job.record, json.dumps(record).encode())
    shutil.rmtree(folder)


@lru_cache(maxsize=1)
def _encoder(tokenizer: Path) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(str(tokenizer)))


def _encoded(job: _Job, counts: dict[str, int]) -> Iterator[EncodedBatch]:
    for batch in _encoder(job.tokenizer).encode(job.slice.documents(), count_bytes=False):
        advance(batch.size)
        counts["bytes"] += batch.size
        counts["documents"] += batch.num_documents
        yield batch


def _rows(batches: Iterable[EncodedBatch], length: int) -> Iterator[NDArray[np.int64]]:
    """Yield the token stream in arrays of `length` tokens, the last one shorter."""
    waiting: list[NDArray[np.int64]] = []
    missing = length
    for batch in batches:
        tokens = batch.tokens
        while len(tokens) >= missing:
            yield np.concatenate([*waiting, tokens[:missing]])
            tokens, waiting, missing = tokens[missing:], [], length
        if len(tokens):
            waiting.append(tokens)
            missing -= len(tokens)
    if waiting:
        yield np.concatenate(waiting)


def _evaluation(
    store: Store,
    parts: MeasuredText,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    staging: Path,
    report: Report,
) -> tuple[TokenCache, list[StoredFile]]:
    """Return the evaluation parts with the tokenizer, and the files that they are in the store."""
    record = store.read(_EVALUATION_RECORD)
    if record is not None:
        files = [StoredFile(*file) for file in json.loads(record)]
        for file in files:
            fetch_file(store, file, staging / file.name)
        return TokenCache(staging / EVALUATION), files
    if tokenizer is None:
        report(f"training a tokenizer of at most {vocab_size:,} tokens on {parts.train}")
        tokenizer = train_tokenizer(parts.beginnings(TOKENIZER_BYTES), vocab_size)
    cache = token_cache.prepare(staging / "parts", parts, tokenizer, vocab_size, report)
    paths = sorted(path for path in cache.folder.rglob("*") if path.is_file())
    files = []
    for path in paths:
        name = f"{EVALUATION}{path.relative_to(cache.folder).as_posix()}"
        files.append(StoredFile.of(path, name))
        store.put(path, name)
    store.write(_EVALUATION_RECORD, json.dumps(files).encode())
    return cache, files


def _finish(
    store: Store,
    records: list[str],
    evaluation_files: list[StoredFile],
    evaluation: TokenCache,
    fingerprint: dict[str, Any],
    report: Report,
) -> None:
    """Write litdata's index, then the marker that makes the preparation whole; the records are not needed then."""
    units = [json.loads(store.read(record) or b"") for record in records]
    shards = [StoredFile(*shard) for unit in units for shard in unit["shards"]]
    if not shards:
        raise InputError("the training part has no tokens; give more text or hold out a smaller part of it")
    dtype = np.dtype(evaluation.meta["dtype"])
    lengths = [(shard.size - HEADER_BYTES) // dtype.itemsize for shard in shards]
    chunks = [
        {"filename": shard.name.removeprefix(SHARDS), "chunk_bytes": shard.size, "chunk_size": 1, "dim": length}
        for shard, length in zip(shards, lengths, strict=True)
    ]
    config = next(unit["config"] for unit in units if unit["shards"])
    store.write(f"{SHARDS}index.json", json.dumps({"chunks": chunks, "config": config}).encode())
    counts = {"tokens": sum(lengths), **{key: sum(unit[key] for unit in units) for key in ("bytes", "documents")}}
    meta = {
        "format": FORMAT,
        "dtype": str(dtype),
        "train": counts,
        "fingerprint": fingerprint,
        "evaluation": evaluation_files,
        "shards": shards,
    }
    store.write(MARKER, json.dumps(meta).encode())
    for name in [*records, _EVALUATION_RECORD, PLAN]:
        store.delete(name)
    report(
        f"prepared {store}: train {counts['tokens']:,} tokens"
        + "".join(f", {part} {tokens:,} tokens" for part, tokens in evaluation.num_tokens.items())
        + f"; number of shards: {len(shards):,}"
    )
