"""Predictions written to a file while they are made."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from lightning_bigmodels.callbacks.prediction_table import PredictionTable
from lightning_bigmodels.callbacks.report import run_folder, write_picture
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.tasks import Task

FILE_NAME = "predictions.jsonl"


class PredictionWriter(BasePredictionWriter):
    """Append each batch's predictions to `predictions.jsonl` in the run's folder, one JSON object a line, in order.

    `predict_step` returns a list of dictionaries of plain values, one for each example. Several processes write a part
    each, which the first one merges by the rows' `index` at the end; the run's folder is one that they all see.

    A `Task` may add pictures (`draw_predictions`), which become PNG files in `predictions/`, columns of numbers
    (`tabulate_predictions`), which become `predictions.parquet`, and files that are made of all rows
    (`collect_predictions`).
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._path = Path()
        self._num_rows = 0
        self._writes = True
        self._table = PredictionTable(Path(), 0)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / (FILE_NAME if trainer.world_size == 1 else _part(trainer.global_rank))
        self._num_rows = 0
        self._table = PredictionTable(folder, trainer.global_rank)
        mesh = pl_module.device_mesh
        # the processes that split the layers of one copy of the network predict the same
        self._writes = mesh is None or mesh["tensor_parallel"].get_local_rank() == 0
        if trainer.local_rank == 0:
            # what a killed run has left must not get among this one's
            for leftover in [folder / FILE_NAME, *folder.glob(_part("*")), *PredictionTable.files(folder)]:
                leftover.unlink(missing_ok=True)
        trainer.strategy.barrier("old predictions removed")

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        name = f"{type(pl_module).__name__}.predict_step"
        if not isinstance(prediction, list) or not all(isinstance(row, dict) for row in prediction):
            raise TypeError(
                f"{name} returned {type(prediction).__name__}; PredictionWriter writes a list of dictionaries"
            )
        if trainer.world_size > 1 and not all("index" in row for row in prediction):
            raise TypeError(
                f"{name} returned a row without `index`, its place among all; several processes need it for the order"
            )
        if not self._writes:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in prediction)
        self._num_rows += len(prediction)
        if isinstance(pl_module, Task):
            self._table.add(prediction, pl_module.tabulate_predictions(batch, prediction))
            for picture_name, picture in pl_module.draw_predictions(batch, prediction):
                write_picture(self._path.parent / "predictions" / f"{picture_name}.png", picture)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._table.close()
        if trainer.world_size > 1:
            self._merge_parts(trainer)
        if trainer.is_global_zero:
            self._table.merge()
        path = self._path.parent / FILE_NAME
        if not isinstance(pl_module, Task) or not trainer.is_global_zero or not path.is_file():
            return
        with path.open(encoding="utf-8") as file:
            contents = pl_module.collect_predictions(json.loads(line) for line in file)
        for content_name, content in contents.items():
            (path.parent / content_name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    def _merge_parts(self, trainer: Trainer) -> None:
        mine = torch.tensor(self._num_rows, device=trainer.strategy.root_device)
        num_rows = int(trainer.strategy.reduce(mine, reduce_op="sum"))
        folder = self._path.parent
        num_merged = _merge(folder, num_rows) if trainer.is_global_zero else 0
        num_merged = trainer.strategy.broadcast(num_merged)
        if num_merged < num_rows:
            raise InputError(
                f"{num_rows - num_merged} of {num_rows} predictions are not in {folder} of the first process: other "
                f"nodes wrote to a folder of the same name on their own disks, where they remain; set "
                f"trainer.default_root_dir to a folder that all nodes see"
            )


def _merge(folder: Path, num_rows: int) -> int:
    """Make one file of the parts, unless some of the rows are missing; return how many there are."""
    parts = list(folder.glob(_part("*")))
    lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines(keepends=True)]
    if len(lines) == num_rows:
        lines.sort(key=lambda line: json.loads(line)["index"])
        temporary = folder / f"{FILE_NAME}.tmp"
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(folder / FILE_NAME)
        for part in parts:
            part.unlink()
    return len(lines)


def _part(rank: int | str) -> str:
    return f"predictions.part{rank}.jsonl"
