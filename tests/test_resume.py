"""Killed anywhere and started again, a run ends with the weights of one that nothing disturbed, bit for bit."""

import os
import signal
import subprocess

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bigmodels import CausalLanguageModel, optim
from lightning_bigmodels.__main__ import main
from tests.conftest import TINY_LLAMA
from tests.workers import run_on

DROPOUT = {**TINY_LLAMA, "attention_dropout": 0.2}
STEPS = 14


class CutError(Exception):
    """The run is over here."""


class Interrupt(Callback):
    """Break off after the training batch of this number."""

    def __init__(self, after_batch):
        self.after_batch = after_batch

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx + 1 == self.after_batch:
            raise CutError


class Kill(Callback):
    """`kill -9` of this very process after the training batch of this number."""

    def __init__(self, after_batch: int) -> None:
        self.after_batch = after_batch

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx + 1 == self.after_batch:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder, data, *, ckpt_path=None, callbacks=(), save_every=4, optimizer=None, **settings):
    torch.manual_seed(3)
    model = CausalLanguageModel(architecture="llama", config=DROPOUT, optimizer=optimizer, schedule=optim.WarmupCosine)
    checkpoints = ModelCheckpoint(
        folder,
        filename="{step}",
        save_top_k=-1,
        save_last=True,
        **({"every_n_train_steps": save_every} if save_every else {}),
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        callbacks=[checkpoints, *callbacks],
        default_root_dir=folder,
        **{"max_steps": STEPS, "max_epochs": -1, **settings},
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, trainer


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# the small text makes 11 such batches an epoch
ELEVEN = {"block_size": 64, "batch_size": 26}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("after_batch", "data", "settings"),
    [
        pytest.param(6, {}, {}, id="mid-epoch, between two checkpoints"),
        pytest.param(13, {}, {"optimizer": optim.MuonWithAdamW}, id="second epoch"),
        pytest.param(12, {}, {"save_every": 11}, id="checkpoint of an epoch's last batch"),
        pytest.param(21, {}, {"accumulate_grad_batches": 2}, id="accumulation"),
        pytest.param(
            21,
            {},
            {"accumulate_grad_batches": 4, "val_check_interval": 3, "save_every": None},
            id="checkpoint inside an accumulated step",
        ),
        pytest.param(10, {"num_workers": 1}, {}, id="worker process"),
        pytest.param(7, {}, {"val_check_interval": 3, "save_every": None}, id="checkpoint written in validation"),
        pytest.param(7, {}, {"precision": "bf16-mixed"}, id="bf16"),
        pytest.param(25, {}, {"max_steps": -1, "max_epochs": 3, "save_every": 5}, id="length in epochs"),
    ],
)
def test_resumed_equals_uninterrupted(after_batch, data, settings, tmp_path, text):
    whole, trainer = run(tmp_path / "whole", text(**ELEVEN, **data), **settings)
    with pytest.raises(CutError):
        run(tmp_path / "cut", text(**ELEVEN, **data), callbacks=[Interrupt(after_batch)], **settings)
    resumed, second = run(
        tmp_path / "cut", text(**ELEVEN, **data), ckpt_path=tmp_path / "cut" / "last.ckpt", **settings
    )
    assert trainer.num_training_batches == 11
    assert (second.global_step, second.current_epoch) == (trainer.global_step, trainer.current_epoch)
    same(whole.state_dict(), resumed.state_dict())


class Draw(Callback):
    """Uses up random numbers while validating."""

    def on_validation_batch_start(self, *args):
        torch.rand(3)


def test_validation_leaves_the_training_stream_alone(tmp_path, text):
    often, _ = run(tmp_path / "often", text(**ELEVEN), callbacks=[Draw()], val_check_interval=2, max_steps=6)
    never, _ = run(tmp_path / "never", text(**ELEVEN, val_fraction=0.1), val_check_interval=11, max_steps=6)
    same(often.state_dict(), never.state_dict())


def test_a_real_kill_and_the_same_command_again(tmp_path, text_file, cache_dir, python, monkeypatch):
    """The command, its run folder, W&B's file and metrics.csv; with accumulation, a worker and validation."""
    # a test before this one may have left the address of its W&B service; a run in a terminal starts its own
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    config = {
        "seed_everything": 5,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 16,
            "max_epochs": -1,
            "accumulate_grad_batches": 2,
            "val_check_interval": 8,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"monitor": "val_loss", "filename": "best", "save_last": True},
                },
            ],
        },
        "model": {
            "class_path": "CausalLanguageModel",
            "init_args": {
                "architecture": "llama",
                "config": DROPOUT,
                "schedule": "lightning_bigmodels.optim.WarmupLinear",
            },
        },
        "data": {
            "class_path": "Text",
            "init_args": {
                "sources": str(text_file),
                "vocab_size": 300,
                "block_size": 32,
                "batch_size": 8,
                "num_workers": 1,
                "cache_dir": cache_dir,
            },
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")

    def arguments(root, *more):
        return ["fit", "--config", str(path), "--trainer.default_root_dir", str(tmp_path / root), *more]

    def command(*words):
        args = [python, "-m", "lightning_bigmodels", *arguments(*words)]
        return subprocess.run(args, capture_output=True, text=True, check=False)

    def weights(root):
        (last,) = (tmp_path / root / "fit").glob("version_*/checkpoints/last.ckpt")
        return torch.load(last, weights_only=True)

    assert run_on(1, main, arguments("whole")) == [0]
    killed = command("cut", "--trainer.callbacks+=tests.test_resume.Kill", "--trainer.callbacks.after_batch=21")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert weights("cut")["global_step"] == 8
    again = command("cut", "--ckpt_path", "last")
    assert again.returncode == 0, again.stderr
    expected, found = weights("whole"), weights("cut")
    assert found["global_step"] == 16
    same(expected["state_dict"], found["state_dict"])
    states = [content["optimizer_states"][0]["state"] for content in (expected, found)]
    assert states[0].keys() == states[1].keys()
    for parameter, state in states[0].items():
        same(state, states[1][parameter])
    assert expected["lr_schedulers"] == found["lr_schedulers"]
    metrics = [(tmp_path / root / "fit" / "version_0" / "metrics.csv").read_text() for root in ("whole", "cut")]
    assert metrics[0] == metrics[1]
