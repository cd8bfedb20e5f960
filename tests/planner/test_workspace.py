"""What is said to be held inside an operation is what torch's profiler sees there."""

import itertools

import pytest
import torch

from lightning_bigmodels.peak_memory import CPUMemory
from lightning_bigmodels.planner.workspace import cpu_workspace

aten = torch.ops.aten
THREAD = 0.17 * 2**20
"""Bytes that a kernel for a thread may take besides."""
PLAIN, LAST = torch.contiguous_format, torch.channels_last


def agree(operator, *args, inside=THREAD):
    """Compare what an operation holds besides its arguments and its result, without and with what the rule says."""
    memory = CPUMemory(torch.device("cpu"))
    try:
        held = memory.begin()
        result = operator(*args)
        _, peak = memory.peaks()
    finally:
        memory.end()
    made = [result] if isinstance(result, torch.Tensor) else [tensor for tensor in result if tensor is not None]
    taken = peak - held - sum(tensor.nbytes for tensor in made)
    assert cpu_workspace(operator, args, result) == pytest.approx(taken, abs=inside)
    return taken


@pytest.mark.parametrize(
    ("dtype", "layout", "stride"), list(itertools.product((torch.float32, torch.bfloat16), (PLAIN, LAST), (1, 2)))
)
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_copy_into_layouts_of_their_own(dtype, layout, stride, transposed):
    x = torch.rand(64, 32, 16, 16).to(dtype, memory_format=layout)
    weight = torch.rand(32, 32, 4, 4).to(dtype, memory_format=layout)
    options = [stride] * 2, [1, 1], [1, 1], transposed, [0, 0], 1
    agree(aten.convolution.default, x, weight, None, *options)
    gradient = torch.ones_like(aten.convolution(x, weight, None, *options))
    for asked in ([True, True, False], [True, False, False], [False, True, False]):
        agree(aten.convolution_backward.default, gradient, x, weight, [0], *options, asked)


def test_a_few_channels_are_filled_up_to_a_block():
    x, weight = torch.rand(16, 32, 32, 32), torch.rand(3, 32, 3, 3)
    options = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    result = aten.convolution(x, weight, None, *options)
    assert agree(aten.convolution.default, x, weight, None, *options) > x.nbytes + 4 * result.nbytes


def test_kernels_copy_what_they_cannot_work_on():
    logits = torch.rand(16, 11, 32, 32).to(memory_format=LAST)
    assert agree(aten._log_softmax.default, logits, 1, False, inside=8192) >= logits.nbytes
    assert agree(aten._log_softmax.default, logits.contiguous(), 1, False, inside=8192) < 8192
    half = torch.rand(64, 64, 16, 16).to(torch.bfloat16)
    assert agree(aten.mean.dim, half, [-1, -2], True, inside=8192) >= 2 * half.nbytes
    assert agree(aten.add.Tensor, half, half.float(), inside=8192) >= 2 * half.nbytes
    both = torch.cat([half, half], dim=1).to(memory_format=LAST)
    sizes = [16, 16], [64, 64, 8, 8], False
    assert agree(aten.upsample_bilinear2d_backward.default, both[:, :64], *sizes, inside=8192) >= half.nbytes
    assert agree(aten.upsample_bilinear2d_backward.default, half.to(memory_format=LAST), *sizes, inside=8192) < 8192
    mean = torch.zeros(64)
    statistics = mean + 1, None, None, mean, mean + 1, True, 1e-5, [True, True, True]
    assert agree(aten.native_batch_norm_backward.default, half, half, *statistics, inside=8192) >= half.nbytes
