"""What the Trainer's lines may hold is planned, or refused in one line that says what to plan; nothing else."""

import re

import pytest
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner import verb
from lightning_bigmodels.planner.flags import setting_from_lines
from lightning_bigmodels.planner.refusals import check_setting
from lightning_bigmodels.trainer import Trainer
from tests.planner.made import made_plan
from tests.toys import ToyData

BOUNDS = r"the strategy {} cannot be simulated without GPUs; .* allocated {}.* GiB.*, as with ddp.*; plan with"


class Own(DDPStrategy):
    """Somebody's own."""


@pytest.fixture
def outcome(monkeypatch):
    """Return a function from the Trainer's lines to the strategy that is planned, or to the line in its place."""

    def plan(model, data, setting, hardware):
        check_setting(setting)
        return made_plan(setting)

    monkeypatch.setattr(verb, "make_plan", plan)
    trainer = Trainer(logger=False, max_steps=1)

    def tell(**lines):
        data = ToyData()
        try:
            found = verb.answer(trainer, None, data, setting_from_lines({"devices": 4, **lines}, data), "h100")
        except InputError as error:
            return str(error)
        return f"{found.plan.setting.strategy} in {found.plan.setting.precision}"

    return tell


def expected(name):
    """What comes of a strategy that the registry knows."""
    if name.startswith(("fsdp", "deepspeed")) and not name.startswith("fsdp2"):
        return BOUNDS.format(name, "at most" if "offload" in name else "between")
    if "xla" in name or "tpu" in name:
        return f"the strategy {name} is for TPUs, of which the planner knows nothing; plan with ddp or fsdp2"
    if name == "single_device":
        return "the strategy single_device runs on one device, and there are 4 .*; set both to 1, or trainer.strategy"
    return f"{name} in 32-true"


def test_each_strategy_by_name_has_a_plan_or_a_line(outcome):
    names = StrategyRegistry.available_strategies()
    assert len(names) > 30
    for name in ("auto", *names):
        assert re.fullmatch(f"{expected(name)}.*", outcome(strategy=name)), name


@pytest.mark.parametrize(
    ("strategy", "arguments", "told"),
    [
        ("FSDP2Strategy", {"tensor_parallel_size": 2, "data_parallel_size": 2}, "fsdp2_tp2 in"),
        ("FSDP2Strategy", {"tensor_parallel_size": 2, "offload": True}, "fsdp2_offload_tp2 in"),
        (
            "FSDP2Strategy",
            {"data_parallel_size": 2},
            r"tensor_parallel_size 1 times data_parallel_size 2 does not make up the 4 processes \(devices 4 times",
        ),
        ("FSDP2Strategy", {"tensor_parallel_size": 0}, "tensor_parallel_size 0 does not make up the 4 processes"),
        ("FSDP2Strategy", {"data_parallel_size": "all"}, "data_parallel_size is 'all'; set it to auto, or to 1 or mo"),
        ("FSDPStrategy", {"sharding_strategy": "HYBRID_SHARD"}, BOUNDS.format("fsdp", "between")),
        ("FSDPStrategy", {"cpu_offload": True}, BOUNDS.format("fsdp_cpu_offload", "at most")),
        ("DeepSpeedStrategy", {"stage": 3}, BOUNDS.format("deepspeed_stage_3", "between")),
        ("DeepSpeedStrategy", {"config": "zero.json"}, BOUNDS.format("deepspeed_config", "at most")),
        ("DDPStrategy", {"ddp_comm_hook": "fp16_compress_hook"}, "the ddp_comm_hook of DDPStrategy cannot be planned;"),
        (
            "SingleDeviceStrategy",
            {"device": "cuda:0"},
            "the strategy SingleDeviceStrategy runs on one device, and ther",
        ),
        ("ModelParallelStrategy", {}, "the planner does not know the strategy ModelParallelStrategy; plan with ddp or"),
    ],
)
def test_each_class_of_a_strategy_has_a_plan_or_a_line(strategy, arguments, told, outcome):
    lines = {"class_path": f"lightning.pytorch.strategies.{strategy}", "init_args": arguments}
    assert re.match(told, outcome(strategy=lines))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ({"strategy": "DDP"}, "ddp in"),
        ({"strategy": "single_device", "devices": 1}, "auto in"),
        ({"strategy": "model_parallel"}, "the planner does not know the strategy model_parallel; plan with ddp or"),
        ({"strategy": "dpp"}, "the planner does not know the strategy dpp; did you mean 'ddp'"),
        *(({"precision": name}, f"auto in {name}$") for name in ("64-true", "16-mixed", "bf16-mixed", "16-true")),
        ({"precision": "16"}, "auto in 16-mixed"),
        ({"precision": 64}, "auto in 64-true"),
        ({"precision": "transformer-engine"}, "the precision transformer-engine cannot be simulated; plan with one of"),
        ({"plugins": {"class_path": "MixedPrecision", "init_args": {"precision": "bf16-mixed"}}}, "auto in bf16-mixed"),
        ({"plugins": [{"class_path": "AsyncCheckpointIO"}, {"class_path": "DoublePrecision"}]}, "auto in 64-true"),
        ({"plugins": {"class_path": "lightning.pytorch.plugins.BitsandbytesPrecision"}}, "the precision Bitsandbytes"),
        *(({"accelerator": name}, "auto in") for name in ("auto", "cpu", "gpu", "cuda")),
        *(({"accelerator": name}, f"trainer.accelerator is {name}; the planner knows CPUs") for name in ("tpu", "mps")),
        (
            {"accelerator": {"class_path": "lightning.pytorch.accelerators.XLAAccelerator"}},
            "trainer.accelerator is XLA",
        ),
        ({"devices": 0}, "trainer.devices is 0; give how many there are, 1 or more"),
        ({"devices": "1,1"}, "trainer.devices is '1,1', which names one twice; name each once"),
        *(({"num_nodes": number}, f"trainer.num_nodes is {number}; set it to 1 or more") for number in (0, -1)),
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches is 0; set it to 1 or more"),
        ({"gradient_clip_val": 0.5}, "auto in"),
    ],
)
def test_each_line_has_a_plan_or_a_line(lines, told, outcome):
    assert re.match(told, outcome(**lines))


def test_a_strategy_that_somebody_else_has_registered_may_do_anything(outcome, monkeypatch):
    monkeypatch.setitem(StrategyRegistry, "own", {"strategy": Own, "init_params": {}, "description": ""})
    assert outcome(strategy="own") == "the planner does not know the strategy own; plan with ddp or fsdp2"


def test_bounds_are_plans_with_less_and_with_more(outcome):
    # 16 GiB for four rows, and 8 GiB of state or a quarter of it
    assert "between 18.00 GiB, as with fsdp2 in bf16-true, and 24.00 GiB, as with ddp;" in outcome(
        strategy="fsdp", precision="bf16-true"
    )
    assert "and 24.75 GiB, as with ddp and the 0.75 GiB that its own buckets take by default" in outcome(
        strategy="deepspeed", precision="bf16-true"
    )
