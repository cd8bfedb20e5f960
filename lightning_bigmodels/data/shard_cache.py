"""Shards on the local disk: fetched ahead of their use, shared by the processes of a node, bounded in bytes."""

import fcntl
import os
import queue
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from numpy.typing import NDArray

from lightning_bigmodels.data.shards import Preparation
from lightning_bigmodels.data.stores import Folder, StoredFile
from lightning_bigmodels.errors import InputError, RunError

NUM_THREADS = 4  # that fetch at the same time in each process


class ShardCache:
    """Hands out the shards of a preparation: of a folder where they lie, of an object store from the local disk.

    On the local disk the shards of all preparations in the same `cache_dir` share the limit. The one that was opened
    longest ago goes first; one that is open stays. Each that comes in is compared with its CRC-32.

    Attributes:
        in_place: Whether the shards are read where they lie.

    Args:
        preparation: Whose shards.
        limit: Bytes of the local disk that shards may take, those of all processes of the node together.
    """

    def __init__(self, preparation: Preparation, limit: int) -> None:
        self.preparation = preparation
        self.limit = limit
        self.in_place = isinstance(preparation.store, Folder)
        self._checked: set[int] = set()

    def open(self, shard: int) -> NDArray[Any]:
        """Return the tokens of a shard, mapped, fetched now if it has not been before; open as long as they are held.

        Raises:
            InputError: it is missing, or the limit leaves no room for it.
            RunError: it is damaged, the store does not answer, or the disk is full.
        """
        while True:
            path = self.fetch(shard)
            if path is None:
                raise InputError(f"shards in use fill the {self.limit / 1e9:g} GB of shard_cache_gb; set it higher")
            with suppress(FileNotFoundError), path.open("rb") as file:  # or removed since, for another process's sake
                if not self.in_place:
                    # A lock of the system, which the map keeps until it is gone, however its process ends.
                    fcntl.flock(file, fcntl.LOCK_SH)
                    os.utime(file.fileno())
                return self.preparation.shard_tokens(file)

    def fetch(self, shard: int) -> Path | None:
        """Bring a shard to where it can be opened at once, and return where; None: there is no room for it now."""
        file, store = self.preparation.shards[shard], self.preparation.store
        if isinstance(store, Folder):
            if shard not in self._checked:
                store.check(file)
                self._checked.add(shard)
            return store.path / file.name
        path = self.preparation.folder / file.name
        if path.is_file():
            return path
        lock = path.with_suffix(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):  # of the processes that want a shard one fetches it
                try:
                    return path if path.is_file() or self._download(file, path) else None
                finally:
                    lock.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(
                f"{path} cannot be written: {error.strerror}; make room for shard_cache_gb in cache_dir or set another "
                "one, then go on with --ckpt_path last"
            ) from error

    def _download(self, file: StoredFile, path: Path) -> bool:
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with FileLock(self.preparation.folder.parent / "shards.lock"):
            if not self._make_room(file.size):
                return False
            target = partial.open("wb")
            fcntl.flock(target, fcntl.LOCK_EX)
            target.truncate(file.size)  # others count it from now on
        try:
            self.preparation.store.fetch(file, target)
            target.flush()
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
            target.close()
        return True

    def _make_room(self, size: int) -> bool:
        """Remove what was opened longest ago until `size` bytes fit, also what killed processes left half fetched."""
        found = []
        for path in self.preparation.folder.parent.glob("shards-*/shards/*.bin*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        excess = sum(used for _, used, _ in found) + size - self.limit
        for _, used, path in sorted(found):
            if excess <= 0:
                break
            if _remove_unused(path):
                excess -= used
        return excess <= 0


class ShardFetcher:
    """Fetches shards in the background; threads of one process, started with the first request.

    Args:
        cache: Where they go.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._requests: queue.SimpleQueue[tuple[int, Future[None]]] = queue.SimpleQueue()
        self._futures: dict[int, Future[None]] = {}
        self._threads: list[threading.Thread] = []

    def request(self, shard: int) -> None:
        """Let a shard be fetched; requests are served in order."""
        # What is done lies on the disk, or has failed and will be tried anew.
        self._futures = {number: future for number, future in self._futures.items() if not future.done()}
        if shard in self._futures:
            return
        if len(self._threads) < NUM_THREADS:
            # A daemon: it must not keep a process that has failed.
            self._threads.append(threading.Thread(target=self._serve, daemon=True))
            self._threads[-1].start()
        future: Future[None] = Future()
        self._futures[shard] = future
        self._requests.put((shard, future))

    def open(self, shard: int) -> NDArray[Any]:
        """Do as `ShardCache.open`, after waiting for the shard where it is being fetched."""
        future = self._futures.pop(shard, None)
        # One that failed before anybody needed it is tried anew, for the store may be back.
        if future is not None and not future.done() and not future.cancel():
            future.result()
        return self._cache.open(shard)

    def _serve(self) -> None:
        while True:
            shard, future = self._requests.get()
            if future.set_running_or_notify_cancel():
                try:
                    self._cache.fetch(shard)
                except BaseException as error:  # handed to whoever waits for the shard
                    future.set_exception(error)
                else:
                    future.set_result(None)


def _remove_unused(path: Path) -> bool:
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
    return True
