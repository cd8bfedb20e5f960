"""Bad numbers where training is not plain: two optimizers, half precision, sparse gradients; and loss spikes."""

import math
import re

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigmodels.callbacks import BadNumbers
from lightning_bigmodels.callbacks.bad_numbers import BadNumbersError
from tests.callbacks.bad_samples import (
    HIGH,
    LOSS,
    OUTPUT,
    SAMPLES,
    Data,
    Model,
    NaNBackward,
    Samples,
    Watch,
    quiet_trainer,
    same,
    sample_at,
)
from tests.workers import run_on


class TwoOptimizers(LightningModule):
    """Two layers that learn apart, as those of a GAN do."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def training_step(self, batch, batch_idx):
        for number, (layer, optimizer) in enumerate(zip(self.layers, self.optimizers(), strict=True)):
            scale = math.nan if (number, batch_idx) == (1, 2) else 1.0 + number
            optimizer.zero_grad()
            self.manual_backward(layer(batch["x"]).square().mean() * scale)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(layer.parameters()) for layer in self.layers]


def test_each_of_two_optimizers_is_judged_by_itself(trainer, capsys):
    watch, guard = Watch(), BadNumbers("skip")
    trainer(callbacks=[guard, watch], max_steps=16).fit(TwoOptimizers(), Data().train_dataloader())
    before, after = watch.seen[2], watch.seen[3]
    assert same(before["optimizers"][1], after["optimizers"][1])
    assert same(before["weights"]["layers.1.weight"], after["weights"]["layers.1.weight"])
    assert not same(before["optimizers"][0], after["optimizers"][0])
    assert "the loss is nan in step 6 (epoch 0, batch 2, rows" in capsys.readouterr().out
    assert {index: len(losses) for index, losses in guard.state_dict()["recent_losses"].items()} == {0: 8, 1: 7}


def half():
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    return {"plugins": [precision], "max_steps": 8}


def test_in_half_precision_an_overflow_is_the_scalers_matter(trainer):
    guard = BadNumbers()
    fit = trainer(callbacks=[guard], **half())
    scale = fit.precision_plugin.scaler
    scale.load_state_dict({**scale.state_dict(), "scale": 2.0**30})
    fit.fit(Model(), Data())
    assert scale.get_scale() < 2.0**30
    # the loss is seen as it is, not as it was scaled
    assert guard.state_dict()["recent_losses"][0][0] < 100


@pytest.mark.parametrize("fused", [False, True])
def test_in_half_precision_a_bad_loss_counts(fused, trainer):
    def optimizer(groups):
        return torch.optim.AdamW(groups, lr=0.01, fused=fused)

    data = {sample_at(9): LOSS, sample_at(17): OUTPUT}
    with pytest.raises(BadNumbersError, match="the loss is inf in step 3"):
        trainer(callbacks=[BadNumbers()], **half()).fit(Model(optimizer=optimizer), Data(data))
    watch, guard = Watch(), BadNumbers("skip")
    trainer(callbacks=[guard, watch], **half()).fit(Model(optimizer=optimizer), Data(data))
    assert guard.skipped_batches == 2
    for step in (2, 4):
        assert same(watch.seen[step]["weights"], watch.seen[step + 1]["weights"])
        assert not same(watch.seen[step + 1]["weights"], watch.seen[step + 2]["weights"])


def test_large_but_finite_gradients_are_not_bad(trainer):
    class Large(Model):
        def on_after_backward(self):
            for parameter in self.parameters():
                parameter.grad.fill_(1e30)

    fit = trainer(callbacks=[BadNumbers()], max_steps=8)
    fit.fit(Large(), Data())
    assert torch.nn.utils.get_total_norm([torch.full((2,), 1e30)]).isinf()
    assert fit.global_step == 8


def test_sparse_gradients_are_looked_at(trainer):
    class Sparse(LightningModule):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(SAMPLES, 2, sparse=True)

        def training_step(self, batch, batch_idx):
            rows = self.embedding(batch[0])
            return (NaNBackward.apply(rows) if batch_idx == 2 else rows).square().mean()

        def configure_optimizers(self):
            return torch.optim.SparseAdam(self.parameters())

    data = DataLoader(TensorDataset(torch.arange(SAMPLES)), batch_size=4)
    with pytest.raises(BadNumbersError, match=r"in step 3 \(epoch 0, batch 2\): .*in the gradient of embedding.weight"):
        trainer(callbacks=[BadNumbers()], max_steps=8).fit(Sparse(), data)


def test_a_spike_is_logged_with_its_place(trainer, tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="fit", version=0)
    guard = BadNumbers(spike_window=4)
    fit = trainer(callbacks=[guard], max_steps=8, logger=logger, log_every_n_steps=50, limit_val_batches=0)
    fit.fit(Model(), Data({sample_at(1): HIGH, sample_at(25): HIGH}))
    out = capsys.readouterr().out
    assert re.search(
        r"loss spike: \S+ in step 7 \(epoch 0, batch 6, rows .* of the training data\) is \S+ standard deviations of "
        r"\S+ above the mean of the last 4 steps, ",
        out,
    )
    assert out.count("loss spike") == 1  # the first of them fell into the warm-up
    names, row = (tmp_path / "fit" / "version_0" / "metrics.csv").read_text().splitlines()
    assert names.split(",") == ["loss_spike", "step"]
    assert float(row.split(",")[0]) > 6
    assert len(guard.state_dict()["recent_losses"][0]) == 4
    trainer(callbacks=[BadNumbers(spike_deviations=None, spike_window=4)], max_steps=8).fit(
        Model(), Data({sample_at(25): HIGH})
    )
    assert "loss spike" not in capsys.readouterr().out


def test_a_spike_on_one_of_two_processes_is_told_by_the_first(capfd):
    def fit():
        torch.manual_seed(0)
        quiet_trainer("ddp", callbacks=[BadNumbers(spike_window=2)]).fit(Model(), Data({sample_at(25): HIGH}))

    run_on(2, fit)
    out = capfd.readouterr().out
    assert out.count("loss spike") == 1
    rows = ", ".join(str(sample_at(position)) for position in (25, 27, 29, 31))
    assert f"in step 4 (epoch 0, batch 3, rank 1, rows {rows} of the training data) is" in out


def test_the_recent_losses_are_of_whole_steps(trainer):
    """The last step of an epoch accumulates fewer batches, and Lightning divides its loss all the same."""
    guard = BadNumbers()
    model = Model(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    model.configure_model()
    model.network.norm.p = 0.0
    trainer(callbacks=[guard], max_steps=3, accumulate_grad_batches=3).fit(model, Data())
    x = Samples({}).x
    order = [sample_at(position) for position in range(SAMPLES)]
    with torch.no_grad():
        losses = (model.network(x, torch.zeros(SAMPLES))[:, 0] - x.sum(1)).square()[order]
    expected = [part.mean().item() for part in losses.split(12)]
    assert guard.state_dict()["recent_losses"][0] == pytest.approx(expected, rel=1e-5)
