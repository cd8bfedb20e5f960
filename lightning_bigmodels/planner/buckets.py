"""What DistributedDataParallel holds and sends; its own reducer, in C++, reads values."""

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_bigmodels.planner.trace import StepTrace, Transfer
from lightning_bigmodels.strategies import CompressedDDPStrategy

_BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's own
_LEAST_COMPRESSION = 2
"""PowerSGD's own: how many times fewer numbers a matrix's factors must have than the matrix."""


def keep_buckets(strategy: DDPStrategy, trace: StepTrace) -> list[Tensor]:
    """Return what DistributedDataParallel holds, and have the backward pass send what it sends.

    It holds each gradient once more, in buckets that are summed over the processes as they fill up. PowerSGD is taken
    as it is once it compresses, and holds what it has not sent besides.
    """
    module = strategy.lightning_module
    assert module is not None
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    held: list[Tensor] = []
    if not strategy._ddp_kwargs.get("gradient_as_bucket_view"):
        held += [torch.empty_like(parameter) for parameter in parameters]
    compression = strategy.compression if isinstance(strategy, CompressedDDPStrategy) else None
    if compression == "powersgd":
        held += [torch.empty_like(parameter) for parameter in parameters]
    trace.note(held, "communication")
    bucket: list[Tensor] = []
    filled = 0

    def fill(parameter: Tensor) -> None:
        nonlocal filled
        bucket.append(parameter)
        filled += parameter.nbytes
        if filled < _BUCKET_BYTES and parameter is not parameters[0]:
            return
        filled = 0
        for size in _sent(strategy, bucket):
            trace.transfers[Transfer("allreduce_", "backward", size, strategy.world_size)] += 1
        if compression is not None:
            # what is sent, or with PowerSGD what it is compared with, is a copy meanwhile
            dtype = parameter.dtype if compression == "powersgd" else torch.bfloat16
            torch.empty(sum(member.numel() for member in bucket), dtype=dtype)
        bucket.clear()

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(fill)
    return held


def _sent(strategy: DDPStrategy, bucket: list[Tensor]) -> list[int]:
    """Return the bytes of each all-reduce of a bucket."""
    if not isinstance(strategy, CompressedDDPStrategy):
        return [sum(member.nbytes for member in bucket)]
    if strategy.compression != "powersgd":
        return [sum(2 * member.numel() for member in bucket)]
    whole = left = right = 0
    for member in bucket:
        rows, columns = len(member) if member.ndim else 1, member.shape[1:].numel()
        rank = min(rows, columns, strategy.powersgd_rank)
        if (rows + columns) * rank * _LEAST_COMPRESSION < rows * columns:
            left += rows * rank * member.itemsize
            right += columns * rank * member.itemsize
        else:
            whole += member.nbytes
    return [size for size in (whole, left, right) if size]
