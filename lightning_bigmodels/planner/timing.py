"""The time of a step: each operation by what bounds it, and what is sent beside the computing or after it."""

from dataclasses import dataclass
from typing import Literal

import torch
from lightning.fabric.utilities.data import _num_cpus_available

from lightning_bigmodels.planner.flags import tensor_parallel_size
from lightning_bigmodels.planner.hardware import Hardware
from lightning_bigmodels.planner.host import copying_time, updating_time
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.trace import Operation, Phase, StepTrace, Transfer
from lightning_bigmodels.planner.traffic import is_awaited, repetitions

Bound = Literal["compute", "memory", "network", "kernel launches", "host memory"]

_BOUNDS: tuple[Bound, ...] = ("compute", "memory", "network", "kernel launches")
_PHASES: tuple[Phase, ...] = ("forward", "backward", "update")
_LAUNCH_SECONDS = 1e-5
"""From one small eager operation to the next, forward, backward and foreach update alike: 16 microseconds were measured
on a busy core of a server, computing included. It matters for small networks only."""
_MEMORY_EFFICIENCY = 0.8
"""Of the bandwidth in data sheets; stream benchmarks reach 0.85 to 0.92 with tensors that are long enough."""
_FUSED_TRAFFIC = 0.35
"""Of the traffic of element-wise operations that compiled code is left with: norms, rotations and gates of Llama's
blocks read and write each tensor about three times as often one by one. With it and the memory's efficiency, the
efficiency of products was set: see the table of hardware."""
_CONVOLUTIONS = 0.9
"""Of the efficiency of products; between those that TIMM-vgg16 and RN50-A100-AMP of tests/benchmarks/planner_rows.csv
ask for."""
_PLAIN_FLOAT32 = 0.75
"""Of the peak of float32 products without tensor cores, which are more easily kept busy; set by RN50-V100-FP32 and
HF-BERT-1 there."""
_PASSES = {"aten::native_batch_norm": 3 / 2, "aten::native_batch_norm_backward": 5 / 3}
"""Traffic of what reads its inputs twice, first for sums over the batch, to that of reading each once."""
_LINK_EFFICIENCY = 0.75
"""Of the bandwidth in data sheets that rings of NCCL reach, an assumption after reports of nccl-tests."""
_LATENCY_SECONDS = 2e-5
"""Of a collective within a node, an assumption."""
_CACHES = 2**24
"""Bytes that most CPUs' caches hold between two operations; measured rates are of fewer."""
_NO_WORK = ("aten::empty", "aten::new_empty", "aten::resize_")


@dataclass(frozen=True)
class StepTime:
    """What an optimizer step takes, all batches that it accumulates included.

    Attributes:
        seconds: All of it.
        parts: Its parts by what bounds them: products that wait for arithmetic, operations that wait for memory,
            transfers that nothing is computed beside, and small operations that wait for being started; where weights
            are in host memory also copies that nothing is computed beside, and the update there.
        sending: Seconds that transfers between devices take in all, most of which may pass beside computing.
        flops: Floating-point operations of this device, recomputation included.
        model_flops: Three times those of the forward pass, as utilisation is counted by custom.
        mfu: Share of the device's peak that `model_flops` are.
    """

    seconds: float
    parts: dict[Bound, float]
    sending: float
    flops: float
    model_flops: float
    mfu: float

    @property
    def bound(self) -> Bound:
        """What most of the time is spent on."""
        return max(self.parts, key=lambda bound: self.parts[bound])


def estimate_time(trace: StepTrace, setting: Setting, hardware: Hardware, compiled: bool = False) -> StepTime:
    """Return how long a step takes that was traced.

    Every operation takes as long as its arithmetic or its traffic, whichever is longer, and no less than it takes to be
    started; on a CPU, what it takes to be started comes on top of what such operations were measured to take. What
    data-parallel strategies send passes beside the computing of the same phase, but for one piece, the first or the
    last; what tensor parallelism sends does not, since the next layer needs it.

    Args:
        trace: A step of the setting.
        setting: How it was run.
        hardware: The device.
        compiled: Whether the network is compiled: element-wise operations are fused, and launched together.
    """
    half = setting.precision.startswith("16")  # whose products are traced in bfloat16, on a CPU
    offloads = setting.offloads and hardware.name != "cpu"
    spent: dict[Bound, float] = dict.fromkeys((*_BOUNDS, "host memory") if offloads else _BOUNDS, 0.0)
    flops = model_flops = sending = 0.0
    peak = hardware.flops_of(_precision_dtype(setting.precision))
    slower = _sharing(setting, hardware)
    # a GPU is sent the next operations while it computes, a CPU is not
    start = 0.0 if hardware.rates is None else hardware.rates.start
    for phase in _PHASES:
        repeats = 1.0
        if phase != "update":
            repeats = setting.accumulate_grad_batches / min(2, setting.accumulate_grad_batches)
        busy = 0.0
        for operation, count in trace.operations.items():
            if operation.phase != phase:
                continue
            if offloads and phase == "update" and not operation.flops:
                bound: Bound = "host memory"
                seconds = updating_time(operation)
            else:
                bound, seconds = _operation_time(operation, hardware, compiled, half)
                seconds *= slower
            if operation.flops:
                peak = max(peak, _peak_flops(operation.name, _real_dtype(operation, half), hardware))
            spent[bound] += seconds * count * repeats
            spent["kernel launches"] += start * count * repeats
            busy += (seconds + start) * count * repeats
            flops += operation.flops * count * repeats
            if phase == "forward":
                model_flops += 3.0 * operation.flops * count * repeats
        beside, between, piece = _sending_time(trace, phase, setting, hardware)
        sending += beside + between
        spent["network"] += between + max(piece, beside - busy)
        if offloads:
            beside_too, awaited, piece = copying_time(trace, phase, setting, hardware)
            spent["host memory"] += awaited + max(piece, beside_too - max(busy, beside))
    total = sum(spent.values())
    return StepTime(total, spent, sending, flops, model_flops, model_flops / (total * peak) if total else 0.0)


def _operation_time(operation: Operation, hardware: Hardware, compiled: bool, half: bool) -> tuple[Bound, float]:
    """Return what bounds an operation, and its seconds."""
    if operation.name.startswith(_NO_WORK):
        return "kernel launches", 0.0
    elementwise = operation.flops == 0
    fused = compiled and elementwise and operation.phase != "update"
    dtype = _real_dtype(operation, half)
    left = _FUSED_TRAFFIC if fused else 1.0
    measured = None if hardware.rates is None else hardware.rates.seconds(operation._replace(dtype=dtype))
    if measured is not None:
        least = operation.traffic / hardware.memory_bandwidth if operation.traffic > _CACHES else 0.0
        return "memory" if elementwise else "compute", max(measured, least) * left
    peak = _reached_flops(operation.name, dtype, hardware)
    traffic = operation.traffic * _PASSES.get(operation.name, 1.0) * left
    times: dict[Bound, float] = {
        "compute": (operation.flops - operation.skipped) / peak,
        "memory": traffic / hardware.memory_bandwidth / _MEMORY_EFFICIENCY,
        "kernel launches": 0.0 if fused or hardware.name == "cpu" else _LAUNCH_SECONDS,
    }
    bound = max(times, key=lambda name: times[name])
    return bound, times[bound]


def _reached_flops(name: str, dtype: torch.dtype | None, hardware: Hardware) -> float:
    """Return the operations per second of a product, convolution or attention, as long as memory keeps up."""
    peak = _peak_flops(name, dtype, hardware)
    if peak == hardware.flops_of(torch.float32) and hardware.name != "cpu":
        return peak * _PLAIN_FLOAT32
    if "attention" in name:
        return peak * hardware.attention_efficiency
    return peak * hardware.product_efficiency * (_CONVOLUTIONS if "convolution" in name else 1.0)


def _peak_flops(name: str, dtype: torch.dtype | None, hardware: Hardware) -> float:
    """Return the peak for the format that a product is computed in."""
    flops = hardware.flops_of(dtype)
    return max(flops, hardware.tf32_flops) if dtype == torch.float32 and _in_tf32(name) else flops


def _real_dtype(operation: Operation, half: bool) -> torch.dtype | None:
    return torch.float16 if half and operation.dtype == torch.bfloat16 else operation.dtype


def _in_tf32(name: str) -> bool:
    """Whether float32 products may be computed in TF32: of convolutions by default, of matrices if torch is told so."""
    if "convolution" in name:
        return torch.backends.cudnn.allow_tf32
    return torch.get_float32_matmul_precision() != "highest"


def _sharing(setting: Setting, hardware: Hardware) -> float:
    """Return how many times as long operations take where the processes of a machine have its processors in common."""
    if hardware.name != "cpu":
        return 1.0
    return max(1.0, setting.devices * torch.get_num_threads() / _num_cpus_available())


def _sending_time(trace: StepTrace, phase: Phase, setting: Setting, hardware: Hardware) -> tuple[float, float, float]:
    """Return seconds of what passes beside computing, of what computing waits for, and of the longest of the former."""
    beside = between = piece = 0.0
    for transfer, count in trace.transfers.items():
        if transfer.phase != phase or transfer.processes < 2:
            continue
        seconds = _transfer_time(transfer, setting, hardware)
        all_of_them = seconds * count * repetitions(transfer, setting)
        if is_awaited(transfer):
            between += all_of_them
        else:
            piece = max(piece, seconds)
            beside += all_of_them
    return beside, between, piece


def _transfer_time(transfer: Transfer, setting: Setting, hardware: Hardware) -> float:
    """Return the seconds of a ring: every process passes on every other's part, over the slowest link on the way.

    Rings of the processes of a node leave it by as many network adapters as it has of them.
    """
    processes = transfer.processes
    tensor_parallel = tensor_parallel_size(setting)
    members = setting.devices if processes == setting.world_size else setting.devices // tensor_parallel
    if is_awaited(transfer) and processes == tensor_parallel:
        members = min(tensor_parallel, setting.devices)
    members = max(1, min(members, processes))
    bandwidth = hardware.link_bandwidth
    nodes = -(-processes // members)
    if nodes > 1:
        bandwidth = min(bandwidth, members * hardware.network_bandwidth) if members > 1 else hardware.network_bandwidth
    passes = 2 if "reduce" in transfer.name and "scatter" not in transfer.name else 1
    size = passes * transfer.size * (processes - 1) / processes
    return size / (bandwidth * _LINK_EFFICIENCY) + _LATENCY_SECONDS * (1 + nodes / 8)


def _precision_dtype(precision: str) -> torch.dtype:
    """Return the format that most products are in."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32
