"""A fit is compared with its plan, and is what it would be without."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_bigmodels import ImageClassifier, Images
from lightning_bigmodels.callbacks import PlanCheck, WeightAverage, plan_check
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner import hardware
from lightning_bigmodels.planner.calibration import machine_of, read_calibration
from lightning_bigmodels.planner.plan import make_plan
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.time_limit import TimeLimitError, check_time, time_limit
from tests.conftest import QUIET
from tests.planner.made import made_plan
from tests.planner.test_simulation import ROWS
from tests.workers import run_on


def parts():
    data = Images("sklearn-digits", image_size=32, channels=3, batch_size=ROWS)
    return ImageClassifier("small_resnet", num_classes=10, channels=3, image_size=32), data


# after the twelfth step too, before which memory begins to be measured
VALIDATED = {"limit_train_batches": 4, "max_epochs": -1, "limit_val_batches": 1}


def fit(folder, logger=False, average=None, **options):
    lines = {name: options.pop(name) for name in ("devices", "strategy") if name in options}
    seed_everything(3)
    check = PlanCheck(**options)
    trainer = Trainer(
        **{**QUIET, **VALIDATED, **lines, "max_steps": 14, "logger": logger, "default_root_dir": folder},
        callbacks=[check] if average is None else [average, check],
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
    weights = fit(tmp_path, average=WeightAverage(), when="always")
    plain = fit(tmp_path / "plain", average=WeightAverage(), when="gpu")
    assert all(torch.equal(value, plain[key]) for key, value in weights.items())
    told = json.loads((tmp_path / "plan_check.json").read_text())
    assert told["planned"]["step_seconds"] > 0 < told["real"]["step_seconds"]
    assert told["real"]["gib"] == pytest.approx(told["planned"]["gib"], rel=0.02)
    assert not (tmp_path / "plain" / "plan_check.json").exists()
    found = read_calibration(str(tmp_path), "cpu")
    assert found.model == "ImageClassifier"
    assert found.setting == Setting(batch_size=ROWS, averages_weights=True)
    assert found.machine == machine_of(torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_an_average_of_lightning_s_is_memory_too(tmp_path, quick):
    fit(tmp_path, average=WeightAveraging(use_buffers=False), when="always")
    told = json.loads((tmp_path / "plan_check.json").read_text())
    assert told["of"]["setting"]["averages_weights"]
    assert told["real"]["gib"] == pytest.approx(told["planned"]["gib"], rel=0.02)


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


@pytest.mark.parametrize("way", ["fork", "forkserver"])
def test_nothing_is_computed_before_processes_are_forked(way, tmp_path, monkeypatch, told):
    monkeypatch.setattr(hardware, "find_hardware", lambda name, table: pytest.fail("it was looked for"))
    strategy = DDPStrategy(start_method=way)
    trainer = Trainer(**{**QUIET, "devices": 2, "strategy": strategy, "default_root_dir": tmp_path})
    PlanCheck("always").plan(trainer, *parts())
    (line,) = told
    assert line.endswith("its processes are forked, before which this one must not compute; use ddp")


def test_other_devices_than_the_planners_are_told(tmp_path, told):
    check, strategy = PlanCheck("always"), SimpleNamespace(root_device=torch.device("mps"))
    check.plan(SimpleNamespace(strategy=strategy, is_global_zero=True), *parts())
    assert told[0].endswith("the planner knows CPUs and the GPUs of CUDA and ROCm, and nothing of mps")


def test_a_plan_that_breaks_is_told_and_the_run_goes_on(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(ImageClassifier, "step", lambda self, phase, batch: {}["kernel"])
    trainer = Trainer(**{**QUIET, "default_root_dir": tmp_path})
    message = "is not compared with a plan, which ended in KeyError: 'kernel'; bigmodels plan with the same flags shows"
    with pytest.warns(UserWarning, match=message):
        PlanCheck("always").plan(trainer, *parts())


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
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI300X VF", "mi300x"),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(name, known):
    assert plan_check._gpu_name(name, None) == known


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("NVIDIA L40", ""),
        ("NVIDIA RTX 6000 Ada Generation", ""),
        ("NVIDIA GH200 480GB", ""),
        # a kind with less bandwidth, or fewer processors, than the table's
        ("NVIDIA A100-PCIE-40GB", ", such as a100-40gb"),
        ("NVIDIA A100 80GB PCIe", ", such as a100"),
        ("NVIDIA H100 NVL", ", such as h100"),
        ("NVIDIA H100 80GB HBM2e", ", such as h100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", ", such as h100"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", ", such as rtx-4090"),
        ("NVIDIA GeForce RTX 3090 Ti", ", such as rtx-3090"),
    ],
)
def test_a_gpu_that_is_none_of_the_table_is_told(name, nearest):
    with pytest.raises(InputError) as raised:
        plan_check._gpu_name(name, None)
    remedy = f"give a row of it as PlanCheck's hardware_table, or name the nearest as its hardware{nearest}"
    assert str(raised.value) == f"the table of devices has no {name}; {remedy}"


def test_a_gpu_has_the_memory_that_it_says(monkeypatch, quick):
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", total_memory=10 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = plan_check._gpu(torch.device("cuda", 1), "h100", None)
    assert found == replace(hardware.find_hardware("h100"), memory=10 * 2**30)
    properties.name = "NVIDIA L4"
    assert plan_check._gpu(torch.device("cuda", 1), None, None).name == "l4"
    with pytest.raises(InputError, match="PlanCheck's hardware is cpu, and the run is on NVIDIA L4; name a GPU of the"):
        plan_check._gpu(torch.device("cuda", 1), "cpu", None)


def test_a_plan_for_a_gpu_is_of_the_gpu_that_is_there(tmp_path, monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    check, trainer = PlanCheck(), Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy._root_device = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match=r"this run does not fit: it needs .* and h100 has 0.00; bigmodels plan with"):
        check.plan(trainer, *parts())
    assert check._plan.peak.held["workspace"] == 2**26, "planned as on a GPU"
    assert (check._plan.hardware.name, check._plan.room.memory) == ("h100", 2**20)
    assert (check._machine.device, check._machine.threads) == ("NVIDIA H100 80GB HBM3", None)


class Clock:
    """A time that passes where a test says so."""

    def __init__(self):
        self.now = 0.0

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(plan_check.time, "perf_counter", lambda: found.now)
    return found


def test_a_gpu_is_waited_for_and_its_peak_is_that_of_its_batches(clock, monkeypatch):
    device, allocated = torch.device("cuda", 1), {"peak": 0}
    left = [0.0]  # seconds of work that the GPU still has

    def synchronize(where):
        assert where == device
        clock.passes(left[0])
        left[0] = 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda where: allocated.update(peak=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: allocated["peak"])
    steps = plan_check._Steps(device)
    for ends_step in (False, True, False, True):
        steps.begin_batch()
        left[0] = 2.0
        allocated["peak"] = 30 if ends_step else 20
        steps.end_batch(ends_step)
        # validation, and work that another callback leaves behind
        allocated["peak"] = 1000
        clock.passes(5)
        left[0] = 1.0
    assert steps.done == [(4.0, 6.0, 30, 2), (4.0, 12.0, 30, 2)]


class Timed(LightningModule):
    """Its steps take as long as it says; the costliest is every third."""

    def __init__(self, clock, step_period=1):
        super().__init__()
        self.clock, self.step_period = clock, step_period
        self.networks = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
        self.automatic_optimization = step_period == 1

    def training_step(self, batch, batch_idx):
        costly = self.step_period > 1 and batch_idx % self.step_period == self.step_period - 1
        self.clock.passes(7 if costly else 2)
        if self.automatic_optimization:
            return self.networks[0](batch).mean()
        for optimizer in self.optimizers()[: 2 if costly else 1]:
            optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        self.clock.passes(100)

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in self.networks]
        return optimizers[0] if self.automatic_optimization else optimizers


class Slow(torch.utils.data.Dataset):
    """Each row takes a while."""

    def __init__(self, clock, rows, seconds):
        self.clock, self.rows, self.seconds = clock, rows, seconds

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.clock.passes(self.seconds)
        return torch.ones(1)


def timed(folder, clock, step_period=1, rows=100, wait=0.0, check=None, ckpt_path=None, **options):
    check = check or PlanCheck("always")
    check._plan, check._machine = made_plan(), machine_of(torch.device("cpu"))
    trainer = Trainer(**{**QUIET, "default_root_dir": folder, **options}, callbacks=[check])
    model = Timed(clock, step_period)
    loaders = DataLoader(Slow(clock, rows, wait)), DataLoader(torch.ones(1, 1))
    trainer.fit(model, *loaders, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("options", "seconds", "waits"),
    [
        ({"max_steps": 11}, 2, ""),
        # an epoch ends with a step of one batch, and with a validation
        ({"max_steps": 11, "accumulate_grad_batches": 2, "rows": 5, "max_epochs": 99, "wait": 0.5}, 4, "1"),
        ({"max_steps": 11, "val_check_interval": 4, "wait": 0.1}, 2, ""),
        ({"max_steps": 11, "val_check_interval": 4, "wait": 0.3}, 2, "0.3"),
        ({"max_steps": 30, "step_period": 3}, 7, ""),
        ({"max_steps": 30, "step_period": 12}, 7, ""),
    ],
)
def test_a_step_is_the_costliest_of_its_batches(options, seconds, waits, tmp_path, clock, told, monkeypatch):
    monkeypatch.setattr(PlanCheck, "_measures_after", lambda self, trainer: False)
    timed(tmp_path, clock, **options)
    values = json.loads((tmp_path / "plan_check.json").read_text())
    assert values["real"] == {"step_seconds": pytest.approx(seconds)}
    (line,) = told
    words = f"; between batches {waits} s more, for data and callbacks, which are in no plan" if waits else ""
    steps = max(10, options.get("step_period", 1))
    assert line == f"the first {steps} steps against the plan: step seconds 1 planned, {seconds} real{words}"


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_is_compared_from_where_it_goes_on(tmp_path, clock, told):
    trainer = timed(tmp_path, clock, max_steps=7, accumulate_grad_batches=2)
    assert told == []
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    # the time alone: the run ends before its memory is measured
    timed(tmp_path, clock, max_steps=18, accumulate_grad_batches=2, ckpt_path=tmp_path / "half.ckpt")
    assert told == ["the first 10 steps against the plan: step seconds 1 planned, 4 real"]


def test_of_spawned_processes_the_first_alone_tells():
    check = PlanCheck("never")
    for first in (True, False):
        check._plan = made_plan()
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        check.on_train_start(SimpleNamespace(is_global_zero=first, strategy=strategy, global_step=0), None)
        assert (check._plan is not None) is first
