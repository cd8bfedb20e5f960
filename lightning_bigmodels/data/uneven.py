"""Loaders that hold unequally many batches on the processes of a run."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from lightning_bigmodels.errors import InputError

_NONE = object()
# the batch about to be trained on, and the one that Lightning fetches to know whether it was the last
_MOST_AHEAD = 2


class EvenBatches:
    """Gives every process equally many batches, however many each process's own loader holds.

    Under `ddp` and `fsdp2` the processes train in step: one that ran out of batches would let the others wait for ever.
    Here they tell each other before each batch whether they have one, by an all_reduce of one number. The loaders of
    this package are even already; wrap your own:

        def train_dataloader(self):
            return EvenBatches(DataLoader(self.files_of(self.trainer.global_rank), batch_size=32), mode="join")

    It has no `len`, so a validation interval is given in batches. A killed run goes on with the wrapped loader's first
    batch.

    Args:
        loader: This process's batches, iterated over anew in each epoch.
        mode: `stop` ends the epoch for all with the first process that runs out, and warns that others have more left.
            `join` lets it repeat its last batch, whose gradient counts as zero, until the last process has run out; the
            gradient remains the mean over all processes, as after Horovod's `join`. It needs a `Task`, and to be its
            only training loader.

    Raises:
        InputError: the mode is unknown; or, on all processes alike: one of them has no batch at all, or nobody asks
            which batches count.
    """

    def __init__(self, loader: Iterable[Any], mode: Literal["stop", "join"] = "stop") -> None:
        if mode not in ("stop", "join"):
            raise InputError(f"mode is {mode!r}; set it to 'stop' or 'join'")
        self.loader = loader
        self.mode = mode
        self._counts: deque[bool] = deque()

    @property
    def sampler(self) -> Any:
        """The wrapped loader's sampler, to which Lightning tells the epoch."""
        return getattr(self.loader, "sampler", None)

    def next_counts(self) -> bool:
        """Return whether the next batch to be trained on counts, or only lets a process that has none left take part.

        To be called once for each batch, in order: Lightning fetches ahead.
        """
        return self.mode == "stop" or self._counts.popleft()

    def __iter__(self) -> Iterator[Any]:
        self._counts.clear()
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        own = iter(self.loader)
        batch, number = _NONE, 0
        while True:
            new = next(own, _NONE)
            num_having = _number_of_processes(having=new is not _NONE)
            if num_having < world_size:
                if number == 0:
                    raise InputError(
                        f"{world_size - num_having} of {world_size} processes have no training batch at all; share the "
                        f"data out so that each has one"
                    )
                if num_having == 0:
                    return
                if self.mode == "stop":
                    rank_zero_warn(
                        f"the epoch ends after {number} batches, where {num_having} of {world_size} processes have "
                        f"more; to train on those too, set mode to 'join'"
                    )
                    return
            if new is not _NONE:
                batch = new
            number += 1
            if self.mode == "join":
                if len(self._counts) == _MOST_AHEAD:
                    raise InputError("mode 'join' needs a Task whose only training loader this is; set it to 'stop'")
                self._counts.append(new is not _NONE)
            yield batch


def _number_of_processes(having: bool) -> int:
    if not dist.is_initialized():
        return int(having)
    number = torch.tensor(int(having), device="cuda" if "nccl" in dist.get_backend() else "cpu")
    dist.all_reduce(number)
    return int(number)
