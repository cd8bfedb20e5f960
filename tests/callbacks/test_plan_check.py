"""A fit is compared with its plan, and is what it would be without."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from lightning_bigmodels import ImageClassifier, Images
from lightning_bigmodels.callbacks import PlanCheck, plan_check
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner import hardware
from lightning_bigmodels.planner.calibration import read_calibration
from lightning_bigmodels.planner.plan import make_plan
from lightning_bigmodels.planner.simulation import Setting
from lightning_bigmodels.planner.time_limit import TimeLimitError, check_time, time_limit
from tests.conftest import QUIET
from tests.planner.test_simulation import ROWS
from tests.workers import run_on


def parts():
    data = Images("sklearn-digits", image_size=32, channels=3, batch_size=ROWS)
    return ImageClassifier("small_resnet", num_classes=10, channels=3, image_size=32), data


def fit(folder, logger=False, **options):
    lines = {name: options.pop(name) for name in ("devices", "strategy") if name in options}
    seed_everything(3)
    check = PlanCheck(**options)
    trainer = Trainer(
        **{**QUIET, **lines, "max_steps": 13, "logger": logger, "limit_val_batches": 0, "default_root_dir": folder},
        callbacks=[check],
    )
    model, data = parts()
    check.plan(trainer, model, data)
    trainer.fit(model, data)
    return model.state_dict()


@pytest.fixture
def quick(monkeypatch):
    """This machine is not measured."""
    cpu = replace(hardware.find_hardware("h100"), name="cpu")
    monkeypatch.setattr(hardware, "_this_machine", lambda: cpu)


@pytest.fixture
def told(monkeypatch):
    """What is said of the plan."""
    found = []
    monkeypatch.setattr("lightning_bigmodels.callbacks.plan_check.rank_zero_info", found.append)
    return found


def test_the_first_steps_are_compared_with_the_plan_and_nothing_else_changes(tmp_path):
    weights, plain = fit(tmp_path, when="always"), fit(tmp_path / "plain", when="gpu")
    assert all(torch.equal(value, plain[key]) for key, value in weights.items())
    told = json.loads((tmp_path / "plan_check.json").read_text())
    assert told["planned"]["step_seconds"] > 0 < told["real"]["step_seconds"]
    assert told["real"]["gib"] == pytest.approx(told["planned"]["gib"], rel=0.02)
    assert not (tmp_path / "plain" / "plan_check.json").exists()
    found = read_calibration(str(tmp_path), "cpu")
    assert found.model == "ImageClassifier"
    assert found.setting == Setting(batch_size=ROWS)


def test_the_first_of_several_processes_plans_and_tells(tmp_path, quick):
    def work():
        fit(tmp_path, CSVLogger(tmp_path, name="", version=0), when="always", devices=2, strategy="ddp")

    run_on(2, work)
    told = json.loads((tmp_path / "version_0" / "plan_check.json").read_text())
    assert told["of"]["setting"] == vars(Setting("ddp", devices=2, batch_size=ROWS))
    # of several processes on a CPU, time alone
    assert set(told["real"]) == set(told["planned"]) == {"step_seconds"}
    heads, *rows = (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()
    column = heads.split(",").index("real_step_seconds")
    assert [row.split(",")[column] != "" for row in rows].count(True) == 1


def test_a_run_does_not_wait_for_a_long_plan(tmp_path, quick, told):
    fit(tmp_path, when="always", seconds=0.05)
    assert not (tmp_path / "plan_check.json").exists()
    (line,) = told
    assert line.startswith("the run is not compared with a plan: planning takes more than 0.05 s, for which the run")
    assert line.endswith("plan it with bigmodels plan and the same flags, or give PlanCheck more seconds")


def test_a_simulation_ends_in_any_pass_and_leaves_nothing(monkeypatch):
    device = hardware.find_hardware("h100")
    whole = make_plan(*parts(), Setting("ddp", devices=2, batch_size=2), device)
    for share in (0.25, 0.75):
        left = int(share * 2 * whole.num_operations)

        def count():
            nonlocal left
            left -= 1
            return float(left < 0)

        with monkeypatch.context() as patch:
            patch.setattr("lightning_bigmodels.planner.time_limit.time.monotonic", count)
            with time_limit(0.5), pytest.raises(TimeLimitError, match=r"cannot be simulated in 0.5 s; give it more"):
                make_plan(*parts(), Setting("ddp", devices=2, batch_size=2), device)
    check_time()
    again = make_plan(*parts(), Setting("ddp", devices=2, batch_size=2), device)
    assert (again.room, again.time) == (whole.room, whole.time)


def test_nothing_is_computed_before_processes_are_forked(tmp_path, monkeypatch, told):
    monkeypatch.setattr(hardware, "find_hardware", lambda name, table: pytest.fail("it was looked for"))
    trainer = Trainer(**{**QUIET, "devices": 2, "strategy": "ddp_fork", "default_root_dir": tmp_path})
    PlanCheck("always").plan(trainer, *parts())
    (line,) = told
    assert line.endswith("its processes are forked from this one, which must not compute before; use ddp")


def test_it_warns_where_the_plan_does_not_fit(tmp_path, monkeypatch):
    small = hardware.Hardware(**{**vars(hardware.find_hardware("h100")), "memory": 2**20})
    monkeypatch.setattr(hardware, "find_hardware", lambda name, table: small)  # looked up when it plans
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"this run does not fit: it needs .* and h100 has 0.00; bigmodels plan with"):
        PlanCheck("always").plan(trainer, *parts())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PlanCheck("never").plan(trainer, *parts())


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(name, known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert plan_check._gpu_name(torch.device("cuda"), None) == known


def test_a_gpu_that_no_table_has_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40")
    with pytest.raises(InputError, match=r"the table of devices has no nvidia-l40; name one with PlanCheck's hardware"):
        plan_check._gpu_name(torch.device("cuda"), None)
