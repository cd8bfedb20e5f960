"""Bytes that a device sends and receives in a step, by kind of collective."""

from dataclasses import dataclass

from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.trace import TO_DEVICE, TO_HOST, StepTrace, Transfer

_KINDS = {
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "broadcast": "broadcast",
    "alltoall": "all-to-all",
    "hosttodevice": "host to device",
    "devicetohost": "device to host",
}


@dataclass(frozen=True)
class Traffic:
    """What one device exchanges by one kind of collective, or with host memory, in an optimizer step."""

    calls: int
    """How often it is called."""
    sent: int
    """Bytes, by the rings or trees that send least."""
    received: int
    """Bytes."""


def traffic_of(trace: StepTrace, setting: Setting) -> dict[str, Traffic]:
    """Return what a device sends and receives in an optimizer step, by kind of collective.

    Args:
        trace: A step, which has at most two of the batches that are accumulated.
        setting: How it is run.
    """
    found: dict[str, Traffic] = {}
    for transfer, count in trace.transfers.items():
        kind = kind_of(transfer)
        calls = round(count * repetitions(transfer, setting))
        size = calls * _sent(kind, transfer)
        sent = 0 if transfer.name == TO_DEVICE else size
        received = 0 if transfer.name == TO_HOST else size
        known = found.get(kind, Traffic(0, 0, 0))
        found[kind] = Traffic(known.calls + calls, known.sent + sent, known.received + received)
    return found


def kind_of(transfer: Transfer) -> str:
    """Return the usual name of a collective, whatever torch calls this form of it."""
    name = transfer.name.replace("_", "")
    return next((kind for key, kind in _KINDS.items() if name.startswith(key)), transfer.name)


def _sent(kind: str, transfer: Transfer) -> int:
    """Return the bytes that a process passes on; in a ring it receives as many."""
    others = (transfer.processes - 1) / transfer.processes
    if kind == "broadcast" or transfer.name in (TO_DEVICE, TO_HOST):
        return transfer.size
    return round((2 if kind == "all-reduce" else 1) * others * transfer.size)


def repetitions(transfer: Transfer, setting: Setting) -> float:
    """Return how often what was traced happens in the whole step."""
    batches = setting.accumulate_grad_batches
    if transfer.phase == "update":
        return 1
    traced = min(2, batches)
    # DistributedDataParallel sends with the last batch alone; for what a layer awaits none is left out
    is_last = setting.strategy.startswith(("auto", "ddp")) and not is_awaited(transfer)
    return (1 if is_last else batches) / traced


def is_awaited(transfer: Transfer) -> bool:
    """Whether a layer waits for it: these are torch's functional collectives, FSDP2's and DDP's are in place."""
    return not transfer.name.endswith("_")
