"""What callbacks that look at validation batches share: which validations they look at."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_bigmodels.errors import InputError


class ValidationView(Callback, ABC):
    """Looks at the batches of every so manieth validation, the first among them, and shows something at its end.

    Args:
        every_n_validations: How often.

    Raises:
        InputError: it is below 1.
    """

    def __init__(self, every_n_validations: int) -> None:
        if every_n_validations < 1:
            raise InputError(f"every_n_validations is {every_n_validations}; set it to 1 or more")
        self.every_n_validations = every_n_validations
        self._validations = 0

    @abstractmethod
    def look(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take a batch, on every process, in the sanity check too."""

    @abstractmethod
    def show(self, trainer: Trainer, module: LightningModule) -> None:
        """Show what was seen, and forget it; every process calls it."""

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
        if self._validations % self.every_n_validations == 0:
            self.look(trainer, pl_module, batch, batch_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations == 0:
            self.show(trainer, pl_module)
