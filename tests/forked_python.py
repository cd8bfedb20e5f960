"""A Python for commands that tests start, forked from one that has imported torch and Lightning already.

It is an executable that runs `-m MODULE` or a file. A client without imports hands its arguments, files, folder,
variables and network to a server, passes signals on, and ends as the server's fork ends. So a start costs a tenth
instead of seven seconds of a core; the one difference that a command can see is its parent, the server.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def serving():
    """Run the server, and give the path of the executable."""
    # sockets have a path of at most 107 characters
    with tempfile.TemporaryDirectory(prefix="python") as folder:
        executable, address = Path(folder, "python"), Path(folder, "server")
        client = f'exec {sys.executable} -I -S {__file__} ask {address} "$@"'
        executable.write_text(f"#!/bin/sh\n{client}\n", encoding="utf-8")
        executable.chmod(0o755)
        command = [sys.executable, "-m", "tests.forked_python", "serve", str(address)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as server:
            while not address.exists():
                assert server.poll() is None, "the server has not started"
                time.sleep(0.05)
            yield str(executable)
            # its standard input is closed now, on which it ends, and whatever it started


def ask(address, words):
    """Have `python *words` run by the server, and end as it does."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    socket.send_fds(server, [b"-"], [0, 1, 2])
    request = {"words": words, "variables": dict(os.environ), "folder": str(Path.cwd()), "client": os.getpid()}
    server.sendall(json.dumps(request).encode() + b"\n")

    def pass_on(number, frame):
        with suppress(BrokenPipeError):  # the fork has just ended
            server.send(bytes([number]))

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    code = int(server.recv(16) or 1)
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(address):
    """Fork for each client, until standard input is closed; return what the fork is asked for, and its files."""
    from lightning_bigmodels import CausalLanguageModel, Text, cli  # noqa: F401

    gc.freeze()  # so that forks share it
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    Path(f"{address}.new").rename(address)
    forks = {}  # by the connection of their client
    while True:
        # whether one has ended is looked at 50 times a second
        ready, _, _ = select.select([0, listener, *forks], [], [], 0.02 if forks else None)
        if 0 in ready:
            for fork in forks.values():
                os.kill(fork, signal.SIGKILL)
            sys.exit()
        for client in forks.keys() & set(ready):
            # nothing to read is a client that was killed
            for number in client.recv(16) or [signal.SIGKILL]:
                os.kill(forks[client], number)
        for client, fork in list(forks.items()):
            ended, status = os.waitpid(fork, os.WNOHANG)
            if ended:
                with suppress(BrokenPipeError):  # the client has just been killed
                    client.sendall(b"%d" % os.waitstatus_to_exitcode(status))
                client.close()
                del forks[client]
        if listener not in ready:
            continue
        client, _ = listener.accept()
        _, files, _, _ = socket.recv_fds(client, 1, 3)
        with client.makefile("rb") as lines:
            request = lines.readline()
        if request.endswith(b"\n"):
            forks[client] = os.fork()
            if not forks[client]:
                for connection in (listener, *forks):
                    connection.close()
                return json.loads(request), files
        for file in files:
            os.close(file)


def be(request, files, executable):
    """Be the Python that a client asked for."""
    os.setsid()  # a signal to its group leaves the server alone
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["variables"])
    _enter_network(request["client"])
    os.chdir(request["folder"])
    sys.path[:1] = [request["folder"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.executable = executable  # of which Lightning and Ray start more

    # Lightning reads the rank when it is imported
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    rank_zero_only.rank = _get_rank() or 0
    words = request["words"]
    if words[0] == "-u":
        sys.stdout.reconfigure(line_buffering=True)
        words = words[1:]
    by_name = words[0] == "-m"
    sys.argv = words[by_name:]
    try:
        if by_name:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # taking all modules down would last a second
    os._exit(code)


def _enter_network(process):
    """Be on the host of `process`, which on Linux may be a network namespace."""
    theirs, own = (Path(f"/proc/{name}/ns/net") for name in (process, "self"))
    if theirs.exists() and theirs.readlink() != own.readlink():
        import ctypes

        with theirs.open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), "no way into the network of the client")


if __name__ == "__main__":
    task, address, *words = sys.argv[1:]
    if task == "ask":
        ask(address, words)
    be(*serve(address), str(Path(address).with_name("python")))
