"""The largest batch whose training step fits into memory, on any number of processes."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

from lightning_bigmodels.batch_search import REMEDIES, BatchSize, Room, Search, Usage, gib
from lightning_bigmodels.callbacks.process_watch import ProcessWatch
from lightning_bigmodels.callbacks.weight_average import WeightAverage
from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.peak_memory import GIB, Memory, memory_of
from lightning_bigmodels.strategies.batch_norm import one_value_allowed
from lightning_bigmodels.strategies.collectives import gather
from lightning_bigmodels.tasks.task import Task

_NEVER_REACHED = 10**9  # batches of the epoch that the search is
_ONE_ROW = "batch norm cannot be trained on one row, of which it gets one value per channel"


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
    decision. Of the Trainer's callbacks only weight averaging takes part. The smallest size is 1, or 2 where batch norm
    gets one value per channel of a row.

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
        InputError: Not even the smallest batch fits, or an argument or the strategy does not suit.
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
        with one_value_allowed() as trials.single_values:
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
        self.single_values: list[torch.Size] = []

    def __len__(self) -> int:
        return _NEVER_REACHED

    def __iter__(self) -> Iterator[Any]:
        yield from self._warm_up()
        self.search = Search(gather(self._room()), self._max_size, self._min_size())
        while (size := self.search.next_size()) is not None:
            assert self._memory is not None
            self._size = size
            held = self._memory.begin()
            yield from self._step()
            self.search.add(size, gather(Usage(held, *self._memory.peaks())))
            peak, limit, rank = self.search.tightest(size)
            rank_zero_info(f"batch_size {size}: {gib(peak)} of {gib(limit)} GiB on rank {rank}")
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

    def _min_size(self) -> int:
        """Return the smallest size that the network takes, once it had one row."""
        if not self.single_values:
            return 1
        if self._max_size == 1:
            raise InputError(f"{_ONE_ROW}, and the largest batch size to try is 1; set it to 2 or more")
        rank_zero_info(f"{_ONE_ROW}: the search begins with 2")
        return 2

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
            return f"rank {self.trainer.global_rank} ran out of memory at batch_size {self._size}; {REMEDIES}"
        assert self.search is not None
        rank = self.trainer.global_rank
        peak, predicted = self.search.predict(best)[rank], self.search.predict(self._size)[rank]
        return (
            f"rank {rank} ran out of memory at batch_size {self._size}, where {gib(predicted)} GiB were predicted; "
            f"{best} ran with {gib(peak)} GiB: take it (--data.batch_size {best}), or search with a --memory between "
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
