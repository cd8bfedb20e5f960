"""What the forked Python has in common with a fresh one."""

import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os
import signal
import sys
import time
from pathlib import Path

if sys.argv[1] == "tell":
    print(sys.argv[2:], Path.cwd(), sys.path[:2], os.environ["OF"], __name__, sys.stdin.read())
    print("to stderr", file=sys.stderr)
    sys.exit(7)
if sys.argv[1] == "rank":
    from lightning.pytorch.utilities import rank_zero_only

    sys.exit(rank_zero_only.rank)
if sys.argv[1] == "fail":
    raise KeyError("which")
if sys.argv[1] == "note":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9))
Path("pid.new").write_text(str(os.getpid()))
Path("pid.new").rename("pid")
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that starts a program with a word under a Python, as a module or a file."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "program.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "work").mkdir()
    for name, value in {"PYTHONPATH": str(tmp_path / "modules"), "OF": "its own", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)

    def popen(python, *words, file=False):
        program = [str(tmp_path / "modules" / "program.py")] if file else ["-m", "program"]
        command = [python, "-u", *program, *words]
        return subprocess.Popen(
            command,
            cwd=tmp_path / "work",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return popen


def reached(process, path):
    """Return the number that the program has written."""
    until = time.monotonic() + 30
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    return int(path.read_text())


def runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("file", [False, True])
def test_it_has_its_own_arguments_files_folder_and_variables(start, python, file):
    ends = []
    for kind in (python, sys.executable):
        process = start(kind, "tell", "a b", "--c", file=file)
        ends.append((*process.communicate("typed"), process.returncode))
    assert ends[0] == ends[1]
    assert ends[0][0].startswith("['a b', '--c'] ")
    assert ends[0][1:] == ("to stderr\n", 7)


def test_lightning_knows_its_rank(start, python):
    process = start(python, "rank")
    process.communicate()
    assert process.returncode == 3


def test_an_error_is_printed_and_ends_it(start, python):
    process = start(python, "fail")
    assert process.communicate()[1].endswith("\nKeyError: 'which'\n")
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("word", "signum", "code"),
    [("note", signal.SIGUSR1, 9), ("note", signal.SIGTERM, -signal.SIGTERM), ("wait", signal.SIGUSR1, -signal.SIGUSR1)],
)
def test_signals_are_passed_on_and_it_ends_as_its_fork(start, python, tmp_path, word, signum, code):
    process = start(python, word)
    reached(process, tmp_path / "work" / "pid")
    process.send_signal(signum)
    process.communicate()
    assert process.returncode == code


@pytest.mark.parametrize("killed", ["the client", "the fork"])
def test_both_die_together(start, python, tmp_path, killed):
    process = start(python, "wait")
    fork = reached(process, tmp_path / "work" / "pid")
    assert fork != process.pid
    os.kill({"the client": process.pid, "the fork": fork}[killed], signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    until = time.monotonic() + 30
    while runs(fork):
        assert time.monotonic() < until
        time.sleep(0.02)
