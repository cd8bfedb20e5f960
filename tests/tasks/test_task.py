"""What every family inherits: parameter groups, penalty, run length, plain hyper-parameters."""

import functools
import math

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigmodels import optim
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.tasks import Task
from lightning_bigmodels.tasks.task import LR_SCALE


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.norm(self.hidden(self.embedding(x))))


class Toy(Task):
    def __init__(self, width=3, optimizer=None, schedule=None, l1_penalty=0.0):
        super().__init__(optimizer=optimizer, schedule=schedule, l1_penalty=l1_penalty)
        self.save_hyperparameters()

    def build_network(self):
        return Net()

    def output_modules(self):
        return [self.network.head]

    def step(self, phase, batch):
        (x,) = batch
        loss = nn.functional.cross_entropy(self.network(x).flatten(0, 1), x.flatten())
        self.log(f"{phase}_loss", loss)
        return loss


class Data(LightningDataModule):
    num_train_batches = 10

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(20, 3, dtype=torch.int64)), batch_size=2)

    val_dataloader = train_dataloader


def built(**kwargs):
    task = Toy(**kwargs)
    task.configure_model()
    return task


def names(task):
    known = {id(p): n for n, p in task.network.named_parameters()}
    return {group["name"]: sorted(known[id(p)] for p in group["params"]) for group in task.parameter_groups()}


def test_weight_decay_is_kept_off_biases_norms_and_embeddings():
    task = built()
    assert names(task) == {
        "hidden": ["hidden.weight"],
        "output": ["head.weight"],
        "undecayed": ["embedding.weight", "head.bias", "hidden.bias", "norm.bias", "norm.weight"],
    }
    optimizer = task.configure_optimizers()
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {
        "hidden": 0.1,
        "output": 0.1,
        "undecayed": 0.0,
    }


def test_an_output_layer_tied_to_the_embedding_is_not_decayed():
    task = built()
    task.network.head.weight = task.network.embedding.weight
    assert "output" not in names(task)


def test_frozen_parameters_are_left_to_themselves():
    task = built()
    task.network.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter of the network is trainable"):
        task.parameter_groups()
    task.network.head.bias.requires_grad_(True)
    assert names(task) == {"undecayed": ["head.bias"]}


def test_the_default_optimizer_leaks_nothing_into_the_one_that_the_user_picks():
    task = built(optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    assert [g["weight_decay"] for g in task.configure_optimizers().param_groups] == [0, 0, 0]


class Scaled(Toy):
    """A toy whose embedding learns at a tenth of the rate."""

    def parameter_groups(self):
        *others, undecayed = super().parameter_groups()
        return [*others, {**undecayed, LR_SCALE: 0.1}]


def test_a_group_s_factor_on_the_rate_holds_under_a_schedule_too():
    task = Scaled(optimizer=functools.partial(torch.optim.SGD, lr=0.5))
    task.configure_model()
    assert [group["lr"] for group in task.configure_optimizers().param_groups] == [0.5, 0.5, 0.05]
    task.schedule = functools.partial(optim.WarmupLinear, final=0.5)
    task.total_steps = lambda: 10
    configured = task.configure_optimizers()
    for _ in range(10):
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    assert [group["lr"] for group in configured["optimizer"].param_groups] == pytest.approx([0.25, 0.25, 0.025])


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
        functools.partial(torch.optim.Adam, lr=0.01),
        functools.partial(torch.optim.AdamW, lr=0.01),
        functools.partial(torch.optim.Adafactor, lr=0.01),
        optim.MuonWithAdamW,
    ],
)
def test_each_optimizer_lowers_the_loss(optimizer, trainer):
    torch.manual_seed(0)
    task = Toy(optimizer=optimizer, schedule=optim.WarmupCosine)
    run = trainer(max_steps=-1, max_epochs=3)
    run.fit(task, Data())
    assert run.callback_metrics["train_loss"] < math.log(5)


def test_the_l1_penalty_is_the_weighted_sum_of_decayed_weights():
    task = built(l1_penalty=0.5)
    batch = (torch.zeros(2, 3, dtype=torch.int64),)
    task.log = lambda *args, **kwargs: None
    plain = task.step("train", batch)
    expected = plain + 0.5 * (task.network.hidden.weight.abs().sum() + task.network.head.weight.abs().sum())
    assert task.training_step(batch, 0).item() == pytest.approx(expected.item())
    with pytest.raises(InputError, match="l1_penalty is -1; it must be 0 or more"):
        Toy(l1_penalty=-1)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"max_steps": -1, "max_epochs": 2}, 20),
        ({"max_steps": 7, "max_epochs": 2}, 7),
        ({"max_steps": 70, "max_epochs": 2}, 20),
        ({"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 4}, 6),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 0.5}, 10),
    ],
)
def test_the_length_of_the_run_is_known_before_it_starts_and_is_kept(settings, steps, trainer):
    seen = []

    def schedule(optimizer, total_steps):
        seen.append(total_steps)
        return optim.WarmupLinear(optimizer, total_steps)

    run = trainer(**settings)
    run.fit(Toy(schedule=schedule), Data())
    assert seen == [steps] == [run.global_step]


def test_a_schedule_over_an_endless_run_is_refused(trainer):
    class Endless(Data):
        num_train_batches = None

    with pytest.raises(InputError, match="set trainer.max_steps or trainer.max_epochs"):
        trainer(max_steps=-1, max_epochs=-1).fit(Toy(schedule=optim.WarmupLinear), Endless())


def test_a_checkpoint_from_python_holds_plain_values_and_loads(tmp_path, trainer):
    run = trainer(max_steps=2)
    task = Toy(width=7, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    run.fit(task, Data())
    run.save_checkpoint(tmp_path / "toy.ckpt")
    content = torch.load(tmp_path / "toy.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {"width": 7, "schedule": None, "l1_penalty": 0.0}
    loaded = Toy.load_from_checkpoint(tmp_path / "toy.ckpt")
    for a, b in zip(task.network.parameters(), loaded.network.parameters(), strict=True):
        assert torch.equal(a, b)
