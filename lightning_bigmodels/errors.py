"""What is said when the user's input is wrong: one sentence that ends in an action."""

import difflib
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

_refused: ContextVar[list[str] | None] = ContextVar("refused", default=None)


class InputError(ValueError):
    """Input that only the user can mend: a file, a value, a setting.

    The message names the place (file and line, or the path of keys), the value and the remedy. The `bigmodels` command
    prints it in place of a traceback.
    """


class RunError(RuntimeError):
    """What ended a run although its input is right: a lost process, numbers that are none, a full disk.

    The message says what happened where and how to go on. The `bigmodels` command prints it in place of a traceback.
    """


def known_error(error: BaseException | None) -> InputError | RunError | None:
    """Find the error that explains itself also where Lightning or jsonargparse has wrapped it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, (InputError, RunError)):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def refuse(message: str) -> None:
    """Raise an InputError; under `noting_refusals` note it, and return: the caller goes on without what is wrong.

    For faults of single rows and files, of which a check is to tell all and a run the first.
    """
    refused = _refused.get()
    if refused is None:
        raise InputError(message)
    refused.append(message)


@contextmanager
def noting_refusals() -> Iterator[list[str]]:
    """Let `refuse` return, and hand out the list to which it adds."""
    noted: list[str] = []
    token = _refused.set(noted)
    try:
        yield noted
    finally:
        _refused.reset(token)


def near(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name nearest to `name`, or what there is if none is near."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known: {', '.join(names)}" if len(names) <= 20 else ""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package where it is used.

    Raises:
        InputError: the package is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise InputError(
            f"{module} is not installed; install it with: pip install 'lightning-bigmodels[{extra}]'"
        ) from error
