"""What callbacks that judge a classifier share: the examples of each evaluation, on all processes."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.tasks import Classification


class EvaluatedClasses(Callback, ABC):
    """Sees each batch of validation and test with its probabilities, and reports at the end."""

    @abstractmethod
    def start(self, module: Classification) -> None:
        """Forget the evaluation before."""

    @abstractmethod
    def add(self, probabilities: Tensor, batch: Any) -> None:
        """Take a batch.

        Args:
            probabilities: (B, K) float32.
            batch: The `ImageBatch`; its labels are (B,) int64.
        """

    @abstractmethod
    def report(self, trainer: Trainer, module: Classification) -> None:
        """Write what was seen; all processes call it."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Classification) or pl_module.multi_label:
            raise InputError(
                f"{type(self).__name__} needs a classifier with one class for each example; remove it from "
                f"trainer.callbacks"
            )

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classification)
        self.start(pl_module)

    on_validation_start = on_test_start = _start

    def _add(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            with torch.no_grad():
                self.add(outputs["probabilities"], batch)

    on_validation_batch_end = on_test_batch_end = _add

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classification)
        if not trainer.sanity_checking:
            self.report(trainer, pl_module)

    on_validation_end = on_test_end = _report
