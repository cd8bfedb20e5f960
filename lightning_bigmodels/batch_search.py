"""The sizes of a batch to try, and the largest that fits, from the memory that a step on each has used."""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.peak_memory import GIB

REMEDIES = (
    "set model.activation_checkpointing, --trainer.precision bf16-mixed, --trainer.strategy fsdp2 on more processes, "
    "or a smaller network or block_size"
)


def gib(num_bytes: int) -> str:
    """Return bytes in GiB, to be read."""
    return f"{num_bytes / GIB:.3f}"


class Usage(NamedTuple):
    """Memory of one step on one process, in bytes."""

    held: int
    """Before the step: weights, gradients and optimizer state."""
    compute: int
    """Peak of forward and backward."""
    update: int
    """Peak of clipping and the optimizer."""

    @property
    def peak(self) -> int:
        """The step's peak."""
        return max(self.compute, self.update)


class Room(NamedTuple):
    """Memory of one process, in bytes."""

    limit: int
    """What a step may need at most."""
    available: int
    """What is there: more than the limit by a margin, or by what the user wants to keep."""


@dataclass(frozen=True)
class BatchSize:
    """The largest batch that fits on all processes.

    Attributes:
        batch_size: Rows per process.
        peaks: Bytes that its step needs, by rank.
        limits: Bytes that a step may need, by rank.
        beyond: What is known of one row more.
    """

    batch_size: int
    peaks: list[int]
    limits: list[int]
    beyond: str

    def __str__(self) -> str:
        """Return what was found, and the option to paste, as lines of text."""
        lines = [f"{'':<8}{'peak GiB':>10}{'limit GiB':>11}{'left GiB':>10}"]
        for rank, (peak, limit) in enumerate(zip(self.peaks, self.limits, strict=True)):
            lines.append(f"rank {rank:<3}{gib(peak):>10}{gib(limit):>11}{gib(limit - peak):>10}")
        lines.append(self.beyond)
        lines.append("not counted: evaluation, generation and processes that load data")
        lines.append(f"largest batch per process: --data.batch_size {self.batch_size}")
        return "\n".join(lines)


class Search:
    """Chooses the sizes to try: upwards to the limit by what was measured, then between what fits and what does not.

    A larger size is tried if it is within the limit by the line through the two largest that fitted, or if it must fit
    into the available memory: beside what is held before the step, and in the optimizer, memory grows at most in
    proportion to the batch. Each size is at most twice the largest that was tried.

    Args:
        rooms: Memory of each rank.
        max_size: Largest size to try.
        min_size: Smallest size that the network takes.
    """

    def __init__(self, rooms: list[Room], max_size: int | None = None, min_size: int = 1) -> None:
        self.rooms = rooms
        self.max_size = max_size
        self.min_size = min_size
        self.trials: dict[int, list[Usage]] = {}

    def add(self, size: int, usages: list[Usage]) -> None:
        """Note what a step of this size used, by rank."""
        self.trials[size] = usages

    @property
    def best(self) -> int | None:
        """The largest size that fits, and no smaller one that was tried does not; None if there is none."""
        too_large = self._smallest_misfit()
        fitting = [size for size in self.trials if self._fits(size) and (too_large is None or size < too_large)]
        return max(fitting, default=None)

    def next_size(self) -> int | None:
        """Return the size to try next, or None if the search is over."""
        if not self.trials:
            return self.min_size
        best, too_large = self.best, self._smallest_misfit()
        if best is None or best == self.max_size:
            return None
        if too_large is not None:
            if too_large == best + 1:
                return None
            # lines are mostly right at once; halving, every other time, comes to an end where they are not
            size = self._largest_by_line(best, too_large) if len(self.trials) % 2 else (best + too_large) // 2
            return min(max(size, best + 1), too_large - 1)
        smaller = max((size for size in self.trials if size < best), default=None)
        size = best + 1 if smaller is None else max(best + 1, self._largest_by_line(smaller, best))
        size = min(size, 2 * best, self.max_size or 2 * best)
        return size if self._may_try(size, smaller, best) else None

    def predict(self, size: int) -> list[int]:
        """Return the bytes that a size will need, by rank: measured if it was tried, else from the sizes below."""
        if size in self.trials:
            return [usage.peak for usage in self.trials[size]]
        below = sorted(tried for tried in self.trials if tried < size)
        if len(below) == 1:
            return self._in_proportion(below[0], size)
        return self._by_line(below[-2], below[-1], size)

    def tightest(self, size: int) -> tuple[int, int, int]:
        """Return what a size needs, the limit, and the rank, for the rank where it has the least room."""
        limits = [room.limit for room in self.rooms]
        return max(zip(self.predict(size), limits, itertools.count(), strict=False), key=lambda each: each[0] - each[1])

    def result(self) -> BatchSize:
        """Return what was found.

        Raises:
            InputError: Not even the smallest size fits.
        """
        best = self.best
        if best is None:
            peak, limit, rank = self.tightest(self.min_size)
            raise InputError(
                f"a step with batch_size {self.min_size} needs {gib(peak)} GiB on rank {rank}, where the limit is "
                f"{gib(limit)} GiB; {REMEDIES}"
            )
        limits = [room.limit for room in self.rooms]
        if best == self.max_size:
            return BatchSize(best, self.predict(best), limits, f"more than {best} was not asked for")
        peak, _, rank = self.tightest(best + 1)
        verb = "needs" if best + 1 in self.trials else "was not tried: it may need"
        beyond = f"batch_size {best + 1} {verb} {gib(peak)} GiB on rank {rank}"
        return BatchSize(best, self.predict(best), limits, beyond)

    def _fits(self, size: int) -> bool:
        return all(u.peak <= room.limit for u, room in zip(self.trials[size], self.rooms, strict=True))

    def _smallest_misfit(self) -> int | None:
        return min((size for size in self.trials if not self._fits(size)), default=None)

    def _may_try(self, size: int, smaller: int | None, best: int) -> bool:
        most = self._in_proportion(best, size)
        if all(n <= max(room.limit, room.available) for n, room in zip(most, self.rooms, strict=True)):
            return True
        if smaller is None:
            return False
        likely = self._by_line(smaller, best, size)
        return all(n <= room.limit for n, room in zip(likely, self.rooms, strict=True))

    def _update_peaks(self) -> list[int]:
        # the same at each size, but missing where a gradient scaler skipped the update
        return [max(usage.update for usage in rank) for rank in zip(*self.trials.values(), strict=True)]

    def _in_proportion(self, tried: int, size: int) -> list[int]:
        growth = size / tried
        pairs = zip(self.trials[tried], self._update_peaks(), strict=True)
        return [max(update, round(u.held + growth * (u.compute - u.held))) for u, update in pairs]

    def _slopes(self, low: int, high: int) -> list[float]:
        pairs = zip(self.trials[low], self.trials[high], strict=True)
        return [max(0.0, (b.compute - a.compute) / (high - low)) for a, b in pairs]

    def _by_line(self, low: int, high: int, size: int) -> list[int]:
        columns = zip(self.trials[high], self._slopes(low, high), self._update_peaks(), strict=True)
        return [max(update, round(u.compute + slope * (size - high))) for u, slope, update in columns]

    def _largest_by_line(self, low: int, high: int) -> int:
        """Return the largest size within all limits by the line through two tried ones, at most `2 * high`."""
        sizes = [2 * high]
        for usage, room, slope in zip(self.trials[low], self.rooms, self._slopes(low, high), strict=True):
            if slope > 0:
                sizes.append(low + int((room.limit - usage.compute) / slope))
        return min(sizes)
