"""A LightningModule and a LightningDataModule that fit in a screen and train in a few milliseconds."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigmodels.errors import InputError


class ToyModel(LightningModule):
    """Fits y = x w with one linear layer.

    Args:
        width: Number of inputs.
        dropout: Probability between 0 and 1.
        optimizer: How parameters are updated; SGD when left out.
    """

    predict_help = "multiply"

    def __init__(self, width: int = 4, dropout: float = 0.0, optimizer: OptimizerCallable | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width, self.optimizer = width, optimizer
        self.layer: torch.nn.Linear | None = None

    def configure_model(self) -> None:
        if self.layer is None:
            self.layer = torch.nn.Linear(self.width, 1)

    def _step(self, word: str, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        self.log(f"{word}_loss", loss, batch_size=len(batch[0]), sync_dist=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self._step("train", batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_bits_per_byte", 1.5, batch_size=len(batch[0]), sync_dist=True)
        self._step("val", batch)

    def test_step(self, batch, batch_idx):
        self._step("test", batch)

    def predict_step(self, batch, batch_idx):
        return [{"index": i, "value": value} for i, value in enumerate(self.layer(batch[0]).flatten().tolist())]

    def configure_optimizers(self):
        return self.optimizer(self.parameters()) if self.optimizer else torch.optim.SGD(self.parameters(), lr=0.01)


class Loader(DataLoader):
    """A loader that goes on in the middle of an epoch."""

    start = done = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.done = index + 1
                yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.start = state["done"] % len(self)


class ToyData(LightningDataModule):
    """Random numbers.

    Args:
        length: Number of examples.
        batch_size: Examples in a batch.
        width: Numbers in an example.
        broken: File that turns out to be broken.
    """

    def __init__(self, length: int = 16, batch_size: int = 4, width: int = 4, broken: Path | None = None) -> None:
        super().__init__()
        self.length, self.batch_size, self.width, self.broken = length, batch_size, width, broken

    def setup(self, stage: str) -> None:
        if self.broken:
            raise InputError(f"{self.broken}, line 3: not UTF-8; convert the file first")

    def _loader(self) -> DataLoader:
        inputs = torch.randn(self.length, self.width, generator=torch.Generator().manual_seed(0))
        return Loader(TensorDataset(inputs), batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


class NeedsWidth(ToyModel):
    """A toy with an argument that must be given.

    Args:
        size: Number of inputs.
    """

    def __init__(self, size: int) -> None:
        super().__init__(width=size)


class Stop(Callback):
    """Does at a given step of training what a user or a machine may do.

    Args:
        step: Optimizer steps done before.
        how: `ctrl-c`, `error`, or `input` for the user's error wrapped in another.
    """

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            if self.how == "ctrl-c":
                raise KeyboardInterrupt
            if self.how == "error":
                raise OSError("disk full")
            raise RuntimeError("worker died") from InputError("notes.txt, line 3: not UTF-8; convert it")
