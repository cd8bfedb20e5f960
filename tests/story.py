"""A page is a story: its commands and its blocks of code and YAML run in order, shrunk to a tiny network.

A block or command that this file does not know how to run fails; what cannot run in a test is named in `NOT_RUN`.
"""

import ast
import gzip
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple
from unittest import mock

import yaml

from lightning_bigmodels.__main__ import main
from lightning_bigmodels.recipe_files import find_config

ROOT = Path(__file__).parent.parent

TRAINER = {
    "max_steps": 4,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
    "limit_val_batches": 2,
    "limit_test_batches": 2,
    "limit_predict_batches": 1,
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
TEXT = {"block_size": 32, "eval_stride": 32, "batch_size": 4}
PICTURES = {"batch_size": 4}
NETWORK = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


class Block(NamedTuple):
    line: int
    language: str
    text: str


def blocks(page):
    """Return every fenced block of a page with the line of its fence."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", page, flags=re.M | re.S)
    return [Block(page[: match.start()].count("\n") + 1, match[1], match[2]) for match in found]


def commands(block):
    """Return the commands of a bash block, one for each line and side of `&&`."""
    return [part.strip() for line in block.text.splitlines() for part in line.split(" && ") if part.strip()]


# ---- what a test cannot run: how the command begins, why, and what is checked instead


def check_extras(command):
    """The extras are in pyproject.toml."""
    install = re.fullmatch(r'pip install -e (?:\.|"\.\[([\w,]+)\]")', command)
    assert install, "an install that no one has tried"
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in (install[1] or "").split(","):
        assert not extra or re.search(rf"^{extra} = \[", text, flags=re.M), extra


def check_pin(command):
    """It names one version, so that what the page says of its files stays true."""
    assert re.search(r"(==|-)\d+\.\d+\.\d+(-py3-none-any\.whl)?$", command)


def check_ci(command):
    """.ci/run does it."""
    assert re.search(rf"(^|')({re.escape(command)})('|$)", (ROOT / ".ci/run").read_text(encoding="utf-8"), flags=re.M)


def check_script(command):
    """The script is there, for the right interpreter."""
    path = ROOT / command.removeprefix("python ")
    if path.suffix == ".py":
        ast.parse(path.read_text(encoding="utf-8"))
    else:
        assert os.access(path, os.X_OK)
        subprocess.run(["bash", "-n", path], check=True)


def check_hooks(command):
    """The hooks are the commands that the README names beside it."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {hook["entry"].split()[0] for hook in repository["hooks"]} == {"ruff", "mypy", "lint-imports"}


NOT_RUN = {
    "pip install": ("changes the environment that runs this test", check_extras),
    "pip download": ("needs the network; the test draws photos of its own", check_pin),
    "unzip": ("unpacks what was not downloaded", check_pin),
    "pytest": ("runs this test", lambda command: check_extras('pip install -e ".[test]"')),
    "pre-commit install": ("writes into .git", check_hooks),
    "ruff": ("comes with [dev], not with [test]", check_ci),
    "mypy": ("comes with [dev], not with [test]", check_ci),
    "lint-imports": ("comes with [dev], not with [test]", check_ci),
    ".ci/run": ("runs this test in a virtual environment of its own", check_script),
    "python tests/benchmarks/": ("measures for minutes, some against packages of [bench]", check_script),
}
SHELL = ("printf", "cat", "ls", "cp")


# ---- the story


class Story:
    """A folder of the reader's, the commands given in it, and what the last of them printed."""

    def __init__(self, capsys, monkeypatch, python):
        self.capsys, self.monkeypatch, self.python = capsys, monkeypatch, python
        self.output = ""
        self.unused = set()
        self.log = logging.StreamHandler(self)
        logging.getLogger("lightning.pytorch").addHandler(self.log)

    def write(self, text):
        """Take what Lightning logs: its own handler holds the stderr of the time of its import."""
        self.output += text

    def run(self, block):
        if block.language == "bash":
            self.output = ""
            for command in commands(block):
                self.run_command(command)
        elif block.language == "text":
            self.compare(block.text)
        elif block.language in ("python", "yaml"):
            named = re.match(r"# ([\w.]+)\n", block.text)
            if named:
                Path(named[1]).write_text(block.text, encoding="utf-8")
                self.unused.add(named[1].removesuffix(".py"))
                self.unused -= {name for name in self.unused if f" {name}." in block.text}  # a class that YAML names
            else:
                assert block.language == "python", "YAML without the name of its file in the first line"
                exec(compile(block.text, f"README.md:{block.line}", "exec"), {"__name__": "readme"})
        else:
            raise AssertionError(f"a block of {block.language or 'no language'}: neither run nor compared")

    def run_command(self, command):
        for beginning, (_, check) in NOT_RUN.items():
            if command.startswith(beginning):
                check(command)
                return
        self.unused -= {word for word in self.unused if word in command}
        words = shlex.split(command)
        if words[0] == "PYTHONPATH=.":
            self.monkeypatch.syspath_prepend(Path.cwd())
            words = words[1:]
        if words[0] == "bigmodels":
            self.bigmodels(words[1:])
        elif words[0] in SHELL:
            result = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True)
            self.output += result.stdout
        else:
            raise AssertionError(f"{command}: neither run nor named in NOT_RUN")

    def bigmodels(self, words):
        words = shrink(words, self.unused)
        if "--trainer.devices" in words and words[0] != "plan":
            # Lightning starts the other processes from the command line of this one
            command = [self.python, "-m", "lightning_bigmodels", *words]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            self.output += result.stdout
            return
        handler = signal.getsignal(signal.SIGINT)
        with mock.patch.dict(os.environ):
            try:
                code = main(words)
            except SystemExit as stop:  # jsonargparse's way to end --help and --print_config
                code = stop.code or 0
        signal.signal(signal.SIGINT, handler)
        printed = self.capsys.readouterr()
        assert code == 0, printed.err
        self.output += printed.out

    def compare(self, text):
        """Find every line of `text` in the output, apart from its figures and from `...`."""
        output = self.output.replace(" --config tiny.yaml", "")
        for line in text.splitlines():
            parts = re.split(r"\{\{\w+\}\}|\.\.\.|\d+ min \d+ s|\d[\d,.]*(?: s\b)?", line)
            pattern = ".*".join(re.escape(part) for part in parts)
            assert re.search(f"^{pattern}$", output, flags=re.M), f"{line!r} is not in the output:\n{output}"


def shrink(words, unused):
    """Add, behind the configurations that the command names, one that makes the run tiny."""
    places = [place for place, word in enumerate(words) if word == "--config"]
    if not places:
        return words
    names = [words[place + 1] for place in places]
    unused -= set(names)
    merged, data, data_class = {}, {}, "Text"
    for name in names:
        config = yaml.safe_load(Path(find_config(name)).read_text(encoding="utf-8"))
        merged |= config.get("model", {}).get("init_args", {})
        data |= config.get("data", {}).get("init_args", {})
        data_class = config.get("data", {}).get("class_path", data_class)
    override = {"trainer": dict(TRAINER), "data": {"init_args": dict(TEXT if data_class == "Text" else PICTURES)}}
    if "eval_batch_size" in data:
        override["data"]["init_args"]["eval_batch_size"] = min(4, data["eval_batch_size"])
    if "num_sampling_steps" in merged:
        override["model"] = {"init_args": {"num_sampling_steps": 4}}
    if data_class == "Text" and "architecture" in merged:
        override["model"] = {"init_args": {"max_new_tokens": 4}}
        if merged["architecture"]:
            override["model"]["init_args"]["config"] = NETWORK
    Path("tiny.yaml").write_text(yaml.safe_dump(override), encoding="utf-8")
    return [*words[: places[-1] + 2], "--config", "tiny.yaml", *words[places[-1] + 2 :]]


@contextmanager
def reading(tmp_path, monkeypatch, capsys, python=sys.executable):
    """The reader's folder with text of his own, a home without caches and keys, and `python` for several processes."""
    folder = tmp_path / "work"
    (folder / "my_text").mkdir(parents=True)
    (folder / "more").mkdir()
    names = sorted(topics)
    for name in names[:10]:
        (folder / "my_text" / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    with gzip.open(folder / "more" / "topics.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": topics[name]}) + "\n" for name in names[10:20])
    monkeypatch.chdir(folder)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "XDG_CACHE_HOME", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    story = Story(capsys, monkeypatch, python)
    yield story
    logging.getLogger("lightning.pytorch").removeHandler(story.log)
    sys.modules.pop("my_model", None)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()
