"""The time that weights and an optimizer in host memory take: copies to the device and back, and the CPU's update."""

from lightning_bigmodels.planner.hardware import Hardware
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.trace import TO_DEVICE, TO_HOST, Operation, Phase, StepTrace
from lightning_bigmodels.planner.traffic import repetitions

_COPY_EFFICIENCY = 0.8
"""Of a link's bandwidth that copies of pinned memory reach: about 25 of PCIe 4.0's 32 GB/s and 50 of 5.0's 64."""
_HOST_BANDWIDTH = 51e9
"""Bytes per second of host memory for each device, an assumption: a DGX A100 has 2 x 8 channels of DDR4-3200 for 8, a
DGX H100 half as much again (their data sheets), a desktop with one GPU two channels of DDR5-5600 or 90 GB/s."""
_HOST_EFFICIENCY = 0.8
"""Of that, as of a device's memory; with cores enough to keep it busy, which a single one is not."""


def copying_time(trace: StepTrace, phase: Phase, setting: Setting, hardware: Hardware) -> tuple[float, float, float]:
    """Return seconds of copies beside computing, of those that computing waits for, and of the longest of the former.

    What goes down and what comes up pass each other. One process alone copies its weights where it computes (torch
    2.14): nothing is gathered, which would be done ahead. Adding up the gradients of accumulated batches on the CPU is
    left out.
    """
    rate = hardware.host_bandwidth * _COPY_EFFICIENCY
    seconds = {TO_DEVICE: 0.0, TO_HOST: 0.0}
    piece = 0.0
    for transfer, count in trace.transfers.items():
        if transfer.phase == phase and transfer.name in seconds:
            seconds[transfer.name] += transfer.size * count * repetitions(transfer, setting) / rate
            piece = max(piece, transfer.size / rate)
    if setting.world_size == 1:
        return seconds[TO_HOST], seconds[TO_DEVICE], 0.0
    return max(seconds.values()), 0.0, piece


def updating_time(operation: Operation) -> float:
    """Return the seconds of an operation of the optimizer, which reads and writes host memory."""
    return operation.traffic / (_HOST_BANDWIDTH * _HOST_EFFICIENCY)
