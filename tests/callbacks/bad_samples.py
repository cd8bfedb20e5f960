"""A small network and its data, some samples of which make numbers that are not finite."""

import math

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_bigmodels.callbacks import BadNumbers
from lightning_bigmodels.data.datamodule import DataModule
from lightning_bigmodels.tasks import Task

SAMPLES = 32
# what a sample does
FINE, OUTPUT, BACKWARD, LOSS, HIGH = range(5)


class NaNBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


class Poison(nn.Module):
    """Passes on what it gets, unless a sample is bad."""

    def forward(self, x, kinds):
        x = torch.where((kinds == OUTPUT)[:, None], math.nan, x)
        return NaNBackward.apply(x) if (kinds == BACKWARD).any() else x


class Network(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Dropout(0.2)
        self.poison = Poison()
        self.last = nn.Linear(6, 1)

    def forward(self, x, kinds):
        return self.last(self.norm(self.poison(torch.tanh(self.first(x)), kinds)))


class Model(Task):
    """Learns a sum of three numbers."""

    def __init__(self, norm=False, **kwargs):
        super().__init__(**kwargs)
        self.norm = norm

    def build_network(self):
        return Network(self.norm)

    def blocks(self):
        return [self.network.first, self.network.last]

    def step(self, phase, batch):
        x, kinds = batch["x"], batch["kinds"]
        loss = (self.network(x, kinds)[:, 0] - x.sum(1)).square()
        loss = loss * torch.where(kinds == HIGH, 1e4, 1.0)
        loss = torch.where(kinds == LOSS, math.inf, loss).mean()
        self.log(f"{phase}_loss", loss.detach(), sync_dist=phase != "train")
        return loss


class Samples(torch.utils.data.Dataset):
    def __init__(self, kinds):
        self.x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1))
        self.kinds = torch.tensor([kinds.get(index, FINE) for index in range(SAMPLES)])

    def __len__(self):
        return SAMPLES

    def __getitems__(self, indices):
        return {"x": self.x[indices], "kinds": self.kinds[indices]}


class Data(DataModule):
    """Random numbers, in an order that the seed chooses."""

    def __init__(self, kinds=None, batch_size=4):
        super().__init__(batch_size=batch_size, eval_batch_size=None, num_workers=0, seed=0)
        self.dataset = Samples(kinds or {})

    num_train_samples = SAMPLES

    def example_batch(self, batch_size):
        return self.dataset[list(range(batch_size))]

    def train_dataloader(self):
        return self.resumable_loader(self.dataset)

    def val_dataloader(self):
        return self.evaluation_loader(Samples({}))


def sample_at(position):
    """Return the sample at this position of the first epoch's order."""
    loader = Data(batch_size=1).train_dataloader()
    return list(iter(loader.sampler))[position]


class Watch(Callback):
    """Keeps what a step may change, as it was before each batch and after the last."""

    def __init__(self):
        self.seen = []

    def _look(self, trainer, module):
        optimizers = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
        content = {"weights": module.state_dict(), "optimizers": optimizers, "random": torch.get_rng_state()}
        self.seen.append(copy(content))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._look(trainer, module)

    def on_train_end(self, trainer, module):
        self._look(trainer, module)


def copy(content):
    return torch.utils._pytree.tree_map(
        lambda value: value.clone() if isinstance(value, torch.Tensor) else value, content
    )


def same(a, b):
    a, b = (torch.utils._pytree.tree_flatten(content) for content in (a, b))
    equal = (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a[0], b[0], strict=True))
    return a[1] == b[1] and all(equal)


def local(content):
    return torch.utils._pytree.tree_map(lambda value: getattr(value, "_local_tensor", value), content)


def quiet_trainer(strategy, **changes):
    values = {"max_steps": 4, "callbacks": [BadNumbers()], "devices": 2, "accelerator": "cpu", "limit_val_batches": 0}
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(**{**values, **dict.fromkeys(names, False), "strategy": strategy, **changes})
