"""What processes tell each other, on any number of them."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Return what each process has, by rank; all must ask. Without a process group that is this one's alone."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def summed(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, without gradients; all must ask."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def concatenated(value: Tensor) -> Tensor:
    """Return every process's tensor, by rank, joined in dimension 0; they have one shape, and all must ask."""
    if not dist.is_initialized():
        return value
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.contiguous())
    return torch.cat(values)
