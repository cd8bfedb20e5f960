"""Unequally many batches: no process waits for another, and what is trained is what is written down."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from lightning_bigmodels.data.uneven import EvenBatches
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.tasks import Task
from tests.workers import fit_on

EPOCHS = 2


def batches(rank, count):
    return torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(rank))


class OwnData(LightningDataModule):
    def __init__(self, counts, mode):
        super().__init__()
        self.counts, self.mode = counts, mode

    def train_dataloader(self):
        rank = self.trainer.global_rank
        return EvenBatches(DataLoader(batches(rank, self.counts[rank]), batch_size=None), self.mode)

    def val_dataloader(self):
        return DataLoader(batches(9, 2), batch_size=None)


class Line(Task):
    def build_network(self):
        return nn.Linear(4, 2, bias=False)

    def step(self, phase, batch):
        return (self.network(batch).sum(1) - 1).square().mean()


def sgd(params):
    return torch.optim.SGD(params, lr=0.05)


def fit(counts, mode, strategy="ddp", **settings):
    settings = {"max_steps": -1, "max_epochs": EPOCHS, **settings}
    return fit_on(len(counts), strategy, lambda: Line(sgd), lambda: OwnData(counts, mode), timeout=60, **settings)


def by_hand(counts, steps):
    """Mean gradients over all processes, of those that still have a batch."""
    torch.manual_seed(0)
    network = nn.Linear(4, 2, bias=False)
    optimizer = sgd(network.parameters())
    for _ in range(EPOCHS):
        for step in range(steps):
            optimizer.zero_grad()
            for rank, count in enumerate(counts):
                if step < count:
                    loss = (network(batches(rank, count)[step]).sum(1) - 1).square().mean()
                    (loss / len(counts)).backward()
            optimizer.step()
    return network.weight.detach()


@pytest.mark.filterwarnings("ignore:the epoch ends after 3 batches, where 1 of 2 processes have more")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("counts", [(5, 3), (3, 5)])
@pytest.mark.parametrize(("mode", "steps"), [("stop", 3), ("join", 5)])
def test_processes_with_unequal_loaders_train_in_step(mode, steps, counts, strategy):
    results = fit(counts, mode, strategy)
    assert [result.global_step for result in results] == [EPOCHS * steps] * 2
    for result in results:
        torch.testing.assert_close(result.weights["network.weight"], by_hand(counts, steps))


def test_what_is_left_out_is_said():
    with pytest.raises(
        ProcessRaisedException,
        match="the epoch ends after 3 batches, where 1 of 2 processes have more; to train on those too, set mode to",
    ):
        fit((5, 3), "stop")


@pytest.mark.parametrize("mode", ["stop", "join"])
def test_a_process_without_any_batch_is_an_error_on_all(mode):
    with pytest.raises(ProcessRaisedException, match="InputError: 1 of 2 processes have no training batch at all"):
        fit((2, 0), mode)


def test_one_process_gets_its_batches_as_they_are():
    assert list(EvenBatches([1, 2], "stop")) == [1, 2]
    with pytest.raises(InputError, match="1 of 1 processes have no training batch at all"):
        list(EvenBatches([]))
    with pytest.raises(InputError, match="mode is 'wait'; set it to 'stop' or 'join'"):
        EvenBatches([1], "wait")


def test_joining_without_a_task_is_refused():
    batches = iter(EvenBatches([1, 2, 3, 4], "join"))
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(
        InputError, match="mode 'join' needs a Task whose only training loader this is; set it to 'stop'"
    ):
        next(batches)


def test_the_epoch_reaches_the_sampler():
    loader = DataLoader([1, 2, 3], batch_size=1)
    assert EvenBatches(loader).sampler is loader.sampler
    assert EvenBatches([1]).sampler is None
