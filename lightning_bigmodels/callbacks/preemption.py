"""Told to stop by SIGTERM or by SLURM, a run writes a checkpoint at the next optimizer step and ends."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_bigmodels.callbacks.report import show

EXIT_CODE = 143  # 128 + SIGTERM, as a shell counts it
_NOTHING, _STOP, _REQUEUE = range(3)
_SAME_REQUEST = 2.0  # seconds in which torchrun, SLURM and a shell pass the same signal on


class PreemptedError(SIGTERMException):
    """The run was told to stop, and did; a `SystemExit`, which ends the process with code 143 unless it is caught."""


class Preemption(Callback):
    """Ends a fit that is told to stop such that `ckpt_path: last` goes on exactly where it ended.

    SIGTERM comes from clouds, Kubernetes, `torchrun` and SLURM before they kill. The signal is only remembered; at the
    end of the next optimizer step (and of a validation) all processes agree, so that it is enough if one of them was
    told, and write `last.ckpt` through the run's first ModelCheckpoint, whatever that keeps otherwise. A validation
    that is due at this step is still done, behind the checkpoint, and the checkpoint is written anew. Then every
    process raises `PreemptedError`: exit code 143. A second SIGTERM, two seconds or more after the first, ends the
    process at once.

    Under SLURM the signal before the time limit (`#SBATCH --signal=SIGUSR1@120`) does the same, and then puts the job
    back into the queue. The exit code is 143 too, so that a batch script does not go on as if the training were done.

    While fit runs this takes the place of Lightning's own handlers, which save and wait for other processes in the
    middle of a batch (2.6.6), and of a SIGTERM handler of yours; all of them are put back afterwards.
    """

    def __init__(self) -> None:
        self._request = _NOTHING
        self._told_at: float | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._request, self._told_at = _NOTHING, None
        trainer._signal_connector = _Handlers(trainer, self._note)
        # the checkpoint holds what the other callbacks make of the batch, and ModelCheckpoint has written its own
        attributes = vars(trainer)
        attributes["callbacks"] = [*(c for c in attributes["callbacks"] if c is not self), self]

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """Remember the signal: a handler may run in the middle of anything."""
        if signum != signal.SIGTERM:
            self._request = self._request or _REQUEUE
            return
        now = time.monotonic()
        if self._told_at is None:
            self._told_at = now
        elif now - self._told_at > _SAME_REQUEST:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self._request = self._request or _STOP

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint = _model_checkpoint(trainer)
        if checkpoint is not None and checkpoint.last_model_path and not checkpoint.save_last:
            # once there is a last.ckpt, it must not fall behind
            checkpoint.save_last = True

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        # inside an accumulated step a sharded network could not go on exactly
        if trainer.fit_loop._should_accumulate():
            return
        request = self._agree(trainer)
        if request == _NOTHING:
            return
        path = _save(trainer, unless_saved=True)
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            # what Lightning does after this hook
            trainer._logger_connector.update_train_step_metrics()
            _leave(trainer, request, path)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        request = self._agree(trainer)
        if request != _NOTHING:
            _leave(trainer, request, _save(trainer))

    def _agree(self, trainer: Trainer) -> int:
        """Return what any of the processes was told."""
        if trainer.world_size == 1:
            return self._request
        request = torch.tensor(self._request, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(request, op=torch.distributed.ReduceOp.MAX)
        return int(request)


class _Handlers(_SignalConnector):
    """Lightning's own outside of fit; in fit, `note` for SIGTERM and for the signal at which SLURM's job requeues."""

    def __init__(self, trainer: Trainer, note: Callable[[int, FrameType | None], None]) -> None:
        super().__init__(trainer)
        self._note = note

    @override
    def register_signal_handlers(self) -> None:
        super().register_signal_handlers()  # it remembers those before it, and `teardown` puts them back
        if self.trainer.state.fn != "fit":
            return
        self._register_signal(signal.SIGTERM, self._note)
        environment = self.trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            self._register_signal(environment.requeue_signal, self._note)


def _model_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)


def _save(trainer: Trainer, unless_saved: bool = False) -> str | None:
    """Write `last.ckpt` through the first ModelCheckpoint and return its path; None where there is none.

    Args:
        trainer: The run.
        unless_saved: Whether to be content with a `last.ckpt` that was written in this very hook.
    """
    checkpoint = _model_checkpoint(trainer)
    if checkpoint is None or vars(trainer).get("fast_dev_run"):
        return None
    chosen = checkpoint.save_last, checkpoint.save_weights_only
    # a step of the user's own may count several batches as one
    unless_saved = unless_saved and trainer.lightning_module.automatic_optimization
    written = checkpoint._last_global_step_saved == trainer.global_step
    written = written and checkpoint._last_checkpoint_saved == checkpoint.last_model_path
    if not (unless_saved and written and not checkpoint.save_weights_only):
        # a link would point to an earlier step, and weights alone do not go on
        checkpoint.save_last, checkpoint.save_weights_only = True, False
        try:
            checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
        finally:
            checkpoint.save_last, checkpoint.save_weights_only = chosen
    return checkpoint.last_model_path


def _leave(trainer: Trainer, request: int, path: str | None) -> None:
    """Say what was done, requeue if that was asked for, and raise on every process."""
    cause = "SIGTERM" if request == _STOP else "SLURM's signal"
    done = f"saved {path}, and --ckpt_path last goes on" if path else "saved nothing, having no ModelCheckpoint"
    show(trainer, f"{cause}: stopped after step {trainer.global_step}, {done}")
    if request == _REQUEUE and trainer.is_global_zero:
        show(trainer, _requeue())
    raise PreemptedError(own_exit_code(trainer, EXIT_CODE))


def own_exit_code(trainer: Trainer, code: int) -> int:
    """Return the exit code with which this process says that the run ends with `code`.

    Lightning's launcher kills the first process, which may still be writing, as soon as one that it started fails
    (2.6.6): to those the end of the run is no failure.
    """
    environment = trainer._accelerator_connector.cluster_environment
    return 0 if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0 else code


def _requeue() -> str:
    """Put the SLURM job back into the queue and return what came of it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    assert re.fullmatch(r"[0-9_]+", job)
    command = ["scontrol", "requeue", job]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return f"job {job} is not back in the queue: scontrol is not on PATH here; run: {' '.join(command)}"
    if result.returncode != 0:
        return f"job {job} is not back in the queue: {result.stderr.strip()}; run: {' '.join(command)}"
    return f"job {job} is back in the queue"
