"""What a real run took beside its plan, and the factors that other plans learn from it."""

import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner.setting import Setting

FILE_NAME = "plan_check.json"
_HOW = (
    "fit measures it in more than ten steps, on GPUs by itself, on a CPU with --trainer.callbacks+=PlanCheck "
    "--trainer.callbacks.when=always"
)
_CPU_INFO = Path("/proc/cpuinfo")
"""Only Linux has it."""
_COMPARED = {"strategy": "strategy", "precision": "precision", "devices": "number of devices", "num_nodes": "nodes"}
"""What of a setting should be alike, and what it is called. Batches differ wherever a plan is of use."""


@dataclass(frozen=True)
class Machine:
    """What steps were measured on.

    Attributes:
        device: The GPU's own name, or the processor's.
        threads: Of torch on a CPU; None on a GPU.
        torch: Version of torch.
    """

    device: str
    threads: int | None
    torch: str

    def __str__(self) -> str:
        """Device and threads, by which times differ."""
        if self.threads is None:
            return self.device
        return f"{self.device} with {self.threads} {'thread' if self.threads == 1 else 'threads'}"


def machine_of(device: torch.device) -> Machine:
    """Return what this process computes on."""
    if device.type == "cuda":
        return Machine(torch.cuda.get_device_name(device), None, torch.__version__)
    return Machine(_processor(), torch.get_num_threads(), torch.__version__)


def _version(name: str) -> str:
    return name.partition("+")[0]  # for which devices it was built is no difference


def _processor() -> str:
    text = _CPU_INFO.read_text(encoding="utf-8") if _CPU_INFO.exists() else ""
    found = re.search(r"^model name\s*: *(.+)$", text, re.M)  # a line that ARM's processors lack
    return found[1] if found else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Calibration:
    """The factors by which a real run's steps differed from their plan.

    Attributes:
        run: Where they were measured, as the user named it.
        seconds: Real time of a step to the planned one.
        memory: Bytes really allocated at the peak to the planned ones; None where they were not measured.
        hardware: Name of the devices in the planner's table.
        machine: What it really was.
        model: Class of the model.
        setting: How the run's steps were run.
    """

    run: str
    seconds: float
    memory: float | None
    hardware: str
    machine: Machine
    model: str
    setting: Setting

    def differences(self, setting: Setting, model: str) -> list[str]:
        """Return what the run had otherwise than a plan, in words."""
        found = [word for name, word in _COMPARED.items() if getattr(setting, name) != getattr(self.setting, name)]
        model_differs = ["model"] if model != self.model else []
        torch_differs = ["version of torch"] if _version(self.machine.torch) != _version(torch.__version__) else []
        return [*model_differs, *found, *torch_differs]

    def to_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return asdict(self)


def write_measurement(
    folder: Path,
    planned: Mapping[str, float],
    real: Mapping[str, float],
    hardware: str,
    machine: Machine,
    model: str,
    setting: Setting,
) -> None:
    """Write what was planned and what was real into a run's folder.

    Args:
        folder: The run's; it is made.
        planned: `step_seconds`, and `gib` allocated where that was measured; as planned without any calibration.
        real: The same, measured.
        hardware: Name of the devices in the planner's table.
        machine: What it really was; on a CPU as it was when the step was planned.
        model: Class of the model.
        setting: How the steps were run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    of = {"hardware": hardware, "machine": asdict(machine), "model": model, "setting": asdict(setting)}
    text = json.dumps({"planned": dict(planned), "real": dict(real), "of": of}, indent=2)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def read_calibration(run: str, hardware: str) -> Calibration:
    """Return the factors of a run.

    Args:
        run: Its folder, or the plan_check.json in it.
        hardware: Name of the devices that are planned for.

    Raises:
        InputError: nothing was measured there, or on other devices, or on a CPU other than this one.
    """
    path = Path(run)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists() and path.parent.exists() and path.name == FILE_NAME:
        raise InputError(f"--calibrate {run}: nothing was measured there, {path} is missing; {_HOW}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--calibrate {run}: {error.strerror}; name a run's folder, such as runs/quickstart/fit/version_0"
        ) from error
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    try:
        found = _calibration(run, values)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if found.hardware != hardware:
        raise InputError(
            f"--calibrate {run} was measured on {found.hardware}, which says nothing of {hardware}; plan with --gpu "
            f"{found.hardware}, or name a run of fit on {hardware}"
        )
    here = machine_of(torch.device("cpu"))
    if hardware == "cpu" and str(found.machine) != str(here):
        alike = found.machine.device == here.device
        raise InputError(
            f"--calibrate {run} was measured on {found.machine}, which says nothing of this machine, {here}; "
            f"{f'plan with OMP_NUM_THREADS={found.machine.threads}, or ' if alike else ''}name a run of fit on this one"
        )
    return found


def _calibration(run: str, values: Any) -> Calibration:
    planned, real, of = values["planned"], values["real"], values["of"]
    known = {field.name for field in fields(Setting)}
    # a setting that a later version writes may say more
    setting = Setting(**{name: value for name, value in of["setting"].items() if name in known})
    return Calibration(
        run=run,
        seconds=_factor(planned, real, "step_seconds"),
        memory=_factor(planned, real, "gib") if "gib" in real else None,
        hardware=str(of["hardware"]),
        machine=_machine(of["machine"]),
        model=str(of["model"]),
        setting=setting,
    )


def _machine(values: Mapping[str, Any]) -> Machine:
    threads = values["threads"]
    return Machine(str(values["device"]), None if threads is None else int(threads), str(values["torch"]))


def _factor(planned: Mapping[str, Any], real: Mapping[str, Any], name: str) -> float:
    factor = float(real[name]) / float(planned[name])
    if not 0 < factor < math.inf:
        raise ValueError(f"{name} is {real[name]}, and {planned[name]} planned")
    return factor


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not what fit writes there ({reason}); {_HOW}")
