"""A plan before a run, and how far it is from the run's first steps."""

import re
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_bigmodels.callbacks.report import run_folder
from lightning_bigmodels.callbacks.weight_average import WeightAverage
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.peak_memory import GIB, Memory, memory_of

if TYPE_CHECKING:
    from lightning_bigmodels.planner.calibration import Machine
    from lightning_bigmodels.planner.hardware import Hardware
    from lightning_bigmodels.planner.plan import Plan

_STEPS = 10
_LONG_WAIT = 0.1
"""Of a step's time, from which on it is told how long the run waits between batches."""
_SAYS_NOTHING = re.compile(r"nvidia|amd|tesla|geforce|instinct|sxm\d?|\d+gb|hbm3e?|oam|vf")
"""Words in the name of a GPU beside those of its kind; any other, such as ti, pcie or mig, makes it another kind."""


class PlanCheck(Callback):
    """Warns before a fit that its plan says will not fit into memory, and compares the first steps with the plan.

    The command plans on its first process, before that starts any other; in Python, call `plan` before `fit`. Time of a
    step and bytes allocated at its peak are logged as they are, planned as `planned_step_seconds` and `planned_gib` and
    real as `real_step_seconds` and `real_gib`, and kept in plan_check.json of the run's folder, from which
    `bigmodels plan --calibrate` corrects other plans. The first step is left out. A step is what happens in its
    batches: waiting for data, validation and what other callbacks do between batches are in no plan; where they take
    more than a tenth of a step, that is told.

    A GPU is waited for at the ends of each batch of these steps, and of no other. On a CPU, memory is measured in the
    steps that come after, which take longer by what torch's profiler takes, and where there is one process; of several,
    what communication holds in other threads is not seen.

    Args:
        when: `gpu` plans where devices are GPUs, `always` on a CPU too, `never` switches it off.
        hardware: Name of the GPU in the planner's table; null looks for it in the GPU's own name. A CPU is measured.
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
        self._machine: Machine | None = None
        self._folder: Path | None = None
        self._steps = _Steps(torch.device("cpu"))
        self._period = 1
        self._step = -1
        self._memory: Memory | None = None
        self._peaks: list[int] = []
        self._measures = False
        self._validated = False

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
        except Exception as error:
            # of the user's code, say, which was not written for tensors without memory: a run that would work goes on
            rank_zero_warn(
                f"the run is not compared with a plan, which ended in {type(error).__name__}: {error}; bigmodels plan "
                f"with the same flags shows where, and PlanCheck's when: never does without"
            )
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
        if getattr(trainer.strategy, "_start_method", None) in ("fork", "forkserver"):
            # neither a GPU nor the threads of a backward pass live on in a fork
            raise InputError("its processes are forked, before which this one must not compute; use ddp")
        device = trainer.strategy.root_device
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"the planner knows CPUs and the GPUs of CUDA and ROCm, and nothing of {device.type}")
        # this starts CUDA, which takes seconds where there are many GPUs, and which the run does in any case
        gpu = _gpu(device, self.hardware, self.hardware_table) if device.type == "cuda" else None
        start = time.monotonic()
        # the planner and its tables are not needed otherwise
        from lightning.pytorch.utilities.seed import isolate_rng

        from lightning_bigmodels.planner.calibration import machine_of
        from lightning_bigmodels.planner.flags import setting_of
        from lightning_bigmodels.planner.hardware import find_hardware
        from lightning_bigmodels.planner.plan import make_plan
        from lightning_bigmodels.planner.time_limit import TimeLimitError, time_limit

        hardware = gpu or find_hardware("cpu", self.hardware_table)
        self._machine = machine_of(device)  # with the threads that it was measured with: the run may take fewer
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
        if not trainer.is_global_zero:
            self._plan = None  # which processes have that were spawned after it was made
        self._steps = _Steps(trainer.strategy.root_device)
        self._peaks, self._measures, self._validated = [], False, False
        self._step = trainer.global_step
        self._period = getattr(pl_module, "step_period", 1)
        if self._compares(trainer):
            # all processes ask, whether they have a plan or not
            self._folder = run_folder(trainer)

    @property
    def _is_timing(self) -> bool:
        """Whether steps are still timed: one that is left out, and of those that are not alike one of each."""
        return len(self._steps.done) <= max(_STEPS, self._period)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._plan is None:
            return
        if self._is_timing:
            self._steps.begin_batch()
        elif self._memory is None:
            self._memory = memory_of(trainer.strategy.root_device, _held_bytes(trainer, pl_module))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._plan is None:
            return
        ends_step = trainer.global_step != self._step
        self._step = trainer.global_step
        if self._is_timing:
            self._steps.end_batch(ends_step)
            if not self._is_timing and not self._measures_after(trainer):
                self._compare(trainer, self._plan, max(step.peak for step in self._steps.done[1:]) or None)
            return
        if not ends_step:
            return
        assert self._memory is not None
        if self._measures:
            self._peaks.append(self._memory.peaks()[1])
        # in the first step gradients are still those of the one before, which was not followed
        self._measures = True
        if len(self._peaks) < self._period:
            self._memory.begin()
        else:
            self._compare(trainer, self._plan, max(self._peaks))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning lets go of gradients before, which the next step would hold; once, as one may follow each step
        if self._memory is not None and not self._validated:
            self._measures, self._validated = False, True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a run that ends before its memory is measured has times all the same
        if self._plan is not None and not self._is_timing:
            self._compare(trainer, self._plan, None)

    def _measures_after(self, trainer: Trainer) -> bool:
        """Whether memory is measured in steps of its own: on a CPU, where nothing else profiles the run."""
        on_cpu = trainer.strategy.root_device.type == "cpu"
        return on_cpu and trainer.world_size == 1 and not torch._C._autograd._profiler_enabled()

    def _compare(self, trainer: Trainer, plan: "Plan", peak: int | None) -> None:
        """Log and keep what was planned and what was real, once."""
        from lightning_bigmodels.planner.calibration import write_measurement

        self._stop()
        steps = self._steps.done[1:]
        seconds = _costliest(steps, self._period)
        planned, real = {"step_seconds": plan.time.seconds}, {"step_seconds": seconds}
        if peak is not None:
            planned["gib"], real["gib"] = plan.room.allocated / GIB, peak / GIB
        values = {f"planned_{name}": value for name, value in planned.items()}
        values |= {f"real_{name}": value for name, value in real.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        told = [f"{name.replace('_', ' ')} {planned[name]:.4g} planned, {real[name]:.4g} real" for name in real]
        wait = median(step.wait for step in steps)
        if wait > _LONG_WAIT * seconds:
            told.append(f"between batches {wait:.4g} s more, for data and callbacks, which are in no plan")
        rank_zero_info(f"the first {len(steps)} steps against the plan: {'; '.join(told)}")
        assert self._folder is not None
        assert self._machine is not None
        write_measurement(self._folder, planned, real, plan.hardware.name, self._machine, plan.model, plan.setting)

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
    """Return the bytes of weights, buffers, optimizer state and an average of the weights, which stay."""
    state = [
        value for optimizer in trainer.optimizers for values in optimizer.state.values() for value in values.values()
    ]
    tensors = [*module.parameters(), *module.buffers(), *(value for value in state if isinstance(value, torch.Tensor))]
    for callback in vars(trainer)["callbacks"]:
        if isinstance(callback, WeightAverage):
            tensors += callback.copies
        elif isinstance(callback, WeightAveraging) and callback._average_model is not None:
            tensors += [*callback._average_model.parameters(), *callback._average_model.buffers()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _gpu(device: torch.device, name: str | None, table: str | None) -> "Hardware":
    """Return what the planner knows of this process's GPU, with the memory that it really has.

    Raises:
        InputError: the table has none that its own name holds, and no name of another is given.
    """
    from lightning_bigmodels.planner.hardware import find_hardware

    # a part of a GPU has less memory than its kind, as some models for laptops have
    properties = torch.cuda.get_device_properties(device)
    found = find_hardware(name or _gpu_name(properties.name, table), table)
    if found.name == "cpu":
        raise InputError(
            f"PlanCheck's hardware is {name}, and the run is on {properties.name}; name a GPU of the table"
        )
    return replace(found, memory=properties.total_memory)


def _gpu_name(name: str, table: str | None) -> str:
    """Return the planner's name of a GPU that calls itself `name`."""
    from lightning_bigmodels.planner.hardware import known_hardware

    words = set(name.lower().replace(" ", "-").split("-"))  # nvidia-a100-sxm4-40gb is an a100-40gb, and an l40 is no l4
    found = [known for known in known_hardware(table) if words.issuperset(known.split("-"))]
    best = max(found, key=len, default=None)
    if best is not None and all(_SAYS_NOTHING.fullmatch(word) for word in words.difference(best.split("-"))):
        return best
    near = "" if best is None else f", such as {best}"
    raise InputError(
        f"the table of devices has no {name}; give a row of it as PlanCheck's hardware_table, or name the nearest as "
        f"its hardware{near}"
    )


class _Step(NamedTuple):
    seconds: float
    """In its batches."""
    wait: float
    """Before its batches, in seconds."""
    peak: int
    """The most bytes allocated in its batches; 0 on a CPU."""
    batches: int


def _costliest(steps: list[_Step], period: int) -> float:
    """Return what is planned of steps that are not alike: the time of the costliest kind, in the median."""
    # what an epoch ends with may have fewer batches
    most = max(step.batches for step in steps)
    times = [step.seconds for step in steps if step.batches == most]
    return max(median(times[first::period]) for first in range(min(period, len(times))))


class _Steps:
    """What steps take: the time in their batches, that between these, and what was allocated on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.done: list[_Step] = []
        self._gpu = device if device.type == "cuda" else None
        self._begun: float = 0.0
        self._ended: float | None = None
        self._now = _Step(0.0, 0.0, 0, 0)

    def begin_batch(self) -> None:
        """Note that a batch begins."""
        if self._gpu is not None:
            # callbacks may have left it work to do
            torch.cuda.synchronize(self._gpu)
            torch.cuda.reset_peak_memory_stats(self._gpu)
        self._begun = time.perf_counter()
        if self._ended is not None:
            self._now = self._now._replace(wait=self._now.wait + self._begun - self._ended)

    def end_batch(self, ends_step: bool) -> None:
        """Note that a batch ends, with its optimizer step or before it."""
        peak = 0
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
            peak = torch.cuda.max_memory_allocated(self._gpu)
        self._ended = time.perf_counter()
        now = self._now
        self._now = _Step(now.seconds + self._ended - self._begun, now.wait, max(now.peak, peak), now.batches + 1)
        if ends_step:
            self.done.append(self._now)
            self._now = _Step(0.0, 0.0, 0, 0)
