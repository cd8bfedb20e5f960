"""A fit is compared with its plan, and is what it would be without."""

import json
import warnings

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_bigmodels import ImageClassifier, Images
from lightning_bigmodels.callbacks import PlanCheck
from lightning_bigmodels.planner import hardware
from tests.planner.test_simulation import ROWS


def parts():
    data = Images("sklearn-digits", image_size=32, channels=3, batch_size=ROWS)
    return ImageClassifier("small_resnet", num_classes=10, channels=3, image_size=32), data


def fit(folder, **options):
    seed_everything(3)
    check = PlanCheck(**options)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", max_steps=11, limit_val_batches=0, logger=False, callbacks=[check], default_root_dir=folder,
        **quiet,
    )  # fmt: skip
    model, data = parts()
    check.plan(trainer, model, data)
    trainer.fit(model, data)
    return model.state_dict()


def test_the_first_steps_are_compared_with_the_plan_and_nothing_else_changes(tmp_path):
    weights, plain = fit(tmp_path, when="always"), fit(tmp_path / "plain", when="gpu")
    assert all(torch.equal(value, plain[key]) for key, value in weights.items())
    told = json.loads((tmp_path / "plan_check.json").read_text())
    assert told["planned"]["step_seconds"] > 0 < told["real"]["step_seconds"]
    assert not (tmp_path / "plain" / "plan_check.json").exists()


def test_it_warns_where_the_plan_does_not_fit(tmp_path, monkeypatch):
    small = hardware.Hardware(**{**vars(hardware.find_hardware("h100")), "memory": 2**20})
    monkeypatch.setattr(hardware, "find_hardware", lambda name: small)  # looked up when it plans
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"this run does not fit: it needs .* and h100 has 0.00; bigmodels plan with"):
        PlanCheck("always").plan(trainer, *parts())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PlanCheck("never").plan(trainer, *parts())
