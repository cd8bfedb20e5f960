"""An average of the weights over the last steps, which generalizes better than the weights of any one of them."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_bigmodels.errors import InputError


class WeightAverage(EMAWeightAveraging):
    """Lightning's EMAWeightAveraging for networks that are built in `configure_model`.

    Validation, checkpoints and what the fit leaves behind hold the exponential moving average of weights and buffers;
    training goes on from its own. A resumed fit continues both, bit for bit.

    Args:
        decay: What remains of the average at each update; it reaches over about 1 / (1 - decay) updates.
        every_n_steps: Optimizer steps between updates.
        start_step: Step of the first update.
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay is {decay}; it must be 0 or more and below 1")
        if every_n_steps < 1:
            raise InputError(f"every_n_steps is {every_n_steps}; it must be 1 or more")
        super().__init__(decay=decay, update_every_n_steps=every_n_steps, update_starting_at_step=start_step)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning 2.6 warns of every configure_model, whether it shards or not
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy)):
            raise InputError(
                "WeightAverage needs a whole network on each process, which sharding strategies do not keep; use ddp, "
                "or remove it from trainer.callbacks"
            )
        pl_module.configure_model()
        self._average_model = AveragedModel(
            pl_module, device=self._device or pl_module.device, use_buffers=self._use_buffers, **self._kwargs
        )

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # elsewhere than in fit Lightning 2.6 warns that there is nothing to go on with
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
