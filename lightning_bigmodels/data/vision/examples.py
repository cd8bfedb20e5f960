"""Examples read from files: a list of places becomes a batch, and what cannot be read ends the run or is left out."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.data.loading import sample_randomness
from lightning_bigmodels.errors import InputError

OnError = Literal["error", "skip"]
Example = TypeVar("Example")


class Examples(Dataset[Any], ABC, Generic[Example]):
    """One part of a data set, which answers a list of places with a batch (`__getitems__`).

    A place is an index or, in training, (epoch, index). The index `len` stands for an example that counts for nothing.

    Args:
        seed: With epoch and index it fixes what is drawn for a training example.
        on_error: Whether a file that cannot be read ends the run, or is left out and named in the batch's `errors`.
    """

    def __init__(self, seed: int = 0, on_error: OnError = "error") -> None:
        if on_error not in ("error", "skip"):
            raise InputError(f"on_error is {on_error!r}; set it to error or skip")
        self.seed = seed
        self.on_error = on_error

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the file of an example, as the user knows it."""

    @abstractmethod
    def read(self, index: int) -> Example:
        """Return an example as it lies in its files.

        Raises:
            InputError: a file is missing or broken; the message names it and the remedy.
        """

    @abstractmethod
    def prepare(self, example: Example, epoch: int | None) -> Example:
        """Return an example of the size that batches want, augmented where there is an epoch: in training.

        All that is random is drawn from torch's global stream, as torchvision's transforms do: in training it is the
        sample's own.
        """

    @abstractmethod
    def filler(self, epoch: int | None) -> Example:
        """Return an example that counts for nothing, such as `prepare` returns."""

    @abstractmethod
    def collate(self, indices: Tensor, examples: list[Example]) -> dict[str, Any]:
        """Return the batch of some examples; `indices` (B,) int64 are `FILLER` where one counts for nothing."""

    def classes(self, index: int) -> list[str]:
        """Return the names of the classes that an example shows, without reading pixels; none where it has none."""
        return []

    def shown(self, index: int, example: Example) -> list[str]:
        """Return the names of the classes that an example shows, now that it was read; one for each object."""
        return self.classes(index)

    def distinct(self) -> Sequence[int]:
        """Return an index of each file: all of them, unless several examples are made of one file."""
        return range(len(self))

    def digest(self, index: int) -> str:
        """Return a hash of what the example's file holds, equal for copies."""
        return hashlib.blake2b(Path(self.name(index)).read_bytes(), digest_size=16).hexdigest()

    def __getitems__(self, places: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        """Return a batch; where a file is left out an example that counts for nothing has its place."""
        indices, examples, errors = [], [], []
        for place in places:
            epoch, index = place if isinstance(place, tuple) else (None, place)
            example = None
            if index < len(self):
                try:
                    example = self._example(epoch, index)
                except InputError as error:
                    if self.on_error == "error":
                        raise
                    errors.append(str(error))
            indices.append(FILLER if example is None else index)
            examples.append(self.filler(epoch) if example is None else example)
        batch = self.collate(torch.tensor(indices), examples)
        return batch | {"errors": errors} if errors else batch

    def _example(self, epoch: int | None, index: int) -> Example:
        example = self.read(index)
        randomness = nullcontext() if epoch is None else sample_randomness(self.seed, epoch, index)
        with randomness:
            return self.prepare(example, epoch)

    def __getitem__(self, place: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([place])
