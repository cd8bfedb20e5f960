"""Processes that load batches: they end when their trainer says so, and not when the whole job is told to."""

import os
import signal
import sys
import threading

from lightning.fabric.utilities.seed import pl_worker_init_function


def outlive_sigterm(worker_id: int) -> None:
    """Let a process that loads batches end at its trainer's word only; a `worker_init_fn`.

    torchrun and SLURM send SIGTERM to every process of a job. The trainer writes a checkpoint first, and for that it
    must not fail for want of a loader.
    """
    if int(os.environ.get("PL_SEED_WORKERS", "0")):
        pl_worker_init_function(worker_id)  # Lightning adds it where no other function is
    # who has sent a signal is known where sigwaitinfo is, so not on macOS
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
