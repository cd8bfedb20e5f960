"""Peak memory of steps on a device, and how much the device has to give."""

import gc
import json
import os
import tempfile
from abc import ABC, abstractmethod
from bisect import bisect_left
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lightning_bigmodels.errors import InputError

GIB = 2**30
_YOUNG = 1  # the garbage of the step before; to look through all objects takes 0.3 s beside Lightning and transformers
_MARK = "second half of the step"


class Memory(ABC):
    """The memory of one process on one device, in bytes, measured step by step.

    Steps are to be alike but for their size: the optimizer has its state before the first that is measured.

    Args:
        device: The device.
        held: Bytes of tensors that are older than this object and will stay.
    """

    def __init__(self, device: torch.device, held: int = 0) -> None:
        self.device = device
        self.held_before = held

    @abstractmethod
    def begin(self) -> int:
        """Let go of what nobody uses, begin a step, and return the bytes that are held now."""

    @abstractmethod
    def mark(self) -> None:
        """Part the step: what comes from here on is its second half; the last mark counts."""

    @abstractmethod
    def peaks(self) -> tuple[int, int]:
        """Return the most bytes held at a time in each half of the step, which ends here."""

    @abstractmethod
    def end(self) -> None:
        """Stop measuring."""

    @abstractmethod
    def room(self, processes: int) -> int:
        """Return the bytes that this process can hold beside what others use now.

        Args:
            processes: How many on this host share the device and ask at the same time.
        """

    @abstractmethod
    def margin(self, room: int) -> int:
        """Return the bytes of `room` to leave free for what the measure leaves out."""


class CPUMemory(Memory):
    """Bytes in CPU tensors: what torch's allocator was asked for, as its profiler sees it, so compiled code counts too.

    Left out is what does not pass through that allocator: Python's objects, the scratch memory of oneDNN and BLAS, and
    the holes that malloc leaves. Together they were 0.2 to 0.5 GiB for networks of 30 M parameters; a tenth of the room
    is kept free for them. Processes that load data are left out as well.

    The profiler forgets what is freed while it is off, so it is on from the beginning to `end`.
    """

    def __init__(self, device: torch.device, held: int = 0) -> None:
        super().__init__(device, held)
        # it prints its comings and goings; read when it is first used
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._blocks = _Blocks()
        self._start()

    @override
    def begin(self) -> int:
        gc.collect(_YOUNG)
        self.peaks()
        self._blocks.settle()
        return self.held_before + self._blocks.total

    @override
    def mark(self) -> None:
        # to stop the profiler here, inside operations that it has seen beginning, corrupts its memory (torch 2.14)
        with torch.profiler.record_function(_MARK):
            pass

    @override
    def peaks(self) -> tuple[int, int]:
        first = peak = self._blocks.total
        for event in self._stop():
            if event["name"] == _MARK:
                first, peak = max(first, peak), self._blocks.total
            else:
                self._blocks.change(event["args"]["Addr"], event["args"]["Bytes"])
                peak = max(peak, self._blocks.total)
        self._start()
        return self.held_before + first, self.held_before + peak

    @override
    def end(self) -> None:
        self._profile.stop()

    @override
    def room(self, processes: int) -> int:
        return self.held_before + self._blocks.total + available_host_memory() // processes

    @override
    def margin(self, room: int) -> int:
        return room // 10

    def _start(self) -> None:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def _stop(self) -> list[dict[str, Any]]:
        """Return the step's allocations, releases and marks in order of time."""
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profile.export_chrome_trace(str(path))
            events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
        named = [event for event in events if event.get("name") in ("[memory]", _MARK)]
        return sorted(named, key=lambda event: event["ts"])


class _Blocks:
    """The blocks of memory in use, told from what the profiler has seen.

    It does not see a release in another thread, as when gloo drops the last reference to a gathered weight. The next
    user of the same addresses tells, or the next `settle`.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._sizes: list[int] = []
        self._counted = 0
        self._lost = 0
        self._least: int | None = None
        self._settled: set[int] = set()

    @property
    def total(self) -> int:
        """Bytes in use."""
        return self._counted - self._lost

    def settle(self) -> None:
        """Take what is in use between two steps for as much as it ever was: the rest was released unseen."""
        self._least = self._counted if self._least is None else min(self._least, self._counted)
        self._lost = self._counted - self._least
        self._settled = set(self._starts)

    def change(self, start: int, num_bytes: int) -> None:
        """Note a block that is taken, or given back if `num_bytes` is negative."""
        place = bisect_left(self._starts, start)
        if place > 0 and self._starts[place - 1] + self._sizes[place - 1] > start:
            place -= 1
        while place < len(self._starts) and self._starts[place] < start + abs(num_bytes):
            self._drop(place, seen=num_bytes < 0)
        if num_bytes > 0:
            self._starts.insert(place, start)
            self._sizes.insert(place, num_bytes)
            self._counted += num_bytes

    def _drop(self, place: int, seen: bool) -> None:
        start, size = self._starts.pop(place), self._sizes.pop(place)
        self._counted -= size
        if not seen and start in self._settled:
            self._lost = max(0, self._lost - size)
        self._settled.discard(start)


class CUDAMemory(Memory):
    """Bytes that torch's allocator has taken from a GPU: tensors, and the holes between them.

    Left out are the CUDA context, NCCL's buffers and what libraries take for themselves. Once a step has run they are
    there, and count as used by others; a twentieth of the GPU is kept free for what comes later.
    """

    @override
    def begin(self) -> int:
        gc.collect(_YOUNG)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._first_half = 0
        return torch.cuda.memory_reserved(self.device)

    @override
    def mark(self) -> None:
        self._first_half = max(self._first_half, torch.cuda.max_memory_reserved(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)

    @override
    def peaks(self) -> tuple[int, int]:
        return self._first_half, torch.cuda.max_memory_reserved(self.device)

    @override
    def end(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    @override
    def room(self, processes: int) -> int:
        # each process has a GPU of its own, and those who share it count as others
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)

    @override
    def margin(self, room: int) -> int:
        _, total = torch.cuda.mem_get_info(self.device)
        return total // 20


def memory_of(device: torch.device, held: int = 0) -> Memory:
    """Return the memory of a device; measuring begins.

    Args:
        device: A CPU or a CUDA device.
        held: Bytes of tensors there that are older and will stay.

    Raises:
        InputError: Memory cannot be measured on this kind of device.
    """
    if device.type == "cpu":
        return CPUMemory(device, held)
    if device.type == "cuda":
        return CUDAMemory(device, held)
    raise InputError(f"memory cannot be measured on {device.type}; set trainer.accelerator to cpu or gpu")


def available_host_memory(root: Path = Path("/")) -> int:
    """Return the bytes that processes of this host can still take: of the machine, or of the control group if less.

    Args:
        root: Folder that holds `proc` and `sys`.

    Raises:
        InputError: The system does not say it in the way of Linux.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError as error:
        raise InputError("the host does not tell how much memory is free; state it with --memory GIB") from error
    kilobytes = dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]
    return min([int(kilobytes) * 1024, *_control_group_rooms(root)])


def _control_group_rooms(root: Path) -> list[int]:
    """Return limit less use of the process's control group and those around it, of version 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # a kernel without control groups
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = "sys/fs/cgroup", ("max", "current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = "sys/fs/cgroup/memory", ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
        else:
            continue
        # a container may see its own group under the name that only the host knows: the root is asked in any case
        for group in [root / base / path.lstrip("/"), *(root / base / path.lstrip("/")).parents]:
            limit, use = group / f"memory.{names[0]}", group / f"memory.{names[1]}"
            if limit.is_file() and limit.read_text().strip() != "max":
                stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                # the page cache counts as used and is given back on demand
                rooms.append(int(limit.read_text()) - int(use.read_text()) + int(stat.get(names[2], 0)))
            if group == root / base:
                break
    return rooms
