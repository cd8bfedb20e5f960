"""Batch norm over two processes is that of one process which sees both batches."""

import functools

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigmodels.strategies.batch_norm import SynchronizedBatchNorm, SynchronizedLayers
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
