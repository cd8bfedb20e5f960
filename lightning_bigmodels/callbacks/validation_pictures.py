"""What the model sees in pictures, as it learns."""

from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.callbacks.report import report_picture
from lightning_bigmodels.errors import InputError, require


class _Draws(Protocol):
    def draw(self, batch: Any) -> list[Tensor]: ...


class ValidationPictures(Callback):
    """Draw what the model makes of the first validation pictures, beside what is right, after each validation.

    The pictures go to the loggers and to `validation_pictures/` in the run's folder.

    Args:
        num_pictures: How many, at most one batch.
        every_n_validations: How often.
    """

    def __init__(self, num_pictures: int = 8, every_n_validations: int = 1) -> None:
        for name, value in {"num_pictures": num_pictures, "every_n_validations": every_n_validations}.items():
            if value < 1:
                raise InputError(f"{name} is {value}; it must be 1 or more")
        self.num_pictures = num_pictures
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._pictures: list[Tensor] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "draw"):
            raise InputError(f"{type(pl_module).__name__} draws nothing for ValidationPictures; remove it")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pictures = []

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        due = self._validations % self.every_n_validations == 0
        if trainer.sanity_checking or batch_idx or not due:
            return
        # every process takes part, since a sharded network answers only to all of them
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            self._pictures = cast(_Draws, pl_module).draw(batch)[: self.num_pictures]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._pictures:
            report_picture(trainer, "validation_pictures", grid([picture.cpu() for picture in self._pictures]))
        self._pictures = []


def grid(pictures: list[Tensor], columns: int = 4) -> Tensor:
    """Return one picture (3, H, W) uint8 of several, which may differ in size.

    Args:
        pictures: Each (3, h, w) uint8.
        columns: Pictures in a row.
    """
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    cells = torch.full((len(pictures), 3, height, width), 255, dtype=torch.uint8)
    for cell, picture in zip(cells, pictures, strict=True):
        cell[:, : picture.shape[1], : picture.shape[2]] = picture
    make_grid = require("torchvision.utils", extra="vision").make_grid
    return make_grid(cells, nrow=min(columns, len(pictures)), padding=2, pad_value=255)
