"""docs/scaling.md is true: its commands and scripts run here, under torchrun, SLURM's variables and Ray, in small.

SLURM itself is imitated: its variables, `srun` and `scontrol`.
"""

import csv
import inspect
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

from lightning_bigmodels import CausalLanguageModel, Text, cli, strategies
from lightning_bigmodels.__main__ import VERBS, main
from tests.conftest import TINY_LLAMA
from tests.story import NETWORK, TEXT, TRAINER, shrink
from tests.test_horovod_mapping import PAGE, ROOT, Traffic, traffic
from tests.workers import fit_on, run_on

STEPS = 40


class Block(NamedTuple):
    line: int
    language: str
    name: str
    text: str


def blocks():
    """Return every fenced block: the line of its fence, and the file's name that its first line of comment gives."""
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.M | re.S):
        name = re.match(r"(?:#!.*\n)?# (\w+\.\w+)", match[2])
        found.append(Block(PAGE[: match.start()].count("\n") + 1, match[1], name[1] if name else "", match[2]))
    return found


def script(name, changes):
    """Return the block of this name with changes, all of which it must have."""
    (text,) = [block.text for block in blocks() if block.name == name]
    for old, new in changes.items():
        assert old in text, f"{name} has no {old!r} any more"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home, where the tokens of all tests lie."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def folder(tmp_path, monkeypatch, home):
    """The reader's folder, and his environment."""
    for name in ("WANDB_API_KEY", "XDG_CACHE_HOME", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "HOME": str(home),
        "PATH": f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_tiny(*callbacks):
    """Write tiny.yaml: a short fit of a tiny network, which saves now and then."""
    saves = {"every_n_train_steps": 5, "save_last": True}
    trainer = {
        **{key: value for key, value in TRAINER.items() if key != "devices"},
        "max_steps": STEPS,
        "val_check_interval": STEPS,
        "limit_val_batches": 1,
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": saves}, *callbacks],
    }
    content = {"trainer": trainer, "model": {"init_args": {"config": NETWORK}}, "data": {"init_args": TEXT}}
    Path("tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def pause(step, rank):
    return {"class_path": "tests.faults.Pause", "init_args": {"steps": [step], "folder": ".", "rank": rank}}


def wait_for(what, processes, log, seconds=90):
    until = time.monotonic() + seconds
    while not what():
        assert any(process.poll() is None for process in processes), log()
        assert time.monotonic() < until, log()
        time.sleep(0.05)


def assert_went_on_exactly():
    """One run, whose every step was done and logged once."""
    (run,) = Path("runs/quickstart/fit").iterdir()
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert steps == list(range(STEPS))
    content = torch.load(run / "checkpoints" / "last.ckpt" / "meta.pt", weights_only=True)
    assert content["global_step"] == STEPS


# torch says so of the profiler that Lightning makes
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events at the end of each cycle")
def test_the_commands_run_in_order(folder, capfd):
    for block in blocks():
        if block.language != "bash" or block.name:
            continue
        for command in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(command)
            words = shrink(words, set()) if "--config" in words else words
            if words[0] == "torchrun":
                result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
                assert result.returncode == 0, result.stderr
            else:
                assert words[0] == "bigmodels", f"line {block.line}: neither run nor known"
                more = ["--max", "4"] if words[1] == "batch-size" else []
                if "--trainer.profiler" in words:
                    # it leaves out the first two batches, and is another one where there are fewer than five
                    more = [f"--trainer.{name}=6" for name in ("max_steps", "val_check_interval", "limit_val_batches")]
                processes = 2 if "--trainer.devices" in words else 1
                assert run_on(processes, main, [*words[1:], *more]) == [0] * processes, f"line {block.line}"

    assert "largest batch per process: --data.batch_size 4" in capfd.readouterr().out
    runs = Path("runs/quickstart/fit")
    assert (runs / "version_0/checkpoints/last.ckpt").is_file()
    assert (runs / "version_1/checkpoints/last.ckpt").is_dir()
    content = torch.load("quickstart.ckpt", weights_only=True)
    assert content["global_step"] == TRAINER["max_steps"]
    assert content["state_dict"].keys() == torch.load(runs / "version_0/checkpoints/last.ckpt")["state_dict"].keys()
    assert "shards: shards" in (runs / "version_2/config.yaml").read_text(encoding="utf-8")
    traces = list((runs / "version_3").glob("*training_step*.json"))
    assert len(traces) == 2
    assert all('"gloo:all_reduce"' in trace.read_text(encoding="utf-8") for trace in traces)


def test_every_script_is_run_here():
    assert {block.name for block in blocks()} - {""} == {"host.sh", "train.sbatch", "train_on_ray.py"}


class Hosts:
    """Hosts that run host.sh: several on this machine, each with an address of its own.

    Args:
        python: With what torchrun starts the command.
    """

    def __init__(self, python):
        self.python = python
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.running = {}

    def start(self, name, number):
        settings = f"is_host={number == 1:d},join_timeout=60,last_call_timeout=1,keep_alive_interval=1"
        changes = {
            "1:4": "1:2",
            "--nproc-per-node 8": "--nproc-per-node 1",
            "--trainer.devices 8": "--trainer.devices 1",
            "$1:29400": f"$1:{self.port}",
            "--rdzv-id quickstart": f"--rdzv-id quickstart --rdzv-conf {settings} --local-addr 127.0.0.{number} "
            "--monitor-interval 0.3",
            "--config text/quickstart": "--config text/quickstart --config tiny.yaml",
        }
        Path(f"{name}.sh").write_text(script("host.sh", changes), encoding="utf-8")
        with Path(f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                ["bash", f"{name}.sh", "127.0.0.1"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LOGLEVEL": "INFO", "PYTHON_EXEC": self.python},
                start_new_session=True,
            )

    def log(self):
        return "".join(Path(f"{name}.log").read_text(encoding="utf-8")[-3000:] for name in self.running)

    def wait_for(self, what):
        wait_for(what, self.running.values(), self.log)

    def kill(self, name, worker):
        """End a host and the process that it started, as when its power goes."""
        os.kill(worker, signal.SIGKILL)
        os.killpg(self.running[name].pid, signal.SIGKILL)
        self.running.pop(name).wait()

    def stop(self):
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # torchrun ends what it has started
                process.wait(60)


def test_a_host_is_lost_and_another_comes(folder, python):
    watch = {"class_path": "ProcessWatch", "init_args": {"timeout": 3, "interval": 1}}
    write_tiny(watch, pause(12, rank=1), pause(26, rank=0))
    hosts = Hosts(python)
    try:
        hosts.start("first", 1)
        hosts.start("second", 2)
        hosts.wait_for(Path("reached12").exists)
        hosts.kill("second", worker=int(Path("reached12").read_text()))
        # the first goes on alone
        hosts.wait_for(Path("reached26").exists)
        hosts.start("third", 2)
        hosts.wait_for(lambda: "Detected 1 new nodes" in Path("first.log").read_text())
        Path("go26").touch()
        assert [process.wait(90) for process in hosts.running.values()] == [0, 0], hosts.log()
    finally:
        hosts.stop()
    log = Path("first.log").read_text()
    assert re.findall(r"MEMBER: (\d/\d)", log) == ["1/2", "1/1", "1/2"]
    assert "rank 1 (process" in log
    assert "SIGTERM: stopped after step 26, saved " in log
    assert_went_on_exactly()


SRUN = """#!/bin/bash
for task in 0 1; do
  SLURM_PROCID=$task SLURM_NODEID=$task SLURM_LOCALID=0 "$@" &
  tasks+=($!)
done
echo "${tasks[@]}" > tasks
for task in "${tasks[@]}"; do wait "$task"; done
"""


def test_a_slurm_job_is_signalled_and_requeued(folder, python, monkeypatch):
    write_tiny(pause(12, rank=1))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = {"JOB_ID": 4321, "JOB_NAME": "train", "NTASKS": 2, "NTASKS_PER_NODE": 1, "NNODES": 2, "NODELIST": "localhost"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("MASTER_PORT", str(port))  # else made of the job's number, which may be taken here
    commands = {
        "srun": SRUN,
        "scontrol": "#!/bin/sh\necho $@ >> said\n",
        "bigmodels": f'#!/bin/sh\nexec {python} -m lightning_bigmodels "$@"\n',
    }
    for name, text in commands.items():
        Path(name).write_text(text, encoding="utf-8")
        Path(name).chmod(0o755)
    text = script("train.sbatch", {"--config text/quickstart": "--config text/quickstart --config tiny.yaml"})
    Path("train.sbatch").write_text(text, encoding="utf-8")
    told = signal.Signals[re.search(r"^#SBATCH .*--signal=(\w+)@\d+$", text, flags=re.M)[1]]

    def start():
        with Path("log").open("ab") as log:
            return subprocess.Popen(["bash", "train.sbatch"], stdout=log, stderr=subprocess.STDOUT)

    job = start()
    wait_for(Path("reached12").exists, [job], Path("log").read_text)
    for task in Path("tasks").read_text().split():
        os.kill(int(task), told)
    Path("go12").touch()
    assert job.wait(60) == 143, Path("log").read_text()
    assert "SLURM's signal: stopped after step 12, saved " in Path("log").read_text()
    assert Path("said").read_text() == "requeue 4321\n"
    assert start().wait(120) == 0, Path("log").read_text()
    assert_went_on_exactly()


FAULT = """
import os
import signal
import time
from pathlib import Path

from lightning.pytorch import Callback

FOLDER = Path({folder!r})


class KilledOnce(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_rank != 0:
            return
        with (FOLDER / "epochs").open("a") as file:
            file.write(str(trainer.current_epoch))
        if (FOLDER / "epochs").read_text() == 10 * "0" + "1":
            # Ray takes note of a checkpoint a moment after it was reported
            while not (FOLDER / "runs/ray/gpt2/checkpoint_manager_snapshot.json").exists():
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ray_trains_and_goes_on_when_a_worker_is_killed(folder, python, monkeypatch):
    Path("fault.py").write_text(FAULT.format(folder=str(folder)), encoding="utf-8")
    changes = {
        "\n\ndef train": "\nfrom fault import KilledOnce\n\n\ndef train",
        "[RayTrainReportCallback()]": "[KilledOnce(), RayTrainReportCallback()]",
    }
    Path("train_on_ray.py").write_text(script("train_on_ray.py", changes), encoding="utf-8")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("TMPDIR", str(folder))
    # Ray's sockets have a path of at most 107 characters
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short:
        monkeypatch.setenv("RAY_TMPDIR", short)
        process = subprocess.Popen(
            [python, "train_on_ray.py"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            process.terminate()  # on which Ray ends its processes
    assert process.returncode == 0, output
    assert Path("epochs").read_text() == 10 * "0" + "1" + 10 * "1"
    (metrics,) = re.findall(r"^\{'train_loss'.*\}$", output, flags=re.M)
    assert "'epoch': 1, 'step': 20" in metrics
    reported = [torch.load(path, weights_only=True) for path in Path("runs/ray/gpt2").glob("*/checkpoint.ckpt")]
    assert sorted(content["global_step"] for content in reported) == [10, 20]


def sent(strategy, text, **settings):
    """Return the bytes that one of two processes gives to each collective in a step, and the number of calls."""

    def build():
        return CausalLanguageModel(architecture="llama", config=TINY_LLAMA)

    passes = settings.get("accumulate_grad_batches", 1)
    watch = Traffic(2 * passes, 3 * passes - 1)
    fits = fit_on(2, strategy, build, lambda: text(batch_size=4), callbacks=[watch], report=traffic, **settings)
    model = build()
    model.configure_model()
    in_blocks = sum(p.numel() for block in model.blocks() for p in block.parameters())
    return *fits[0].report, sum(p.numel() for p in model.parameters()), in_blocks


def test_what_each_strategy_sends(text):
    bytes_, _, everything, in_blocks = sent("ddp", text)
    assert bytes_["all_reduce", "float"] == 4 * everything
    for name, kind in {"ddp_fp16_gradients": "c10::Half", "ddp_bf16_gradients": "c10::BFloat16"}.items():
        bytes_, *_ = sent(name, text)
        assert bytes_["all_reduce", kind] == 2 * everything
    weights = 4 * (everything + in_blocks) / 2
    bytes_, *_ = sent("fsdp2", text)
    # gloo's reduce-scatter is an all-reduce
    assert bytes_ == {("all_gather", "float"): weights, ("all_reduce", "float"): 4 * everything}
    bytes_, *_ = sent("fsdp2", text, accumulate_grad_batches=2)
    assert bytes_ == {("all_gather", "float"): 2 * weights, ("all_reduce", "float"): 2 * 4 * everything}
    bytes_, *_ = sent("fsdp2", text, precision="bf16-mixed")
    assert bytes_ == {
        ("all_gather", "c10::BFloat16"): 2 * 2 * in_blocks / 2,
        ("all_gather", "float"): 4 * (everything - in_blocks) / 2,
        ("all_reduce", "float"): 4 * everything,
    }
    _, calls, *_ = sent("tp", text)
    # beside those of layers one behind the embedding and one before the output
    assert calls["all_reduce", "float"] == 7 * TINY_LLAMA["num_hidden_layers"] + 2


def column(head):
    """Return the words in backticks of the first column of the table whose first row begins with `head`."""
    table = re.search(rf"^\| {re.escape(head)} \|.*\n\|[ |-]+\n((?:\|.*\n)+)", PAGE, flags=re.M)
    return {word for row in table[1].splitlines() for word in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_what_the_page_names_is_there():
    ours = {name for name, entry in StrategyRegistry.items() if entry["strategy"].__module__.startswith("lightning_bi")}
    assert column("strategy") == {*ours, "ddp", "fsdp"}
    assert {"ddp", "fsdp"} <= StrategyRegistry.keys()
    assert column("callback") == {kind.__name__ for kind in cli._GUARDS}
    owners = {"trainer": Trainer, "model": CausalLanguageModel, "data": Text}
    found = set(re.findall(r"(?:--|`)(trainer|model|data)\.(\w+)", PAGE))
    assert len(found) > 10
    known = {owner: {*inspect.signature(kind).parameters, *dir(kind)} for owner, kind in owners.items()}
    assert [f"{owner}.{name}" for owner, name in found if name not in known[owner]] == []
    assert set(re.findall(r"^bigmodels ([\w-]+)", PAGE, flags=re.M)) <= VERBS.keys()
    options = set(re.findall(r"--trainer\.strategy \w*Strategy\w* *\n? *--trainer\.strategy\.(\w+)", PAGE))
    kinds = (strategies.CompressedDDPStrategy, strategies.FSDP2Strategy)
    arguments = {name for kind in kinds for name in inspect.signature(kind).parameters} | {"bucket_cap_mb"}
    assert {"compression", "tensor_parallel_size"} <= options <= arguments
    extras = set(re.findall(r"extra\s`\[(\w+)\]`", PAGE))
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
    assert extras == {"ray", "streaming"}
    assert extras <= set(declared)
