"""Where a plan's one process finds itself: the first of all those that a run would have, on a machine without GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lightning.fabric.plugins import ClusterEnvironment
from typing_extensions import override


class FirstProcess(ClusterEnvironment):
    """The first of some processes, the others of which are not there.

    Args:
        world_size: How many there would be.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self._world_size = world_size

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    @override
    def main_port(self) -> int:
        return 0

    @staticmethod
    @override
    def detect() -> bool:
        return False

    @override
    def world_size(self) -> int:
        return self._world_size

    @override
    def set_world_size(self, size: int) -> None:
        pass

    @override
    def global_rank(self) -> int:
        return 0

    @override
    def set_global_rank(self, rank: int) -> None:
        pass

    @override
    def local_rank(self) -> int:
        return 0

    @override
    def node_rank(self) -> int:
        return 0


@contextmanager
def without_gpus() -> Iterator[None]:
    """Hide this machine's GPUs, which others may be using, and whose random state is the run's.

    Lightning reads and sets the random state of each around a validation (2.6), for which CUDA is started on all.
    """

    def nothing(*_: Any) -> None:
        return None

    with mock.patch.multiple(
        "torch.cuda",
        device_count=lambda: 0,
        is_available=lambda: False,
        is_initialized=lambda: False,
        _initialized=False,
        is_current_stream_capturing=lambda: False,
        manual_seed=nothing,
        manual_seed_all=nothing,
    ):
        yield
