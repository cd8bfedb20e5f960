"""Told to stop, a run ends with a checkpoint from which it goes on as if nobody had said anything."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing import ProcessExitedException

from lightning_bigmodels.__main__ import main
from lightning_bigmodels.callbacks import BadNumbers, Preemption
from lightning_bigmodels.callbacks.preemption import PreemptedError
from lightning_bigmodels.optim import WarmupLinear
from lightning_bigmodels.runs import RunLogger, RunRecorder
from tests.callbacks.bad_samples import Data, Model, same
from tests.conftest import TINY_LLAMA
from tests.workers import run_on

# the small data make eight batches an epoch on one process, four on two
STEPS = 20

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Tell(Callback):
    """Sends this process a signal in the middle of a batch.

    Args:
        batch: Number of the batch over all epochs, from 1.
        signum: The signal.
        rank: The process that is told.
        validation: Whether it comes in the validation behind that batch.
    """

    def __init__(self, batch: int, signum: int = signal.SIGTERM, rank: int = 0, validation: bool = False) -> None:
        self.batch, self.signum, self.rank, self.validation = batch, signum, rank, validation

    def _tell(self, trainer):
        if trainer.fit_loop.total_batch_idx + 1 == self.batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signum)

    def on_before_backward(self, trainer, *args):
        if not self.validation:
            self._tell(trainer)

    def on_validation_batch_start(self, trainer, *args):
        if self.validation and not trainer.sanity_checking:
            self._tell(trainer)


class Rewind(Callback):
    """What the command does with metrics.csv."""

    on_train_start = RunRecorder.on_train_start


def fit(folder, *callbacks, ckpt_path=None, checkpoint=None, **settings):
    torch.manual_seed(3)
    model = Model(schedule=WarmupLinear)
    values = {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "max_epochs": -1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "logger": RunLogger(folder, "fit", version=0),
        "default_root_dir": folder,
        **settings,
    }
    checkpoint = checkpoint or ModelCheckpoint(folder / "checkpoints", save_last=True, every_n_train_steps=5)
    trainer = Trainer(**values, callbacks=[Preemption(), checkpoint, *callbacks, BadNumbers(), Rewind()])
    try:
        trainer.fit(model, Data(), ckpt_path=ckpt_path)
    except PreemptedError as error:
        return error.code, trainer.global_step, model.state_dict(), trainer
    return 0, trainer.global_step, model.state_dict(), trainer


def metrics(folder):
    return (folder / "fit" / "version_0" / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("tell", "stops_after", "settings"),
    [
        pytest.param(Tell(3), 3, {}, id="mid-epoch"),
        pytest.param(Tell(10), 10, {}, id="at the step of another checkpoint"),
        pytest.param(Tell(11), 4, {"accumulate_grad_batches": 3}, id="inside an accumulated step"),
        pytest.param(Tell(16), 16, {}, id="at the end of an epoch, validation due"),
        pytest.param(Tell(13), 13, {"limit_val_batches": 0}, id="no validation"),
        pytest.param(Tell(16), 16, {"limit_val_batches": 0}, id="at the end of an epoch without validation"),
        pytest.param(Tell(6), 6, {"val_check_interval": 3}, id="validation due"),
        pytest.param(Tell(6, validation=True), 6, {"val_check_interval": 3}, id="in validation"),
        pytest.param(Tell(20), 20, {"limit_val_batches": 0}, id="last step"),
    ],
)
def test_what_goes_on_equals_what_was_never_stopped(tell, stops_after, settings, tmp_path, capsys):
    settings = {"max_steps": 7, **settings} if "accumulate_grad_batches" in settings else settings
    code, steps, expected, _ = fit(tmp_path / "whole", **settings)
    assert code == 0
    code, stopped, _, trainer = fit(tmp_path / "cut", tell, **settings)
    assert (code, stopped) == (143, stops_after)
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert (
        f"SIGTERM: stopped after step {stopped}, saved {last}, and --ckpt_path last goes on" in capsys.readouterr().out
    )
    assert trainer.interrupted
    code, resumed, found, _ = fit(tmp_path / "cut", ckpt_path="last", **settings)
    assert (code, resumed) == (0, steps)
    assert same(expected, found)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    "settings",
    [
        {"save_last": False, "every_n_epochs": 1},
        {"save_last": "link", "every_n_train_steps": 5},
        {"save_last": True, "every_n_train_steps": 1, "save_weights_only": True},
        {"save_last": True, "every_n_train_steps": 7},
    ],
)
def test_every_kind_of_model_checkpoint_leaves_a_last_one_that_goes_on(settings, tmp_path):
    def checkpoint():
        return ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", save_top_k=-1, **settings)

    code, *_ = fit(tmp_path, Tell(7), checkpoint=checkpoint(), limit_val_batches=0)
    assert code == 143
    folder = tmp_path / "checkpoints"
    others = {path: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("step=*.ckpt")}
    assert all(path.name == f"step={step}.ckpt" for path, step in others.items())
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 7
    assert not list(folder.glob("last-v*"))
    _, steps, found, _ = fit(tmp_path, checkpoint=checkpoint(), ckpt_path=folder / "last.ckpt", limit_val_batches=0)
    expected = fit(tmp_path / "whole", limit_val_batches=0)[2]
    assert steps == STEPS
    assert same(expected, found)
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] > 7  # it has not fallen behind


def test_a_trainer_without_checkpoints_stops_all_the_same(trainer, capsys):
    with pytest.raises(PreemptedError) as caught:
        trainer(callbacks=[Preemption(), Tell(3)], max_steps=8).fit(Model(), Data())
    assert caught.value.code == 143
    assert isinstance(caught.value, SystemExit)
    assert "SIGTERM: stopped after step 3, saved nothing, having no ModelCheckpoint" in capsys.readouterr().out


def test_handlers_are_put_back(trainer):
    def own(signum, frame):
        pass

    in_fit = []

    class Look(Callback):
        def on_sanity_check_start(self, *args):
            in_fit.append(signal.getsignal(signal.SIGTERM))

    before = signal.signal(signal.SIGTERM, own)
    try:
        guard = Preemption()
        run = trainer(callbacks=[guard, Look()], max_steps=2, num_sanity_val_steps=1)
        run.fit(Model(), Data())
        assert in_fit == [guard._note]
        assert signal.getsignal(signal.SIGTERM) is own
        run.validate(Model(), Data(), verbose=False)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_ends_the_process_unless_it_is_the_first_one_passed_on(monkeypatch):
    def stubborn():
        guard = Preemption()
        now = [100.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        signal.signal(signal.SIGTERM, guard._note)
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 1
        os.kill(os.getpid(), signal.SIGTERM)
        print("still there", flush=True)
        now[0] += 2
        os.kill(os.getpid(), signal.SIGTERM)
        print("gone", flush=True)

    with pytest.raises(ProcessExitedException) as caught:
        run_on(1, stubborn)
    assert caught.value.exit_code == -signal.SIGTERM
    assert caught.value.signal_name == "SIGTERM"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_it_is_enough_that_one_process_is_told(strategy, tmp_path):
    def start(name, *callbacks, **settings):
        def work():
            settings_ = {"strategy": strategy, "devices": 2, "logger": False, "max_steps": 10, **settings}
            code, steps, weights, _ = fit(tmp_path / name, *callbacks, **settings_)
            weights = {
                key: value.full_tensor() if code == 0 and strategy == "fsdp2" else 0 for key, value in weights.items()
            }
            return code, steps, weights

        return run_on(2, work)

    assert [result[:2] for result in start("cut", Tell(6, rank=1))] == [(143, 6)] * 2
    resumed = start("cut", ckpt_path=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    whole = start("whole")
    assert [result[:2] for result in resumed] == [(0, 10)] * 2
    assert same(resumed, whole)


@pytest.fixture
def command(tmp_path, text_file, cache_dir, monkeypatch):
    """Return a function from the names of a folder and a callback to the arguments of a fit."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = {
        "seed_everything": 5,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 30,
            "max_epochs": -1,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "every_n_train_steps": 15}}
            ],
        },
        "model": {
            "class_path": "CausalLanguageModel",
            "init_args": {
                "architecture": "llama",
                "config": {**TINY_LLAMA, "attention_dropout": 0.2},
                "schedule": "lightning_bigmodels.optim.WarmupLinear",
            },
        },
        "data": {
            "class_path": "Text",
            "init_args": {
                "sources": str(text_file),
                "vocab_size": 300,
                "block_size": 32,
                "cache_dir": cache_dir,
                "num_workers": 1,
            },
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")

    def arguments(root, callback="", *more):
        told = [f"--trainer.callbacks+=tests.callbacks.test_preemption.{callback}"] if callback else []
        return ["fit", "--config", str(path), "--trainer.default_root_dir", str(tmp_path / root), *told, *more]

    return arguments


def last(tmp_path, root):
    (path,) = (tmp_path / root / "fit").glob("version_*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)


def test_torchrun_passes_sigterm_on_and_the_same_command_goes_on(command, tmp_path, python):
    both = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--module"]
    pause = ["--trainer.callbacks+=tests.faults.Pause", "--trainer.callbacks.steps=[7]"]
    pause += [f"--trainer.callbacks.folder={tmp_path}"]
    stopped = subprocess.Popen(
        [*torchrun, "lightning_bigmodels", *command("cut", "", *pause, *both)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHON_EXEC": python},
    )
    while not (tmp_path / "reached7").exists():
        assert stopped.poll() is None, stopped.stderr.read()
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    (tmp_path / "go7").touch()
    stdout, stderr = stopped.communicate(timeout=120)
    step = last(tmp_path, "cut")["global_step"]
    assert 7 <= step < 30, stderr
    assert stdout.count(f"SIGTERM: stopped after step {step}, saved ") == 1
    assert stderr.count("Traceback") == 1, stderr  # torchrun's own
    assert run_on(2, main, command("cut", "", "--ckpt_path=last", *both)) == [0, 0]
    assert run_on(2, main, command("whole", "", *both)) == [0, 0]
    found, expected = last(tmp_path, "cut"), last(tmp_path, "whole")
    assert found["global_step"] == expected["global_step"] == 30
    assert same(expected["state_dict"], found["state_dict"])
    assert same(expected["optimizer_states"], found["optimizer_states"])


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's variables, and a `scontrol` that writes its arguments to the file that is returned."""
    variables = {"JOB_ID": "4321", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # Lightning sets what is not there, and a test must not leave it behind
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/said\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path / "said"


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_JOB_ID": "4000", "SLURM_ARRAY_TASK_ID": "3"}])
def test_slurm_requeues_the_job(array, trainer, slurm, tmp_path, monkeypatch, capsys):
    for name, value in array.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGUSR1)

    def stop():
        with pytest.raises(PreemptedError) as caught:
            trainer(callbacks=[Preemption(), Tell(3, signal.SIGUSR1)], max_steps=8).fit(Model(), Data())
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGUSR1) is before
        return capsys.readouterr().out

    job = "4000_3" if array else "4321"
    out = stop()
    assert "SLURM's signal: stopped after step 3" in out
    assert f"job {job} is back in the queue" in out
    assert slurm.read_text() == f"requeue {job}\n"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    assert f"job {job} is not back in the queue: no such job; run: scontrol requeue {job}" in stop()
    scontrol.unlink()
    assert f"job {job} is not back in the queue: scontrol is not on PATH here; run: scontrol requ" in stop()


def test_the_command_ends_with_143_under_slurm_and_the_same_command_goes_on(command, slurm, tmp_path, capfd):
    told = command("cut", "Tell", "--trainer.callbacks.batch=7", f"--trainer.callbacks.signum={int(signal.SIGUSR1)}")
    process = get_context("fork").Process(target=lambda: sys.exit(main(told)))
    process.start()
    process.join(60)
    assert process.exitcode == 143
    out, error = capfd.readouterr()
    assert "SLURM's signal: stopped after step 7, saved " in out
    assert "Traceback" not in error
    assert slurm.read_text() == "requeue 4321\n"
    assert last(tmp_path, "cut")["global_step"] == 7
    assert main(command("cut", "", "--ckpt_path=last")) == 0
    assert last(tmp_path, "cut")["global_step"] == 30
