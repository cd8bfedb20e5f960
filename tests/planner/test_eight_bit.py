"""An optimizer of 8 bits in a plan: its bytes, where it is tried, and flags that mean what was planned."""

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch.optim import SGD, Adam, AdamW

from lightning_bigmodels import CausalLanguageModel, Text
from lightning_bigmodels.__main__ import main
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.optim import AdamW8bit, MuonWithAdamW
from lightning_bigmodels.planner.eight_bit import arguments_8bit
from lightning_bigmodels.planner.flags import changed_flags
from lightning_bigmodels.planner.search import find_changes
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.simulation import simulate
from tests.conftest import TINY_LLAMA
from tests.planner.made import GIB, made_plan

EIGHT = "--model.optimizer lightning_bigmodels.optim.AdamW8bit"


def language_model(optimizer=None):
    return CausalLanguageModel("llama", TINY_LLAMA, activation_checkpointing=True, optimizer=optimizer)


def test_a_simulation_holds_what_training_holds():
    config = {**TINY_LLAMA, "hidden_size": 256, "intermediate_size": 512}
    model = CausalLanguageModel("llama", config, optimizer=partial(AdamW, lr=0.01))
    data = Text("python-docs", vocab_size=300, block_size=32)
    for devices in (1, 4):
        setting = Setting("auto" if devices == 1 else "fsdp2", devices=devices, batch_size=2)
        plain = simulate(model, data, setting).peak.held["optimizer state"]
        found = simulate(model, data, replace(setting, optimizer_8bit=True)).peak.held["optimizer state"]
        # norms, and counters of steps, are as they were
        assert found == pytest.approx(plain * (1 + 4 / 256) / 4, rel=0.02)
    # the same network, and its state when it has really learnt for a step
    model.optimizer = AdamW8bit
    model.configure_model()
    optimizer = model.configure_optimizers()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    fresh = CausalLanguageModel("llama", config, optimizer=AdamW)
    assert simulate(fresh, data, Setting(optimizer_8bit=True)).peak.held["optimizer state"] == held


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (None, (1e-3, (0.9, 0.95), 1e-8, 0.1)),
        (partial(AdamW, lr=0.5, fused=True), (0.5, (0.9, 0.999), 1e-8, 0.01)),
        (partial(Adam, lr=0.5, eps=1e-6), (0.5, (0.9, 0.999), 1e-6, 0)),
        (partial(Adam, weight_decay=0.1), None),
        (partial(AdamW, amsgrad=True), None),
        (SGD, None),
        (MuonWithAdamW, None),
        (AdamW8bit, None),
    ],
)
def test_it_takes_the_place_of_adamw_alone(optimizer, arguments):
    found = arguments_8bit(language_model(optimizer))
    assert (None if found is None else tuple(found.values())) == arguments


def test_another_optimizer_cannot_be_planned_as_one_of_8_bits():
    message = (
        r"the optimizer of CausalLanguageModel is none that AdamW8bit can take the place of; plan with optimizer_8"
    )
    with pytest.raises(InputError, match=message):
        simulate(language_model(SGD), Text("python-docs", vocab_size=300), Setting(optimizer_8bit=True))


@pytest.mark.parametrize("optimizer", [None, {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-6, "fused": True}])
def test_the_flags_mean_what_was_planned(optimizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = {"architecture": "llama", "config": TINY_LLAMA}
    if optimizer is not None:
        arguments["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": optimizer}
    lines = {"model": {"class_path": "CausalLanguageModel", "init_args": arguments}, "data": {"class_path": "Text"}}
    lines["data"]["init_args"] = {"sources": "nowhere.txt", "vocab_size": 300}
    Path("recipe.yaml").write_text(yaml.safe_dump(lines))
    model = language_model(None if optimizer is None else partial(AdamW, **optimizer))
    flags = changed_flags(Setting(), Setting(optimizer_8bit=True), model)
    assert flags[0] == EIGHT
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "recipe.yaml", *shlex.split(" ".join(flags)), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert printed["class_path"].endswith("AdamW8bit")
    expected = arguments_8bit(model)
    assert printed["init_args"] == {**expected, "betas": list(expected["betas"])}


def tried(setting, model, moments, row=4):
    """Return the flags of what was tried, and of what fits 24 GiB, where the state of AdamW takes so many GiB."""

    def replan(changed):
        plan = made_plan(changed, state=10, row=row)
        size = int(moments * GIB / (4 if changed.optimizer_8bit else 1))
        return replace(
            plan,
            hardware=replace(plan.hardware, name="cpu"),  # whose state is in host memory anyhow
            peak=plan.peak._replace(held={**plan.peak.held, "optimizer state": size}),
            room=replace(plan.room, used=plan.room.used + size),
        )

    trials = find_changes(replan(setting), model, replan)
    return [" ".join(trial.flags) for trial in trials], [" ".join(trial.flags) for trial in trials if trial.fits]


def test_it_is_tried_where_it_helps_after_what_changes_less():
    eight = f"{EIGHT} --model.optimizer.betas '[0.9, 0.95]' --model.optimizer.weight_decay 0.1"
    # 10 + 2 x 4 + 20 GiB; with 5 in place of 20 both rows fit
    found, fitting = tried(Setting(batch_size=2), language_model(), 20)
    assert found[:2] == [
        "--data.batch_size 1 --trainer.accumulate_grad_batches 2",
        "--data.batch_size 1 --trainer.accumulate_grad_batches 2 --trainer.precision bf16-mixed",
    ]
    assert fitting[0] == eight
    # a smaller batch is enough
    _, fitting = tried(Setting(batch_size=4), language_model(), 4)
    assert fitting == ["--data.batch_size 2 --trainer.accumulate_grad_batches 2"]
    # 10 + 12 + 8, 10 + 6 + 8 and 10 + 12 + 2: neither alone is enough, and of devices there are no more
    _, fitting = tried(Setting("tp", devices=8, num_nodes=512), language_model(), 8, row=12)
    assert fitting == [f"--trainer.precision bf16-mixed {eight}"]


def test_it_is_not_tried_where_it_saves_little_or_something_else_learns():
    for optimizer, moments in ((None, 0.5), (SGD, 20)):
        found, _ = tried(Setting(batch_size=4), language_model(optimizer), moments)
        assert found
        assert not any("AdamW8bit" in flags for flags in found)
