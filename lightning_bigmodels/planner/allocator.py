"""What CUDA's caching allocator takes from the device for what a step allocates: whole segments, with holes in them."""

import bisect
import math
from collections import Counter, defaultdict
from collections.abc import Iterable

from lightning_bigmodels.planner.trace import Change, StepTrace

_MIB = 2**20
_ROUNDED_TO = 512
_SMALL = _MIB  # blocks up to here share segments of 2 MiB
_SMALL_SEGMENT = 2 * _MIB
_MIDDLE = 10 * _MIB  # larger ones up to here share segments of 20 MiB
_MIDDLE_SEGMENT = 20 * _MIB
_TYPICAL = 16 * _MIB  # a gradient's size where the trace tells none
_STEPS = 3
"""The first step makes the optimizer's state among the activations' holes, and the second fills what remains of them;
from then on nothing is added."""


def reserved_bytes(trace: StepTrace, limit: float = math.inf) -> int:
    """Return the most that the allocator holds in some steps like the traced one.

    Blocks are the best fitting free ones, and split; neighbours are joined when they are free. Tensors come and go as
    in the trace. Parameters are there first, and the optimizer's state comes with the first update: it lies where
    activations were, so the next step's activations need other room. Where the device is full, segments that are free
    as a whole go back to it.

    Source: the caching allocator of torch 2.x, c10/cuda/CUDACachingAllocator.cpp, with its default settings. Memory of
    other streams is kept apart there; here that is the communication's.

    Args:
        trace: The step.
        limit: Bytes that the device has for it. What is needed beyond them is counted all the same.
    """
    changes, gradients = _without_relabelling(trace.changes)
    freed = _freed_before_taken(changes)
    # what is accumulated into, or set to zero: it comes in the first backward pass and stays
    kept = max(0, trace.start.get("gradients", 0) - sum(freed))
    gradients = gradients or [_TYPICAL] * max(1, kept // _TYPICAL)
    state = trace.start.get("optimizer state", 0)
    states = max(1, round(state / sum(gradients)))  # of each parameter
    backward = [number for number, change in enumerate(changes) if change.phase == "backward"]
    arriving = iter(_parts(gradients, kept))
    arrivals = set(backward[:: max(1, len(backward) // len(gradients))]) if kept else set()

    allocator = _Allocator(limit)
    for size in _parts(gradients, trace.start.get("parameters", 0)) + freed:
        allocator.take("gradients", size)
    for step in range(_STEPS):
        waiting = step == 0
        for number, change in enumerate(changes):
            if waiting and number in arrivals:
                allocator.take("gradients", next(arriving, 0))
            if waiting and change.phase == "update":
                for size in [*arriving, *_parts(gradients * states, state)]:
                    allocator.take("optimizer state", size)
                waiting = False
            if change.difference > 0:
                allocator.take(change.kind, change.difference)
            elif change.difference < 0:
                allocator.give_back(-change.difference)
    return allocator.most


def _without_relabelling(changes: list[Change]) -> tuple[list[Change], list[int]]:
    """Return the changes less those where bytes only turned out to be of another kind, and the gradients' sizes."""
    kept: list[Change] = []
    gradients = []
    number = 0
    while number < len(changes):
        change = changes[number]
        following = changes[number + 1] if number + 1 < len(changes) else None
        relabelled = (
            following is not None
            and change.difference < 0
            and following.difference == -change.difference
            and following.operation == change.operation
            and following.kind != change.kind
        )
        last = following if relabelled and following is not None else change
        if last.kind == "gradients" and last.difference > 0:
            gradients.append(last.difference)
        if not relabelled:
            kept.append(change)
        number += 2 if relabelled else 1
    return kept, gradients


def _parts(sizes: list[int], total: int) -> list[int]:
    """Return a total in parts that are to each other as `sizes` are."""
    whole = sum(sizes)
    return [size * total // whole for size in sizes]


def _freed_before_taken(changes: Iterable[Change]) -> list[int]:
    """Return the sizes that a step gives back and has not taken: they are there when it begins."""
    balance: Counter[int] = Counter()
    found = []
    for change in changes:
        size = abs(change.difference)
        if change.difference > 0:
            balance[size] += 1
        elif change.difference < 0:
            if not balance[size]:
                found.append(size)
            else:
                balance[size] -= 1
    return found


class _Block:
    """A piece of a segment, between its neighbours."""

    __slots__ = ("key", "next", "previous", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.previous: _Block | None = None
        self.next: _Block | None = None
        self.key: tuple[int, int] | None = None  # place among the free blocks; None: taken


class _Pool:
    """Segments for blocks of alike size."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.reserved = 0
        self._free: list[tuple[int, int]] = []
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._number = 0

    def take(self, size: int) -> _Block | None:
        """Return a block, or None where no free one is large enough."""
        place = bisect.bisect_left(self._free, (size, 0))
        if place == len(self._free):
            return None
        block = self._blocks.pop(self._free.pop(place))
        block.key = None
        rest = block.size - size
        if rest >= _ROUNDED_TO if self.small else rest > _SMALL:
            remainder = _Block(rest)
            remainder.previous, remainder.next = block, block.next
            if block.next is not None:
                block.next.previous = remainder
            block.next, block.size = remainder, size
            self._put(remainder)
        return block

    def give_back(self, block: _Block) -> None:
        before, after = block.previous, block.next
        if before is not None and before.key is not None:
            self._remove(before)
            before.size += block.size
            before.next = after
            if after is not None:
                after.previous = before
            block = before
        if after is not None and after.key is not None:
            self._remove(after)
            block.size += after.size
            block.next = after.next
            if after.next is not None:
                after.next.previous = block
        self._put(block)

    def grow(self, size: int) -> None:
        """Take a segment from the device."""
        self.reserved += size
        self._put(_Block(size))

    def shrink(self) -> None:
        """Give segments back to the device that are free as a whole."""
        for block in list(self._blocks.values()):
            if block.previous is None and block.next is None:
                self._remove(block)
                self.reserved -= block.size

    def segment_size(self, size: int) -> int:
        """Return the size of the segment that is taken for a block."""
        if self.small:
            return _SMALL_SEGMENT
        return _MIDDLE_SEGMENT if size < _MIDDLE else -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT

    def _put(self, block: _Block) -> None:
        self._number += 1
        block.key = (block.size, self._number)
        self._blocks[block.key] = block
        bisect.insort(self._free, block.key)

    def _remove(self, block: _Block) -> None:
        assert block.key is not None
        del self._free[bisect.bisect_left(self._free, block.key)]
        del self._blocks[block.key]
        block.key = None


class _Allocator:
    def __init__(self, limit: float) -> None:
        self.most = 0
        self._limit = limit
        self._pools: dict[tuple[bool, bool], _Pool] = {}
        self._taken: defaultdict[int, list[tuple[_Pool, _Block]]] = defaultdict(list)

    def take(self, kind: str, size: int) -> None:
        if not size:
            return
        size = -(-size // _ROUNDED_TO) * _ROUNDED_TO
        small = size <= _SMALL
        pool = self._pools.setdefault((kind == "communication", small), _Pool(small))
        block = pool.take(size)
        if block is None:
            self._grow(pool, pool.segment_size(size))
            block = pool.take(size)
            assert block is not None
        self._taken[size].append((pool, block))

    def give_back(self, size: int) -> None:
        """Free one of the blocks of a size, the one taken last: a trace does not say which."""
        blocks = self._taken[-(-size // _ROUNDED_TO) * _ROUNDED_TO]
        if blocks:
            pool, block = blocks.pop()
            pool.give_back(block)

    def _grow(self, pool: _Pool, size: int) -> None:
        if self._reserved + size > self._limit:
            for each in self._pools.values():
                each.shrink()
        pool.grow(size)
        self.most = max(self.most, self._reserved)

    @property
    def _reserved(self) -> int:
        return sum(pool.reserved for pool in self._pools.values())
