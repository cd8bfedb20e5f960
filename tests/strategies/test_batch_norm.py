"""Batch norm over two processes is that of one process which sees both batches; one row may be too few for it."""

import functools

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigmodels.__main__ import main
from lightning_bigmodels.batch_size import find_batch_size
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner.hardware import find_hardware
from lightning_bigmodels.planner.plan import make_plan
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.strategies.batch_norm import SynchronizedBatchNorm, SynchronizedLayers, one_value_allowed
from lightning_bigmodels.tasks import Task
from tests.workers import fit_on, run_on

X = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
TARGET = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def normalize(norm, rows):
    """Return output, gradients of input and parameters, and running statistics for some rows."""
    x = X[rows].clone().requires_grad_()
    y = norm(x)
    (y * TARGET[rows]).sum().backward()
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_it_equals_one_process_also_for_parts_of_unequal_size(momentum):
    expected = normalize(nn.BatchNorm2d(3, momentum=momentum), slice(None))

    def work():
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        norm = SynchronizedLayers().apply(nn.BatchNorm2d(3, momentum=momentum))
        return normalize(norm, [slice(0, 4), slice(4, 6)][rank])

    first, second = run_on(2, work)
    for place in range(2):
        torch.testing.assert_close(torch.cat([first[place], second[place]]), expected[place], rtol=1e-4, atol=1e-5)
    for place in (2, 3):  # each process has its own part's share of the sum
        torch.testing.assert_close(first[place] + second[place], expected[place], rtol=1e-4, atol=1e-5)
    for place in (4, 5):
        torch.testing.assert_close(first[place], expected[place])
        assert torch.equal(first[place], second[place])


def test_layers_are_replaced_and_put_back_with_their_own_parameters():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=0.01)), nn.BatchNorm2d(4)).eval()
    weight, mean = network[1][0].weight, network[1][0].running_mean
    SynchronizedLayers().apply(network)
    assert type(network[1][0]) is type(network[2]) is SynchronizedBatchNorm
    assert (network[1][0].weight is weight, network[1][0].running_mean is mean) == (True, True)
    assert (network[1][0].eps, network[1][0].training) == (0.01, False)
    again = network[2]
    assert SynchronizedLayers().apply(network)[2] is again
    SynchronizedLayers().revert(network)
    assert type(network[1][0]) is nn.BatchNorm2d
    assert (network[1][0].weight is weight, network[1][0].eps) == (True, 0.01)


class Pixels(LightningDataModule):
    """Four of the pictures, which are one batch of all processes."""

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(X[:4], TARGET[:4]), batch_size=self.batch_size)

    def val_dataloader(self):
        return []


class Normalizes(Task):
    """Learns to make one picture of another, by two convolutions with batch norm between them."""

    def build_network(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def step(self, phase, batch):
        return (self.network(batch[0]) - batch[1]).square().mean()


SGD = functools.partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_training_with_the_flag_equals_one_process(strategy):
    def fit(processes, strategy, **flags):
        return fit_on(
            processes,
            strategy,
            lambda: Normalizes(optimizer=SGD),
            lambda: Pixels(4 // processes),
            max_steps=4,
            report=lambda trainer: type(trainer.lightning_module.network[1]).__name__,
            **flags,
        )

    (expected,) = fit(1, "auto")
    found = fit(2, strategy, sync_batchnorm=True)
    losses = [sum(batch) / 2 for batch in zip(*(each.losses for each in found), strict=True)]
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    for each in found:
        assert each.weights.keys() == expected.weights.keys()
        torch.testing.assert_close(each.weights, expected.weights, rtol=1e-4, atol=1e-5)
    alone = [sum(batch) / 2 for batch in zip(*(each.losses for each in fit(2, strategy)), strict=True)]
    assert alone != pytest.approx(expected.losses, rel=1e-4)  # without the flag each process has its own statistics


# ---- one value per channel


class Pools(Task):
    """Normalizes what pooling leaves of a picture, as the pyramid of DeepLabV3 does."""

    def build_network(self):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))

    def step(self, phase, batch):
        return self.network(batch).square().mean()


class Pictures(LightningDataModule):
    """A batch of so many as are wanted, or an epoch of two batches."""

    def __init__(self, batch_size: int = 1):
        super().__init__()
        self.batch_size = batch_size

    def example_batch(self, rows):
        return torch.rand(rows, 3, 32, 32)

    def train_dataloader(self):
        return DataLoader(self.example_batch(2), batch_size=self.batch_size)

    def val_dataloader(self):
        return []


def quiet(**settings):
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, **settings)


def test_one_value_that_is_allowed_counts_twice():
    norm = nn.BatchNorm1d(3)
    x = torch.randn(1, 3, requires_grad=True)
    with one_value_allowed() as shapes:
        output = norm(x)
        norm(torch.randn(2, 3))
        norm.eval()(x)
    output.sum().backward()
    assert shapes == [x.shape]
    torch.testing.assert_close(output, torch.zeros(1, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.grad, torch.zeros(1, 3), rtol=0, atol=1e-4)
    assert norm.running_var.isfinite().all()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm.train()(x)


@pytest.mark.parametrize("largest", [2, 3])
def test_the_search_for_a_batch_begins_with_what_batch_norm_takes(largest, caplog):
    with caplog.at_level("INFO"):
        assert find_batch_size(quiet(), Pools(), Pictures(), max_batch_size=largest).batch_size == largest
    told = [message for message in caplog.messages if "batch_size" in message or "search" in message]
    assert told[0].endswith("one value per channel: the search begins with 2")
    assert [line.split(":")[0] for line in told[1:]] == [f"batch_size {size}" for size in range(2, largest + 1)]


def test_where_one_row_is_wanted_the_error_says_what_to_do(tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"one value per channel, .* largest batch size to try is 1; set it to 2 or"):
        find_batch_size(quiet(), Pools(), Pictures(), max_batch_size=1)
    with pytest.raises(InputError, match="batch norm cannot be trained on one value per channel.*data.batch_size to 2"):
        make_plan(Pools(), Pictures(), Setting(), find_hardware("l4"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    names = {"model": "Pools", "data": "Pictures"}
    flags = [f"--{key}=tests.strategies.test_batch_norm.{name}" for key, name in names.items()]
    lines = {"accelerator": "cpu", "devices": 1, "max_steps": 1, "limit_val_batches": 0, "enable_model_summary": False}
    assert main(["fit", *flags, *(f"--trainer.{name}={value}" for name, value in lines.items())]) == 2
    assert "batch norm cannot be trained on one value per channel" in capsys.readouterr().err.splitlines()[-1]


def test_one_row_can_be_planned_where_other_processes_have_more():
    setting = Setting("ddp", devices=2, sync_batchnorm=True)
    plan = make_plan(Pools(), Pictures(), setting, find_hardware("l4"))
    assert plan.peak.held["activations"] > 0
