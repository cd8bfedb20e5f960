"""Tokens or pictures per second and model FLOPs utilisation, in the loggers and in the progress bar."""

import time
from functools import cache
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

_MATRIX = 1024


class Throughput(ThroughputMonitor):
    """Lightning's ThroughputMonitor for batches of tokens or of pictures, needing no functions from the user.

    It measures training alone, without the time that validation, samples and checkpoints take. On a CPU, whose peak no
    table knows, utilisation is relative to a matrix product, measured once before the first fit of a process.

    Args:
        window_size: Batches over which rates are averaged.
    """

    def __init__(self, window_size: int = 10) -> None:
        super().__init__(
            batch_size_fn=lambda batch: len(_examples(batch)),
            length_fn=lambda batch: batch["input_ids"].numel() if "input_ids" in batch else len(_examples(batch)),
            window_size=window_size,
        )
        self._paused_at: float | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        trains = trainer.state.fn == TrainerFn.FITTING
        if trains and self.available_flops is None and trainer.strategy.root_device.type == "cpu":
            self.available_flops = measure_matmul_flops(_plugin_to_compute_dtype(trainer.precision_plugin))
            for throughput in self._throughputs.values():
                throughput.available_flops = self.available_flops

    @override
    def on_validation_start(self, trainer: Trainer, *args: Any) -> None:
        if self._paused_at is None:
            self._paused_at = time.perf_counter()

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        """Evaluation has no backward pass, so that `flops_per_batch` does not hold for it."""

    on_validation_batch_end = on_validation_end = _ignore
    on_test_start = on_test_batch_end = on_predict_start = on_predict_batch_end = _ignore

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        if self._paused_at is not None:
            if RunningStage.TRAINING in self._t0s:
                self._t0s[RunningStage.TRAINING] += time.perf_counter() - self._paused_at
            self._paused_at = None

    @override
    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, *args)
        if not trainer._logger_connector.should_update_logs:
            return
        rate = self._throughputs[RunningStage.TRAINING].compute().get("device/items_per_sec")
        if rate is not None:
            name, digits = ("tokens_per_s", -2) if "input_ids" in batch else ("images_per_s", 0)
            total = round(rate * trainer.world_size, digits)
            pl_module.log(name, total, prog_bar=True, logger=False, rank_zero_only=True)


def _examples(batch: Any) -> Any:
    return next(batch[key] for key in ("input_ids", "images", "indices") if key in batch)


@cache
def measure_matmul_flops(dtype: torch.dtype) -> int:
    """Return the floating-point operations per second of a square matrix product on this CPU, the best of three."""
    a = torch.ones(_MATRIX, _MATRIX, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return round(2 * _MATRIX**3 / best)
