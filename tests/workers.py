"""Several processes in a test, forked from it: half a second a fit, since nothing is imported again.

Each worker finds the variables that torchrun sets, so strategies go by name (`ddp`, `fsdp2`), any number
of nodes can be told, and what a worker returns or raises comes back to the test.
"""

import faulthandler
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes

from tests.conftest import QUIET

_PATIENCE = 3  # seconds that a failed worker's siblings, who wait for it in a collective, are given to end


def run_on(processes: int, function: Callable[..., Any], *args: Any, num_nodes: int = 1, timeout: float = 120) -> list:
    """Call `function(*args)` in forked workers that torchrun seems to have started, and return what each returned.

    No process group is made; Lightning makes one, and so does `torch.distributed.init_process_group("gloo")`.

    Args:
        processes: The world size.
        function: What each worker calls; it may be a closure. What it returns must be picklable.
        args: Its arguments, objects of the test's own process.
        num_nodes: Hosts that the workers seem to run on; divides `processes`.
        timeout: Seconds until all workers are killed; shortly before, each prints its stack.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A worker raised; the message holds its traceback.
        torch.multiprocessing.ProcessExitedException: A worker was killed.
        TimeoutError: The workers did not end in time.
    """
    # Python 3.12 on warns of every thread at a fork; what pytest's own threads hold is not used in a worker
    warnings.filterwarnings("ignore", r".* is multi-threaded, use of fork", DeprecationWarning)
    with tempfile.TemporaryDirectory() as folder, _store() as port:
        task = (function, args, folder, processes, num_nodes, port, timeout)
        context = start_processes(_work, task, nprocs=processes, join=False, start_method="fork")
        end = time.monotonic() + timeout
        while not context.join(timeout=max(0.0, end - time.monotonic()), grace_period=_PATIENCE):
            if time.monotonic() >= end:
                for process in context.processes:
                    process.kill()
                    process.join()
                raise TimeoutError(f"{processes} workers did not end in {timeout} s; their stacks are on stderr")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(processes)]


@contextmanager
def _store() -> Iterator[int]:
    """Run the store that brings workers together, and give its port; no other test can take that meanwhile.

    It has a process of its own: its thread may hold a lock at the moment of a fork, which the fork would wait for.
    """
    fork = get_context("fork")
    mine, its = fork.Pipe()

    def serve() -> None:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        its.send(store.port)
        its.recv()

    server = fork.Process(target=serve, daemon=True)
    server.start()
    try:
        yield mine.recv()
    finally:
        server.kill()
        server.join()


def _work(
    rank: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    folder: str,
    processes: int,
    num_nodes: int,
    port: int,
    timeout: float,
) -> None:
    faulthandler.dump_traceback_later(0.9 * timeout, file=2)
    local = processes // num_nodes
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local),
        "GROUP_RANK": str(rank // local),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    # of a test that ran the command before; Lightning would seed the workers with it once more
    os.environ.pop("PL_GLOBAL_SEED", None)
    # the server from which the test's own process forks is no child of a worker, which must start one for itself
    forkserver._forkserver._forkserver_pid = None
    # Lightning reads the rank from the environment when it is imported, which was before the fork
    rank_zero_only.rank = rank
    torch.set_num_threads(1)
    result = function(*args)
    # a file, since tensors in a queue live in memory that ends with their process
    torch.save(result, Path(folder) / str(rank))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass
class Fit:
    """What one worker has to tell of its fit."""

    losses: list[float]
    """The loss of each of this worker's training batches."""
    weights: dict[str, torch.Tensor]
    """The whole state dict, on every worker."""
    metrics: dict[str, float]
    """The Trainer's callback metrics."""
    global_step: int
    report: Any
    """What `report(trainer)` returned."""


class _Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(float(outputs["loss"]))


def fit_on(
    processes: int,
    strategy: Any,
    build_module: Callable[[], LightningModule],
    build_data: Callable[[], LightningDataModule],
    *,
    report: Callable[[Trainer], Any] = lambda trainer: None,
    ckpt_path: str | Path | None = None,
    seed: int = 0,
    timeout: float = 120,
    **settings: Any,
) -> list[Fit]:
    """Fit on the CPU in forked workers and return what each of them saw; the process of the test is left as it was.

    Args:
        processes: The world size; 1 with `strategy="auto"` is the plain run to compare with.
        strategy: A name, or a function that returns a strategy, called in the worker.
        build_module: Returns the module, called in the worker after seeding.
        build_data: Returns the data module, called in the worker.
        report: Called in the worker after the fit with its Trainer; what it returns must be picklable.
        ckpt_path: Checkpoint to go on from.
        seed: Seed of torch before the module is built.
        timeout: Seconds until the workers are killed.
        settings: More arguments of the Trainer; `max_steps` is 4 unless given.
    """
    num_nodes = settings.pop("num_nodes", 1)

    def fit() -> Fit:
        torch.manual_seed(seed)
        module = build_module()
        losses = _Losses()
        values = {
            **QUIET,
            "devices": processes // num_nodes,
            "num_nodes": num_nodes,
            "strategy": strategy if isinstance(strategy, str) else strategy(),
            "limit_val_batches": 0,
            **settings,
        }
        callbacks = [*values.pop("callbacks", []), losses]
        trainer = Trainer(**values, callbacks=callbacks)
        trainer.fit(module, build_data(), ckpt_path=ckpt_path)
        weights = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in module.state_dict().items()
        }
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return Fit(losses.seen, weights, metrics, trainer.global_step, report(trainer))

    return run_on(processes, fit, num_nodes=num_nodes, timeout=timeout)
