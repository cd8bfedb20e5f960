"""Predictions written to a file while they are made."""

import json
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from lightning_bigmodels.callbacks.report import run_folder

FILE_NAME = "predictions.jsonl"


class PredictionWriter(BasePredictionWriter):
    """Append each batch's predictions to `predictions.jsonl` in the run's folder, one JSON object a line, in order.

    `predict_step` returns a list of dictionaries of plain values, one for each example. Several processes write a part
    each, which the first one merges by the rows' `index` at the end; they share the run's folder.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

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
        if not isinstance(prediction, list) or not all(isinstance(row, dict) for row in prediction):
            raise TypeError(
                f"{type(pl_module).__name__}.predict_step returned {type(prediction).__name__}; "
                f"PredictionWriter writes a list of dictionaries"
            )
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (FILE_NAME if trainer.world_size == 1 else _part(trainer.global_rank))
        mode = "w" if batch_idx == 0 and dataloader_idx == 0 else "a"
        with path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in prediction)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        folder = run_folder(trainer)
        trainer.strategy.barrier("predictions written")
        if not trainer.is_global_zero:
            return
        parts = [part for rank in range(trainer.world_size) if (part := folder / _part(rank)).exists()]
        lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines(keepends=True)]
        lines.sort(key=lambda line: json.loads(line)["index"])
        (folder / FILE_NAME).write_text("".join(lines), encoding="utf-8")
        for part in parts:
            part.unlink()


def _part(rank: int) -> str:
    return f"predictions.part{rank}.jsonl"
