"""What a CPU's kernels take for themselves while they run."""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_BLOCK = 16
"""Channels of a block of oneDNN's, to which the last one is filled up."""
_ARITHMETIC = (aten.add, aten.sub, aten.mul, aten.div)


def cpu_workspace(operator: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the bytes that an operation holds besides its arguments and its result, and gives back at its end.

    Measured with torch 2.14 on one thread, each operation by itself under its profiler, which lists what is taken and
    given back. Left out is what oneDNN's kernels take besides for each thread, up to 0.4 MiB.

    Args:
        operator: An overload of torch's.
        args: Its arguments.
        result: What it returned.
    """
    packet = operator._overloadpacket
    if packet is aten.convolution:
        return _of_convolution(args[0], args[1], result, transposed=args[6], strided=max(args[3]) > 1)
    if packet is aten.convolution_backward:
        gradient, x, weight = args[:3]
        return _of_its_backward(gradient, x, weight, transposed=args[7], strided=max(args[4]) > 1, asked=args[-1])
    if packet in (aten._softmax, aten._log_softmax):
        # aten/src/ATen/native/SoftMax.cpp begins with input.contiguous()
        return _copied(args[0])
    if packet is aten.native_batch_norm_backward:
        # makes the input's gradient, and then makes it anew before the first one is let go
        return int(args[1].nbytes) if args[-1][0] else 0
    if packet is aten.upsample_bilinear2d_backward:
        # aten/src/ATen/native/cpu/UpSampleMoreKernel.cpp makes parts of channels_last plain, and copies back
        return _copied(args[0]) + _copied(result) if _copied_to_channels_last(args[0]) else 0
    if packet is aten.mean and args[0].itemsize == 2:
        # aten/src/ATen/native/ReduceOps.cpp: to float32, sum, divide, and back
        return 2 * int(args[0].nbytes + result.nbytes)
    if packet in _ARITHMETIC:
        # aten/src/ATen/TensorIterator.cpp brings tensors to a common dtype before the loop over them
        others = [x for x in args[:2] if isinstance(x, Tensor) and x.ndim and x.dtype != result.dtype]
        return sum(x.numel() * int(result.itemsize) for x in others)
    return 0


def _of_convolution(x: Tensor, weight: Tensor, result: Tensor, transposed: bool, strided: bool) -> int:
    """Convolutions are oneDNN's, in `channels_last` or, if nothing lies that way, in blocks of channels."""
    if x.itemsize > 4:
        return 0  # it has no double precision
    if _lies_in_channels_last(x) or _lies_in_channels_last(weight):
        return int(weight.nbytes) + _copied_to_channels_last(x)
    blocks = _in_blocks(result, transposed)
    # the input's copy goes before the result is copied back
    back = blocks * _copies_back(transposed and strided)
    return _copied(x) + _copied(weight) + int(max(x.nbytes + weight.nbytes + blocks - result.nbytes, back))


def _of_its_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, transposed: bool, strided: bool, asked: list[bool]
) -> int:
    """The gradient of the input comes first, and is held while that of the weight is gathered."""
    if x.itemsize > 4:
        return 0
    size, weights = int(x.nbytes), int(weight.nbytes)
    of_x, of_weight = asked[0] * size, asked[1] * weights
    if _lies_in_channels_last(x) or _lies_in_channels_last(weight):
        peaks = (asked[0] * (size + weights), asked[1] * (of_x + 3 * weights))
        copies = _copied_to_channels_last(gradient) + _copied_to_channels_last(x)
    else:
        blocks = _in_blocks(gradient, transposed)
        # half precision gathers in float32
        gathered = blocks + size + (3 if x.itemsize == 2 else 1) * weights
        peaks = (
            asked[0] * max(blocks + weights + size, (1 + _copies_back(strided and not transposed)) * size),
            asked[1] * (of_x + max(gathered, 2 * weights)),
        )
        copies = _copied(gradient) + _copied(x)
    return copies + max(0, max(peaks) - of_x - of_weight)


def _copies_back(upwards: bool) -> int:
    """Return how many there are of a result besides itself; one that is larger than its input is copied twice."""
    return 2 if upwards else 1


def _lies_in_channels_last(tensor: Tensor) -> bool:
    """Tell as c10/core/MemoryFormat.h does, from strides, where a single channel or pixel lies in either way."""
    if tensor.ndim != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
        return False
    return tensor.stride(1) * tensor.shape[1] <= tensor.stride(3)


def _in_blocks(tensor: Tensor, transposed: bool) -> int:
    """Return the bytes with the last block filled up, as only those are that a convolution makes from its input."""
    channels = tensor.shape[1]
    if transposed or not channels:
        return int(tensor.nbytes)
    return int(tensor.nbytes) // channels * -(-channels // _BLOCK) * _BLOCK


def _copied(tensor: Tensor) -> int:
    return 0 if tensor.is_contiguous() else int(tensor.nbytes)


def _copied_to_channels_last(tensor: Tensor) -> int:
    return 0 if tensor.is_contiguous(memory_format=torch.channels_last) else int(tensor.nbytes)
