"""The time of steps whose parts can be summed by hand."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_bigmodels.planner.cpu_rates import Rates
from lightning_bigmodels.planner.hardware import Hardware
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.timing import estimate_time
from lightning_bigmodels.planner.trace import TO_DEVICE, TO_HOST, Operation, StepTrace, Transfer
from lightning_bigmodels.planner.traffic import Traffic, traffic_of

PEAKS = {torch.float32: 1e13, torch.bfloat16: 1e14, torch.float16: 2e14}
DEVICE = Hardware("device", 2**34, 1e12, PEAKS, 5e13, 0.5, 0.25, 1e11, 1e10, "made up")


def traced(*operations, transfers=()):
    return SimpleNamespace(operations=Counter(dict(operations)), transfers=Counter(dict(transfers)))


def product(phase, dtype=torch.bfloat16, flops=10**13):
    return Operation("aten::mm", phase, flops, 10**6, dtype)


def test_products_take_their_arithmetic_and_copies_their_traffic():
    copy = Operation("aten::mul.Tensor", "forward", 0, 8 * 10**9, torch.bfloat16)
    trace = traced((product("forward"), 1), (product("backward"), 2), (copy, 10))
    step = estimate_time(trace, Setting(precision="bf16-mixed"), DEVICE)
    # 3e13 at half of 1e14, and 8e10 bytes at 0.8 of 1e12
    assert step.parts == pytest.approx({"compute": 0.6, "memory": 0.1, "network": 0.0, "kernel launches": 0.0})
    assert (step.seconds, step.bound, step.flops) == (pytest.approx(0.7), "compute", 3e13)
    assert step.model_flops == 3e13
    assert step.mfu == pytest.approx(3e13 / 0.7 / 1e14)
    fused = estimate_time(trace, Setting(precision="bf16-mixed"), DEVICE, compiled=True)
    assert fused.parts["memory"] == pytest.approx(0.035)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_each_gradient_of_a_convolution_costs_what_the_convolution_does(kind, groups):
    convolution = kind(8, 12, 3, stride=2, groups=groups)
    trace = StepTrace()
    with trace:
        x = torch.ones(2, 8, 9, 9, requires_grad=True)
        result = convolution(x)
        trace.phase = "backward"
        result.sum().backward()
    flops = {operation.phase: operation.flops for operation in trace.operations if "convolution" in operation.name}
    places = (x if kind is nn.ConvTranspose2d else result)[0, 0].numel()
    assert flops["forward"] == 2 * 2 * places * 9 * 8 * 12 / groups
    assert flops["backward"] == 2 * flops["forward"]


def test_float32_is_exact_but_for_convolutions():
    matrices = traced((product("forward", torch.float32), 1))
    assert estimate_time(matrices, Setting(), DEVICE).seconds == pytest.approx(1 / 0.75)
    filters = traced((product("forward", torch.float32)._replace(name="aten::convolution"), 1))
    step = estimate_time(filters, Setting(), DEVICE)
    assert step.seconds == pytest.approx(0.4 / 0.9)
    # by the highest peak that is made use of, that of TF32
    assert step.mfu == pytest.approx(3 * 0.5 * 0.9)


def test_processes_on_cpus_have_them_in_common(monkeypatch):
    trace, cpu = traced((product("forward"), 1)), dataclasses.replace(DEVICE, name="cpu")
    monkeypatch.setattr("lightning_bigmodels.planner.timing._num_cpus_available", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    seconds = [
        estimate_time(trace, Setting("ddp", "bf16-mixed", devices), cpu).parts["compute"] for devices in (1, 2, 8)
    ]
    assert seconds == pytest.approx([0.2, 0.2, 0.8])


def test_half_precision_is_traced_in_bfloat16():
    trace = traced((product("forward"), 1))
    assert estimate_time(trace, Setting(precision="16-mixed"), DEVICE).seconds == pytest.approx(0.1)


def test_causal_attention_leaves_out_half_and_small_operations_wait_to_be_started():
    attention = Operation(
        "aten::_scaled_dot_product_flash_attention", "forward", 10**13, 10**6, torch.bfloat16, 5 * 10**12
    )
    small = Operation("aten::add.Tensor", "update", 0, 100, torch.float32)
    nothing = Operation("aten::empty.memory_format", "forward", 0, 10**12, None)
    step = estimate_time(traced((attention, 1), (small, 1000), (nothing, 5)), Setting(precision="bf16-true"), DEVICE)
    assert step.parts == pytest.approx({"compute": 0.2, "memory": 0.0, "network": 0.0, "kernel launches": 0.01})
    assert step.model_flops == 3e13


def test_batch_norm_reads_its_input_twice():
    norm = Operation("aten::native_batch_norm", "forward", 0, 8 * 10**10, torch.float32)
    assert estimate_time(traced((norm, 1)), Setting(), DEVICE).seconds == pytest.approx(0.15)


def test_what_was_measured_on_a_cpu_stands_for_its_peaks():
    products = [(0.0, 30.0), (2.0, 32.0), (4.0, 33.0)]
    rates = Rates({("aten::mm", torch.float32): products}, {("aten::add.Tensor", torch.float32): 1e9}, start=0.01)
    cpu = dataclasses.replace(DEVICE, name="cpu", rates=rates)

    def seconds(name, flops, traffic, dtype=torch.float32, skipped=0):
        operation = Operation(name, "forward", flops, traffic, dtype, skipped)
        step = estimate_time(traced((operation, 1)), Setting(), cpu)
        assert step.parts["kernel launches"] == 0.01
        return step.seconds - 0.01

    # by operations for each byte: as few as bytes allow, between two that were measured, and as many as there can be
    assert seconds("aten::mm", 2**20, 2**21) == pytest.approx(2**20 / 2**29)
    assert seconds("aten::mm", 2**23, 2**20) == pytest.approx(2**23 / 2**32.5)
    assert seconds("aten::mm", 2**30, 2**20, skipped=2**29) == pytest.approx(2**29 / 2**33)
    assert seconds("aten::add.Tensor", 0, 10**6) == pytest.approx(1e-3)
    # more than caches hold takes as long as memory does, and what was not measured as long as anywhere
    slow = dataclasses.replace(cpu, memory_bandwidth=1e8)
    large = traced((Operation("aten::add.Tensor", "forward", 0, 10**8, torch.float32), 1))
    assert estimate_time(large, Setting(), slow).seconds == pytest.approx(1.01)
    assert seconds("aten::add.Tensor", 0, 8 * 10**9, torch.bfloat16) == pytest.approx(0.01)


def test_accumulation_repeats_all_but_the_update():
    small = Operation("aten::lerp_", "update", 0, 8 * 10**10, torch.float32)
    trace = traced((product("forward"), 2), (small, 1))
    step = estimate_time(trace, Setting(accumulate_grad_batches=6, precision="bf16-mixed"), DEVICE)
    assert step.parts["compute"] == pytest.approx(6 * 0.2)
    assert step.parts["memory"] == pytest.approx(0.1)


def test_gradients_are_sent_beside_the_computing():
    gathered = Transfer("_allgather_base_", "forward", 16 * 10**9, 16)
    computing = product("forward", flops=10**14)
    setting = Setting("fsdp2", "bf16-true", devices=8, num_nodes=2)
    trace = traced((computing, 1), transfers=((gathered, 4),))
    step = estimate_time(trace, setting, DEVICE)
    # 15/16 of it over 8 adapters of 1e10, at three quarters; one of the four is waited for
    one = 15 * 10**9 / 6e10
    assert step.sending == pytest.approx(4 * one, rel=0.01)
    assert step.parts["network"] == pytest.approx(one, rel=0.01)
    alone = estimate_time(traced(transfers=((gathered, 4),)), setting, DEVICE)
    assert (alone.bound, alone.seconds) == ("network", pytest.approx(4 * one, rel=0.01))
    within = estimate_time(
        traced(transfers=((gathered._replace(processes=8), 4),)), Setting("fsdp2", devices=8), DEVICE
    )
    assert within.seconds == pytest.approx(4 * 14 * 10**9 / 7.5e10, rel=0.01)


def test_layers_wait_for_tensor_parallelism_and_one_adapter_serves_each_ring_of_the_data():
    summed = Transfer("all_reduce", "forward", 8 * 10**9, 8)
    gathered = Transfer("_allgather_base_", "forward", 2 * 10**9, 2)
    setting = Setting("fsdp2_tp8", "bf16-true", devices=8, num_nodes=2)
    step = estimate_time(traced((product("forward"), 100), transfers=((summed, 1),)), setting, DEVICE)
    assert step.parts["network"] == pytest.approx(2 * 7 * 10**9 / 7.5e10, rel=0.01)  # twice round, within the node
    step = estimate_time(traced(transfers=((gathered, 1),)), setting, DEVICE)
    assert step.parts["network"] == pytest.approx(10**9 / 7.5e9, rel=0.01)


def test_copies_sum_gradients_once_for_all_batches():
    bucket = Transfer("allreduce_", "backward", 10**9, 4)
    trace = traced(transfers=((bucket, 2),))  # one for each of the two batches that are traced
    step = estimate_time(trace, Setting("ddp", devices=4, accumulate_grad_batches=8), DEVICE)
    assert step.sending == pytest.approx(2 * 0.75 * 10**9 / 7.5e10, rel=0.01)


def test_weights_in_host_memory_are_copied_beside_the_computing_and_updated_there():
    # at four fifths of 25e9 a second
    device = dataclasses.replace(DEVICE, host_bandwidth=25e9)
    down, up = Transfer(TO_DEVICE, "backward", 4 * 10**9, 1), Transfer(TO_HOST, "backward", 10**9, 1)
    copies = ((down, 10), (up, 10))
    update = Operation("aten::lerp_", "update", 0, 408 * 10**8, torch.float32)
    setting = Setting("fsdp2_offload", "bf16-true", devices=2)
    step = estimate_time(traced((update, 2), transfers=copies), setting, device)
    # ten times 0.2 s down while less comes up, and a second for each of the updates at four fifths of 51e9
    assert step.parts["host memory"] == pytest.approx(10 * 0.2 + 2)
    assert (step.bound, step.seconds) == ("host memory", pytest.approx(4))
    # 4 s of products, behind which all but one copy hides
    busy = traced((product("backward", flops=10**14), 2), transfers=copies)
    assert estimate_time(busy, setting, device).parts["host memory"] == pytest.approx(0.2)
    # one process alone gathers nothing ahead, and waits for each
    alone = dataclasses.replace(setting, devices=1)
    assert estimate_time(busy, alone, device).parts["host memory"] == pytest.approx(10 * 0.2)
    # with as many batches as are not traced
    more = dataclasses.replace(setting, accumulate_grad_batches=6)
    step = estimate_time(traced((update, 2), transfers=copies), more, device)
    assert step.parts["host memory"] == pytest.approx(3 * 10 * 0.2 + 2)
    assert traffic_of(busy, more) == {
        "host to device": Traffic(30, 0, 12 * 10**10),
        "device to host": Traffic(30, 3 * 10**10, 0),
    }
