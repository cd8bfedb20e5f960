"""Callbacks with which the processes that tests start are disturbed at a known step."""

import os
import time
from pathlib import Path

from lightning.pytorch import Callback


class Pause(Callback):
    """Once, on one process after a step, say so and wait for the test, which breaks something meanwhile.

    Args:
        steps: Optimizer steps after which to wait.
        folder: Where `reached<step>` is written, with the process's number, and `go<step>` is waited for.
        rank: The process that waits.
    """

    def __init__(self, steps: list[int], folder: str, rank: int = 1) -> None:
        self.steps = steps
        self.folder = Path(folder)
        self.rank = rank

    def on_train_batch_end(self, trainer, *args):
        step = trainer.global_step
        reached = self.folder / f"reached{step}"
        if trainer.global_rank != self.rank or step not in self.steps or reached.exists():
            return
        reached.with_suffix(".tmp").write_text(str(os.getpid()))
        reached.with_suffix(".tmp").replace(reached)
        until = time.monotonic() + 60
        while not (self.folder / f"go{step}").exists():
            assert time.monotonic() < until, "the test has not gone on"
            time.sleep(0.05)
