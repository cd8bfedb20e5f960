"""Training rows from shards: an order that is a function of (seed, epoch), and few shards for each process.

Legend: N blocks of all shards, B rows of a batch, T tokens of a row (`block_size`).
"""

import heapq
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_bigmodels.data.batches import TokenBatch
from lightning_bigmodels.data.loading import ResumableSampler, epoch_generator
from lightning_bigmodels.data.shard_cache import ShardCache, ShardFetcher
from lightning_bigmodels.errors import InputError

NUM_LANES = 64
NUM_AHEAD = 8  # shards that a process fetches before it needs them


class ShardOrder:
    """The order of an epoch's blocks.

    The shuffled shards, laid end to end, are cut into 64 lanes of equally many blocks, and the order takes one block
    from each lane in turn; inside a shard the blocks are shuffled. A block's neighbours in the order so come from 64
    shards, and of R processes, R dividing 64, each reads the lanes p with p % R equal to its rank, and no other process
    their shards, but for those at the ends of its share. Numbering the lanes by reversed bits makes that share one run
    of shards.

    Args:
        seed: Chooses the sequence of orders.
        epoch: From 0.
        num_blocks: (number of shards,) int64, blocks of each.
    """

    def __init__(self, seed: int, epoch: int, num_blocks: NDArray[np.int64]) -> None:
        generator = epoch_generator(seed, epoch)
        self._shards = torch.randperm(len(num_blocks), generator=generator).numpy()
        self._seeds = torch.randint(2**62, (len(num_blocks),), generator=generator)
        self._ends = np.cumsum(num_blocks[self._shards])
        self._num_blocks = num_blocks
        lengths = [len(range(lane, int(self._ends[-1]), NUM_LANES)) for lane in range(NUM_LANES)]
        width = NUM_LANES.bit_length() - 1
        reversed_bits = [int(f"{lane:0{width}b}"[::-1], 2) for lane in range(NUM_LANES)]
        begin = 0
        self._lanes = [range(0)] * NUM_LANES
        for lane in sorted(range(NUM_LANES), key=reversed_bits.__getitem__):
            self._lanes[lane] = range(begin, begin + lengths[lane])
            begin += lengths[lane]

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return the lane of a position, its shard, and its place among the shard's shuffled blocks."""
        lane = position % NUM_LANES
        block = self._lanes[lane][position // NUM_LANES]
        rank = int(np.searchsorted(self._ends, block, side="right"))
        shard = int(self._shards[rank])
        return lane, shard, block - int(self._ends[rank] - self._num_blocks[shard])

    def generator(self, shard: int) -> torch.Generator:
        """Return a generator whose stream belongs to this shard in this epoch alone."""
        return torch.Generator().manual_seed(int(self._seeds[shard]))

    def upcoming(self, position: int, stride: int) -> Iterator[tuple[int, int]]:
        """Yield (position, shard) for what the positions `position`, `position + stride`, ... need, in order.

        The position is that of the shard's beginning in its lane: at most a little before the first that needs it.
        """
        lanes = {(position + step * stride) % NUM_LANES for step in range(NUM_LANES // math.gcd(stride, NUM_LANES))}
        return heapq.merge(*(self._shards_of(lane, position) for lane in lanes))

    def _shards_of(self, lane: int, position: int) -> Iterator[tuple[int, int]]:
        blocks = self._lanes[lane]
        first = -((lane - position) // NUM_LANES)  # of the lane's blocks, at or behind the position
        while first < len(blocks):
            rank = int(np.searchsorted(self._ends, blocks[first], side="right"))
            yield first * NUM_LANES + lane, int(self._shards[rank])
            first = int(self._ends[rank]) - blocks.start


class ShardBlocks(Dataset[TokenBatch]):
    """Blocks of the shards' tokens, those of one shard all moved by a shift that changes from epoch to epoch.

    Index `position + epoch * len` is the block at a position of an epoch's order: the sampler speaks to persistent
    workers through the index alone. No block crosses from one shard into the next; a shard so gives up less than two
    blocks at its end.

    Args:
        cache: Hands out the shards.
        block_size: T.
        seed: Chooses the sequence of orders.
        num_processes: Number of processes that share the data; it decides what is fetched ahead, never the order.

    Raises:
        InputError: all shards are shorter than a block, or the cache's limit is too small.
    """

    def __init__(self, cache: ShardCache, block_size: int, seed: int, num_processes: int = 1) -> None:
        self._cache = cache
        self._seed = seed
        self._num_processes = num_processes
        self.block_size = block_size
        lengths = cache.preparation.num_shard_tokens
        self._num_blocks = np.where(lengths > block_size, np.maximum(1, (lengths - block_size) // block_size), 0)
        self._num_shifts = np.minimum(block_size, lengths - self._num_blocks * block_size)
        self._len = int(self._num_blocks.sum())
        if self._len == 0:
            raise InputError(
                f"the shards in {cache.preparation.store} have at most {lengths.max()} tokens, fewer than one block of "
                f"{block_size} and the token after it; set a smaller block_size or prepare larger shards"
            )
        sizes = [shard.size for shard in cache.preparation.shards]
        needed = min(sum(sizes), 2 * NUM_LANES * max(sizes))
        if cache.limit < needed and not cache.in_place:
            raise InputError(
                f"shard_cache_gb is {cache.limit / 1e9:g}, which is too little for two shards in each of {NUM_LANES} "
                f"lanes; set it to {math.ceil(needed / 1e7) / 100:g} or more, or prepare smaller shards"
            )
        self._reader: _Reader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def __len__(self) -> int:
        return self._len

    def __getitems__(self, indices: Sequence[int]) -> TokenBatch:
        """Return the rows of one batch, after waiting for shards that are not there yet."""
        if self._reader is None or self._reader.process != os.getpid():
            # Threads do not survive a fork, and locks may have been taken in it.
            self._reader = _Reader(self._cache, self._num_processes)
        rows = []
        for index in indices:
            epoch, position = divmod(index, len(self))
            if not self._reader.is_at(epoch, position):
                self._reader.begin(epoch, position, ShardOrder(self._seed, epoch, self._num_blocks))
            rows.append(self._reader.read(position, self._starts, self.block_size + 1))
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        return {"input_ids": batch[:, :-1].contiguous(), "labels": batch[:, 1:].contiguous()}

    def __getitem__(self, index: int) -> TokenBatch:
        return self.__getitems__([index])

    def _starts(self, shard: int, generator: torch.Generator) -> NDArray[np.int64]:
        """Return where the blocks of a shard begin, shifted and shuffled."""
        shift = int(torch.randint(int(self._num_shifts[shard]), (), generator=generator))
        starts: NDArray[np.int64] = torch.randperm(int(self._num_blocks[shard]), generator=generator).numpy()
        return starts * self.block_size + shift


class ShardSampler(ResumableSampler):
    """Goes through the positions of the epoch's order; which blocks they are, `ShardBlocks` knows."""

    @override
    def __iter__(self) -> Iterator[int]:
        length = len(self.dataset)  # type: ignore[arg-type]
        start, self.start = self.start, 0
        stop = length - (length - start) % self.num_replicas
        begin = self.epoch * length
        share = range(begin + start + self.rank, begin + stop, self.num_replicas)
        self.indices = share.start + self.num_replicas * torch.arange(len(share))
        return iter(share)


class _Reader:
    """What one process has open: the shard of each lane, and requests for those that it will need next."""

    def __init__(self, cache: ShardCache, num_processes: int) -> None:
        self.process = os.getpid()
        self._fetcher = ShardFetcher(cache)
        self._num_processes = num_processes
        self._lanes: dict[int, tuple[int, NDArray[Any], NDArray[np.int64]]] = {}
        self._order: ShardOrder | None = None
        self._epoch = self._position = -1
        self._upcoming: Iterator[tuple[int, int]] = iter(())
        self._ahead: deque[int] = deque()

    def is_at(self, epoch: int, position: int) -> bool:
        """Tell whether a position lies ahead in the epoch that is being read."""
        return epoch == self._epoch and position >= self._position

    def begin(self, epoch: int, position: int, order: ShardOrder) -> None:
        """Go to a place in the order of an epoch."""
        self._lanes.clear()
        self._ahead.clear()
        self._epoch, self._order = epoch, order
        self._upcoming = order.upcoming(position, self._num_processes)

    def read(
        self, position: int, starts: Callable[[int, torch.Generator], NDArray[np.int64]], length: int
    ) -> NDArray[Any]:
        """Return the tokens of the block at a position.

        Args:
            position: In the epoch's order.
            starts: Returns where the blocks of a shard begin.
            length: Tokens to read.
        """
        assert self._order is not None
        self._position = position
        self._look_ahead()
        lane, shard, number = self._order.locate(position)
        if lane not in self._lanes or self._lanes[lane][0] != shard:
            self._lanes.pop(lane, None)  # makes room for the next
            tokens = self._fetcher.open(shard)
            self._lanes[lane] = (shard, tokens, starts(shard, self._order.generator(shard)))
        _, tokens, begins = self._lanes[lane]
        begin = begins[number]
        # A copy: a view would keep a shard open that its lane has left.
        return tokens[begin : begin + length].copy()

    def _look_ahead(self) -> None:
        while self._ahead and self._ahead[0] <= self._position:
            self._ahead.popleft()
        while len(self._ahead) < NUM_AHEAD:
            entry = next(self._upcoming, None)
            if entry is None:
                break
            position, shard = entry
            self._fetcher.request(shard)
            if position > self._position:
                self._ahead.append(position)
