"""How well each class is told, after each evaluation."""

import csv
from typing import Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_bigmodels.callbacks.report import report_table, run_folder
from lightning_bigmodels.errors import InputError


class _HasTable(Protocol):
    def class_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]: ...


class ClassTable(Callback):
    """Write a table with a row for each class to the loggers and to `<phase>_classes/` in the run's folder, as CSV.

    A model has it as `class_table()`: heads and rows of text, of its last evaluation.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "class_table"):
            raise InputError(f"{type(pl_module).__name__} has no table of classes for ClassTable; remove it")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer, pl_module, "val")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        name = f"{phase}_classes"
        folder = run_folder(trainer) / name  # on every process: it may be a broadcast
        if not trainer.is_global_zero:
            return
        columns, rows = cast(_HasTable, pl_module).class_table()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"step_{trainer.global_step:08d}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        report_table(trainer, name, columns, rows)
