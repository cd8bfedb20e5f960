"""From the Trainer's lines to a Setting, and from a Setting back to flags to paste."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner.eight_bit import flags_8bit
from lightning_bigmodels.planner.refusals import FLAGS
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.strategies import CompressedDDPStrategy, FSDP2Strategy
from lightning_bigmodels.strategies.fsdp2 import mesh_sizes

_AVERAGES = ("WeightAverage", "WeightAveraging")
"""Callbacks that keep an average of the weights: this package's, and Lightning's with those made of it."""
_PACKAGES = ("lightning", "pytorch_lightning")
"""What the modules of strategies begin with that are not the user's own."""
_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "CPUAccelerator", "CUDAAccelerator")
_PRECISION_PLUGINS = {
    "Precision": "32-true",
    "DoublePrecision": "64-true",
    "HalfPrecision": "16-true",
    "MixedPrecision": "16-mixed",
}
"""What these plugins of the Trainer are where they do not say it."""


def setting_of(trainer: pl.Trainer, datamodule: Any) -> Setting:
    """Return how a Trainer will run a step.

    Args:
        trainer: Any; its strategy may be a name or an instance.
        datamodule: Its `batch_size` is that of a process; 1 if it has none.
    """
    given = trainer._accelerator_connector._strategy_flag
    counts = trainer.num_devices, trainer.num_nodes
    plugin = trainer.precision_plugin
    return Setting(
        strategy=_name_of_lines(given, *counts)
        if isinstance(given, str)
        else _name_of_instance(given or trainer.strategy, *counts),
        precision=type(plugin).__name__ if isinstance(plugin, BitsandbytesPrecision) else str(trainer.precision),
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
        InputError: lines contradict each other, or are of something that the planner does not know.
    """
    accelerator = _class_name(lines.get("accelerator") or "auto")
    if accelerator not in _ACCELERATORS:
        raise InputError(
            f"trainer.accelerator is {accelerator}; the planner knows CPUs and the GPUs of CUDA and ROCm: set it to "
            f"cpu, gpu or auto"
        )
    devices, num_nodes = _count_devices(lines.get("devices", "auto")), _number(lines.get("num_nodes"))
    return Setting(
        strategy=_name_of_lines(lines.get("strategy") or "auto", devices, num_nodes),
        precision=_precision(lines),
        devices=devices,
        num_nodes=num_nodes,
        batch_size=_batch_size(datamodule),
        accumulate_grad_batches=_number(lines.get("accumulate_grad_batches")),
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
    flags = []
    for field, flag in FLAGS.items():
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
    if setting.strategy == "tp":
        return setting.devices
    _, splits, size = setting.strategy.partition("_tp")
    return int(size) if splits else 1


def _count_devices(devices: Any) -> int:
    """Return how many devices are meant; what only the machine with the devices can count is one."""
    if devices is None or str(devices) in ("auto", "-1"):
        return 1
    if isinstance(devices, (list, tuple)) or "," in str(devices):
        given = devices.split(",") if isinstance(devices, str) else devices
        names = [name for one in given if (name := str(one).strip())]
        count = len(names)
        if len(set(names)) < count:
            raise InputError(f"trainer.devices is {devices!r}, which names one twice; name each once")
    else:
        try:
            count = int(devices)
        except ValueError as error:
            raise InputError(f"trainer.devices is {devices!r}; give how many there are, such as 8") from error
    if count < 1:
        raise InputError(f"trainer.devices is {devices!r}; give how many there are, 1 or more")
    return count


def _name_of_lines(given: Any, devices: int, num_nodes: int) -> str:
    if not isinstance(given, Mapping):
        # Lightning takes names in capitals too
        name = str(given).lower()
        if name == "single_device":
            return _name_of_one(name, devices, num_nodes)
        return name if name in StrategyRegistry else str(given)
    path, arguments = str(given.get("class_path")), given.get("init_args") or {}
    package, _, kind = path.rpartition(".")
    if package and not package.startswith(_PACKAGES):
        return path
    is_bucket_view = bool(arguments.get("gradient_as_bucket_view"))
    match kind:
        case "SingleDeviceStrategy":
            return _name_of_one(kind, devices, num_nodes)
        case "FSDP2Strategy":
            sizes = arguments.get("data_parallel_size", "auto"), arguments.get("tensor_parallel_size", 1)
            return _name_of_split(*sizes, devices, num_nodes, bool(arguments.get("offload")))
        case "CompressedDDPStrategy":
            rank = arguments.get("powersgd_rank", 1)
            return _name_of_compression(arguments.get("compression", "fp16"), rank, is_bucket_view)
        case "DDPStrategy":
            return _name_of_ddp(arguments.get("ddp_comm_hook"), is_bucket_view)
        case "FSDPStrategy":
            return "fsdp_cpu_offload" if arguments.get("cpu_offload") else "fsdp"
        case "DeepSpeedStrategy":
            offloads = arguments.get("offload_optimizer") or arguments.get("offload_parameters")
            return _name_of_deepspeed(arguments.get("stage", 2), bool(offloads), arguments.get("config") is not None)
        case "XLAStrategy" | "SingleDeviceXLAStrategy":
            return "xla"
    return kind


def _name_of_one(name: str, devices: int, num_nodes: int) -> str:
    if devices * num_nodes > 1:
        raise InputError(
            f"the strategy {name} runs on one device, and there are {devices * num_nodes} (trainer.devices {devices} "
            f"times trainer.num_nodes {num_nodes}); set both to 1, or trainer.strategy to ddp"
        )
    return "auto"


def _name_of_instance(strategy: Strategy, devices: int, num_nodes: int) -> str:
    # by its very class: those that shard, and those of the user, may be made of one that does not
    if type(strategy) is FSDP2Strategy:
        sizes = strategy._data_parallel_size, strategy._tensor_parallel_size
        return _name_of_split(*sizes, devices, num_nodes, strategy.offload)
    if isinstance(strategy, DDPStrategy):
        is_bucket_view = bool(strategy._ddp_kwargs.get("gradient_as_bucket_view"))
        if type(strategy) is CompressedDDPStrategy:
            return _name_of_compression(strategy.compression, strategy.powersgd_rank, is_bucket_view)
        if type(strategy) is DDPStrategy:
            return _name_of_ddp(strategy._ddp_comm_hook, is_bucket_view)
    if type(strategy) is FSDPStrategy:
        return "fsdp_cpu_offload" if strategy.cpu_offload and strategy.cpu_offload.offload_params else "fsdp"
    if type(strategy) is DeepSpeedStrategy:
        zero = (strategy.config or {}).get("zero_optimization", {})
        return _name_of_deepspeed(zero.get("stage", 0), bool({"offload_optimizer", "offload_param"} & set(zero)), False)
    return "auto" if type(strategy) is SingleDeviceStrategy else type(strategy).__name__


def _name_of_split(data: Any, tensor: Any, devices: int, num_nodes: int, offload: bool) -> str:
    _, size = mesh_sizes(data, tensor, devices, num_nodes)
    if size == 1:
        return "fsdp2_offload" if offload else "fsdp2"
    if size == devices and not offload:
        return "tp"
    name = f"fsdp2_offload_tp{size}" if offload else f"fsdp2_tp{size}"
    return _registered(name, FSDP2Strategy, tensor_parallel_size=size, offload=offload)


def _name_of_ddp(hook: Any, is_bucket_view: bool) -> str:
    if hook is not None:
        raise InputError(
            "the ddp_comm_hook of DDPStrategy cannot be planned; plan with ddp_fp16_gradients, ddp_bf16_gradients or "
            "ddp_powersgd, or without it"
        )
    return _registered("ddp_bucket_view", DDPStrategy, gradient_as_bucket_view=True) if is_bucket_view else "ddp"


def _name_of_compression(compression: str, rank: int, is_bucket_view: bool) -> str:
    name = "ddp_powersgd" if compression == "powersgd" else f"ddp_{compression}_gradients"
    arguments: dict[str, Any] = {"compression": compression}
    if compression == "powersgd" and rank != 1:
        name, arguments = f"{name}_rank{rank}", {**arguments, "powersgd_rank": rank}
    if is_bucket_view:
        name, arguments = f"{name}_bucket_view", {**arguments, "gradient_as_bucket_view": True}
    return _registered(name, CompressedDDPStrategy, **arguments)


def _name_of_deepspeed(stage: int, offloads: bool, has_config: bool) -> str:
    return "deepspeed_config" if has_config else f"deepspeed_stage_{stage}{'_offload' if offloads else ''}"


def _registered(name: str, kind: type[Strategy], **arguments: Any) -> str:
    """Return the name under which the Trainer that plans finds a strategy."""
    if name not in StrategyRegistry:
        StrategyRegistry.register(name, kind, **arguments)
    return name


def _precision(lines: Mapping[str, Any]) -> str:
    """Return Lightning's name of a precision for any of its short ones, or for a plugin."""
    plugins = lines.get("plugins") or []
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        name = _class_name(plugin)
        if name.endswith("Precision"):
            arguments = (plugin.get("init_args") or {}) if isinstance(plugin, Mapping) else {}
            return str(arguments.get("precision", _PRECISION_PLUGINS.get(name, name)))
    short = {"None": "32-true", "64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    return short.get(str(lines.get("precision")), str(lines.get("precision")))


def _class_name(given: Any) -> str:
    """Return the last part of a class path, or the name that stands in its place."""
    return str(given.get("class_path") if isinstance(given, Mapping) else given).rpartition(".")[2]


def _number(value: Any) -> int:
    return 1 if value is None else int(value)


def _averages(callbacks: Any) -> bool:
    given = callbacks if isinstance(callbacks, list) else [callbacks]
    paths = [str(callback.get("class_path")) for callback in given if isinstance(callback, Mapping)]
    return any(path.endswith(_AVERAGES) for path in paths)


def _batch_size(datamodule: Any) -> int:
    return int(getattr(datamodule, "batch_size", 1))


def _as_float(value: Any) -> float | None:
    return None if value is None else float(value)
