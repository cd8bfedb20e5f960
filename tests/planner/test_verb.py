"""`bigmodels plan`: from a command line to a verdict, without data, weights or devices."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lightning_bigmodels import CausalLanguageModel, Images, Text
from lightning_bigmodels.__main__ import main
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner import verb
from lightning_bigmodels.planner.hardware import find_hardware
from lightning_bigmodels.planner.plan import make_plan
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.tasks import Task
from lightning_bigmodels.trainer import Trainer
from tests.conftest import TINY_LLAMA
from tests.planner.made import made_plan


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe for GPUs that are not there, whose data are nowhere."""
    monkeypatch.chdir(tmp_path)
    values = {
        "trainer": {
            "accelerator": "gpu",
            "devices": 8,
            "strategy": "fsdp2",
            "precision": "bf16-mixed",
            "max_steps": 100,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "callbacks": [{"class_path": "Throughput"}],
        },
        "model": {
            "class_path": "CausalLanguageModel",
            "init_args": {
                "architecture": "llama",
                "config": TINY_LLAMA,
                "schedule": {"class_path": "lightning_bigmodels.optim.WarmupCosine", "init_args": {"warmup": 50}},
            },
        },
        "data": {
            "class_path": "Text",
            "init_args": {"sources": "nowhere.txt", "vocab_size": 300, "block_size": 32, "batch_size": 4},
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    return ["--config", "recipe.yaml"]


def test_the_command_tells_everything(recipe, capsys):
    assert main(["plan", *recipe, "--gpu", "h100", "--trainer.num_nodes=2", "--price=2", "--output=out"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("16 x h100 on 2 nodes, fsdp2, bf16-mixed, batch_size 4, 2 batches accumulated\n")
    for words in ("parameters", "gradients", "optimizer state", "activations", "allocated", "reserved", "used"):
        assert re.search(rf"^  {words} +\d+\.\d\d\d\b", text, flags=re.M), words
    assert re.search(r"^  time .* bound by [\w ]+: ", text, flags=re.M)
    assert "Run of 100 steps, 409,600 tokens" in text
    assert re.search(r"^  cost +[\d.,]+ +at 2 a device and hour$", text, flags=re.M)
    assert re.search(r"^FITS: \d+\.\d\d GiB to spare, uncertain by \d+\.\d\d$", text, flags=re.M)
    assert sorted(path.name for path in Path().iterdir()) == ["out", "recipe.yaml"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["memory.html", "memory.png", "plan.json"]

    assert main(["plan", *recipe, "--gpu", "H100", "--trainer.num_nodes=2", "--price=2", "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads(Path("out/plan.json").read_text(encoding="utf-8"))
    assert json.loads(printed)["run"]["steps"] == 100
    assert json.loads(printed)["step"]["traffic"]["reduce-scatter"]["sent"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu=h10"], "can add it; did you mean 'h100'?"),
        (["--gpu=h100", "--price=-1"], "--price is -1.0; set it to 0 or more"),
        (["--gpu=h100", "--samples=-5"], "--samples is -5; set it to 0 or more"),
        (["--gpu=h100", "--output=recipe.yaml"], "--output recipe.yaml cannot be written: File exists"),
        (["--gpu=h100", "--gpu_table=none.csv"], "the hardware table none.csv cannot be read"),
        (["--gpu=h100", "--data=null"], "no data is named"),
        # needs packages that are not here, which a plan does not
        (
            ["--gpu=h100", "--trainer.strategy=XLAStrategy", "--trainer.strategy.debug=true"],
            "xla is for TPUs, of which",
        ),
        (["--gpu=h100", "--trainer.strategy=fsdp2x"], "does not know the strategy fsdp2x; did you mean 'fsdp2'?"),
        (["--gpu=h100", "--trainer.strategy=tests.toys.Own"], "the strategy tests.toys.Own; plan with ddp or fsdp2"),
    ],
)
def test_the_commands_errors_are_one_line(recipe, options, message, capsys):
    assert main(["plan", *recipe, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bigmodels: error: ")
    assert message in error, error


def test_a_strategy_that_needs_gpus_has_bounds(monkeypatch):
    monkeypatch.setattr(verb, "make_plan", lambda model, data, setting, hardware: made_plan(setting, state=16))
    setting = Setting("fsdp", devices=4)
    with pytest.raises(InputError, match=r"the strategy fsdp cannot be simulated without GPUs; .* between 8.00 GiB"):
        verb.answer(Trainer(logger=False), None, None, setting, "h100")
    with pytest.raises(
        InputError, match=r"allocated at most 21.49 GiB, as with ddp and the 1.49 GiB that its own buck"
    ):
        verb.answer(Trainer(logger=False), None, None, Setting("deepspeed_stage_3_offload", devices=4), "h100")


def test_what_does_not_fit_is_told_with_changes(monkeypatch, capsys):
    monkeypatch.setattr(verb, "make_plan", lambda model, data, setting, hardware: made_plan(setting))
    trainer = Trainer(logger=False, max_epochs=3, limit_train_batches=50)
    found = trainer.plan(CausalLanguageModel("llama", TINY_LLAMA), Text(batch_size=8), gpu="h100")
    assert "--model.activation_checkpointing true" in capsys.readouterr().out
    assert found.length.steps == 150
    assert [change["plan"]["fits"] for change in found.to_dict()["changes"]] == [True, True]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({"max_epochs": 3}, "The run is of 3 epochs, whose length is known when data are read: for its hours and cost"),
        ({"max_epochs": -1}, "The run has no end: for its hours and cost give --samples, the rows of all epochs, or"),
    ],
)
def test_a_run_of_unknown_length_says_what_to_give(lines, words, monkeypatch, capsys):
    monkeypatch.setattr(verb, "make_plan", lambda model, data, setting, hardware: made_plan(setting))
    trainer = Trainer(logger=False, **lines)
    assert trainer.plan(None, Text(batch_size=1), gpu="h100").length is None
    assert words in capsys.readouterr().out.replace("\n", " ")
    assert trainer.plan(None, Text(batch_size=1), gpu="h100", samples=40).length.steps == 40


@torch.library.custom_op("planned::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


class Own(Task):
    """Its operator is the user's own."""

    def build_network(self):
        return nn.Linear(1, 1)

    def step(self, phase, batch):
        return twice(self.network(batch["labels"][:, None].float())).mean()


class Leaves(Own):
    """Its step leaves torch."""

    def step(self, phase, batch):
        return torch.from_numpy(self.network(batch["labels"][:, None].float()).detach().numpy()).mean()


@pytest.mark.parametrize(("kind", "words"), [(Own, "planned::twice"), (Leaves, r"\.numpy\(\) is not supported")])
def test_what_cannot_run_without_values_is_named(kind, words):
    data = Images("sklearn-digits", image_size=8, channels=1)
    place = rf"cannot be planned, at {__file__}, line \d+"
    with pytest.raises(InputError, match=rf"{place}: .*{words}.*; planning needs operations .*: register yours with"):
        make_plan(kind(), data, Setting(), find_hardware("h100"))


def test_data_must_have_an_example_batch():
    with pytest.raises(InputError, match=r"object has no example_batch\(batch_size\) to plan with; add one"):
        make_plan(None, object(), Setting(), None)


def test_the_help_names_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: bigmodels plan [--config")
    for option in ("--gpu ", "--gpu_table ", "--samples ", "--price ", "--output ", "--json "):
        assert option in text
    assert "--setting" not in text
