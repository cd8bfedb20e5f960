"""A plan before a run, and how far it is from the run's first steps."""

import json
import time
from statistics import median
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_bigmodels.callbacks.report import run_folder
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.peak_memory import GIB

FILE_NAME = "plan_check.json"
_STEPS = 10


class PlanCheck(Callback):
    """Warns before a fit that its plan says will not fit into memory, and compares the first steps with the plan.

    The command plans on its first process, before any other is started; in Python, call `plan` before `fit`. Time of a
    step and, on a GPU, bytes allocated at its peak are logged as they are, planned as `planned_step_seconds` and
    `planned_gib` and real as `real_step_seconds` and `real_gib`, and kept in plan_check.json of the run's folder. The
    first step is left out of the time.

    Args:
        when: `gpu` plans where devices are GPUs, `always` on a CPU too, `never` switches it off.
        hardware: Name of the devices in the planner's table; null looks for it in the GPU's own name.
    """

    def __init__(self, when: Literal["gpu", "always", "never"] = "gpu", hardware: str | None = None) -> None:
        self.when = when
        self.hardware = hardware
        self._planned: dict[str, float] | None = None
        self._ends: list[float] = []
        self._step = -1

    def plan(self, trainer: Trainer, model: LightningModule, datamodule: Any) -> None:
        """Plan the run, and warn if it will not fit; where that is not possible, one line says why.

        Random state and model stay as they are.
        """
        on_gpu = trainer.strategy.root_device.type == "cuda"
        if self.when == "never" or (self.when == "gpu" and not on_gpu) or not trainer.is_global_zero:
            return
        # the planner and its tables are not needed otherwise
        from lightning.pytorch.utilities.seed import isolate_rng

        from lightning_bigmodels.planner.flags import setting_of
        from lightning_bigmodels.planner.hardware import find_hardware
        from lightning_bigmodels.planner.plan import make_plan

        try:
            hardware = find_hardware(self.hardware or (_gpu_name() if on_gpu else "cpu"))
            with isolate_rng(include_cuda=False):
                plan = make_plan(model, datamodule, setting_of(trainer, datamodule), hardware)
        except InputError as error:
            rank_zero_info(f"the run is not compared with a plan: {error}")
            return
        room = plan.room
        if not room.fits:
            rank_zero_warn(
                f"the plan says that this run does not fit: it needs {room.used / GIB:.2f} GiB, give or take "
                f"{room.uncertainty / GIB:.2f}, and {hardware.name} has {room.memory / GIB:.2f}; bigmodels plan with "
                f"the same flags finds changes that fit"
            )
        self._planned = {"step_seconds": plan.time.seconds, "gib": room.allocated / GIB}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ends, self._step = [], trainer.global_step
        if self._planned is not None and trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._planned is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._ends.append(time.perf_counter())
        if len(self._ends) <= _STEPS:
            return
        planned, self._planned = self._planned, None
        real = {"step_seconds": median(b - a for a, b in zip(self._ends, self._ends[1:], strict=False))}
        if device.type == "cuda":
            real["gib"] = torch.cuda.max_memory_allocated(device) / GIB
        self._tell(trainer, {name: planned[name] for name in real}, real)

    def _tell(self, trainer: Trainer, planned: dict[str, float], real: dict[str, float]) -> None:
        values = {f"planned_{name}": value for name, value in planned.items()}
        values |= {f"real_{name}": value for name, value in real.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        told = [f"{name.replace('_', ' ')} {planned[name]:.4g} planned, {real[name]:.4g} real" for name in real]
        rank_zero_info(f"the first {_STEPS} steps against the plan: {'; '.join(told)}")
        # only the first process has a plan, so that it asks for the folder alone
        folder = run_folder(trainer) if trainer.world_size == 1 else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FILE_NAME).write_text(json.dumps({"planned": planned, "real": real}, indent=2) + "\n")


def _gpu_name() -> str:
    """Return the planner's name of this process's GPU.

    Raises:
        InputError: the table has none that its own name holds.
    """
    from lightning_bigmodels.planner.hardware import known_hardware

    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    found = [known for known in known_hardware() if known in name]
    if not found:
        raise InputError(f"the table of devices has no {name}; name one with PlanCheck's hardware")
    return max(found, key=len)
