"""Precision that is what its flag says, on CPUs too."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_bigmodels.errors import InputError

_MIXED: dict[str, Literal["16-mixed", "bf16-mixed"]] = {
    "16-mixed": "16-mixed",
    "16": "16-mixed",
    "bf16-mixed": "bf16-mixed",
    "bf16": "bf16-mixed",
}


class WorldGradScaler(torch.amp.GradScaler):
    """A GradScaler that skips a step on all processes when the gradient of one of them overflowed.

    torch's own asks the processes that share the optimizer's first parameter, which with tensor parallelism need not be
    all (torch 2.14).
    """

    @classmethod
    def like(cls, scaler: torch.amp.GradScaler, device: str) -> "WorldGradScaler":
        """Return one with the settings of another."""
        return cls(
            device,
            init_scale=scaler.get_scale(),
            growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(),
            growth_interval=scaler.get_growth_interval(),
        )

    @override
    def unscale_(self, optimizer: Optimizer) -> None:
        super().unscale_(optimizer)
        for found in self._found_inf_per_device(optimizer).values():
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)


def with_true_precision(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a Trainer's arguments with a plugin in place of a mixed precision that Lightning would not do.

    On a CPU Lightning 2.6 turns 16-mixed into bf16-mixed, and trains in float32 where the accelerator is an instance;
    an instance of its ModelParallelStrategy refuses 16-mixed.
    """
    flag = _MIXED.get(str(arguments.get("precision")))
    accelerator = arguments.get("accelerator", "auto")
    on_cpu = isinstance(accelerator, CPUAccelerator) or accelerator == "cpu"
    if accelerator == "auto":
        on_cpu = not torch.accelerator.is_available()
    if flag is None or not (on_cpu or isinstance(arguments.get("strategy"), ModelParallelStrategy)):
        return arguments
    plugins = arguments.get("plugins") or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    return {**arguments, "precision": None, "plugins": [*plugins, MixedPrecision(flag, "cpu" if on_cpu else "cuda")]}


def check_precision(trainer: pl.Trainer) -> None:
    """Refuse a Trainer whose mixed precision would have no effect.

    Raises:
        InputError: Autocast is made for another device than the one that trains.
    """
    plugin, device = trainer.precision_plugin, trainer.strategy.root_device.type
    if isinstance(plugin, MixedPrecision) and plugin.device != device:
        raise InputError(
            f"precision {plugin.precision} would be float32 here: Lightning made it for {plugin.device}, and the run "
            f"is on {device}; give the accelerator as a word, accelerator={device!r}, or in place of precision "
            f"plugins=[MixedPrecision({plugin.precision!r}, {device!r})]"
        )
