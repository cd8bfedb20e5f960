"""Pictures of several shapes in batches of one shape each: aspect-ratio buckets, sharded and resumed as all data are.

Source: NovelAI 2022, "Improvements on Stable Diffusion", aspect ratio bucketing: sides are multiples of a step, the
area stays below that of the square, and a picture goes to the shape whose ratio is nearest. Where we differ: batches
are drawn from (seed, epoch) alone, and what does not fill a batch waits for another epoch's order.
"""

import math
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DistributedSampler
from typing_extensions import override

from lightning_bigmodels.data.loading import ResumableSampler
from lightning_bigmodels.data.vision.transforms import Size


def bucket_sizes(side: int, step: int, most: float) -> list[Size]:
    """Return heights and widths, multiples of `step` with at most `side` squared pixels, the flattest first.

    Args:
        side: Of the square.
        step: What sides are multiples of.
        most: The longer side over the shorter one, at most.
    """
    found = set()
    for short in range(step, side + 1, step):
        long = side * side // short // step * step
        long = min(long, int(short * most) // step * step)
        if long >= short and long * short > side * side // 2:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda size: size[0] / size[1]) or [(side, side)]


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> int:
    """Return the place of the bucket whose ratio is nearest to that of a picture."""
    ratio = math.log(size[0] / size[1])
    return min(range(len(sizes)), key=lambda place: abs(ratio - math.log(sizes[place][0] / sizes[place][1])))


class _Length(Sized):
    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class BucketSampler(ResumableSampler):
    """A `ResumableSampler` of (epoch, index) whose batches, over all processes, come from one bucket each.

    The order of an epoch is a function of (seed, epoch, global batch size). A run that goes on with another global
    batch size begins with the next whole batch of the new order.

    Args:
        buckets: (N,) int64 bucket of each example.
        batch_size: Examples of a batch, per process.
        num_replicas: Number of processes that share the data.
        rank: This process among them, from 0.
        seed: Chooses the sequence of orders.
    """

    def __init__(
        self, buckets: torch.Tensor, batch_size: int, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        self.buckets = buckets
        self.global_batch_size = batch_size * num_replicas
        super().__init__(_Length(samples_in_batches(buckets, self.global_batch_size)), num_replicas, rank, seed)

    @override
    def seek(self, epoch: int, start: int) -> None:
        super().seek(epoch, -(-start // self.global_batch_size) * self.global_batch_size)

    @override
    def order(self, generator: torch.Generator) -> torch.Tensor:
        size = self.global_batch_size
        batches = []
        for bucket in self.buckets.unique().tolist():
            members = (self.buckets == bucket).nonzero().flatten()
            members = members[torch.randperm(len(members), generator=generator)]
            batches.append(members[: len(members) // size * size].view(-1, size))
        whole = torch.cat(batches)
        return whole[torch.randperm(len(whole), generator=generator)].flatten()

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        epoch = self.epoch
        return ((epoch, index) for index in super().__iter__())


def samples_in_batches(buckets: torch.Tensor, global_batch_size: int) -> int:
    """Return how many examples of an epoch fill batches of one bucket each."""
    return int((torch.bincount(buckets) // global_batch_size * global_batch_size).sum())


class BucketEvaluationSampler(DistributedSampler[Any]):
    """Deals every example to exactly one process, bucket by bucket, and fills the last batch of each bucket.

    What fills is the index `len(buckets)`, which the data set answers with an example that counts for nothing.

    Args:
        buckets: (N,) int64 bucket of each example.
        batch_size: Examples of a batch, per process.
        num_replicas: Number of processes that share the data.
        rank: This process among them, from 0.
    """

    def __init__(self, buckets: torch.Tensor, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        size = batch_size * num_replicas
        order: list[int] = []
        for bucket in buckets.unique().tolist():
            members = (buckets == bucket).nonzero().flatten().tolist()
            order += members + [len(buckets)] * (-len(members) % size)
        self._order = order
        super().__init__(_Length(len(order)), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self._order[self.rank :: self.num_replicas])
