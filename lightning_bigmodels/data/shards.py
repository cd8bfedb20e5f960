"""Prepared text: tokens in shards, in a folder or an object store, and all that must lie beside them.

```
preparation.json      what there is: written last, so that half a preparation is never taken for a whole one
shards/               litdata's format (TokensLoader): index.json and one file per shard
evaluation/           a token cache without a training part: tokenizer, validation and test tokens, bytes of each
```
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lightning_bigmodels.data.stores import Store, StoredFile
from lightning_bigmodels.data.token_cache import ArrayFile, TokenCache
from lightning_bigmodels.errors import InputError

FORMAT = 1
MARKER = "preparation.json"
PLAN = "plan.json"  # there while a preparation is being written
EVALUATION = "evaluation/"
SHARDS = "shards/"
HEADER_BYTES = 12  # litdata's chunk of one item: the number of items, where it begins, where it ends; four bytes each


class Preparation:
    """What `bigmodels prepare` has written, opened to be read.

    Attributes:
        store: Where it lies.
        folder: Local folder that holds the evaluation parts and, of an object store, shards for a while.
        shards: The shards, in the order of the text.
        num_shard_tokens: (number of shards,) int64, tokens of each.

    Args:
        store: Where it lies.
        cache_dir: Local folder for what is fetched.

    Raises:
        InputError: there is no whole preparation.
        RunError: the store does not answer, or a file is damaged.
    """

    def __init__(self, store: Store, cache_dir: Path) -> None:
        self.store = store
        content = store.read(MARKER)
        if content is None:
            if store.read(PLAN) is not None:
                raise InputError(
                    f"{store} holds an unfinished preparation; start the same `bigmodels prepare` again: it goes on"
                )
            raise InputError(f"{store} holds no prepared text; write it with `bigmodels prepare --output {store} ...`")
        try:
            meta: dict[str, Any] = json.loads(content)
        except ValueError as error:
            raise InputError(f"{store}/{MARKER} is not valid JSON ({error}); prepare the text again") from error
        if meta.get("format") != FORMAT:
            raise InputError(
                f"{store} was prepared in format {meta.get('format')}, this version reads format {FORMAT}; prepare it "
                "again, or install the version that wrote it"
            )
        self.meta = meta
        self.shards = [StoredFile(*shard) for shard in meta["shards"]]
        itemsize = np.dtype(meta["dtype"]).itemsize
        self.num_shard_tokens = (np.array([s.size for s in self.shards], np.int64) - HEADER_BYTES) // itemsize
        # Named by its content: another preparation at the same address has another folder.
        self.folder = cache_dir / f"shards-{hashlib.sha256(content).hexdigest()[:24]}"
        self._evaluation = self._fetch_evaluation()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that wrote the tokens."""
        return self._evaluation.tokenizer

    @cached_property
    def num_tokens(self) -> dict[str, int]:
        """Tokens of each part, with the end-of-text token before each document."""
        return {"train": int(self.num_shard_tokens.sum()), **self._evaluation.num_tokens}

    def tokens(self, part: str) -> ArrayFile:
        """Return the token stream of the validation or test part."""
        return self._evaluation.tokens(part)

    def num_bytes(self, part: str) -> ArrayFile:
        """Return the UTF-8 bytes that each token of the validation or test part spells."""
        return self._evaluation.num_bytes(part)

    def shard_tokens(self, file: IO[bytes]) -> NDArray[Any]:
        """Map the tokens of a shard's file."""
        return np.memmap(file, self.meta["dtype"], mode="r", offset=HEADER_BYTES)

    def _fetch_evaluation(self) -> TokenCache:
        """Fetch the evaluation parts whole: they are small, and read from end to end."""
        files = [StoredFile(*file) for file in self.meta["evaluation"]]
        folder = self.folder / EVALUATION
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "evaluation.lock"):
                for file in files:
                    path = self.folder / file.name
                    if not path.is_file() or path.stat().st_size != file.size:
                        fetch_file(self.store, file, path)
        except OSError as error:
            raise InputError(f"cache_dir {self.folder.parent} cannot be written ({error}); set another one") from error
        return TokenCache(folder)


def fetch_file(store: Store, file: StoredFile, path: Path) -> None:
    """Fetch a file under another name and rename it once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as target:
        store.fetch(file, target)
    partial.replace(path)
