"""From the Trainer's lines to a Setting, and from a Setting back to flags to paste."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner.eight_bit import flags_8bit
from lightning_bigmodels.planner.simulation import Setting
from lightning_bigmodels.strategies import CompressedDDPStrategy, FSDP2Strategy

_AVERAGES = ("WeightAverage", "WeightAveraging")
"""Callbacks that keep an average of the weights: this package's, and Lightning's with those made of it."""


def setting_of(trainer: pl.Trainer, datamodule: Any) -> Setting:
    """Return how a Trainer will run a step.

    Args:
        trainer: Any; its strategy may be a name or an instance.
        datamodule: Its `batch_size` is that of a process; 1 if it has none.
    """
    given = trainer._accelerator_connector._strategy_flag
    name = given if isinstance(given, str) else _name_of_instance(given or trainer.strategy, trainer.num_devices)
    return Setting(
        strategy=name,
        precision=str(trainer.precision),
        devices=trainer.num_devices,
        num_nodes=trainer.num_nodes,
        batch_size=_batch_size(datamodule),
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=_as_float(trainer.gradient_clip_val),
        sync_batchnorm=getattr(trainer.strategy, "_layer_sync", None) is not None,
        averages_weights=any(
            kind.__name__ in _AVERAGES for callback in vars(trainer)["callbacks"] for kind in type(callback).__mro__
        ),
    )


def setting_from_lines(lines: Mapping[str, Any], datamodule: Any) -> Setting:
    """Return how the `trainer:` part of a configuration would run a step, on devices that need not be here.

    Args:
        lines: The Trainer's arguments as a configuration has them: a strategy is a name, or class_path and init_args.
        datamodule: As for `setting_of`.

    Raises:
        InputError: the number of devices is none.
    """
    strategy = lines.get("strategy") or "auto"
    strategy = "auto" if strategy == "single_device" else strategy
    devices = _count_devices(lines.get("devices", "auto"))
    return Setting(
        strategy=strategy if isinstance(strategy, str) else _name_of_lines(strategy, devices),
        precision=_precision(lines.get("precision")),
        devices=devices,
        num_nodes=int(lines.get("num_nodes") or 1),
        batch_size=_batch_size(datamodule),
        accumulate_grad_batches=int(lines.get("accumulate_grad_batches") or 1),
        gradient_clip_val=_as_float(lines.get("gradient_clip_val")),
        sync_batchnorm=bool(lines.get("sync_batchnorm")),
        averages_weights=_averages(lines.get("callbacks")),
    )


def changed_flags(old: Setting, new: Setting, model: Any = None) -> list[str]:
    """Return what to add to the command line to have `new` in place of `old`.

    Args:
        old: The setting that the command line is of.
        new: Another one.
        model: The model, whose AdamW an optimizer of 8 bits takes over from.
    """
    names = {
        "batch_size": "data.batch_size",
        "accumulate_grad_batches": "trainer.accumulate_grad_batches",
        "activation_checkpointing": "model.activation_checkpointing",
        "strategy": "trainer.strategy",
        "precision": "trainer.precision",
        "devices": "trainer.devices",
        "num_nodes": "trainer.num_nodes",
    }
    flags = []
    for field, flag in names.items():
        value = getattr(new, field)
        if value != getattr(old, field):
            flags.append(f"--{flag} {str(value).lower() if isinstance(value, bool) else value}")
    if new.optimizer_8bit and not old.optimizer_8bit:
        flags += flags_8bit(model)
    return flags


def replicas(setting: Setting) -> int:
    """Return how many processes see data of their own; those that split a layer see the same."""
    return setting.world_size // tensor_parallel_size(setting)


def tensor_parallel_size(setting: Setting) -> int:
    """Return over how many processes a layer is split, by the strategy's name."""
    name = setting.strategy
    if name == "tp":
        return setting.devices
    return int(name.removeprefix("fsdp2_tp")) if name.startswith("fsdp2_tp") else 1


def _count_devices(devices: Any) -> int:
    """Return how many devices are meant; what only the machine with the devices can count is one."""
    if isinstance(devices, (list, tuple)):
        count = len(devices)
    elif devices is None or str(devices) in ("auto", "-1"):
        return 1
    elif "," in str(devices):
        count = len([name for name in str(devices).split(",") if name.strip()])
    else:
        try:
            count = int(devices)
        except ValueError as error:
            raise InputError(f"trainer.devices is {devices!r}; give how many there are, such as 8") from error
    if count < 1:
        raise InputError(f"trainer.devices is {devices!r}; give how many there are, 1 or more")
    return count


def _name_of_lines(lines: Mapping[str, Any], devices: int) -> str:
    arguments = lines.get("init_args") or {}
    path = str(lines.get("class_path", ""))
    kind = path.rpartition(".")[2]
    if kind == "FSDP2Strategy":
        return _name_of_split(arguments.get("tensor_parallel_size", 1), devices, bool(arguments.get("offload", False)))
    if kind == "CompressedDDPStrategy":
        return _name_of_compression(arguments.get("compression", "fp16"))
    return {"DDPStrategy": "ddp", "FSDPStrategy": "fsdp", "SingleDeviceStrategy": "auto"}.get(kind, path)


def _name_of_instance(strategy: Strategy, devices: int) -> str:
    if isinstance(strategy, FSDP2Strategy):
        return _name_of_split(strategy._tensor_parallel_size, devices, strategy.offload)
    if isinstance(strategy, CompressedDDPStrategy):
        return _name_of_compression(strategy.compression)
    kinds = {DDPStrategy: "ddp", FSDPStrategy: "fsdp", SingleDeviceStrategy: "auto"}
    return next((name for kind, name in kinds.items() if isinstance(strategy, kind)), type(strategy).__name__)


def _name_of_split(size: Any, devices: int, offload: bool) -> str:
    if offload:
        if size != 1:
            raise InputError(
                f"offload with tensor_parallel_size {size} cannot be planned; plan with fsdp2_offload, or offload false"
            )
        return "fsdp2_offload"
    if size == 1:
        return "fsdp2"
    if size in ("auto", devices):
        return "tp"
    if not isinstance(size, int) or size < 1:
        raise InputError(f"tensor_parallel_size is {size!r}; set it to auto, or to 1 or more of the {devices} devices")
    name = f"fsdp2_tp{size}"
    if name not in StrategyRegistry:
        # for the Trainer that plans
        StrategyRegistry.register(name, FSDP2Strategy, tensor_parallel_size=size)
    return name


def _name_of_compression(compression: str) -> str:
    return "ddp_powersgd" if compression == "powersgd" else f"ddp_{compression}_gradients"


def _precision(name: Any) -> str:
    """Return Lightning's name of a precision for any of its short ones."""
    short = {"None": "32-true", "64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    return short.get(str(name), str(name))


def _averages(callbacks: Any) -> bool:
    given = callbacks if isinstance(callbacks, list) else [callbacks]
    paths = [str(callback.get("class_path")) for callback in given if isinstance(callback, Mapping)]
    return any(path.endswith(_AVERAGES) for path in paths)


def _batch_size(datamodule: Any) -> int:
    return int(getattr(datamodule, "batch_size", 1))


def _as_float(value: Any) -> float | None:
    return None if value is None else float(value)
