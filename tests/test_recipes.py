"""The family contract: every recipe that ships, in a tiny version, held to each point that it covers.

1 builds on meta · 2 learns · 3 fit, validate, test, predict from YAML · 4 resumes bit for bit · 7 loads under
weights_only in a process that saw no YAML · 8 its export equals it · 9 broken input ends in one clear error.
Points 5 and 6 (two processes: equal losses, exact metrics, sharded training) come with the strategies.

A recipe of another data type brings its entry in `TINY`, `BASELINES` and `BROKEN`; everything else holds it unasked.
"""

import csv
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from lightning_bigmodels import Text, modules
from lightning_bigmodels.__main__ import main
from lightning_bigmodels.recipe_files import list_recipes

# the full-size network of each recipe; a recipe that discovery misses, or one without its entry here, is an error
PARAMETERS = {
    "text/gpt_shakespeare": 4_339_200,
    "text/llama_8b": 8_030_261_248,
    "text/quickstart": 2_558_144,
}
RECIPES = {recipe.name: recipe for recipe in list_recipes()}
every_recipe = pytest.mark.parametrize("name", sorted(PARAMETERS))
STEPS = 100


def tiny_text(architecture, folder):
    """Return the overrides that make any recipe on `Text` train within seconds; its source is `folder`/text.txt."""
    config = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    config |= {positions: 64}
    if architecture != "gpt2":
        config |= {"intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 2}
    return {
        "trainer": {"val_check_interval": 50, "check_val_every_n_epoch": None, "max_steps": STEPS, "max_epochs": -1},
        "model": {
            "init_args": {
                "config": config,
                "compile": False,
                "max_new_tokens": 8,
                "optimizer": {"init_args": {"lr": 0.02}},
                "schedule": {"init_args": {"warmup": 2}},
            }
        },
        "data": {
            "init_args": {
                "sources": str(folder / "text.txt"),
                "encoding": "utf-8",
                "val_fraction": 0.1,
                "test_fraction": 0.1,
                "tokenizer": None,
                "vocab_size": 300,
                "block_size": 32,
                "eval_stride": None,
                "batch_size": 16,
                "num_workers": 0,
                "num_prompts": 3,
                "cache_dir": str(folder / "cache"),
            }
        },
    }


def no_context(data):
    """Return the bits per byte of the best model that ignores context: the tokens' own frequencies."""
    data.prepare_data()
    data.setup("fit")
    counts = Counter(t for batch in data.train_dataloader() for t in batch["labels"].flatten().tolist())
    total, nats, num_bytes = counts.total() + data.vocab_size, 0.0, 0
    for batch in data.val_dataloader():
        num_bytes += int(batch["num_bytes"].sum())
        counted = batch["labels"][batch["labels"] != -100]
        nats -= sum(math.log((counts[t] + 1) / total) for t in counted.tolist())
    return nats / math.log(2) / num_bytes


# by data type: how to make a recipe tiny; which validation metric must fall below which baseline
TINY = {"text": tiny_text}
BASELINES = {"text": ("val_bits_per_byte", lambda args: no_context(Text(**args)))}

ONE_PROCESS = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "limit_val_batches": 1.0,
    "log_every_n_steps": 5,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class BreakError(Exception):
    """The run is over here."""


class Break(Callback):
    """Break off after the training batch of this number."""

    def __init__(self, after_batch: int) -> None:
        self.after_batch = after_batch

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx + 1 == self.after_batch:
            raise BreakError


class Run:
    """A recipe in its tiny version, with a folder of its own."""

    def __init__(self, name, folder, text_file):
        self.name, self.folder = name, folder
        self.recipe = yaml.safe_load(RECIPES[name].path.read_text(encoding="utf-8"))
        self.type = name.partition("/")[0]
        (folder / "text.txt").write_bytes(text_file.read_bytes())
        self.overrides = TINY[self.type](self.recipe["model"]["init_args"].get("architecture"), folder)
        self.overrides["trainer"] = {**ONE_PROCESS, **self.overrides["trainer"]}
        self.tiny = folder / "tiny.yaml"
        self.tiny.write_text(yaml.safe_dump(self.overrides), encoding="utf-8")

    def command(self, verb, *more, root="run"):
        return main(
            [
                verb,
                "--config",
                self.name,
                "--config",
                str(self.tiny),
                f"--trainer.default_root_dir={self.folder / root}",
                *more,
            ]
        )

    def fitted(self):
        """Fit, unless that is done; return the run's folder."""
        version = self.folder / "run" / "fit" / "version_0"
        if not version.exists():
            assert self.command("fit") == 0
        return version


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_file):
    """Return a function from a recipe's name to its one `Run` of the session."""
    known = {}

    def get(name):
        if name not in known:
            known[name] = Run(name, tmp_path_factory.mktemp(name.replace("/", "_")), text_file)
        return known[name]

    return get


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)


def metrics(version):
    """Return the values of each column of metrics.csv."""
    columns = {}
    with (version / "metrics.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value:
                    columns.setdefault(key, []).append(float(value))
    return columns


def test_discovery_finds_every_recipe():
    files = [p for p in Path(__file__).parents[1].glob("recipes/*/*.yaml") if p.is_file()]
    assert len(files) == len(RECIPES)
    assert sorted(RECIPES) == sorted(PARAMETERS)


@every_recipe
def test_its_header_is_a_page_of_a_notebook(name):
    lines = RECIPES[name].path.read_text(encoding="utf-8").splitlines()
    header = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert f"bigmodels fit --config {name}" in header
    assert "TODO" not in header
    for word in ("Source:", "Data:", "Command:", "Hardware:"):
        assert word in header
    assert "Result:" in header or "Not run:" in header


@every_recipe
def test_1_it_builds_on_meta_at_full_size(name):
    model = yaml.safe_load(RECIPES[name].path.read_text(encoding="utf-8"))["model"]
    # how optimizer and schedule are made needs no memory, and the next test reads it
    arguments = {key: value for key, value in model["init_args"].items() if key not in ("optimizer", "schedule")}
    model = getattr(modules, model["class_path"])(**arguments)
    with torch.device("meta"):
        model.configure_model()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@every_recipe
def test_the_whole_recipe_is_understood(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", name, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["class_path"].startswith("lightning_bigmodels.")


@every_recipe
def test_2_it_learns(name, runs):
    run = runs(name)
    metric, baseline = BASELINES[run.type]
    found, bound = min(metrics(run.fitted())[metric]), baseline(run.overrides["data"]["init_args"])
    assert found < 0.97 * bound, (found, bound)


@every_recipe
def test_3_validate_and_test_report_numbers(name, runs):
    run = runs(name)
    fitted = metrics(run.fitted())
    metric, _ = BASELINES[run.type]
    assert run.command("validate", "--ckpt_path", "last") == 0
    validated = metrics(run.folder / "run" / "validate" / "version_0")
    assert validated[metric][0] == pytest.approx(fitted[metric][-1], rel=1e-6)
    assert run.command("test", "--ckpt_path", "best") == 0
    tested = metrics(run.folder / "run" / "test" / "version_0")
    assert 0 < tested[metric.replace("val_", "test_")][0] < math.inf


@every_recipe
def test_3_predictions_land_in_a_file_in_order_and_complete(name, runs, tmp_path):
    run = runs(name)
    run.fitted()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The class\nIf\nA name\n", encoding="utf-8")
    for version, more in enumerate(([], ["--data.prompts", str(prompts)])):
        assert run.command("predict", "--ckpt_path", "best", *more) == 0
        path = run.folder / "run" / "predict" / f"version_{version}" / "predictions.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["prompt"] for row in rows] == ["The class", "If", "A name"]


@every_recipe
def test_4_broken_off_and_resumed_it_ends_with_the_same_weights(name, runs):
    run = runs(name)
    whole = torch.load(run.fitted() / "checkpoints" / "last.ckpt", weights_only=True)
    # 50 batches between checkpoints: the break falls between two
    with pytest.raises(BreakError):
        run.command(
            "fit", "--trainer.callbacks+=tests.test_recipes.Break", "--trainer.callbacks.after_batch=73", root="cut"
        )
    assert run.command("fit", "--ckpt_path", "last", root="cut") == 0
    resumed = torch.load(run.folder / "cut" / "fit" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == STEPS
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key


def test_7_every_checkpoint_loads_in_a_process_that_saw_no_yaml(runs):
    paths = [str(runs(name).fitted() / "checkpoints" / "best.ckpt") for name in PARAMETERS]
    script = """
import importlib, sys, torch
for path in sys.argv[1:]:
    content = torch.load(path, weights_only=True)
    module, _, name = content["hyper_parameters"]["_class_path"].rpartition(".")
    model = getattr(importlib.import_module(module), name).load_from_checkpoint(path, weights_only=True)
    same = all(torch.equal(value, content["state_dict"][key]) for key, value in model.state_dict().items())
    print(same and model.generate(["The class"]) != [""])
"""
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"] * len(paths), done.stderr


@every_recipe
def test_8_its_export_loads_elsewhere_and_equals_it(name, runs, tmp_path):
    from transformers import AutoModelForCausalLM

    run = runs(name)
    best = torch.load(run.fitted() / "checkpoints" / "best.ckpt", weights_only=True)
    assert run.command("export", "--ckpt_path", "best", "--output", str(tmp_path / "out")) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for key, value in exported.items():
        assert torch.equal(value, best["state_dict"][f"network.{key}"]), key


def broken_text(folder):
    """Return what can be wrong with text: overrides, and what the one line must say."""
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1") * 100)
    (folder / "short.txt").write_text("Too short.")
    (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (folder / "other.jsonl").write_text('{"txt": "one"}\n')

    def source(file):
        return ["--data.sources", str(folder / file)]

    return [
        (source("gone.txt"), ["gone.txt"]),
        (source("empty.txt"), ["empty.txt", "empty"]),
        (source("latin.txt"), ["latin.txt", "byte 3", "encoding"]),
        (source("short.txt"), ["short.txt", "block_size"]),
        (source("rows.jsonl"), ["rows.jsonl", "line 2"]),
        (source("other.jsonl"), ["other.jsonl", "line 1", "no column 'text'", "'txt'"]),
        (["--data.block_size", "99"], ["block_size is 99", "64 positions"]),
        (["--data.vocab_size", "320"], ["320 tokens", "vocab_size is 300"]),
    ]


BROKEN = {"text": broken_text}


@every_recipe
def test_9_broken_input_ends_in_one_clear_error(name, runs, tmp_path, capsys):
    run = runs(name)
    for number, (arguments, words) in enumerate(BROKEN[run.type](tmp_path)):
        assert run.command("fit", *arguments, root=f"broken_{number}") == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("bigmodels: error:")]
        for word in words:
            assert word in line
