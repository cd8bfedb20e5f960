"""Samplers and loaders whose order is a function of (seed, epoch): a killed run goes on with the very next batch."""

from collections.abc import Iterator, Sized
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, DistributedSampler

Batch = TypeVar("Batch")


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return a generator whose stream belongs to this epoch of this seed alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def identity(batch: Batch) -> Batch:
    """Collate nothing: the data set's `__getitems__` has already made a batch."""
    return batch


class ResumableSampler(DistributedSampler[Any]):
    """Shuffles by (seed, epoch) only, deals the order out to the processes, and can start in the middle of an epoch.

    It is a `DistributedSampler` because Lightning replaces every other kind under a distributed strategy. `len` is the
    whole epoch's also when the start lies further on: Lightning counts the batches it has trained before.

    Args:
        dataset: What is sampled.
        num_replicas: Number of processes that share the data.
        rank: This process among them, from 0.
        seed: Chooses the sequence of orders.
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; a start inside the epoch before it is forgotten (as after `limit_train_batches`)."""
        if epoch != self.epoch:
            self.start = 0
        super().set_epoch(epoch)

    def seek(self, epoch: int, start: int) -> None:
        """Let the next iteration begin behind `start` samples of an epoch, counted over all processes."""
        super().set_epoch(epoch)
        self.start = start

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """Return the epoch's order of the whole data set, drawn from `generator` alone."""
        return torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        order = self.order(epoch_generator(self.seed, self.epoch))[: self.total_size]
        start, self.start = self.start, 0
        return iter(order[start:][self.rank :: self.num_replicas].tolist())


class EvaluationSampler(DistributedSampler[Any]):
    """Deals every example to exactly one process, in order.

    Args:
        dataset: What is evaluated.
        num_replicas: Number of processes that share the data.
        rank: This process among them, from 0.
        even: Give every process equally many indices, which a sharded network needs: its forward pass is a collective.
            What is missing is filled with the index `len(dataset)`, which the data set answers with an example that
            counts for nothing.
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0, even: bool = True) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False, drop_last=False)  # type: ignore[arg-type]
        self.even = even

    def _indices(self) -> range:
        end = self.total_size if self.even else len(self.dataset)  # type: ignore[arg-type]
        return range(self.rank, end, self.num_replicas)

    def __len__(self) -> int:
        return len(self._indices())

    def __iter__(self) -> Iterator[int]:
        length = len(self.dataset)  # type: ignore[arg-type]
        return (min(index, length) for index in self._indices())


class ResumableDataLoader(DataLoader[Any]):
    """A loader over a `ResumableSampler` that Lightning stores in the checkpoint and puts back to the next batch.

    The state counts samples over all processes, so that rank 0's copy, the only one that Lightning keeps, serves every
    process, also another number of them with the same global batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Its own generator: making an iterator must not draw from the stream that dropout reads.
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(*args, **kwargs)
        self._epoch = 0
        self._num_consumed = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: its body runs at the first `next`, which is after Lightning's `set_epoch`.
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):  # `overfit_batches` puts a sequential sampler in its place
            yield from super().__iter__()
            return
        assert self.generator is not None
        self.generator.manual_seed(epoch_generator(sampler.seed, sampler.epoch).initial_seed())
        self._epoch, self._num_consumed = sampler.epoch, sampler.start
        for batch in super().__iter__():
            # Counted where batches are handed out: workers have fetched further ahead.
            self._num_consumed += self._global_batch_size()
            yield batch

    def _global_batch_size(self) -> int:
        assert self.batch_size is not None
        return self.batch_size * getattr(self.sampler, "num_replicas", 1)

    def state_dict(self) -> dict[str, int]:
        """Return the place of the next batch: plain values, equal on all processes."""
        return {"epoch": self._epoch, "samples": self._num_consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin there; behind the last batch of an epoch that is the next epoch."""
        epoch, start = state["epoch"], state["samples"]
        if start >= len(self) * self._global_batch_size():
            epoch, start = epoch + 1, 0
        self._epoch, self._num_consumed = epoch, start
        if isinstance(self.sampler, ResumableSampler):
            self.sampler.seek(epoch, start)
