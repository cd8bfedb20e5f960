"""What a CPU's kernels take for themselves while they run."""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def cpu_workspace(operator: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the bytes that an operation holds besides its arguments and its result, and gives back at its end.

    oneDNN convolves half precision in layouts of its own: what is not `channels_last` is copied into them and back.
    Measured with torch 2.14 for bfloat16.

    Args:
        operator: An overload of torch's.
        args: Its arguments.
        result: What it returned.
    """
    if operator._overloadpacket is aten.convolution:
        x, weight = args[:2]
        if x.itemsize != 2 or _lies_well(x) or _lies_well(weight):
            return 0
        # the input's copy goes before the result is copied back
        return int(max(x.nbytes + weight.nbytes, result.nbytes))
    if operator._overloadpacket is aten.convolution_backward:
        gradient, x, weight = args[:3]
        if x.itemsize != 2 or _lies_well(gradient) or _lies_well(x) or _lies_well(weight):
            return 0
        return int(gradient.nbytes + x.nbytes)
    return 0


def _lies_well(tensor: Tensor) -> bool:
    if tensor.ndim != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)
