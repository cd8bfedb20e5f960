"""Processes that work through a list, report how far they are, and end with the one that started them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lightning_bigmodels.data.token_cache import REPORT_SECONDS, Report
from lightning_bigmodels.errors import RunError

Job = TypeVar("Job")
Result = TypeVar("Result")

# In a worker: what all have done together, and whether they are to stop.
_done: Any = None
_stop: Any = None


class Stopped(Exception):  # noqa: N818  # no error: the work is called off
    """Raised in a worker by `advance` when another has failed, or the user has interrupted."""


class WorkerPool:
    """A pool of processes, used in a `with` block, at whose end nothing runs on.

    Args:
        num_workers: Number of processes; 0: a thread of this process, which starts at once.
        report: Called with a sentence now and then.
    """

    def __init__(self, num_workers: int, report: Report) -> None:
        # Forked from a process that has no threads, whose locks a fork would copy, and that has imported all once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lightning_bigmodels.data.preparation", "litdata.streaming.writer"])
        self._done, self._stop = context.Value("q", 0), context.Event()
        self._report = report
        self._pool: Executor
        if num_workers == 0:
            self._pool = ThreadPoolExecutor(1, initializer=_share, initargs=(self._done, self._stop))
        else:
            arguments = (self._done, self._stop)
            self._pool = ProcessPoolExecutor(num_workers, context, initializer=_begin_process, initargs=arguments)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def run(
        self, work: Callable[[Job], Result], jobs: Sequence[Job], what: str, total: int | None = None
    ) -> list[Result]:
        """Return the results in order.

        Args:
            work: Done in the processes, for each job; it calls `advance`.
            jobs: What is to be done.
            what: Begins the sentences that say how far the work is.
            total: Bytes of all jobs together; None: not known.

        Raises:
            RunError: a process was killed.
        """
        self._done.value = 0
        began = time.monotonic()
        futures = [self._pool.submit(work, job) for job in jobs]
        pending = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, REPORT_SECONDS, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                if pending:
                    self._tell(what, total, time.monotonic() - began)
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process was killed, perhaps because memory ran out; start the same command again: it goes "
                "on, and needs less memory with a smaller --num_workers"
            ) from error
        return [future.result() for future in futures]

    def _tell(self, what: str, total: int | None, seconds: float) -> None:
        done = self._done.value / 1e6
        of = "" if total is None else f" of {total / 1e6:,.0f}"
        self._report(f"{what}: {done:,.0f}{of} MB, {done / seconds:,.1f} MB/s")


def advance(num_bytes: int) -> None:
    """Count bytes as done; called by work in a worker, every second or so.

    Raises:
        Stopped: the work is called off.
    """
    if _stop.is_set():
        raise Stopped
    with _done.get_lock():
        _done.value += num_bytes


def _share(done: Any, stop: Any) -> None:
    global _done, _stop
    _done, _stop = done, stop


def _begin_process(done: Any, stop: Any) -> None:
    _share(done, stop)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the first process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the pool's own queues would let it wait for ever
