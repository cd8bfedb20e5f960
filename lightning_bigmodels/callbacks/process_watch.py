"""A process that dies or is cut off ends the run on all others, soon and by name."""

import os
import re
import secrets
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.distributed_c10d import PrefixStore, Store

from lightning_bigmodels.errors import InputError, RunError

# what gloo, NCCL and the store say when the other side is gone
_COMMUNICATION = re.compile(r"connection|timed out|timeout|gloo|nccl|peer|socket", re.IGNORECASE)


class ProcessWatch(Callback):
    """Ends a run of several processes, with an error that names the lost one, when one of them is no longer heard of.

    Each process leaves a sign of life in the process group's store, and the first one says who has stopped to. Without
    that, the others wait in a collective for its time-out (half an hour) and name an address at most.

    Args:
        timeout: Seconds without a sign of life after which a process is lost; three intervals once a collective failed.
        interval: Seconds between two signs of life.

    Raises:
        InputError: The timeout is shorter than three intervals.
        RunError: A process is lost, and this one noticed by a failed collective. One that waits in a collective cannot
            be interrupted: it prints the same line and exits with code 1.
    """

    def __init__(self, timeout: float = 120.0, interval: float = 5.0) -> None:
        if interval <= 0 or timeout < 3 * interval:
            raise InputError(f"timeout is {timeout} s; set it to three intervals of {interval} s or more")
        self.timeout = timeout
        self.interval = interval
        self._watch: _Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start to watch, where there is somebody to watch."""
        if trainer.world_size > 1 and self._watch is None:
            # a name of its own: torchrun's store outlives a start, and must not tell the next one who was lost in it
            name = trainer.strategy.broadcast(f"process_watch/{secrets.token_hex(4)}")
            # a connection of its own: the process group's may wait for an answer
            store = PrefixStore(name, dist.distributed_c10d._get_default_store().clone())
            self._watch = _Watch(store, trainer.global_rank, trainer.world_size, self.timeout, self.interval)
            trainer.strategy.barrier("everybody has given a sign")
            self._watch.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave in peace."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Find out who is lost, if it is a failed collective that ends the run here."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        if isinstance(exception, RuntimeError) and _COMMUNICATION.search(str(exception)):
            verdict = watch.verdict()
            if verdict is not None:
                raise RunError(verdict) from exception
        # no farewell: to the others this process is lost, and so they shall hear
        watch.silence()


class _Watch:
    """Two threads: one leaves signs of life and reads those of others, one sees to it that the first gets answers."""

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float, interval: float) -> None:
        self._store = store
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank] if rank == 0 else [0]
        self._interval = interval
        self._patience = timeout
        self._stopped = threading.Event()
        self._decided = threading.Event()
        self._verdict: str | None = None
        self._main_waits = False
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._answered = time.monotonic()
        self._failure = "no answer"
        store.set(f"place/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        store.set(f"sign/{rank}", "0")

    def start(self) -> None:
        """Start to watch; by then every process must have made its watch."""
        self._answered = time.monotonic()
        for run in (self._give_signs, self._wait_for_verdict):
            threading.Thread(target=run, daemon=True, name=f"process watch, {run.__name__}").start()

    def stop(self) -> None:
        """Say farewell and stop watching."""
        self.silence()
        try:
            self._store.set(f"sign/{self._rank}", "end")
        except RuntimeError:
            # the first process keeps the store, and it may have gone home before this one
            if self._rank == 0:
                raise

    def silence(self) -> None:
        """Stop watching without a farewell."""
        self._stopped.set()

    def verdict(self) -> str | None:
        """Return who was lost, as soon as that is known; None if all others are there after ten intervals."""
        self._main_waits = True
        self._hurry()
        self._decided.wait(10 * self._interval)
        self._stopped.set()
        return self._verdict

    def _hurry(self) -> None:
        self._patience = 3 * self._interval

    def _give_signs(self) -> None:
        number = 0
        while not self._stopped.wait(self._interval):
            number += 1
            try:
                self._store.set(f"sign/{self._rank}", str(number))
                if self._main_waits:
                    self._store.set("alarm", "1")
                elif self._store.check(["alarm"]):
                    self._hurry()
                self._look()
            except RuntimeError as error:  # lost, or only for a moment: the other thread has the clock
                self._failure = str(error).strip().partition("\n")[0]
            else:
                self._answered = time.monotonic()

    def _look(self) -> None:
        if self._rank != 0 and self._store.check(["lost"]):
            self._decide(self._store.get("lost").decode())
            return
        silent = []
        now = time.monotonic()
        signs = self._store.multi_get([f"sign/{other}" for other in self._others])
        for other, sign in zip(self._others, signs, strict=True):
            known, since = self._seen.get(other, (b"", now))
            if sign != known:
                self._seen[other] = (sign, now)
            elif sign != b"end" and now - since > self._patience:
                silent.append(other)
        if silent:
            places = ", ".join(f"rank {other} ({self._store.get(f'place/{other}').decode()})" for other in silent)
            verdict = f"{places} gave no sign of life for {self._patience:g} s"
            if self._rank == 0:
                self._store.set("lost", verdict)
                time.sleep(2 * self._interval)  # the store ends with this process: let the others read it
            self._decide(verdict)

    def _wait_for_verdict(self) -> None:
        while not self._decided.wait(self._interval):
            if self._stopped.is_set():
                return
            if time.monotonic() - self._answered > self._patience + self._interval:
                self._decide(f"the store of rank 0 has not answered for {self._patience:g} s ({self._failure})")
        if not self._main_waits and not self._stopped.is_set():
            # the main thread waits in a collective, which nothing interrupts
            print(f"bigmodels: error: rank {self._rank}: {self._verdict}", file=sys.stderr, flush=True)
            _tell_torchrun(RuntimeError(self._verdict))
            os._exit(1)

    def _decide(self, what: str) -> None:
        if self._verdict is None:
            self._verdict = (
                f"{what}: it has crashed, was killed or cannot be reached; see its own output, and go on from the last "
                "checkpoint with --ckpt_path last"
            )
        self._decided.set()


def _tell_torchrun(error: Any) -> None:
    """Leave the error where torchrun's report looks for it; without torchrun there is no such place."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
