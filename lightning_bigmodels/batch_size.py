"""The largest batch whose training step fits into memory, on any number of processes."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

from lightning_bigmodels.callbacks.process_watch import ProcessWatch
from lightning_bigmodels.callbacks.weight_average import WeightAverage
from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.peak_memory import GIB, Memory, memory_of
from lightning_bigmodels.strategies.collectives import gather
from lightning_bigmodels.tasks.task import Task

_T = TypeVar("_T")
_NEVER_REACHED = 10**9  # batches of the epoch that the search is


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
            lines.append(f"rank {rank:<3}{_gib(peak):>10}{_gib(limit):>11}{_gib(limit - peak):>10}")
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
    """

    def __init__(self, rooms: list[Room], max_size: int | None = None) -> None:
        self.rooms = rooms
        self.max_size = max_size
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
            return 1
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
            InputError: Not even one row fits.
        """
        best = self.best
        if best is None:
            peak, limit, rank = self.tightest(1)
            raise InputError(
                f"a step with batch_size 1 needs {_gib(peak)} GiB on rank {rank}, where the limit is {_gib(limit)} GiB"
                f"; {_REMEDIES}"
            )
        limits = [room.limit for room in self.rooms]
        if best == self.max_size:
            return BatchSize(best, self.predict(best), limits, f"more than {best} was not asked for")
        peak, _, rank = self.tightest(best + 1)
        verb = "needs" if best + 1 in self.trials else "was not tried: it may need"
        beyond = f"batch_size {best + 1} {verb} {_gib(peak)} GiB on rank {rank}"
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


def find_batch_size(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule,
    memory: float | None = None,
    max_batch_size: int | None = None,
) -> BatchSize:
    """Return the largest batch whose training step fits into memory on all processes.

    Real steps are run, with the Trainer's strategy, precision, clipping and accumulation, on batches of growing size
    from `datamodule.example_batch`: no data are read. All processes see what each has measured, so they take the same
    decision. Of the Trainer's callbacks only weight averaging takes part.

    Evaluation and generation are not counted, nor are processes that load data. The Trainer and the model are used up,
    since the model is trained on made-up data, and random numbers have been drawn.

    Args:
        trainer: Its settings are those of the training to come.
        model: The model to train.
        datamodule: Its `example_batch(batch_size)` makes the batches.
        memory: GiB that a step may need on this process; None: what is available, less a margin of a tenth of a CPU's,
            a twentieth of a GPU's memory. The processes of a host share its memory equally.
        max_batch_size: Largest size to try; None: memory alone decides.

    Raises:
        InputError: Not even one row fits, or an argument or the strategy does not suit.
        RunError: A process ran out of memory although less was predicted. It ends with this error, and the others end
            after it within two minutes (`ProcessWatch`).
    """
    if not hasattr(datamodule, "example_batch"):
        raise InputError(f"{type(datamodule).__name__} has no example_batch(batch_size) to try sizes with; add one")
    if memory is not None and memory <= 0:
        raise InputError(f"memory is {memory} GiB; it must be above 0")
    if max_batch_size is not None and max_batch_size < 1:
        raise InputError(f"the largest batch size to try is {max_batch_size}; set it to 1 or more")
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise InputError("the strategy runs in processes whose findings are lost; set trainer.strategy to ddp")
    if isinstance(model, Task):
        model.uses_no_data = True
    trials = _Trials(trainer, datamodule.example_batch, memory, max_batch_size, getattr(model, "step_period", 1))
    _strip(trainer, trials)
    try:
        trainer.fit(model, datamodule=_Batches(datamodule, trials))
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise RunError(trials.out_of_memory()) from error
    finally:
        trials.end()
    assert trials.search is not None
    return trials.search.result()


class _Trials(Callback):
    """An iterable of training batches that measures what each step on them used, and ends when the search is over."""

    def __init__(
        self,
        trainer: Trainer,
        example_batch: Callable[[int], Any],
        memory: float | None,
        max_size: int | None,
        step_period: int,
    ) -> None:
        self.trainer = trainer
        self._step_period = step_period
        self.search: Search | None = None
        self._example_batch = example_batch
        self._limit = None if memory is None else round(memory * GIB)
        self._max_size = max_size
        self._memory: Memory | None = None
        self._size = 1

    def __len__(self) -> int:
        return _NEVER_REACHED

    def __iter__(self) -> Iterator[Any]:
        yield from self._warm_up()
        self.search = Search(gather(self._room()), self._max_size)
        while (size := self.search.next_size()) is not None:
            assert self._memory is not None
            self._size = size
            held = self._memory.begin()
            yield from self._step()
            self.search.add(size, gather(Usage(held, *self._memory.peaks())))
            peak, limit, rank = self.search.tightest(size)
            rank_zero_info(f"batch_size {size}: {_gib(peak)} of {_gib(limit)} GiB on rank {rank}")
        self.trainer.should_stop = True

    def _step(self) -> Iterator[Any]:
        # as many as are not alike
        for _ in range(self._step_period * self.trainer.accumulate_grad_batches):
            yield self._example_batch(self._size)

    def _warm_up(self) -> Iterator[Any]:
        """Have the optimizer make its state, which a gradient scaler that begins too high puts off."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        for _ in range(64):
            before = scaler.get_scale() if scaler is not None else 0.0
            yield from self._step()
            if scaler is None or scaler.get_scale() >= before:
                return
        raise RunError("the gradients were not finite in 64 steps; set trainer.precision to bf16-mixed or 32-true")

    def _room(self) -> Room:
        assert self._memory is not None
        self._memory.begin()
        gather(None)  # so that no process frees or takes anything while the others look
        available = self._memory.room(self.trainer.num_devices)
        limit = available - self._memory.margin(available) if self._limit is None else self._limit
        return Room(limit, available)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to measure before there is a network."""
        device = trainer.strategy.root_device
        tensors = map(_local, itertools.chain(pl_module.parameters(), pl_module.buffers()))
        storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self._memory = memory_of(device, sum(held.values()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Part forward and backward, which grow with the batch, from the update, which does not."""
        assert self._memory is not None
        self._memory.mark()

    def end(self) -> None:
        """Stop measuring."""
        if self._memory is not None:
            self._memory.end()
            self._memory = None

    def out_of_memory(self) -> str:
        """Return what to do after the last size did not even run."""
        best = None if self.search is None else self.search.best
        if best is None:
            return f"rank {self.trainer.global_rank} ran out of memory at batch_size 1; {_REMEDIES}"
        assert self.search is not None
        rank = self.trainer.global_rank
        peak, predicted = self.search.predict(best)[rank], self.search.predict(self._size)[rank]
        return (
            f"rank {rank} ran out of memory at batch_size {self._size}, where {_gib(predicted)} GiB were predicted; "
            f"{best} ran with {_gib(peak)} GiB: take it (--data.batch_size {best}), or search with a --memory between "
            "the two"
        )


class _Batches(LightningDataModule):
    """Hands out the trials' batches; moves and changes them as the user's data module does."""

    def __init__(self, datamodule: LightningDataModule, trials: _Trials) -> None:
        super().__init__()
        self._trials = trials
        for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            setattr(self, hook, getattr(datamodule, hook))

    def train_dataloader(self) -> _Trials:
        return self._trials

    def val_dataloader(self) -> list[Any]:
        return []


def _strip(trainer: Trainer, trials: _Trials) -> None:
    """Leave of the Trainer what a step needs: nothing is written, evaluated or shown."""
    averaging = (WeightAverage, WeightAveraging)
    kept = [callback for callback in vars(trainer)["callbacks"] if isinstance(callback, averaging)]
    trainer.callbacks = [trials, *kept, ProcessWatch()]  # type: ignore[attr-defined]  # set by the connectors
    trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined]
    trainer.overfit_batches = 0.0  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.limit_train_batches = 1.0
    trainer.limit_val_batches = 0
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
    trainer.fit_loop.max_epochs = -1
    # what a schedule is laid over
    trainer.fit_loop.epoch_loop.max_steps = _NEVER_REACHED
    # from the second batch on, gradients are there in the backward pass: more batches need no more memory
    trainer.accumulate_grad_batches = min(2, trainer.accumulate_grad_batches)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3f}"


_REMEDIES = (
    "set model.activation_checkpointing, --trainer.precision bf16-mixed, --trainer.strategy fsdp2 on more processes, "
    "or a smaller network or block_size"
)
