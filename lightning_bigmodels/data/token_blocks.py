"""Rows of tokens cut from a stream: shifting blocks to train on, windows to evaluate with.

Legend: B rows of a batch, T tokens of a row (`block_size`), N tokens of the stream.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_bigmodels.data.batches import IGNORED, EvaluationTokenBatch, TokenBatch
from lightning_bigmodels.data.loading import ResumableSampler
from lightning_bigmodels.data.token_cache import ArrayFile


class TrainBlocks(Dataset[TokenBatch]):
    """Neighbouring blocks of a token stream, all of them moved by the same shift.

    Index `block + shift * len` is the block moved by `shift` tokens: the sampler speaks to persistent workers through
    the index alone. The number of blocks is the same for every shift, for which up to one block at the end is given up.

    Args:
        tokens: (N,) the stream, with N > block_size.
        block_size: T.
    """

    def __init__(self, tokens: ArrayFile, block_size: int) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.num_blocks = max(1, (len(tokens) - block_size) // block_size)
        # The last label of the last block is token num_blocks * T + shift.
        self.num_shifts = min(block_size, len(tokens) - self.num_blocks * block_size)

    def __len__(self) -> int:
        return self.num_blocks

    def __getitems__(self, indices: Sequence[int]) -> TokenBatch:
        """Return the rows of one batch, gathered at once."""
        shifts, blocks = np.divmod(np.asarray(indices, dtype=np.int64), self.num_blocks)
        starts = blocks * self.block_size + shifts
        positions = starts[:, None] + np.arange(self.block_size + 1)  # (B, T + 1)
        rows = torch.from_numpy(self.tokens.array[positions].astype(np.int64))
        return {"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}

    def __getitem__(self, index: int) -> TokenBatch:
        return self.__getitems__([index])


class BlockSampler(ResumableSampler):
    """Shuffles the blocks and draws a new shift for each epoch, so that no token is always the first of its row."""

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """Return the epoch's order of shifted blocks."""
        blocks = self.dataset
        assert isinstance(blocks, TrainBlocks)
        shift = torch.randint(blocks.num_shifts, (), generator=generator)
        return super().order(generator) + shift * len(blocks)


class EvaluationWindows(Dataset[EvaluationTokenBatch]):
    """Windows in which each token of the stream but the first is a counted label exactly once.

    The first window counts all its labels, each later one its last `stride`; the last is moved back to end with the
    stream. So a label behind the first window is predicted from more than `block_size - stride` tokens. Index `len`
    is a row that counts for nothing.

    Args:
        tokens: (N,) the stream; its first token is end-of-text, which also fills what a short stream leaves open.
        num_bytes: (N,) UTF-8 bytes that each token spells.
        block_size: T.
        stride: Labels counted per window, 1 to T.
    """

    def __init__(self, tokens: ArrayFile, num_bytes: ArrayFile, block_size: int, stride: int) -> None:
        self.tokens = tokens
        self.num_bytes = num_bytes
        self.block_size = block_size
        self.stride = stride

    def __len__(self) -> int:
        return 1 + max(0, -((len(self.tokens) - 1 - self.block_size) // -self.stride))

    def __getitems__(self, indices: Sequence[int]) -> EvaluationTokenBatch:
        """Return the windows of one batch."""
        size, length = self.block_size, len(self.tokens)
        window = np.asarray(indices, dtype=np.int64)[:, None]  # (B, 1)
        starts = np.minimum(window * self.stride, max(0, length - 1 - size))
        positions = starts + np.arange(size + 1)  # (B, T + 1)
        # The window counts the labels from this position of the stream on; the row of index `len` has none left.
        first = np.where(window == 0, 1, window * self.stride + size - self.stride + 1)
        inside = positions < length
        counted = (inside & (positions >= first))[:, 1:] & (window < len(self))
        positions = np.where(inside, positions, 0)
        rows = self.tokens.array[positions].astype(np.int64)
        labels = np.where(counted, rows[:, 1:], IGNORED)
        num_bytes = (self.num_bytes.array[positions[:, 1:]] * counted).sum(axis=1, dtype=np.int64)
        return {
            "input_ids": torch.from_numpy(rows[:, :-1]).contiguous(),
            "labels": torch.from_numpy(labels),
            "num_bytes": torch.from_numpy(num_bytes),
        }

    def __getitem__(self, index: int) -> EvaluationTokenBatch:
        return self.__getitems__([index])
