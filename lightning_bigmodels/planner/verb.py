"""What `bigmodels plan` does: the plan, changes where it does not fit, and both as text, JSON and pictures."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.peak_memory import GIB
from lightning_bigmodels.planner.calibration import read_calibration
from lightning_bigmodels.planner.hardware import find_hardware
from lightning_bigmodels.planner.picture import JSON_NAME, check_output, write_pictures
from lightning_bigmodels.planner.plan import Length, Plan, check_not_negative, make_plan
from lightning_bigmodels.planner.refusals import bounds_of
from lightning_bigmodels.planner.report import report
from lightning_bigmodels.planner.search import Trial, find_changes
from lightning_bigmodels.planner.setting import Setting


@dataclass
class Answer:
    """A plan with what belongs to it.

    Attributes:
        plan: The plan.
        trials: Changes that were tried because it does not fit.
        length: Of the run; None where it is not known.
        hint: How the length could be known.
        price: Of a device's hour.
    """

    plan: Plan
    trials: list[Trial] = field(default_factory=list)
    length: Length | None = None
    hint: str | None = None
    price: float | None = None

    def __str__(self) -> str:
        return report(self.plan, self.length, self.price, self.hint, self.trials)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        length = None if self.length is None else vars(self.length)
        return {**self.plan.to_dict(), "run": length, "changes": [trial.to_dict() for trial in self.trials]}


def answer(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    datamodule: Any,
    setting: Setting,
    gpu: str,
    gpu_table: str | None = None,
    samples: int | None = None,
    price: float | None = None,
    output: str | None = None,
    calibrate: str | None = None,
) -> Answer:
    """Plan a run, find changes where it does not fit, and write pictures.

    Args:
        trainer: It says how long the run is; nothing else of it is used.
        model: The model.
        datamodule: The data, which are not read.
        setting: How a step is run.
        gpu: Name of the hardware.
        gpu_table: Rows of the user's own.
        samples: Rows of the run in place of the Trainer's steps.
        price: Of a device's hour.
        output: Folder for pictures.
        calibrate: Folder of a run, by whose measured steps all plans are corrected.

    Raises:
        InputError: an option is wrong, or the step cannot be planned.
    """
    check_not_negative(samples=samples, price=price)
    hardware = find_hardware(gpu, gpu_table)
    calibration = None if calibrate is None else read_calibration(calibrate, hardware.name)
    folder = None if output is None else check_output(output)

    def replan(setting: Setting) -> Plan:
        return make_plan(model, datamodule, setting, hardware).calibrated(calibration)

    plan = _plan_or_bounds(setting, replan)
    found = Answer(plan, [] if plan.room.fits else find_changes(plan, model, replan), price=price)
    steps, found.hint = _steps(trainer, samples)
    if steps is not None or samples is not None:
        found.length = plan.length(steps, samples, price)
    if folder is not None:
        write_pictures(plan, str(found), folder)
        (folder / JSON_NAME).write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    return found


def _plan_or_bounds(setting: Setting, replan: Callable[[Setting], Plan]) -> Plan:
    bounds = bounds_of(setting)
    if bounds is None:
        return replan(setting)
    low, high, on_top = bounds
    most = f"{(replan(high).room.allocated + on_top) / GIB:,.2f} GiB, as with {high.strategy}"
    if on_top:
        most += f" and the {on_top / GIB:,.2f} GiB that its own buckets take by default"
    between = f"at most {most}"
    if low is not None:
        least = replan(low).room.allocated / GIB
        between = f"between {least:,.2f} GiB, as with {low.strategy} in {low.precision}, and {most}"
    raise InputError(
        f"the strategy {setting.strategy} cannot be simulated without GPUs; at the step's peak a device would have "
        f"allocated {between}; plan with --trainer.strategy fsdp2"
    )


def _steps(trainer: pl.Trainer, samples: int | None) -> tuple[int | None, str | None]:
    """Return the steps of a run, or how they could be known."""
    if samples is not None:
        return None, None
    epochs, batches = trainer.max_epochs, trainer.limit_train_batches
    ends: list[int] = [trainer.max_steps] if trainer.max_steps > 0 else []
    if epochs is not None and epochs > 0 and isinstance(batches, int):
        ends.append(epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    if ends:
        return min(ends), None
    end = "has no end" if epochs in (None, -1) else f"is of {epochs} epochs, whose length is known when data are read"
    return None, f"The run {end}: for its hours and cost give --samples, the rows of all epochs, or --trainer.max_steps"
