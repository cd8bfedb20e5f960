"""An end to a simulation that takes too long for whoever waits for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lightning_bigmodels.errors import InputError

_limit: ContextVar[tuple[float, float] | None] = ContextVar("limit", default=None)
"""When the time is over, and how many seconds it was."""


class TimeLimitError(InputError):
    """A simulation took longer than it may."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let what is simulated inside end with a TimeLimitError once it takes longer.

    Args:
        seconds: How long it may take, building the network included.
    """
    token = _limit.set((time.monotonic() + seconds, seconds))
    try:
        yield
    finally:
        _limit.reset(token)


def check_time() -> None:
    """Say that the time is over, if there is a limit and it is; a simulation asks before each operation.

    Raises:
        TimeLimitError: it is over.
    """
    limit = _limit.get()
    if limit is not None and time.monotonic() > limit[0]:
        raise TimeLimitError(f"a step cannot be simulated in {limit[1]:.1f} s; give it more time")
