"""What a plan learns from a real run: the factors, whence they are, and when they say nothing."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_bigmodels import CausalLanguageModel, Text
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner import calibration as calibration_module
from lightning_bigmodels.planner import verb
from lightning_bigmodels.planner.calibration import FILE_NAME, Machine, machine_of, read_calibration, write_measurement
from lightning_bigmodels.planner.report import report
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.trainer import Trainer
from tests.conftest import TINY_LLAMA
from tests.planner.made import GIB, made_plan

GPU = Machine("NVIDIA H100 80GB HBM3", None, torch.__version__)
PLANNED, REAL = {"step_seconds": 2.0, "gib": 10.0}, {"step_seconds": 2.5, "gib": 11.0}


def measured(folder, planned=PLANNED, real=REAL, hardware="h100", machine=GPU, setting=None):
    write_measurement(folder, planned, real, hardware, machine, "Made", setting or Setting(batch_size=3))
    return str(folder)


@pytest.mark.parametrize("name", ["", FILE_NAME])
def test_factors_are_real_to_planned(tmp_path, name):
    setting = Setting("ddp", "bf16-mixed", devices=8, batch_size=3)
    found = read_calibration(str(Path(measured(tmp_path, setting=setting)) / name), "h100")
    assert (found.seconds, found.memory, found.machine, found.setting) == (1.25, 1.1, GPU, setting)


def test_everything_follows_from_the_factors(tmp_path):
    # 12 GiB allocated, of which a context of 1 is no part; a step of one row takes 1 s
    plain = made_plan()
    plain = replace(plain, room=replace(plain.room, used=plain.room.used + GIB))
    plan = plain.calibrated(read_calibration(measured(tmp_path), "h100"))
    assert (plan.room.allocated, plan.room.reserved) == (round(13.2 * GIB), round(13.2 * GIB))
    assert plan.room.used == round(13.2 * GIB) + GIB
    assert plan.room.uncertainty == round(0.55 * GIB)
    assert plan.time.seconds == sum(plan.time.parts.values()) == 1.25
    assert plan.time.mfu == plain.time.mfu / 1.25
    assert plan.units_per_second == plain.units_per_second / 1.25
    assert plan.length(steps=3600, price=2).cost == 2.5
    told = plan.to_dict()["memory"]
    assert sum(told["kinds"].values()) == plan.peak.total == told["allocated"]
    assert told["kinds"]["activations"] == round(4.4 * GIB)
    assert max(moment.total for moment in plan.course) == told["allocated"], "the pictures show what the report tells"
    assert plan.to_dict()["calibration"]["seconds"] == 1.25
    assert plain.to_dict()["calibration"] is None


def test_less_memory_is_no_less_uncertain(tmp_path):
    plan = made_plan(state=8.75, row=4, memory=13)  # 12.75 of 13 GiB
    smaller = plan.calibrated(read_calibration(measured(tmp_path, real={"step_seconds": 2, "gib": 9}), "h100"))
    assert not plan.room.fits
    assert smaller.room.fits
    assert smaller.room.uncertainty == plan.room.uncertainty


def test_a_report_says_whence_the_factors_are(tmp_path):
    run = measured(tmp_path / "run", setting=Setting("ddp", devices=4, batch_size=3))
    text = report(made_plan().calibrated(read_calibration(run, "h100")), None, None, None, [])
    told = " ".join(text.split())
    assert (
        f"Calibrated by {run}: time x 1.25, memory x 1.1 measured on NVIDIA H100 80GB HBM3, torch {torch.__version__}, "
        "in a run of Made on 4 x h100, ddp, 32-true, batch_size 3"
    ) in told
    assert "which had another strategy and number of devices than this plan: the factors may be others here." in told
    assert "parameters 8.800 activations 4.400 temporary 0.000 allocated 13.200" in told

    run = measured(tmp_path / "alike", {"step_seconds": 4}, {"step_seconds": 2})
    plan = made_plan().calibrated(read_calibration(run, "h100"))
    told = " ".join(report(plan, None, None, None, []).split())
    assert "time x 0.5, memory as planned, which was not measured measured on" in told
    assert "which had" not in told
    assert plan.room == made_plan().room


def test_changes_are_calibrated_like_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "make_plan", lambda model, data, setting, hardware: made_plan(setting))
    model, data = CausalLanguageModel("llama", TINY_LLAMA), Text(batch_size=4)
    # four rows take 24 GiB, which do not fit; of two rows the 16 GiB fit, but not 1.5 times of them
    run = measured(tmp_path, real={"step_seconds": 2, "gib": 15})
    found = Trainer(logger=False, max_steps=1).plan(model, data, gpu="h100", calibrate=run)
    used = {tuple(trial.flags): trial.plan.room.used / GIB for trial in found.trials if trial.plan}
    assert found.plan.room.used == 36 * GIB
    assert used["--data.batch_size 1", "--trainer.accumulate_grad_batches 4"] == 18
    assert used["--model.activation_checkpointing true",] == 18
    assert all(trial.plan.calibration == found.plan.calibration for trial in found.trials if trial.plan)
    assert json.loads(json.dumps(found.to_dict()))["changes"][0]["plan"]["calibration"]["memory"] == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "nothing was measured there, .*plan_check.json is missing; fit measures it in more than ten steps, on"),
        ("{", r"plan_check.json is not what fit writes there \(Expecting property name.*\); fit measures it in more"),
        (
            '{"planned": {"step_seconds": 1}, "real": {"step_seconds": 1}}',
            r"not what fit writes there \(KeyError: 'of'\)",
        ),
        (
            '{"planned": {"step_seconds": 1}, "real": {"step_seconds": 0}, "of": {"setting": {}}}',
            r"not what fit writes there \(ValueError: step_seconds is 0, and 1 planned\)",
        ),
        ("[]", r"not what fit writes there \(TypeError"),
    ],
)
def test_a_run_without_measurements_says_how_to_have_them(tmp_path, text, message):
    if text is not None:
        (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(InputError, match=message):
        read_calibration(str(tmp_path), "h100")


def test_a_run_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"--calibrate .*none: No such file or directory; name a run's folder"):
        read_calibration(str(tmp_path / "none"), "h100")


def test_other_hardware_is_refused(tmp_path):
    message = r"was measured on cpu, which says nothing of h100; plan with --gpu cpu, or name a run of fit on h100"
    with pytest.raises(InputError, match=message):
        read_calibration(measured(tmp_path, hardware="cpu"), "h100")


def test_a_cpu_says_nothing_of_another(tmp_path):
    here = machine_of(torch.device("cpu"))
    assert read_calibration(measured(tmp_path, hardware="cpu", machine=here), "cpu").machine == here
    other = replace(here, device="Abacus")
    message = f"was measured on {other}, which says nothing of this machine, {here}; name a run of fit on this one"
    with pytest.raises(InputError, match=re.escape(message)):
        read_calibration(measured(tmp_path, hardware="cpu", machine=other), "cpu")
    more = replace(here, threads=here.threads + 1)
    message = f"with {more.threads} threads, which .* plan with OMP_NUM_THREADS={more.threads}, or name a run of fit on"
    with pytest.raises(InputError, match=message):
        read_calibration(measured(tmp_path, hardware="cpu", machine=more), "cpu")


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("processor\t: 0\nmodel name\t: A  B @ 2.0\nflags\t: x\nmodel name\t: C\n", "A  B @ 2.0"),
        ("processor\t: 0\nCPU part\t: 0xd0c\n", "aarch64"),
        (None, "aarch64"),
    ],
)
def test_a_processor_has_a_name(tmp_path, monkeypatch, lines, name):
    if lines is not None:
        (tmp_path / "cpuinfo").write_text(lines)
    monkeypatch.setattr(calibration_module, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert machine_of(torch.device("cpu")).device == name


def test_another_torch_is_told(tmp_path):
    here = torch.__version__.partition("+")[0]
    for version, told in ((f"{here}+cu999", []), ("1.0", ["version of torch"])):
        found = read_calibration(measured(tmp_path, machine=replace(GPU, torch=version)), "h100")
        assert found.differences(found.setting, "Made") == told
