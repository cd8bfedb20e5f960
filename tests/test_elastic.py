"""A run goes on with another number of processes: no sample twice, none forgotten, steps and epochs right."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import Dataset

from lightning_bigmodels import CausalLanguageModel
from lightning_bigmodels.data import DataModule
from lightning_bigmodels.data.loading import ResumableSampler, epoch_generator
from lightning_bigmodels.optim import WarmupLinear
from lightning_bigmodels.tasks import Task
from tests.conftest import TINY_LLAMA
from tests.workers import fit_on, run_on

LENGTH = 100
EPOCHS = 3


class Points(Dataset):
    """Numbered points of a plane through the origin."""

    def __len__(self):
        return LENGTH

    def __getitems__(self, indices):
        inputs = torch.randn(LENGTH, 4, generator=torch.Generator().manual_seed(1))
        return {"index": torch.tensor(indices), "inputs": inputs[indices]}


class PointData(DataModule):
    def __init__(self, batch_size):
        super().__init__(batch_size, None, num_workers=0, seed=5)

    def example_batch(self, batch_size):
        return Points().__getitems__(range(batch_size))

    @property
    def num_train_samples(self):
        return LENGTH

    def train_dataloader(self):
        return self.resumable_loader(Points())

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(4, 1), batch_size=1)


class Plane(Task):
    def build_network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))

    def blocks(self):
        return list(self.network)

    def step(self, phase, batch):
        if phase == "val":
            return torch.zeros(())
        loss = (self.network(batch["inputs"]).sum(1) - batch["inputs"].sum(1)).square().mean()
        self.log("train_loss", loss.detach())
        return loss


class Watch(Callback):
    """Notes what each process really trains on, and the rest that a person sees."""

    def __init__(self):
        self.batches = []
        self.validations = []
        self.rates = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx, batch["index"].tolist()))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_start(self, trainer, module):
        loop = trainer.fit_loop.epoch_loop
        self.validations.append((trainer.current_epoch, loop.batch_progress.current.ready))


class Save(Callback):
    """Writes a checkpoint behind a step, in the hook of this name; it has no state that a resumed run would ask for."""

    def __init__(self, path, step, hook="on_train_batch_end"):
        setattr(self, hook, lambda trainer, *args: trainer.global_step == step and trainer.save_checkpoint(path))


def run(processes, batch_size, *callbacks, strategy="ddp", **settings):
    """Return the workers' fits; each report has what `Watch` saw, the last batch's place and the steps of the logs."""

    def report(trainer):
        (watch,) = [callback for callback in trainer.callbacks if isinstance(callback, Watch)]
        seen = {"batches": watch.batches, "validations": watch.validations, "rates": watch.rates}
        place = trainer.fit_loop._combined_loader.flattened[0].place()
        return SimpleNamespace(**seen, place=place, logged_steps=trainer.fit_loop.epoch_loop._batches_that_stepped)

    return fit_on(
        processes,
        "auto" if processes == 1 and strategy == "ddp" else strategy,
        lambda: Plane(optimizer=lambda params: torch.optim.SGD(params, lr=0.02), schedule=WarmupLinear),
        lambda: PointData(batch_size),
        report=report,
        **{
            "max_steps": -1,
            "max_epochs": EPOCHS,
            "limit_val_batches": 1,
            "callbacks": [Watch(), *callbacks],
            **settings,
        },
    )


def samples(fits, epoch):
    """Return the samples of an epoch over all workers, batch by batch in the order of the epoch."""
    shares = [[indices for e, _, indices in fit.report.batches if e == epoch] for fit in fits]
    batches = zip(*shares, strict=True)
    return [index for batch in batches for row in zip(*batch, strict=True) for index in row]


def order(epoch):
    return ResumableSampler(Points(), seed=5).order(epoch_generator(5, epoch)).tolist()


@pytest.mark.parametrize(
    ("before", "batch_before", "save_at", "after", "batch_after"),
    [
        pytest.param(2, 4, 17, 1, 8, id="2 to 1, same global batch"),
        pytest.param(2, 4, 17, 4, 2, id="2 to 4, same global batch"),
        pytest.param(4, 2, 17, 2, 4, id="4 to 2, same global batch"),
        pytest.param(1, 8, 17, 2, 4, id="1 to 2, same global batch"),
        pytest.param(2, 4, 17, 1, 4, id="2 to 1, half the global batch"),
        pytest.param(2, 4, 17, 4, 4, id="2 to 4, twice the global batch"),
        pytest.param(4, 2, 17, 2, 2, id="4 to 2, half the global batch"),
        pytest.param(1, 8, 17, 2, 8, id="1 to 2, twice the global batch"),
        pytest.param(2, 4, 17, 3, 3, id="2 to 3, at no multiple of the new batch"),
        pytest.param(1, 4, 26, 4, 4, id="1 to 4, in the first of the new batches"),
        pytest.param(2, 4, 21, 2, 24, id="2 to 2, no whole batch remains"),
    ],
)
def test_goes_on_with_the_very_next_sample(before, batch_before, save_at, after, batch_after, tmp_path):
    path = tmp_path / "cut.ckpt"
    whole = run(before, batch_before, Save(path, save_at))
    resumed = run(after, batch_after, ckpt_path=path)
    size_before, size = before * batch_before, after * batch_after
    done = (save_at - LENGTH // size_before) * size_before  # samples of the second epoch
    rest = samples(resumed, 1)
    assert rest == order(1)[done : done + len(rest)]
    assert len(rest) == (LENGTH - done) // size * size  # what fills no batch on all processes is left out
    assert samples(resumed, 0) == []
    assert samples(resumed, 2) == order(2)[: LENGTH // size * size]

    seen = resumed[0].report
    steps_left = len(rest) // size + LENGTH // size
    assert resumed[0].global_step == seen.logged_steps == save_at + steps_left
    assert seen.place == {
        "epoch": 2,
        "samples": (LENGTH // size * size - size, LENGTH // size * size),
        "indices": seen.batches[-1][2],
    }
    # the epoch's last batch has the last number, and validation comes behind it
    num_batches = LENGTH // size
    numbers = [batch_idx for epoch, batch_idx, _ in seen.batches if epoch == 1]
    assert numbers == list(range(num_batches))[num_batches - len(numbers) :]
    assert seen.validations == [(epoch, num_batches) for epoch in (1, 2) if epoch == 2 or numbers]

    # the schedule ends with the run, and goes on from the same fraction of it
    assert seen.rates[-1] == pytest.approx(0.02 / (EPOCHS * num_batches))
    if size == size_before:
        assert seen.rates == whole[0].report.rates[save_at:]
        pairs = zip(*(mean_losses(fits)[-steps_left:] for fits in (whole, resumed)), strict=True)
        assert all(abs(a - b) < 1e-5 * abs(a) + 1e-7 for a, b in pairs)
        for name, value in whole[0].weights.items():
            torch.testing.assert_close(resumed[0].weights[name], value, rtol=1e-5, atol=1e-6)


def mean_losses(fits):
    return [sum(losses) / len(losses) for losses in zip(*(fit.losses for fit in fits), strict=True)]


@pytest.mark.parametrize(("after", "batch_after"), [(1, 8), (4, 2), (4, 4)])
def test_a_sharded_run_goes_on_with_the_very_next_sample(after, batch_after, tmp_path):
    path = tmp_path / "cut.ckpt"
    whole = run(2, 4, Save(path, 17), strategy="fsdp2")
    resumed = run(after, batch_after, strategy="fsdp2", ckpt_path=path)
    size = after * batch_after
    rest = samples(resumed, 1)
    assert rest == order(1)[40 : 40 + (LENGTH - 40) // size * size]
    assert samples(resumed, 2) == order(2)[: LENGTH // size * size]
    assert resumed[0].report.rates[-1] == pytest.approx(0.02 / (EPOCHS * (LENGTH // size)))
    if size == 8:
        assert resumed[0].global_step == whole[0].global_step
        for name, value in whole[0].weights.items():
            torch.testing.assert_close(resumed[0].weights[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("saved_at", [17, 18], ids=["between two steps", "inside an accumulated step"])
def test_accumulation_over_the_same_samples_on_half_the_processes(saved_at, tmp_path):
    class SaveAtBatch(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.fit_loop.total_batch_idx == saved_at:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    whole = run(2, 4, SaveAtBatch(), accumulate_grad_batches=2, limit_train_batches=12)
    resumed = run(1, 4, accumulate_grad_batches=4, limit_train_batches=24, ckpt_path=tmp_path / "cut.ckpt")
    assert resumed[0].global_step == resumed[0].report.logged_steps == whole[0].global_step == 18
    assert resumed[0].report.rates[-1] == whole[0].report.rates[-1]
    assert samples(resumed, 1) == order(1)[(saved_at - 11) * 8 : 96]
    for name, value in whole[0].weights.items():
        torch.testing.assert_close(resumed[0].weights[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("hook", "length", "batch_after"),
    [
        ("on_train_batch_end", {"max_steps": 20}, 4),
        ("on_validation_end", {"max_steps": 20}, 4),
        ("on_train_epoch_end", {"max_steps": 20}, 4),
        ("on_train_epoch_end", {"max_steps": 20}, 8),
        ("on_train_epoch_end", {"max_epochs": 3}, 4),
    ],
)
def test_a_checkpoint_of_an_epochs_end_begins_the_next_epoch(hook, length, batch_after, tmp_path):
    length = {"max_epochs": -1, **length}
    run(2, 4, Save(tmp_path / "cut.ckpt", 12, hook), **length)
    resumed = run(1, batch_after, ckpt_path=tmp_path / "cut.ckpt", **length)
    numbers = [(epoch, batch_idx) for epoch, batch_idx, _ in resumed[0].report.batches]
    assert numbers[0] == (1, 0)
    assert numbers == sorted(set(numbers))
    assert samples(resumed, 1) == order(1)[: len(samples(resumed, 1))]
    assert resumed[0].report.logged_steps == resumed[0].global_step == 12 + len(numbers)


def test_a_checkpoint_behind_a_fit_that_its_steps_cut_short_goes_on_in_mid_epoch(tmp_path):
    """The same batch counts before and after: Lightning alone skips the rest of the epoch here."""
    short, whole = {"max_epochs": -1, "max_steps": 17}, {"max_epochs": -1, "max_steps": 26}
    run(1, 8, Save(tmp_path / "cut.ckpt", 17, "on_train_end"), **short)
    resumed = run(1, 8, ckpt_path=tmp_path / "cut.ckpt", **whole)
    assert samples(resumed, 1) == order(1)[40:96]
    assert samples(resumed, 2) == order(2)[:16]


def test_validation_comes_at_the_same_batches_of_the_new_epoch(tmp_path):
    settings = {"val_check_interval": 6}
    run(2, 4, Save(tmp_path / "cut.ckpt", 18, "on_validation_end"), **settings)
    resumed = run(1, 4, ckpt_path=tmp_path / "cut.ckpt", **settings)
    assert resumed[0].report.validations == [(1, 18), (1, 24), *((2, number) for number in (6, 12, 18, 24))]
    assert resumed[0].report.logged_steps == resumed[0].global_step == 18 + 13 + 25


class Counts(Callback):
    """Notes what this process has counted before Lightning clears it."""

    def on_validation_epoch_end(self, trainer, module):
        metric = module.metrics["val"]["loss"]
        self.counted = (int(metric.tokens), int(metric.num_bytes))


@pytest.mark.parametrize("val_fraction", [0.05, 0.001], ids=["many windows", "one window"])
def test_evaluation_counts_each_example_once_on_any_number_of_processes(val_fraction, text):
    def evaluate(processes, strategy):
        def work():
            torch.manual_seed(0)
            counts = Counts()
            trainer = Trainer(
                accelerator="cpu",
                devices=processes,
                strategy=strategy,
                logger=False,
                enable_progress_bar=False,
                callbacks=[counts],
            )
            data = text(val_fraction=val_fraction, batch_size=4)
            (metrics,) = trainer.validate(
                CausalLanguageModel(architecture="llama", config=TINY_LLAMA), data, verbose=False
            )
            return metrics, counts.counted, len(data.val_dataloader().dataset)

        return run_on(processes, work)

    ((expected, counted, num_windows),) = evaluate(1, "auto")
    assert num_windows == (1 if val_fraction < 0.05 else 35)  # neither 2 nor 3 divides it
    for processes, strategy in [(2, "ddp"), (3, "ddp"), (2, "fsdp2")]:
        results = evaluate(processes, strategy)
        assert tuple(map(sum, zip(*(counts for _, counts, _ in results), strict=True))) == counted
        for metrics, _, _ in results:
            assert metrics == pytest.approx(expected, rel=1e-6)
