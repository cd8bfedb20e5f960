"""Samplers and loaders whose order is a function of (seed, epoch): a killed run goes on with the very next batch."""

import hashlib
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypedDict, TypeVar

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

    Attributes:
        indices: (N,) int64, this process's share of the epoch from its start on, known while it is iterated over.

    Args:
        dataset: What is sampled.
        num_replicas: Number of processes that share the data.
        rank: This process among them, from 0.
        seed: Chooses the sequence of orders.
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.start = 0
        self.indices = torch.empty(0, dtype=torch.int64)

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
        order = self.order(epoch_generator(self.seed, self.epoch))
        start, self.start = self.start, 0
        # The rest is cut, not the whole: another number of processes may have left a start that is no multiple of this.
        stop = len(order) - (len(order) - start) % self.num_replicas
        self.indices = order[start:stop][self.rank :: self.num_replicas]
        return iter(self.indices.tolist())


class EpochSampler(ResumableSampler):
    """A `ResumableSampler` that yields (epoch, index), for data sets whose samples change from epoch to epoch.

    What such a set draws for a sample, with `sample_generator`, belongs to (seed, epoch, index) alone: neither the
    number of processes, of workers, nor a resume moves it.
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        epoch = self.epoch
        return ((epoch, index) for index in super().__iter__())


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Return a generator whose stream belongs to this sample in this epoch of this seed alone."""
    place = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(place, "big") >> 1)


@contextmanager
def sample_randomness(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Let torch's global stream, from which torchvision's transforms draw, be this sample's; put it back after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(sample_generator(seed, epoch, index).get_state())
        yield


class EvaluationSampler(DistributedSampler[Any]):
    """Deals every example to exactly one process, in order, and to all processes equally many indices.

    A sharded network needs that, since its forward pass is a collective. What is missing is filled with the index
    `len(dataset)`, which the data set answers with an example that counts for nothing.

    Args:
        dataset: What is evaluated.
        num_replicas: Number of processes that share the data.
        rank: This process among them, from 0.
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False, drop_last=False)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        length = len(self.dataset)  # type: ignore[arg-type]
        return (min(index, length) for index in range(self.rank, self.total_size, self.num_replicas))


class Place(TypedDict):
    """Where a batch lies in the data.

    Attributes:
        epoch: From 0.
        samples: First and end (not included) in the epoch's order, counted over all processes.
        indices: This process's own samples of the batch, as indices of the data set.
    """

    epoch: int
    samples: tuple[int, int]
    indices: list[int]


class ResumableDataLoader(DataLoader[Any]):
    """A loader over a `ResumableSampler` that Lightning stores in the checkpoint and puts back to the next batch.

    The state counts samples over all processes, so that rank 0's copy, the only one that Lightning keeps, serves every
    process, also another number of them and another batch size. What then remains of the epoch is cut into batches from
    that place on; samples that do not fill a batch on every process are left out, as at the end of every epoch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Its own generator: making an iterator must not draw from the stream that dropout reads.
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(*args, **kwargs)
        self._epoch = 0
        self._first_sample = 0
        self._num_batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: its body runs at the first `next`, which is after Lightning's `set_epoch`.
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):  # `overfit_batches` puts a sequential sampler in its place
            yield from super().__iter__()
            return
        assert self.generator is not None
        self.generator.manual_seed(epoch_generator(sampler.seed, sampler.epoch).initial_seed())
        self._epoch, self._first_sample, self._num_batches = sampler.epoch, sampler.start, 0
        for batch in super().__iter__():
            # Counted where batches are handed out: workers have fetched further ahead.
            self._num_batches += 1
            yield batch

    @property
    def global_batch_size(self) -> int:
        """Samples of a batch over all processes."""
        assert self.batch_size is not None
        return self.batch_size * getattr(self.sampler, "num_replicas", 1)

    def place(self) -> Place:
        """Return where the last batch handed out lies; empty before the first batch and under `overfit_batches`."""
        if not isinstance(self.sampler, ResumableSampler):
            return {"epoch": 0, "samples": (0, 0), "indices": []}
        assert self.batch_size is not None
        size = self.global_batch_size
        before = max(0, self._num_batches - 1)
        start, stop = self._first_sample + before * size, self._first_sample + self._num_batches * size
        indices = self.sampler.indices[before * self.batch_size : self._num_batches * self.batch_size]
        return {"epoch": self._epoch, "samples": (start, stop), "indices": indices.tolist()}

    def state_dict(self) -> dict[str, int]:
        """Return the place of the next batch: plain values, equal on all processes; nothing under `overfit_batches`."""
        if not isinstance(self.sampler, ResumableSampler):
            return {}
        size = self.global_batch_size
        samples = self._first_sample + self._num_batches * size
        return {"epoch": self._epoch, "samples": samples, "global_batch_size": size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin there; where no batch remains in the epoch, with the next epoch."""
        if not state or not isinstance(self.sampler, ResumableSampler):
            return
        epoch, start = state["epoch"], state["samples"]
        if len(self.sampler.dataset) - start < self.global_batch_size:  # type: ignore[arg-type]
            epoch, start = epoch + 1, 0
        self._epoch, self._first_sample, self._num_batches = epoch, start, 0
        self.sampler.seek(epoch, start)
