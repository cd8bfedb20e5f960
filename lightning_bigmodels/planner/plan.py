"""What a recipe needs and costs on some hardware, as plain data."""

import dataclasses
import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule
from torch._subclasses.fake_tensor import UnsupportedOperatorException

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner.calibration import Calibration
from lightning_bigmodels.planner.course import course_of
from lightning_bigmodels.planner.flags import replicas
from lightning_bigmodels.planner.hardware import Hardware
from lightning_bigmodels.planner.room import Room, estimate_room
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.simulation import simulate
from lightning_bigmodels.planner.timing import StepTime, estimate_time
from lightning_bigmodels.planner.trace import Kind, Moment
from lightning_bigmodels.planner.traffic import Traffic, traffic_of
from lightning_bigmodels.strategies.batch_norm import one_value_explained

BLOCK_SIZE = 512
"""Bytes that the blocks of CUDA's caching allocator are a multiple of."""

# what torch 2.14 says of an operator without a rule for shapes, and of .numpy()
_NOT_FAKE = ("no fake impl registered", "not supported for tensor subclasses")


@dataclass(frozen=True)
class Length:
    """A run's length, and what it takes."""

    steps: int
    """Optimizer steps."""
    rows: int
    """Rows that all devices see in them."""
    hours: float
    """Of training alone: validation, checkpoints and waiting for data come on top."""
    cost: float | None
    """In the currency of the price; None without a price."""


@dataclass(frozen=True)
class Plan:
    """What a step needs on each device, how long it takes, and where its memory goes.

    Attributes:
        setting: How the step is run.
        hardware: What it is run on.
        unit: What rows are counted in: tokens where a batch has `input_ids`, else samples.
        units_per_row: Tokens of a row, or 1.
        peak: The moment at which most is allocated, with the bytes of each kind; all of them are `room.allocated`.
        num_operations: Operations of the step, by whose number `peak` and `course` are placed.
        room: What the peak comes to on the device, and whether it fits.
        time: What the step takes, and what bounds it.
        traffic: Bytes sent and received in a step by each kind of collective.
        course: The memory over the step, in a few hundred moments.
        assumptions: Operations whose results hang on values, and were assumed.
        model: Class of the model.
        calibration: Factors of a real run by which `peak`, `room`, `course` and `time` were changed.
    """

    setting: Setting
    hardware: Hardware
    unit: str
    units_per_row: int
    peak: Moment
    num_operations: int
    room: Room
    time: StepTime
    traffic: dict[str, Traffic]
    course: list[Moment]
    assumptions: list[str]
    model: str = ""
    calibration: Calibration | None = None

    @property
    def rows_per_step(self) -> int:
        """Rows that all devices see in an optimizer step."""
        return self.setting.batch_size * self.setting.accumulate_grad_batches * replicas(self.setting)

    @property
    def units_per_second(self) -> float:
        """Tokens or samples a second on all devices."""
        return self.rows_per_step * self.units_per_row / self.time.seconds

    @property
    def units_per_second_and_device(self) -> float:
        """The same, divided by the devices."""
        return self.units_per_second / self.setting.world_size

    def length(self, steps: int | None = None, rows: int | None = None, price: float | None = None) -> Length:
        """Return what a run takes.

        Args:
            steps: Optimizer steps.
            rows: In place of steps, the rows that all devices see.
            price: Of a device's hour, in any currency.

        Raises:
            InputError: a number is below 0.
        """
        check_not_negative(samples=rows, price=price)
        if rows is not None:
            steps = math.ceil(rows / self.rows_per_step)
        assert steps is not None
        hours = steps * self.time.seconds / 3600
        cost = None if price is None else hours * self.setting.world_size * price
        return Length(steps, steps * self.rows_per_step, hours, cost)

    def calibrated(self, calibration: Calibration | None) -> "Plan":
        """Return the plan with the factors of a real run: time, memory, and what follows from them.

        Of what is allocated at a moment each kind has the same factor: a run tells of all of them together. What the
        driver and communication take stays as it is; what is uncertain does not become less.
        """
        if calibration is None:
            return self
        room, time, seconds = self.room, self.time, calibration.seconds
        memory = 1.0 if calibration.memory is None else calibration.memory

        def scaled(moment: Moment) -> Moment:
            return moment._replace(held={kind: round(size * memory) for kind, size in moment.held.items()})

        peak = scaled(self.peak)
        reserved = peak.total + round((room.reserved - room.allocated) * memory)
        return replace(
            self,
            peak=peak,
            course=[scaled(moment) for moment in self.course],
            room=replace(
                room,
                allocated=peak.total,
                reserved=reserved,
                used=room.used + reserved - room.reserved,
                uncertainty=round(room.uncertainty * max(1.0, memory)),
            ),
            time=replace(
                time,
                seconds=time.seconds * seconds,
                parts={bound: part * seconds for bound, part in time.parts.items()},
                sending=time.sending * seconds,
                mfu=time.mfu / seconds,
            ),
            calibration=calibration,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all but the course as what JSON can hold: bytes, seconds, operations; names as they are here."""
        room, time = self.room, self.time
        return {
            "setting": dataclasses.asdict(self.setting),
            "hardware": {"name": self.hardware.name, "memory": self.hardware.memory, "source": self.hardware.source},
            "memory": {
                "kinds": dict(self.peak.held),
                "allocated": room.allocated,
                "reserved": room.reserved,
                "used": room.used,
                "uncertainty": room.uncertainty,
                "spare": room.spare,
                "available": room.memory,
                "host": room.host,
                "host_of_node": room.host * self.setting.devices,
                "peak": {
                    "phase": self.peak.phase,
                    "operation": self.peak.operation,
                    "name": self.peak.name,
                    "operations": self.num_operations,
                },
            },
            "fits": room.fits,
            "step": {
                "flops": time.flops,
                "seconds": time.seconds,
                "seconds_by_bound": dict(time.parts),
                "bound": time.bound,
                "mfu": time.mfu,
                "traffic": {name: dataclasses.asdict(traffic) for name, traffic in self.traffic.items()},
                "rows": self.rows_per_step,
                "unit": self.unit,
                "units_per_row": self.units_per_row,
                "units_per_second": self.units_per_second,
                "units_per_second_and_device": self.units_per_second_and_device,
            },
            "assumptions": self.assumptions,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
        }


def make_plan(model: LightningModule, datamodule: Any, setting: Setting, hardware: Hardware) -> Plan:
    """Simulate a step and return what it needs and costs.

    Args:
        model: The model, whose network is not built yet; it stays so.
        datamodule: Its `example_batch(batch_size)` makes the batches; nothing else of it is used.
        setting: How the step is run.
        hardware: What it is run on.

    Raises:
        InputError: the step cannot be simulated; the message says why.
    """
    if not hasattr(datamodule, "example_batch"):
        raise InputError(f"{type(datamodule).__name__} has no example_batch(batch_size) to plan with; add one")
    on_cpu = hardware.name == "cpu"
    try:
        with one_value_explained():
            trace = simulate(model, datamodule, setting, 1 if on_cpu else BLOCK_SIZE, like_cuda=not on_cpu)
    except RuntimeError as error:
        if not isinstance(error, UnsupportedOperatorException) and not any(words in str(error) for words in _NOT_FAKE):
            raise
        raise InputError(
            f"the step cannot be planned, at {_place(error)}: {str(error).split('. ')[0].rstrip('.')}; planning needs "
            f"operations that give shapes without values: register yours with torch.library.register_fake"
        ) from error
    unit, units_per_row = _unit(datamodule)
    room = estimate_room(trace, setting, hardware)
    workspace = room.allocated - trace.peak.total

    def with_workspace(moment: Moment) -> Moment:
        return moment._replace(held={**moment.held, "workspace": workspace}) if workspace else moment

    return Plan(
        setting=setting,
        hardware=hardware,
        unit=unit,
        units_per_row=units_per_row,
        peak=with_workspace(trace.peak),
        num_operations=trace.changes[-1].operation if trace.changes else 0,
        room=room,
        time=estimate_time(trace, setting, hardware, compiled=bool(getattr(model, "compile_network", False))),
        traffic=traffic_of(trace, setting),
        course=[with_workspace(moment) for moment in course_of(trace)],
        assumptions=sorted(trace.assumptions),
        model=type(model).__name__,
    )


def _place(error: BaseException) -> str:
    """Return file and line of the innermost code that is neither torch's nor Lightning's nor the planner's."""
    others = [Path(str(file)).parent for file in (torch.__file__, lightning.__file__, __file__)]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(Path(frame.filename).is_relative_to(folder) for folder in others)
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}"


def check_not_negative(**values: float | None) -> None:
    """Refuse options below 0; None passes.

    Raises:
        InputError: one is.
    """
    for name, value in values.items():
        if value is not None and not value >= 0:
            raise InputError(f"--{name} is {value}; set it to 0 or more")


def _unit(datamodule: Any) -> tuple[str, int]:
    batch = datamodule.example_batch(1)
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ("samples", 1) if tokens is None else ("tokens", tokens.numel())


def kinds_of(plan: Plan) -> list[Kind]:
    """Return the kinds of memory that a step has, in the order in which they are told and stacked."""
    found = {kind for moment in (*plan.course, plan.peak) for kind, size in moment.held.items() if size}
    return [kind for kind in KINDS if kind in found]


KINDS: tuple[Kind, ...] = (
    "parameters",
    "gradients",
    "optimizer state",
    "workspace",
    "activations",
    "communication",
    "temporary",
    "inputs",
)
"""From what is always there to what comes and goes."""
