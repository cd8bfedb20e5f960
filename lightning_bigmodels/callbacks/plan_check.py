"""A plan before a run, and how far it is from the run's first steps."""

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_bigmodels.callbacks.report import run_folder
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.peak_memory import GIB, Memory, memory_of

if TYPE_CHECKING:
    from lightning_bigmodels.planner.plan import Plan

_STEPS = 10


class PlanCheck(Callback):
    """Warns before a fit that its plan says will not fit into memory, and compares the first steps with the plan.

    The command plans on its first process, before that starts any other; in Python, call `plan` before `fit`. Time of a
    step and bytes allocated at its peak are logged as they are, planned as `planned_step_seconds` and `planned_gib` and
    real as `real_step_seconds` and `real_gib`, and kept in plan_check.json of the run's folder, from which
    `bigmodels plan --calibrate` corrects other plans. The first step is left out of the time.

    On a CPU, memory is measured in the steps that come after, which take longer by what torch's profiler takes, and
    where there is one process; of several, what communication holds in other threads is not seen.

    Args:
        when: `gpu` plans where devices are GPUs, `always` on a CPU too, `never` switches it off.
        hardware: Name of the devices in the planner's table; null looks for it in the GPU's own name.
        hardware_table: A CSV file with devices of your own, as for `bigmodels plan --gpu_table`.
        seconds: How long the run may wait for its plan; if that takes longer, one line says so and the run begins.
    """

    def __init__(
        self,
        when: Literal["gpu", "always", "never"] = "gpu",
        hardware: str | None = None,
        hardware_table: str | None = None,
        seconds: float = 5.0,
    ) -> None:
        self.when = when
        self.hardware = hardware
        self.hardware_table = hardware_table
        self.seconds = seconds
        self._plan: Plan | None = None
        self._folder: Path | None = None
        self._ends: list[float] = []
        self._step = -1
        self._memory: Memory | None = None
        self._peaks: list[int] = []
        self._measures = False

    def plan(self, trainer: Trainer, model: LightningModule, datamodule: Any) -> None:
        """Plan the run, and warn if it will not fit; where that is not possible, one line says why.

        Random state and model stay as they are.
        """
        if not self._compares(trainer) or not trainer.is_global_zero:
            return
        try:
            self._plan = self._make_plan(trainer, model, datamodule)
        except InputError as error:
            rank_zero_info(f"the run is not compared with a plan: {error}")
            return
        room, name = self._plan.room, self._plan.hardware.name
        if not room.fits:
            rank_zero_warn(
                f"the plan says that this run does not fit: it needs {room.used / GIB:.2f} GiB, give or take "
                f"{room.uncertainty / GIB:.2f}, and {name} has {room.memory / GIB:.2f}; bigmodels plan with "
                f"the same flags finds changes that fit"
            )

    def _compares(self, trainer: Trainer) -> bool:
        """Whether this kind of device is asked for; all processes agree."""
        return self.when == "always" or (self.when == "gpu" and trainer.strategy.root_device.type == "cuda")

    def _make_plan(self, trainer: Trainer, model: LightningModule, datamodule: Any) -> "Plan":
        if getattr(trainer.strategy, "_start_method", None) == "fork":
            # neither a GPU nor the threads of a backward pass live on in a fork
            raise InputError("its processes are forked from this one, which must not compute before; use ddp")
        start = time.monotonic()
        # the planner and its tables are not needed otherwise
        from lightning.pytorch.utilities.seed import isolate_rng

        from lightning_bigmodels.planner.flags import setting_of
        from lightning_bigmodels.planner.hardware import find_hardware
        from lightning_bigmodels.planner.plan import make_plan
        from lightning_bigmodels.planner.time_limit import TimeLimitError, time_limit

        device = trainer.strategy.root_device
        name = self.hardware or (_gpu_name(device, self.hardware_table) if device.type == "cuda" else "cpu")
        hardware = find_hardware(name, self.hardware_table)
        try:
            with isolate_rng(include_cuda=False), time_limit(self.seconds - (time.monotonic() - start)):
                return make_plan(model, datamodule, setting_of(trainer, datamodule), hardware)
        except TimeLimitError as error:
            raise InputError(
                f"planning takes more than {self.seconds:g} s, for which the run does not wait; plan it with bigmodels "
                f"plan and the same flags, or give PlanCheck more seconds"
            ) from error

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ends, self._peaks, self._measures = [], [], False
        self._step = trainer.global_step
        if self._compares(trainer):
            # all processes ask, whether they have a plan or not
            self._folder = run_folder(trainer)
        if self._plan is not None and trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._plan is None or len(self._ends) <= _STEPS or self._memory is not None:
            return
        self._memory = memory_of(trainer.strategy.root_device, _held_bytes(trainer, pl_module))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._plan is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        device = trainer.strategy.root_device
        if len(self._ends) <= _STEPS:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self._ends.append(time.perf_counter())
            if len(self._ends) > _STEPS and not self._measures_after(trainer):
                peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
                self._compare(trainer, self._plan, peak)
            return
        assert self._memory is not None
        if self._measures:
            self._peaks.append(self._memory.peaks()[1])
        # in the first step gradients are still those of the one before, which was not followed
        self._measures = True
        if len(self._peaks) < getattr(pl_module, "step_period", 1):
            self._memory.begin()
        else:
            self._compare(trainer, self._plan, max(self._peaks))

    def _measures_after(self, trainer: Trainer) -> bool:
        """Whether memory is measured in steps of its own: on a CPU, where nothing else profiles the run."""
        on_cpu = trainer.strategy.root_device.type == "cpu"
        return on_cpu and trainer.world_size == 1 and not torch._C._autograd._profiler_enabled()

    def _compare(self, trainer: Trainer, plan: "Plan", peak: int | None) -> None:
        """Log and keep what was planned and what was real, once."""
        from lightning_bigmodels.planner.calibration import write_measurement

        self._stop()
        planned = {"step_seconds": plan.time.seconds}
        real = {"step_seconds": median(b - a for a, b in zip(self._ends, self._ends[1:], strict=False))}
        if peak is not None:
            planned["gib"], real["gib"] = plan.room.allocated / GIB, peak / GIB
        values = {f"planned_{name}": value for name, value in planned.items()}
        values |= {f"real_{name}": value for name, value in real.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        told = [f"{name.replace('_', ' ')} {planned[name]:.4g} planned, {real[name]:.4g} real" for name in real]
        rank_zero_info(f"the first {_STEPS} steps against the plan: {'; '.join(told)}")
        assert self._folder is not None
        write_measurement(self._folder, planned, real, plan.hardware.name, plan.model, plan.setting)

    def _stop(self) -> None:
        self._plan = None
        if self._memory is not None:
            self._memory.end()
            self._memory = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # a fit may end while its memory is measured
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()


def _held_bytes(trainer: Trainer, module: LightningModule) -> int:
    """Return the bytes of weights, buffers and optimizer state, which stay."""
    state = [
        value for optimizer in trainer.optimizers for values in optimizer.state.values() for value in values.values()
    ]
    tensors = [*module.parameters(), *module.buffers(), *(value for value in state if isinstance(value, torch.Tensor))]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _gpu_name(device: torch.device, table: str | None) -> str:
    """Return the planner's name of this process's GPU.

    Raises:
        InputError: the table has none that its own name holds.
    """
    from lightning_bigmodels.planner.hardware import known_hardware

    name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    words = set(name.split("-"))  # nvidia-a100-sxm4-40gb is an a100-40gb, and an l40 is no l4
    found = [known for known in known_hardware(table) if words.issuperset(known.split("-"))]
    if not found:
        raise InputError(f"the table of devices has no {name}; name one with PlanCheck's hardware")
    return max(found, key=len)
