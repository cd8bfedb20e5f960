"""Which classes are taken for which."""

import csv
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.callbacks.evaluated import EvaluatedClasses
from lightning_bigmodels.callbacks.report import report_picture, run_folder
from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.errors import require
from lightning_bigmodels.tasks import Classification

_NAME = "confusion_matrix"
# beyond, names and numbers would cover one another
_MOST_NUMBERS, _MOST_NAMES = 20, 60


class ConfusionMatrix(EvaluatedClasses):
    """Count after each validation and test how often each class (row) was taken for each (column).

    The counts go to `confusion_matrix/` in the run's folder, as CSV and, in shares of each row, as a picture, which the
    loggers get too.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(0)

    @override
    def start(self, module: Classification) -> None:
        size = module.num_classes
        self._counts = torch.zeros(size, size, dtype=torch.int64, device=module.device)

    @override
    def add(self, probabilities: Tensor, batch: Any) -> None:
        labels, found = batch["labels"], probabilities.argmax(1)
        counted = labels != IGNORED
        size = len(self._counts)
        pairs = labels[counted] * size + found[counted]
        self._counts += torch.bincount(pairs, minlength=size * size).view(size, size)

    @override
    def report(self, trainer: Trainer, module: Classification) -> None:
        reduced = trainer.strategy.reduce(self._counts, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        counts = reduced.cpu()
        names = [module.class_name(i) for i in range(module.num_classes)]
        folder = run_folder(trainer) / _NAME
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step_{trainer.global_step:08d}.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["true \\ found", *names])
                writer.writerows([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
        report_picture(trainer, _NAME, draw_matrix(counts, names))


def draw_matrix(counts: Tensor, names: list[str]) -> Tensor:
    """Return (3, H, W) uint8: each row's shares of counts (K, K) in shades of blue, with the counts where they fit."""
    figure_module = require("matplotlib.figure", extra="vision")
    canvas_module = require("matplotlib.backends.backend_agg", extra="vision")
    size = len(names)
    side = min(14.0, 2.5 + 0.45 * size)
    figure = figure_module.Figure(figsize=(side, side), layout="constrained")
    # its own canvas: no window system is asked
    canvas = canvas_module.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("taken for")
    axes.set_ylabel("true class")
    if size <= _MOST_NAMES:
        axes.set_xticks(range(size), names, rotation=90)
        axes.set_yticks(range(size), names)
    if size <= _MOST_NUMBERS:
        for row in range(size):
            for column in range(size):
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    text = str(int(counts[row, column]))
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(height, width, 4)[..., :3].permute(2, 0, 1).contiguous()
