"""The family contract: every recipe that ships, in a tiny version, held to each point that it covers.

1 builds on meta and is priced · 2 learns · 3 fit, validate, test, predict from YAML · 4 resumes bit for bit · 5 two
processes give the loss and the metrics of one · 6 sharded over two it trains, and its checkpoint loads on one · 7 loads
under weights_only in a process that saw no YAML · 8 its export equals it · 9 broken input ends in one clear error.

Another recipe needs its line in `PARAMETERS`; another data type brings a file `recipe_<type>.py` with a class
`Contract` (see `tests/contract.py`). Everything else holds it unasked.
"""

import csv
import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from lightning_bigmodels import modules
from lightning_bigmodels.__main__ import main
from lightning_bigmodels.recipe_files import list_recipes
from tests import pricing
from tests.contract import contract_of
from tests.workers import run_on

# the full-size network of each recipe; a recipe that discovery misses, or one without its entry here, is an error
PARAMETERS = {
    "autoencoder/denoising": 621_089,
    "autoencoder/vae": 521_250,
    "detection/digits": 591_216,
    "detection/fasterrcnn_coco": 41_704_036,
    "diffusion/ddpm": 686_769,
    "diffusion/flow_matching": 687_473,
    "gan/dcgan": 462_690,
    "gan/wgan_gp": 468_002,
    "image/quickstart": 89_930,
    "image/fashion_mnist": 1_226_442,
    "image/finetune_efficientnet": 4_054_945,
    "image/resnet50_imagenet": 25_557_032,
    "segmentation/cityscapes": 60_995_174,
    "segmentation/digits": 450_651,
    "super_resolution/edsr_x2": 195_971,
    "text/gpt_shakespeare": 4_339_200,
    "text/llama_8b": 8_030_261_248,
    "text/quickstart": 2_558_144,
    "text_to_image/latent_diffusion": 1_066_235_307,
    "text_to_image/shapes": 2_445_132,
}
RECIPES = {recipe.name: recipe for recipe in list_recipes()}
every_recipe = pytest.mark.parametrize("name", sorted(PARAMETERS))


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

    def __init__(self, name, folder, text_file, shelf):
        self.name, self.folder, self.shelf = name, folder, shelf
        self.recipe = yaml.safe_load(RECIPES[name].path.read_text(encoding="utf-8"))
        self.contract = contract_of(name)
        (folder / "text.txt").write_bytes(text_file.read_bytes())
        self.overrides = self.contract.tiny(self.recipe, folder)
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
            with suppress(FileExistsError):  # another process has fitted it meanwhile, for test 7
                checkpoint_on(self.shelf, self.name).symlink_to(version / "checkpoints" / "best.ckpt")
        return version


def checkpoint_on(shelf, name):
    """Return the link to the best checkpoint of a recipe, which is there once it is fitted."""
    return shelf / f"{name.replace('/', '_')}.ckpt"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Return a folder for the best checkpoint of each recipe, whichever process has fitted it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "best_checkpoints"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_file, shelf):
    """Return a function from a recipe's name to its one `Run` of the process."""
    known = {}

    def get(name):
        if name not in known:
            known[name] = Run(name, tmp_path_factory.mktemp(name.replace("/", "_")), text_file, shelf)
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


def header_of(name):
    """Return the words at the head of a recipe, one space between them."""
    lines = takewhile(lambda line: line.startswith("#"), RECIPES[name].path.read_text(encoding="utf-8").splitlines())
    return " ".join(word for line in lines for word in line.lstrip("# ").split())


@every_recipe
def test_its_header_is_a_page_of_a_notebook(name):
    header = header_of(name)
    assert f"bigmodels fit --config {name}" in header
    assert "TODO" not in header
    for word in ("Source:", "Data:", "Command:", "Hardware:"):
        assert word in header
    assert "Result:" in header or ("Not run:" in header and pricing.planned_of(header))


@every_recipe
def test_1_it_builds_on_meta_at_full_size_and_is_priced(name, monkeypatch, capsys):
    recipe = yaml.safe_load(RECIPES[name].path.read_text(encoding="utf-8"))
    model, network = getattr(modules, recipe["model"]["class_path"]), pricing.Network()
    build = model.configure_model

    def build_and_note(model):
        build(model)
        network.note(model)

    monkeypatch.setattr(model, "configure_model", build_and_note)
    usual = ["plan", "--config", name, "--gpu", "h100", "--price", str(pricing.PRICE)]
    planned, command = pricing.planned_of(header_of(name)) or (None, usual)
    assert command[: len(usual)] == usual
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert network.number() == PARAMETERS[name]
    pricing.check_plan(name, recipe, network, plan, int(command[-1]) if "--samples" in command else None)
    if planned:
        pricing.check_words(planned, plan)


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
    found, bound = metrics(run.fitted())[run.contract.metric], run.contract.baseline(run.overrides["data"]["init_args"])
    assert run.contract.better(found, bound), (found, bound)


@every_recipe
def test_3_validate_and_test_report_numbers(name, runs):
    run = runs(name)
    fitted = metrics(run.fitted())
    metric = run.contract.metric
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
    for version, (more, check) in enumerate(run.contract.predictions(run.folder, tmp_path)):
        assert run.command("predict", "--ckpt_path", "best", *more) == 0
        folder = run.folder / "run" / "predict" / f"version_{version}"
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [row["index"] for row in rows] == list(range(len(rows)))
        check(rows, folder)


@every_recipe
def test_4_broken_off_and_resumed_it_ends_with_the_same_weights(name, runs):
    run = runs(name)
    whole = torch.load(run.fitted() / "checkpoints" / "last.ckpt", weights_only=True)
    # the tiny version writes two checkpoints: the break falls between them, soon behind the first
    broken_at = f"--trainer.callbacks.after_batch={run.contract.steps * 57 // 100}"
    with pytest.raises(BreakError):
        run.command("fit", "--trainer.callbacks+=tests.test_recipes.Break", broken_at, root="cut")
    assert run.command("fit", "--ckpt_path", "last", root="cut") == 0
    resumed = torch.load(run.folder / "cut" / "fit" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == run.contract.steps
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key


class Losses(Callback):
    """Write the loss of each training batch to a file of this process."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.losses.append(float(outputs["loss"]))

    def on_fit_end(self, trainer, module):
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(self.losses))


def short_fit(run, strategy, processes):
    """Fit for a few steps with one global batch for any number of processes; return its losses and its metrics."""
    root = f"short_{strategy}"
    losses = run.folder / f"losses_{strategy}"
    rows = run.overrides["data"]["init_args"]["batch_size"] // processes
    more = {
        "trainer.strategy": strategy,
        "trainer.devices": processes,
        "trainer.max_steps": run.contract.short_steps,
        "trainer.val_check_interval": run.contract.short_steps,
        "trainer.precision": "32-true",
        "trainer.sync_batchnorm": True,
        "data.batch_size": rows,
        "data.eval_batch_size": run.contract.uneven_batch_size,
    }
    flags = [f"--{key}={value}" for key, value in more.items()]
    # what is drawn at random differs from process to process
    flags += run.contract.without_randomness(run.recipe)
    flags += ["--trainer.callbacks+=tests.test_recipes.Losses", f"--trainer.callbacks.folder={losses}"]
    if processes == 1:
        assert run.command("fit", *flags, root=root) == 0
    else:
        assert run_on(processes, lambda: run.command("fit", *flags, root=root)) == [0] * processes
    columns = [json.loads((losses / f"{rank}.json").read_text()) for rank in range(processes)]
    return [sum(row) / processes for row in zip(*columns, strict=True)], metrics(run.folder / root / "fit/version_0")


@pytest.fixture(scope="module")
def alone(runs):
    """Return a function from a recipe's name to the losses and metrics of a short fit on one process."""
    return cache(lambda name: short_fit(runs(name), "auto", 1))


def assert_same(found, expected, metric):
    assert len(found[0]) == len(expected[0]) >= 4
    assert found[0] == pytest.approx(expected[0], rel=2e-5)
    assert found[1][metric] == pytest.approx(expected[1][metric], rel=2e-5)


@every_recipe
def test_5_on_two_processes_it_gives_the_losses_and_metrics_of_one(name, runs, alone):
    run = runs(name)
    metric = run.contract.metric
    assert_same(short_fit(run, "ddp", 2), alone(name), metric)
    # of the same weights, on a number of processes that does not divide the data: every number
    for processes in (1, 2, 3):
        flags = ["--ckpt_path", str(run.fitted() / "checkpoints" / "last.ckpt"), "--data.eval_batch_size", "5"]
        flags += ["--trainer.strategy", "ddp" if processes > 1 else "auto", f"--trainer.devices={processes}"]
        root = f"validate_{processes}"
        if processes == 1:
            assert run.command("validate", *flags, root=root) == 0
        else:
            results = run_on(processes, lambda flags=flags, root=root: run.command("validate", *flags, root=root))
            assert results == [0] * processes
    values = [metrics(run.folder / f"validate_{n}" / "validate/version_0")[metric][0] for n in (1, 2, 3)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-7)


@every_recipe
def test_6_sharded_over_two_processes_it_trains_and_loads_on_one(name, runs, alone):
    run = runs(name)
    metric = run.contract.metric
    sharded = short_fit(run, "fsdp2", 2)
    assert_same(sharded, alone(name), metric)
    assert (run.folder / "short_fsdp2" / "fit/version_0/checkpoints/last.ckpt").is_dir()
    flags = run.contract.without_randomness(run.recipe)
    assert (
        run.command("validate", "--ckpt_path", "last", "--trainer.precision=32-true", *flags, root="short_fsdp2") == 0
    )
    loaded = metrics(run.folder / "short_fsdp2" / "validate/version_0")
    assert loaded[metric][0] == pytest.approx(sharded[1][metric][-1], rel=2e-5)


def test_7_every_checkpoint_loads_in_a_process_that_saw_no_yaml(runs, shelf):
    for name in PARAMETERS:
        if not checkpoint_on(shelf, name).exists():
            runs(name).fitted()
    paths = [f"{name}={checkpoint_on(shelf, name)}" for name in PARAMETERS]
    script = """
import importlib, sys, torch
from tests.contract import contract_of
for argument in sys.argv[1:]:
    name, _, path = argument.partition("=")
    content = torch.load(path, weights_only=True)
    module, _, cls = content["hyper_parameters"]["_class_path"].rpartition(".")
    model = getattr(importlib.import_module(module), cls).load_from_checkpoint(path, weights_only=True)
    same = all(torch.equal(value, content["state_dict"][key]) for key, value in model.state_dict().items())
    print(name, same and contract_of(name).answers(model))
"""
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{name} True" for name in PARAMETERS], done.stderr


@every_recipe
def test_8_its_export_loads_elsewhere_and_equals_it(name, runs, tmp_path):
    run = runs(name)
    best = run.fitted() / "checkpoints" / "best.ckpt"
    assert run.command("export", "--ckpt_path", "best", "--output", str(tmp_path / "out")) == 0
    run.contract.check_export(tmp_path / "out", best)


@every_recipe
def test_9_broken_input_ends_in_one_clear_error(name, runs, tmp_path, capsys):
    run = runs(name)
    for number, (arguments, words) in enumerate(run.contract.broken(tmp_path)):
        assert run.command("fit", *arguments, root=f"broken_{number}") == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("bigmodels: error:")]
        for word in words:
            assert word in line
