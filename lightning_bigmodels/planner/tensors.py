"""The tensors in an operation's arguments and results, and where their values lie."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor


def storages(tensor: Any) -> Iterator[torch.UntypedStorage]:
    """Yield what a tensor's values lie in on this process: of a DTensor its shard, of a subclass its parts."""
    if type(tensor) is FakeTensor:  # most of them, whose layout and device take Python's time
        if not tensor.is_sparse:
            yield tensor.untyped_storage()
        return
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    if not isinstance(tensor, Tensor):
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    elif tensor.layout is torch.strided and tensor.device.type != "meta":
        yield tensor.untyped_storage()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an operation's arguments or result, in time that counts: a step has thousands of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def group_size(argument: Any) -> int:
    """Return how many processes a group has, which collectives take as an object or by its name; 0 for all else."""
    if isinstance(argument, torch.ScriptObject):
        try:
            return int(ProcessGroup.unbox(argument).size())
        except RuntimeError:  # a ReduceOp
            return 0
    if isinstance(argument, str):
        try:
            return int(_resolve_process_group(cast(Any, argument)).size())
        except (RuntimeError, ValueError):  # the name of an operation, such as sum
            return 0
    return 0
