"""From the bytes that tensors hold to what a device shows as used, and whether it fits."""

from dataclasses import dataclass

from lightning_bigmodels.peak_memory import GIB
from lightning_bigmodels.planner.allocator import reserved_bytes
from lightning_bigmodels.planner.hardware import Hardware
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.trace import StepTrace

_WORKSPACE = 2**26
"""cuBLAS takes 32 MiB for the forward pass and as much for the backward pass of Hopper, and a quarter of it of others
(torch's notes on CUDA semantics, cuBLAS workspaces)."""
_HOLES = 0.02
"""Holes that the order of a trace does not show; set by AO-1 of tests/benchmarks/planner_rows.csv."""
_COMMUNICATION = int(1.3 * GIB)
"""NCCL's buffers with more than one process: 1 to 2 GiB were seen."""
_UNCERTAIN = 0.08
"""Share by which more may be reserved, besides half a GiB for context and communication: no run in
tests/benchmarks/planner_rows.csv took as much more than was planned."""
_PROCESS = int(0.4 * GIB)
"""What a process on a CPU takes besides tensors: 0.2 to 0.5 GiB were measured."""


@dataclass(frozen=True)
class Room:
    """What a step needs of a device's memory, in bytes.

    Attributes:
        allocated: Of tensors at the step's peak: `torch.cuda.max_memory_allocated()`.
        reserved: With the holes that the caching allocator keeps: `torch.cuda.max_memory_reserved()`. On a device that
            is full it keeps fewer.
        used: With the driver's context and the buffers of communication: what nvidia-smi shows of the process.
        uncertainty: How much more it may be.
        memory: What the device has; on a CPU, what there is for each process of a machine.
        host: Of host memory, where a strategy keeps weights, gradients and optimizer state there; no part of `used`.
    """

    allocated: int
    reserved: int
    used: int
    uncertainty: int
    memory: int
    host: int = 0

    @property
    def spare(self) -> int:
        """Bytes that remain free; below 0, bytes that are missing."""
        return self.memory - self.used

    @property
    def fits(self) -> bool:
        """Whether it fits even with the uncertainty."""
        return self.uncertainty <= self.spare


def estimate_room(trace: StepTrace, setting: Setting, hardware: Hardware) -> Room:
    """Return what a traced step needs of a device.

    Args:
        trace: A step of the setting, traced `like_cuda` unless the hardware is a CPU.
        setting: How it was run.
        hardware: The device.
    """
    allocated = trace.peak.total
    if hardware.name == "cpu":
        used, memory = allocated + _PROCESS, hardware.memory // setting.devices
        return Room(allocated, allocated, used, allocated // 20 + _PROCESS // 2, memory)
    allocated += _WORKSPACE
    outside = hardware.context + (_COMMUNICATION if setting.world_size > 1 else 0)
    limit = (hardware.memory - outside) / (1 + _HOLES) - _WORKSPACE
    reserved = int(max(allocated, reserved_bytes(trace, limit) + _WORKSPACE) * (1 + _HOLES))
    used = reserved + outside
    host = trace.host_peak if setting.offloads else 0
    return Room(allocated, reserved, used, int(_UNCERTAIN * reserved) + GIB // 2, hardware.memory, host)
