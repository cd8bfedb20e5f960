"""A loss or gradient that is not finite never reaches the weights, and what is said of it leads to its origin."""

import math
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_bigmodels.__main__ import main
from lightning_bigmodels.callbacks import BadNumbers
from lightning_bigmodels.callbacks.bad_numbers import BadNumbersError
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.optim import MuonWithAdamW, WarmupLinear
from tests.callbacks.bad_samples import (
    BACKWARD,
    LOSS,
    OUTPUT,
    Data,
    Model,
    Watch,
    local,
    quiet_trainer,
    same,
    sample_at,
)
from tests.workers import run_on


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.01)


def momentum(groups):
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=0.1)


def test_the_module_the_rows_and_the_step_are_named(trainer):
    sample = sample_at(9)
    watch = Watch()
    fit = trainer(callbacks=[BadNumbers(), watch], max_steps=8)
    with pytest.raises(BadNumbersError) as caught:
        fit.fit(Model(), Data({sample: OUTPUT}))
    message = str(caught.value)
    rows = ", ".join(str(sample_at(position)) for position in range(8, 12))
    assert message == (
        f"the loss is nan in step 3 (epoch 0, batch 2, rows {rows} of the training data): the first output that is not "
        "finite is that of network.poison (Poison); look at this batch, lower the learning rate, clip gradients, or "
        "leave such batches out with BadNumbers' action: skip; no checkpoint was written before"
    )
    assert same(watch.seen[-1]["weights"], fit.lightning_module.state_dict())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            BACKWARD,
            "a gradient is not finite in .*: it arose in the backward pass, first in the gradient of network.first",
        ),
        (LOSS, "the loss is inf in .*: every module's output is finite, so look at the loss function; "),
    ],
)
def test_what_arose_outside_of_the_forward_pass(kind, message, trainer):
    with pytest.raises(BadNumbersError, match=message):
        trainer(callbacks=[BadNumbers()], max_steps=8).fit(Model(), Data({3: kind}))


def test_a_batch_that_is_bad_itself(trainer):
    data = Data()
    data.dataset.x[sample_at(5), 1] = math.inf
    with pytest.raises(
        BadNumbersError, match="the loss is inf in step 2 .*: the batch itself holds numbers that are not"
    ):
        trainer(callbacks=[BadNumbers()], max_steps=8).fit(Model(), data)


def test_a_failure_of_the_repeated_step_does_not_hide_what_happened(trainer):
    class Once(Model):
        def step(self, phase, batch):
            return super().step(phase, {"x": batch.pop("x"), "kinds": batch.pop("kinds")})

    with pytest.raises(
        BadNumbersError, match="the loss is nan in .*: the step, repeated to find the origin, raised KeyErr"
    ):
        trainer(callbacks=[BadNumbers()], max_steps=8).fit(Once(), Data({3: OUTPUT}))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch, at a break of the graph
def test_compiled_networks_are_looked_into(trainer):
    model = Model()
    model.configure_model()
    model.network.compile(backend="eager")
    with pytest.raises(BadNumbersError, match="that is not finite is that of network.poison"):
        trainer(callbacks=[BadNumbers()], max_steps=8).fit(model, Data({3: OUTPUT}))


@pytest.mark.parametrize("optimizer", [adamw, momentum, lambda groups: MuonWithAdamW(groups, lr=0.01)])
@pytest.mark.parametrize("kind", [OUTPUT, BACKWARD])
def test_a_skipped_batch_leaves_everything_as_it_was(kind, optimizer, trainer, capsys):
    watch, guard = Watch(), BadNumbers("skip")
    model = Model(optimizer=optimizer, schedule=WarmupLinear)
    settings = {"max_steps": 8, "gradient_clip_val": 1.0, "enable_progress_bar": False}
    fit = trainer(callbacks=[guard, watch], **settings)
    fit.fit(model, Data({sample_at(9): kind}))
    before, after = watch.seen[2], watch.seen[3]
    for part in ("weights", "optimizers"):
        assert same(before[part], after[part])
        assert not same(after[part], watch.seen[4][part])
    assert before["optimizers"][0]
    assert (guard.skipped_batches, fit.global_step, fit.lr_scheduler_configs[0].scheduler.last_epoch) == (1, 8, 8)
    assert "skipped batch 1 of at most 10: " in capsys.readouterr().out
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_looking_for_the_module_draws_no_random_number(trainer):
    runs = []
    for kinds in ({}, {sample_at(9): OUTPUT}):
        watch = Watch()
        torch.manual_seed(0)
        trainer(callbacks=[BadNumbers("skip"), watch], max_steps=8).fit(Model(), Data(kinds))
        runs.append([content["random"] for content in watch.seen])
    assert same(*runs)
    assert not same(runs[0][0], runs[0][1])  # dropout does draw


def test_running_statistics_are_put_back(trainer):
    watch = Watch()
    model = Model(norm=True)
    trainer(callbacks=[BadNumbers("skip"), watch], max_steps=8).fit(model, Data({sample_at(9): OUTPUT}))
    assert same(watch.seen[2]["weights"], watch.seen[3]["weights"])
    assert model.network.norm.running_mean.isfinite().all()
    assert model.network.norm.num_batches_tracked == 7


def test_accumulation_skips_the_whole_step_and_names_the_batch(trainer, capsys):
    watch = Watch()
    fit = trainer(callbacks=[BadNumbers("skip"), watch], max_steps=3, accumulate_grad_batches=3)
    fit.fit(Model(), Data({sample_at(17): OUTPUT}))
    assert "skipped batch 1 of at most 10: the loss is nan in step 2 (epoch 0, batch 4, rows" in capsys.readouterr().out
    assert same(watch.seen[3]["weights"], watch.seen[6]["weights"])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_number_of_skips_is_limited_counted_and_logged(trainer, tmp_path):
    kinds = {sample_at(position): OUTPUT for position in (1, 9, 17)}
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=4)
    guard = BadNumbers("skip", max_skips=2)
    settings = {"enable_checkpointing": True, "log_every_n_steps": 50}
    logger = CSVLogger(tmp_path, name="fit", version=0)
    with pytest.raises(
        BadNumbersError, match=r"after 2 batches that were skipped \(max_skips\); .*clip gradients; the l"
    ):
        trainer(callbacks=[guard, checkpoint], max_steps=8, logger=logger, **settings).fit(Model(), Data(kinds))
    rows = (tmp_path / "fit" / "version_0" / "metrics.csv").read_text().splitlines()
    assert rows == ["skipped_batches,step", "1,0", "2,2"]
    # the count and the mean of the losses go on where the checkpoint was written
    again = BadNumbers("skip", max_skips=2)
    with pytest.raises(BadNumbersError, match="in step 5 .*after 2 batches that were skipped"):
        trainer(callbacks=[again, checkpoint], max_steps=8, **settings).fit(
            Model(), Data(kinds), ckpt_path=tmp_path / "last.ckpt"
        )
    whole = BadNumbers("skip")
    trainer(callbacks=[whole], max_steps=4).fit(Model(), Data(kinds))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["BadNumbers"]
    assert state["skipped_batches"] == whole.state_dict()["skipped_batches"] == 2
    assert len(state["recent_losses"][0]) == 2


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_last_checkpoint_is_untouched_and_goes_on(trainer, tmp_path):
    settings = {"max_steps": 8, "enable_checkpointing": True}

    def checkpoint(folder):
        return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_last=True, every_n_train_steps=2)

    torch.manual_seed(5)
    with pytest.raises(BadNumbersError, match=rf"; the last checkpoint is {tmp_path}/a/last.ckpt$"):
        trainer(callbacks=[BadNumbers(), checkpoint(tmp_path / "a")], **settings).fit(
            Model(schedule=WarmupLinear), Data({sample_at(13): OUTPUT})
        )
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["last.ckpt", "step=2.ckpt"]
    resumed = Model(schedule=WarmupLinear)
    guard = BadNumbers()
    trainer(callbacks=[guard, checkpoint(tmp_path / "a")], **settings).fit(
        resumed, Data(), ckpt_path=tmp_path / "a" / "last.ckpt"
    )
    torch.manual_seed(5)
    whole, undisturbed = Model(schedule=WarmupLinear), BadNumbers()
    trainer(callbacks=[undisturbed, checkpoint(tmp_path / "b")], **settings).fit(whole, Data())
    assert same(whole.state_dict(), resumed.state_dict())
    assert guard.state_dict() == undisturbed.state_dict()
    torch.manual_seed(5)
    alone = Model(schedule=WarmupLinear)
    trainer(**settings | {"enable_checkpointing": False}).fit(alone, Data())
    assert same(whole.state_dict(), alone.state_dict())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (
            OUTPUT,
            r"the loss is nan in step 2 \(epoch 0, batch 1, rank 1, rows .*\): .* that of network.poison \(Poison\); ",
        ),
        (LOSS, r"the loss is inf in step 2 \(epoch 0, batch 1, rank 1, rows .*\): every module's output is finite"),
        (
            BACKWARD,
            r"a gradient is not finite in step 2 \(.*\): it arose in the backward pass, first in .* network.first",
        ),
    ],
)
def test_processes_stop_together_and_name_the_one_to_blame(kind, found, strategy):
    sample = sample_at(2 * 4 + 1)  # the order is dealt out like cards: the second batch of the second process

    def told():
        with pytest.raises(BadNumbersError) as caught:
            quiet_trainer(strategy).fit(Model(), Data({sample: kind}))
        return str(caught.value)

    messages = run_on(2, told)
    assert messages[0] == messages[1]
    assert re.match(found, messages[0]), messages[0]
    if kind == BACKWARD:
        # what DDP has summed up can be told apart by a backward pass of each process alone
        assert ("rank 1, rows" in messages[0]) == (strategy == "ddp")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_processes_skip_together(strategy):
    sample = sample_at(2 * 4 + 1)

    def fit():
        guard, watch = BadNumbers("skip"), Watch()
        model = Model(optimizer=adamw)
        torch.manual_seed(0)
        quiet_trainer(strategy, callbacks=[guard, watch], gradient_clip_val=1.0).fit(model, Data({sample: OUTPUT}))
        parts = [[local(content[part]) for content in watch.seen] for part in ("weights", "optimizers")]
        return (
            guard.skipped_batches,
            [same(seen[1], seen[2]) for seen in parts],
            [same(seen[2], seen[3]) for seen in parts],
        )

    assert run_on(2, fit) == [(1, [True, True], [False, False])] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "ignore"}, "action is 'ignore'; set it to stop or skip"),
        ({"max_skips": 0}, "max_skips is 0; set it to 1 or more, or action to stop"),
        ({"spike_deviations": 0.0}, "spike_deviations is 0.0; it must be above 0, or null for no report"),
        ({"spike_window": 1}, "spike_window is 1; it must be 2 or more"),
    ],
)
def test_arguments_out_of_bounds_are_refused(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        BadNumbers(**arguments)


class NaNFromStep(Callback):
    """Spoils the weights before a step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            module.layer.weight.data.fill_(math.nan)


def test_the_command_says_it_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    args = ["fit", "--model=tests.toys.ToyModel", "--data=tests.toys.ToyData", "--trainer.accelerator=cpu"]
    args += ["--trainer.max_steps=8", "--trainer.callbacks+=tests.callbacks.test_bad_numbers.NaNFromStep"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    assert main([*args, *quiet, "--trainer.log_every_n_steps=1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "bigmodels: error: the loss is nan in step 3 (epoch 0, batch 2): the first output that is not"
    )
    assert "that of layer (Linear); " in error
    assert Path("runs/fit/version_0").is_dir()
