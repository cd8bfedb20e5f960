"""What the model sees in pictures, as it learns."""

from typing import Any, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.callbacks.report import report_picture
from lightning_bigmodels.callbacks.validation_view import ValidationView
from lightning_bigmodels.errors import InputError, require


class _Draws(Protocol):
    def draw(self, batch: Any) -> list[Tensor]: ...


class ValidationPictures(ValidationView):
    """Draw what the model makes of the first validation pictures, beside what is right, after each validation.

    The pictures go to the loggers and to `validation_pictures/` in the run's folder.

    Args:
        num_pictures: How many, at most one batch.
        every_n_validations: How often.
    """

    def __init__(self, num_pictures: int = 8, every_n_validations: int = 1) -> None:
        super().__init__(every_n_validations)
        if num_pictures < 1:
            raise InputError(f"num_pictures is {num_pictures}; set it to 1 or more")
        self.num_pictures = num_pictures
        self._pictures: list[Tensor] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "draw"):
            raise InputError(f"{type(pl_module).__name__} draws nothing for ValidationPictures; remove it")

    @override
    def look(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx or trainer.sanity_checking:
            return
        # every process takes part, since a sharded network answers only to all of them
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            self._pictures = cast(_Draws, module).draw(batch)[: self.num_pictures]

    @override
    def show(self, trainer: Trainer, module: LightningModule) -> None:
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
