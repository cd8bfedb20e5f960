"""Two hosts, joined by a wire that can be cut: what is lost, who says so, and how the run goes on.

The hosts are network namespaces of this machine, which takes root on Linux.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from lightning_bigmodels.__main__ import main
from tests.recipe_text import tiny_text
from tests.test_recipes import ONE_PROCESS
from tests.workers import run_on

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]
STEPS = 40
CUT, KILLED = 23, 33


class Hosts:
    """Two namespaces, a and b, and a wire between them.

    Args:
        python: With what torchrun starts the command.
    """

    def __init__(self, python):
        self.python = python
        self.names = {host: f"bm{host}{os.getpid()}" for host in "ab"}
        self.address = {"a": "10.77.0.1", "b": "10.77.0.2"}
        for name in self.names.values():
            _ip("netns", "add", name)
        a, b = self.names["a"], self.names["b"]
        _ip("link", "add", "wire", "netns", a, "type", "veth", "peer", "name", "wire", "netns", b)
        for host, name in self.names.items():
            _ip("-n", name, "addr", "add", f"{self.address[host]}/24", "dev", "wire")
            self.set_link(host, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def set_link(self, host, state):
        _ip("-n", self.names[host], "link", "set", "wire", state)

    def remove(self):
        for name in self.names.values():
            _ip("netns", "del", name)

    def torchrun(self, host, folder, *arguments):
        """Start the command under torchrun on one host; its output goes to `folder`/<host>.log."""
        command = [
            *("ip", "netns", "exec", self.names[host]),
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--monitor-interval", "0.3"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.address['a']}:29400"),
            # the address has no name here by which torchrun could tell whose it is
            *("--rdzv-conf", f"is_host={host == 'a':d},join_timeout=120,read_timeout=20"),
            *("--rdzv-id", folder.name, "--local-addr", self.address[host]),
            *("-m", "lightning_bigmodels", *arguments),
        ]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "wire", "WANDB_MODE": "disabled", "PYTHON_EXEC": self.python}
        # torchrun else keeps one store for all its starts, where a new process may read the address of a dead one
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with (folder / f"{host}.log").open("wb") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=Path(__file__).parents[1]
            )


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts(python):
    """Return the two hosts."""
    if shutil.which("ip") is None:
        pytest.skip("this machine has no `ip` command (iproute2) to make network namespaces with")
    try:
        made = Hosts(python)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
    yield made
    made.remove()


def fit(folder, strategy, text_file, *callbacks):
    """Return the command of a fit of the quickstart, in small, on two hosts; its data and its run go to `folder`."""
    folder.mkdir()
    (folder / "text.txt").write_bytes(text_file.read_bytes())
    overrides = tiny_text("qwen3", folder)
    overrides["trainer"] |= {
        **ONE_PROCESS,
        "num_nodes": 2,
        "strategy": strategy,
        "precision": "32-true",
        "max_steps": STEPS,
        "val_check_interval": STEPS // 2,
        "default_root_dir": str(folder / "run"),
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 5, "save_last": True, "save_top_k": 0},
            },
            {"class_path": "ProcessWatch", "init_args": {"timeout": 4, "interval": 1}},
            *callbacks,
        ],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(overrides), encoding="utf-8")
    return ["fit", "--config", "text/quickstart", "--config", str(folder / "tiny.yaml")]


def weights(folder):
    """Return the weights at the end of the fit in `folder`."""
    path = folder / "run" / "fit" / "version_0" / "checkpoints" / "last.ckpt"
    if path.is_dir():
        assert main(["consolidate", str(path), "--output", str(folder / "plain.ckpt")]) == 0
        path = folder / "plain.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == STEPS
    return content["state_dict"]


class Job:
    """A fit on both hosts, which waits after two of its steps for the test."""

    def __init__(self, hosts, folder, strategy, text_file):
        pause = {"class_path": "tests.faults.Pause", "init_args": {"steps": [CUT, KILLED], "folder": str(folder)}}
        command = [*fit(folder, strategy, text_file, pause), "--ckpt_path", "last"]
        self.folder = folder
        self.processes = {host: hosts.torchrun(host, folder, *command) for host in "ab"}

    def log(self, host):
        return (self.folder / f"{host}.log").read_text(encoding="utf-8", errors="replace")

    def wait_for(self, what, seconds=90):
        """Wait until `what()` is true, and return it."""
        until = time.monotonic() + seconds
        while not (found := what()):
            running = [host for host, process in self.processes.items() if process.poll() is None]
            assert running, self.log("a")[-3000:] + self.log("b")[-3000:]
            assert time.monotonic() < until, self.log("a")[-3000:] + self.log("b")[-3000:]
            time.sleep(0.1)
        return found

    def wait(self):
        for host, process in self.processes.items():
            assert process.wait(timeout=180) == 0, self.log(host)[-3000:]

    def stop(self):
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_cut_wire_and_a_killed_process_cost_no_bit(strategy, hosts, tmp_path, text_file, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    # what nothing disturbs needs no wire
    whole = fit(tmp_path / "whole", strategy, text_file)
    assert run_on(2, lambda: main(whole), num_nodes=2) == [0, 0]

    job = Job(hosts, tmp_path / "disturbed", strategy, text_file)
    try:
        # host b is cut off in the middle of an epoch; both notice, and say whom they miss
        job.wait_for((job.folder / f"reached{CUT}").exists)
        hosts.set_link("b", "down")
        (job.folder / f"go{CUT}").touch()
        job.wait_for(lambda: "error: rank 0: rank 1 (process" in job.log("a"), seconds=30)
        job.wait_for(lambda: "error: rank 1: the store of rank 0 has not answered" in job.log("b"), seconds=30)
        hosts.set_link("b", "up")
        # torchrun has started both again, from the last checkpoint; now a process is killed
        job.wait_for((job.folder / f"reached{KILLED}").exists)
        os.kill(int((job.folder / f"reached{KILLED}").read_text()), signal.SIGKILL)
        job.wait_for(lambda: re.search(r"rank 1 \(process \d+ on \S+\) gave no sign of life for 3 s", job.log("a")))
        (job.folder / f"go{KILLED}").touch()
        job.wait()
    finally:
        hosts.set_link("b", "up")
        job.stop()

    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "disturbed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
