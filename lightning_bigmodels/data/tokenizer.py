"""Tokenizers: trained on the text, loaded from where people keep them, carried inside checkpoints; and their use."""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_bigmodels.data.sources import num_utf8_bytes
from lightning_bigmodels.errors import InputError

END_OF_TEXT = "<|endoftext|>"
CHECKPOINT_KEY = "tokenizer"
MIN_VOCAB_SIZE = 257  # every byte, and the end of text
BATCH_CHARACTERS = 1 << 20  # encoded at a time; their token strings and offsets take some 60 times as much memory
PIECE_CHARACTERS = 1 << 14  # of a long document: 64 pieces keep as many cores busy

# What others call the end of a text, for a bare tokenizer.json, which has no field for it.
_END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eos|>", "<|im_end|>")
_SAFE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE: any text round-trips, and the same text gives the same tokenizer.

    Args:
        documents: The training text.
        vocab_size: Most tokens it may have, with 256 bytes and the end of text; a small text yields fewer, for a merge
            must occur twice.

    Raises:
        InputError: `vocab_size` has no room for all bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(f"vocab_size is {vocab_size}; set it to {MIN_VOCAB_SIZE} or more (256 bytes and end of text)")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Pieces, because the words of one string are counted on one core.
    backend.train_from_iterator((piece for document in documents for piece in pieces(document)), trainer)
    return _wrap(backend, END_OF_TEXT, pad_token=END_OF_TEXT)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a `tokenizer.json`, a folder or hub name, or a checkpoint of this package.

    Raises:
        InputError: there is none, it is one without a Rust backend, or it has no end-of-text token.
    """
    path = Path(source).expanduser()
    try:
        if path.suffix == ".ckpt":
            tokenizer = _from_checkpoint(path)
        elif path.suffix == ".json":
            tokenizer = _from_json(path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path) if path.exists() else source)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"tokenizer {source!r} cannot be loaded ({type(error).__name__}: {reason}); give a tokenizer.json, a "
            "folder or hub name that holds one, or a checkpoint of this package"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"tokenizer {source!r} has no tokenizer.json; convert it to a fast tokenizer and save it again"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {source!r} has no end-of-text token to put between documents; set eos_token in the "
            "tokenizer_config.json beside it and give the folder"
        )
    return tokenizer


def tokenizer_to_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return what `save_pretrained` writes, file name to text: plain values for a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # Only text: tokenizer.json says all that a SentencePiece file beside it says.
        return {
            file.name: file.read_bytes().decode()
            for file in sorted(Path(folder).iterdir())
            if file.suffix in (".json", ".jinja", ".txt")
        }


def tokenizer_from_files(files: dict[str, str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `tokenizer_to_files` took apart."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / Path(name).name).write_bytes(text.encode())
        return AutoTokenizer.from_pretrained(folder)


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Tell whether two tokenizers give the same tokens for every text, and end a text alike."""
    return tokenizer_rules(a) == tokenizer_rules(b)


def tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return all that decides which tokens a text becomes, as plain values."""
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by the last call, not rules of the tokenizer.
    del rules["truncation"], rules["padding"]
    return {**rules, "end_of_text": tokenizer.eos_token_id}


class EncodedBatch(NamedTuple):
    """A stretch of the token stream.

    Attributes:
        tokens: End of text before each document, then its tokens.
        num_bytes: UTF-8 bytes that each token spells; empty if they were not asked for.
        size: UTF-8 bytes of the stretch.
        num_documents: Documents that begin in it.
    """

    tokens: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    size: int
    num_documents: int


class Encoder:
    """Encodes documents on all cores, long ones in pieces where that cannot change a token.

    It reads text as nothing but text: the name of a special token that occurs in it is spelled out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._end_of_text: int = tokenizer.eos_token_id
        self._cuts = can_be_cut(tokenizer_rules(tokenizer))
        self._at_start, self._left_over = True, 0

    def encode(self, documents: Iterable[str], count_bytes: bool) -> Iterator[EncodedBatch]:
        """Yield the token stream of the documents that are not empty.

        The byte counts sum to the text's bytes whatever the tokenizer drops: characters that no token covers count for
        the token behind them, at a document's end for the one before. Only where a document has no token at all do its
        bytes count for an end of text.
        """
        self._at_start, self._left_over = True, 0
        texts: list[str] = []
        begins: list[bool] = []
        waiting = 0
        for document in documents:
            for number, piece in enumerate(pieces(document) if self._cuts else [document]):
                if piece:
                    texts.append(piece)
                    begins.append(number == 0)
                    waiting += len(piece)
                if waiting >= BATCH_CHARACTERS:
                    yield self._encode(texts, begins, count_bytes)
                    texts, begins, waiting = [], [], 0
        if texts:
            yield self._encode(texts, begins, count_bytes)

    def _encode(self, texts: list[str], begins: list[bool], count_bytes: bool) -> EncodedBatch:
        encode = self._backend.encode_batch if count_bytes else self._backend.encode_batch_fast  # fast: no offsets
        tokens: list[int] = []
        counts: list[NDArray[np.int64]] = []
        for text, begin, encoding in zip(texts, begins, encode(texts, add_special_tokens=False), strict=True):
            if begin:
                tokens.append(self._end_of_text)
            tokens.extend(encoding.ids)
            if count_bytes:
                counts.append(self._bytes_of(text, begin, encoding.offsets))
        num_bytes = np.concatenate(counts) if counts else np.empty(0, np.int64)
        size = sum(map(num_utf8_bytes, texts))
        return EncodedBatch(np.array(tokens, np.int64), num_bytes, size, sum(begins))

    def _bytes_of(self, text: str, begin: bool, offsets: list[tuple[int, int]]) -> NDArray[np.int64]:
        """Return the bytes of each token of a piece, with the end-of-text token before it if a document begins."""
        ends = np.array([end for _, end in offsets], np.int64)
        # A byte-level token inside a character ends with it, so the first of a character's tokens gets all its bytes.
        # Offsets that leave out white space may step back.
        ends = _byte_positions(text)[np.maximum.accumulate(ends)] if len(ends) else ends
        counts = np.diff(ends, prepend=0)
        size = num_utf8_bytes(text)
        if len(counts):
            counts[-1] += size - ends[-1]
            size = 0
        if not begin:
            return counts
        # The stream's first token is nobody's label, so the one before the next document counts in its place.
        front = 0 if self._at_start else self._left_over + size
        self._left_over = size if self._at_start else 0
        self._at_start = False
        return np.concatenate([[front], counts])


def _byte_positions(text: str) -> NDArray[np.int64]:
    """Return where each character begins in UTF-8, and where the text ends."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])


def can_be_cut(rules: dict[str, Any]) -> bool:
    r"""Tell whether text may be cut behind a newline between two characters that are not white space.

    True for GPT-2's pattern, alone or behind a splitter of digits: there `\s+(?!\S)|\s+` takes such a newline as a word
    of its own, with or without the text behind it, and no other branch takes a newline. Nothing may touch the text
    before it: no normalizer, no prefix, no added token that is looked for in plain text.
    """
    before = rules["pre_tokenizer"]
    steps = before["pretokenizers"] if before and before["type"] == "Sequence" else [before]
    *first, last = [step or {} for step in steps]
    return (
        rules["normalizer"] is None
        and all(token["special"] for token in rules["added_tokens"])
        and all(step.get("type") == "Digits" for step in first)
        and last.get("type") == "ByteLevel"
        and last["use_regex"]
        and not last["add_prefix_space"]
    )


def pieces(document: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a document where `can_be_cut` allows it, into pieces of at least `size` characters."""
    begin = 0
    while len(document) - begin > size:
        found = _SAFE_BREAK.search(document, begin + size)
        if found is None:
            break
        yield document[begin : found.end()]
        begin = found.end()
    yield document[begin:]


def _wrap(backend: Tokenizer, end: str | None, **special_tokens: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, clean_up_tokenization_spaces=False, **special_tokens
    )


def _from_json(path: Path) -> PreTrainedTokenizerBase:
    if path.name == "tokenizer.json" and path.with_name("tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(str(path.parent))
    backend = Tokenizer.from_file(str(path))
    end = next((name for name in _END_NAMES if backend.token_to_id(name) is not None), None)
    return _wrap(backend, end)


def _from_checkpoint(path: Path) -> PreTrainedTokenizerBase:
    import torch

    file = path / "meta.pt" if path.is_dir() else path  # a sharded checkpoint is a folder
    # Mapped, not read: the weights are not wanted.
    checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if CHECKPOINT_KEY not in checkpoint:
        raise InputError(f"checkpoint {path} holds no tokenizer; give one of a language model of this package")
    return tokenizer_from_files(checkpoint[CHECKPOINT_KEY])
