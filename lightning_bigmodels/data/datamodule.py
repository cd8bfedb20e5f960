"""What all data types share: a batch without a disk, the number of batches, and loaders that resume exactly."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_bigmodels.data.check import Inspector
from lightning_bigmodels.data.loader_processes import outlive_sigterm
from lightning_bigmodels.data.loading import EvaluationSampler, ResumableDataLoader, ResumableSampler, identity
from lightning_bigmodels.errors import InputError


class DataModule(pl.LightningDataModule, ABC):
    """A LightningDataModule whose order of samples is a function of (seed, epoch), cut over the processes.

    Its data sets answer a list of indices with a batch (`__getitems__`), and evaluation sets answer the index `len`
    with an example that counts for nothing. No Trainer is needed: call `prepare_data`, `setup`, then a loader.

    Args:
        batch_size: Rows of a training batch, per process.
        eval_batch_size: Rows of an evaluation batch, per process; None: as `batch_size`.
        num_workers: Processes that load batches ahead; 0: none.
        seed: Chooses the order of the training samples.
    """

    def __init__(self, batch_size: int, eval_batch_size: int | None, num_workers: int, seed: int) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_at_least(0, num_workers=num_workers, seed=seed)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.seed = seed

    @abstractmethod
    def example_batch(self, batch_size: int) -> Mapping[str, Any]:
        """Return a batch with the right keys, shapes and dtypes, without any disk."""

    @property
    @abstractmethod
    def num_train_samples(self) -> int:
        """Samples of an epoch over all processes, known after `setup`."""

    def inspect(self, inspector: Inspector) -> None:
        """Hand the files of all parts to `bigmodels check`, and what the run would refuse before it reads them.

        Raises:
            InputError: this data type cannot be checked, or nothing of it can be found.
        """
        raise InputError(f"check does not know how to read {type(self).__name__}; give it data of this package")

    @property
    def num_train_batches(self) -> int:
        """Batches of an epoch in each process, known after `setup`.

        For schedules: reading `trainer.estimated_stepping_batches` in `configure_optimizers` makes Lightning forget the
        training loader's state when it resumes (2.6.6).

        Raises:
            InputError: the data do not fill one batch on every process.
        """
        num_batches = self.num_train_samples // self.global_batch_size
        if num_batches == 0:
            raise InputError(
                f"{self.num_train_samples} training samples do not fill one batch of {self.batch_size} on each of "
                f"{self.shard()[0]} processes; set a smaller batch_size or give more data"
            )
        return num_batches

    @property
    def global_batch_size(self) -> int:
        """Samples of a training batch over all processes."""
        return self.batch_size * self.shard()[0]

    def num_batches_behind(self, samples: int, num_batches: int) -> int:
        """Return how many batches of this run lie behind a place in the epoch, such that full ones fill the rest of it.

        A run with another number of processes or another batch size may have left any place. What it has trained counts
        here as as many batches as are missing to a whole epoch.

        Args:
            samples: The place: samples behind it, over all processes.
            num_batches: Batches of this run's epoch, `num_train_batches` or fewer.
        """
        size = self.global_batch_size
        end = self.num_train_samples if num_batches == self.num_train_batches else num_batches * size
        return num_batches - max(0, end - samples) // size

    def shard(self) -> tuple[int, int]:
        """Return how many processes share the data and which of them this one is; (1, 0) without a Trainer.

        Under tensor parallelism a group of processes reads the same rows: these are not world size and global rank.
        """
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (1, 0) if kwargs is None else (kwargs["num_replicas"], kwargs["rank"])

    def resumable_loader(
        self, dataset: Dataset[Any], sampler: type[ResumableSampler] = ResumableSampler
    ) -> ResumableDataLoader:
        """Return the training loader; a last batch that is not full is left out."""
        assert self.num_train_batches > 0
        return ResumableDataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler(dataset, *self.shard(), seed=self.seed),  # type: ignore[arg-type]
            drop_last=True,
            **self._loader_options(),
        )

    def evaluation_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        """Return a loader that counts every example once and gives every process equally many batches."""
        return DataLoader(
            dataset,
            batch_size=self.eval_batch_size,
            sampler=EvaluationSampler(dataset, *self.shard()),  # type: ignore[arg-type]
            generator=torch.Generator(),  # validation leaves the training stream alone
            **self._loader_options(),
        )

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": identity,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": outlive_sigterm if self.num_workers else None,
            "pin_memory": torch.cuda.is_available(),
        }


def check_at_least(bound: int, **values: int | None) -> None:
    """Refuse arguments below `bound`; None passes."""
    for name, value in values.items():
        if value is not None and value < bound:
            raise InputError(f"{name} is {value}; set it to {bound} or more")
