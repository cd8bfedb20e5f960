"""Text for language models: from a source's name to batches of tokens."""

import codecs
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_bigmodels.data.batches import EvaluationTokenBatch
from lightning_bigmodels.data.check import Inspector
from lightning_bigmodels.data.datamodule import DataModule, check_at_least
from lightning_bigmodels.data.loading import ResumableDataLoader
from lightning_bigmodels.data.preparation import prepare_shards
from lightning_bigmodels.data.prompts import Prompts, read_prompts
from lightning_bigmodels.data.shard_cache import ShardCache
from lightning_bigmodels.data.shards import Preparation
from lightning_bigmodels.data.sources import Corpus, TextParts
from lightning_bigmodels.data.stores import open_store
from lightning_bigmodels.data.streaming import ShardBlocks, ShardSampler
from lightning_bigmodels.data.text_inspection import inspect_text
from lightning_bigmodels.data.token_blocks import BlockSampler, EvaluationWindows, TrainBlocks
from lightning_bigmodels.data.token_cache import TokenCache, default_cache_dir, prepare
from lightning_bigmodels.data.tokenizer import MIN_VOCAB_SIZE, load_tokenizer, same_tokenizer
from lightning_bigmodels.errors import InputError

_PROMPT_CHARACTERS = 64
_PROMPT_TOKENS = 256  # enough for 64 characters of four bytes each


class Text(DataModule):
    """Plain text, tokenized once and cut into rows for next-token prediction.

    Attributes:
        tokenizer: The tokenizer, known after `setup`; None while only `prompts` are read.
        splits: Tokens of each part, known after `setup`.

    Args:
        sources: Where the text comes from: `python-docs` (the language reference in every CPython), a file, a folder, a
            glob, `hub:<name>[:<configuration>][@<split>]`, or a list of these. `.jsonl` and `.parquet` files hold one
            document per row, any other file is one document; `.gz` and `.zst` are read too.
        column: Column of `.jsonl`, `.parquet` and hub rows that holds the text.
        encoding: Encoding of plain text and `.jsonl` files, such as latin-1.
        val_sources: Sources of validation text; None takes it from the end of `sources`.
        test_sources: Sources of test text; None takes it from before the validation text.
        val_fraction: Part of the text, from 0 to below 1, that is held out for validation, in UTF-8 bytes.
        test_fraction: Part of the text, from 0 to below 1, that is held out for testing, in UTF-8 bytes.
        tokenizer: A tokenizer.json, a folder or hub name with a tokenizer, or a checkpoint; None trains one on the
            training part.
        vocab_size: Most tokens of the trained tokenizer; at least 257.
        block_size: Tokens of a row.
        batch_size: Rows of a training batch, per process.
        eval_batch_size: Rows of a validation or test batch and prompts of a predict batch, per process; None: as
            `batch_size`.
        eval_stride: Tokens counted per evaluation window, 1 to `block_size`; fewer give each token more context and
            take longer. None: `block_size`.
        prompts: What predict continues: a text file with one prompt per line, none of them blank, or a `.jsonl` file
            with a column `prompt`, which may be empty. None takes beginnings from the validation text.
        num_prompts: Number of prompts taken from the validation text.
        seed: Chooses the order of the training rows.
        num_workers: Processes that load batches ahead; 0 is fast enough for all but the smallest networks.
        cache_dir: Folder for the tokens; None: `lightning_bigmodels` in `$XDG_CACHE_HOME` or `~/.cache`.
        shards: A folder or `s3://BUCKET/PREFIX` that `bigmodels prepare` has written; text, parts and tokenizer then
            are those that it was given, and `sources` are not read.
        shard_cache_gb: GB (10^9 bytes) of the local disk, in `cache_dir`, that shards from an object store may take.
        shard_timeout: Seconds that an object store may stay silent before the run ends.

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(
        self,
        sources: str | list[str] = "python-docs",
        column: str = "text",
        encoding: str = "utf-8",
        val_sources: str | list[str] | None = None,
        test_sources: str | list[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        block_size: int = 256,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        eval_stride: int | None = None,
        prompts: str | None = None,
        num_prompts: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        shards: str | None = None,
        shard_cache_gb: float = 8.0,
        shard_timeout: float = 600.0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        check_at_least(1, block_size=block_size, eval_stride=eval_stride, num_prompts=num_prompts)
        check_at_least(MIN_VOCAB_SIZE, vocab_size=vocab_size)
        _check_fractions(0.0 if val_sources else val_fraction, 0.0 if test_sources else test_fraction)
        if eval_stride is not None and eval_stride > block_size:
            raise InputError(f"eval_stride is {eval_stride}; set it to at most block_size ({block_size})")
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise InputError(f"encoding {encoding!r} is unknown; set one that Python has, such as latin-1") from error
        if shard_cache_gb <= 0:
            raise InputError(f"shard_cache_gb is {shard_cache_gb}; set it above 0")
        if shard_timeout < 0:
            raise InputError(f"shard_timeout is {shard_timeout}; set it to 0 or more")
        for name, value in {"sources": sources, "val_sources": val_sources, "test_sources": test_sources}.items():
            if value is not None and not value:
                raise InputError(f"{name} is empty; name at least one source")

        def corpus(names: str | list[str] | None) -> Corpus | None:
            return None if names is None else Corpus(names, column, encoding)

        self.text = TextParts(
            Corpus(sources, column, encoding), corpus(val_sources), corpus(test_sources), val_fraction, test_fraction
        )
        self.tokenizer_source = tokenizer
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.eval_stride = block_size if eval_stride is None else eval_stride
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self.shards = shards
        self.shard_cache_gb = shard_cache_gb
        self.shard_timeout = shard_timeout
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._cache: TokenCache | Preparation | None = None

    def prepare_data(self) -> None:
        """Tokenize the text, unless its cache is there; prepared shards need nothing."""
        if self.shards is None and not (self.prompts and self._running("predict")):
            self._prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open the token cache or the shards; with `prompts`, predict needs neither text nor tokenizer.

        Raises:
            InputError: the part that the stage needs is missing or too short, or `shards` is no whole preparation.
        """
        if stage == "predict" and self.prompts:
            return
        # also where another node's disk has been prepared
        self._cache = self._prepare() if self.shards is None else self._open_shards(self.shards)
        self.tokenizer = self._cache.tokenizer
        if stage in (None, "fit") and self.splits["train"] <= self.block_size:
            raise InputError(
                f"the training part of {self._name} has {self.splits['train']} tokens, fewer than one block of "
                f"{self.block_size} and the token after it; set a smaller block_size or give more text"
            )
        if stage in ("validate", "test"):
            self._check_part("val" if stage == "validate" else "test")
        # Lightning advises workers by the number of cores; mapped tokens load at millions a second without them. And it
        # takes no validation loader for an oversight.
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        if "val" not in self._parts:
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")

    @property
    def splits(self) -> dict[str, int]:
        """Tokens of each part, known after `setup`."""
        return self._opened.num_tokens

    @property
    def num_train_samples(self) -> int:
        """Rows of an epoch over all processes, known after `setup`."""
        return len(self._train_blocks())

    def train_dataloader(self) -> ResumableDataLoader:
        """Return batches like `TokenBatch`; block boundaries move from epoch to epoch."""
        blocks = self._train_blocks()
        return self.resumable_loader(blocks, BlockSampler if isinstance(blocks, TrainBlocks) else ShardSampler)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches like `EvaluationTokenBatch`; without a validation part, no loader."""
        if "val" not in self._parts and not self._running("validate"):
            return []
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches like `EvaluationTokenBatch`.

        Raises:
            InputError: there is no test part.
        """
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches like `PromptBatch`, equally many on each process; every prompt is on one, in order within it.

        Raises:
            InputError: there is no prompt.
        """
        if self.prompts:
            prompts = read_prompts(Path(self.prompts).expanduser(), self.text.train.encoding)
        else:
            prompts = self._prompts_from_text()
        return self.evaluation_loader(Prompts(prompts))

    def write_shards(self, output: str, shard_bytes: int, num_workers: int) -> None:
        """Tokenize the text into shards, which `shards` reads; interrupted, it goes on when it is called again.

        Args:
            output: A folder or `s3://BUCKET/PREFIX`, empty.
            shard_bytes: Size of a shard.
            num_workers: Processes that tokenize; 0: this one.

        Raises:
            InputError: the text cannot be read, or the output holds something else.
            RunError: the output cannot be written, or a process died.
        """
        if self.shards is not None:
            raise InputError("data.shards is set, and prepare reads data.sources; leave data.shards out")
        check_at_least(64, shard_bytes=shard_bytes)
        check_at_least(0, num_workers=num_workers)
        tokenizer = None if self.tokenizer_source is None else load_tokenizer(self.tokenizer_source)
        prepare_shards(
            self.text, tokenizer, self.vocab_size, output, self.cache_dir, shard_bytes, num_workers, rank_zero_info
        )

    def inspect(self, inspector: Inspector) -> None:
        """Hand the documents of all parts to `bigmodels check`.

        Raises:
            InputError: a source is not there, or the text is that of `shards`.
        """
        if self.shards is not None:
            raise InputError("data.shards is set, and check reads data.sources; leave data.shards out")
        inspect_text(self.text, inspector)

    def example_batch(self, batch_size: int) -> EvaluationTokenBatch:
        """Return random tokens below `vocab_size`, four bytes each."""
        shape = (batch_size, self.block_size + 1)
        rows = torch.randint(self.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        num_bytes = torch.full((batch_size,), 4 * self.block_size)
        return {"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous(), "num_bytes": num_bytes}

    def _prepare(self) -> TokenCache:
        tokenizer = None if self.tokenizer_source is None else load_tokenizer(self.tokenizer_source)
        return prepare(self.cache_dir, self.text, tokenizer, self.vocab_size, rank_zero_info)

    @property
    def _opened(self) -> TokenCache | Preparation:
        if self._cache is None:
            raise InputError("the text is not open yet; call prepare_data() and setup() before this")
        return self._cache

    def _running(self, verb: str) -> bool:
        return self.trainer is not None and self.trainer.state.fn == verb

    @property
    def _name(self) -> str:
        return str(self.text.train) if self.shards is None else self.shards

    @property
    def _parts(self) -> list[str]:
        return self.text.names() if self.shards is None else list(self._opened.num_tokens)

    def _check_part(self, part: str) -> None:
        if part not in self._parts:
            when = "" if self.shards is None else " when you prepare it"
            raise InputError(f"{self._name} has no {part} part; set {part}_fraction above 0, or {part}_sources{when}")

    def _open_shards(self, address: str) -> Preparation:
        opened = Preparation(open_store(address, self.shard_timeout), self.cache_dir)
        if self.tokenizer_source is None:
            size = len(opened.tokenizer)
            if size > self.vocab_size:
                raise InputError(
                    f"{address} was prepared with a tokenizer of {size} tokens and vocab_size is {self.vocab_size}; "
                    f"set vocab_size to {size} or more"
                )
        elif not same_tokenizer(load_tokenizer(self.tokenizer_source), opened.tokenizer):
            raise InputError(
                f"{address} was prepared with another tokenizer than {self.tokenizer_source}; leave tokenizer out, or "
                "prepare the text again with it"
            )
        return opened

    def _train_blocks(self) -> TrainBlocks | ShardBlocks:
        opened = self._opened
        if isinstance(opened, Preparation):
            cache = ShardCache(opened, round(self.shard_cache_gb * 1e9))
            return ShardBlocks(cache, self.block_size, self.seed, num_processes=self.shard()[0])
        return TrainBlocks(opened.tokens("train"), self.block_size)

    def _evaluation_loader(self, part: str) -> DataLoader[Any]:
        self._check_part(part)
        tokens, num_bytes = self._opened.tokens(part), self._opened.num_bytes(part)
        return self.evaluation_loader(EvaluationWindows(tokens, num_bytes, self.block_size, self.eval_stride))

    def _prompts_from_text(self) -> list[str]:
        """Return beginnings of whole words from evenly spaced places of the validation text."""
        if "val" not in self._parts:
            raise InputError("predict has no validation text to take prompts from; set `prompts` to a file of them")
        assert self.tokenizer is not None
        tokens = self._opened.tokens("val").array
        prompts = []
        for number in range(self.num_prompts):
            start = number * len(tokens) // self.num_prompts
            ids = tokens[start : start + _PROMPT_TOKENS].tolist()
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if number:
                text = re.sub(r"^\S*\s+", "", text)  # the place may lie inside a word, or inside a character
            if len(text) > _PROMPT_CHARACTERS:
                text = re.sub(r"\s+\S*$", "", text[: _PROMPT_CHARACTERS + 1])
            prompts.append(text)
        prompts = [prompt for prompt in prompts if prompt.strip()]
        if not prompts:
            raise InputError("the validation text has no words to take prompts from; set `prompts` to a file of them")
        return prompts


def _check_fractions(val: float, test: float) -> None:
    for name, value in {"val_fraction": val, "test_fraction": test}.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}; set it to 0 or more and below 1")
    if val + test >= 1:
        raise InputError(
            f"val_fraction {val} and test_fraction {test} leave no training text; let their sum be below 1"
        )
