"""A plan without a simulation: memory and time by formulas that a test can work out in the head."""

from dataclasses import replace

from lightning_bigmodels.planner.hardware import find_hardware
from lightning_bigmodels.planner.plan import Plan
from lightning_bigmodels.planner.room import Room
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.timing import StepTime
from lightning_bigmodels.planner.trace import Moment
from lightning_bigmodels.planner.traffic import Traffic

GIB = 2**30


def made_plan(setting=None, state=8, row=4, memory=24):
    """Return a plan of `state` GiB that strategies divide, and `row` GiB of activations for each row of a batch."""
    setting = setting or Setting()
    shards = setting.world_size if setting.strategy.startswith("fsdp2") else 1
    halved = 2 if setting.precision == "bf16-mixed" else 1
    split = int(setting.strategy.partition("_tp")[2] or 1)
    activations = row * setting.batch_size / halved / (4 if setting.activation_checkpointing else 1) / split
    shard = int(state * GIB / shards)
    host = shard if setting.offloads else 0
    held = {"parameters": shard - host, "activations": int(activations * GIB)}
    used = sum(held.values())
    seconds = setting.accumulate_grad_batches * setting.batch_size * (1.3 if setting.activation_checkpointing else 1)
    moments = [
        Moment(0, "forward", {"parameters": held["parameters"]}),
        Moment(6, "forward", held, "aten::mm"),
        Moment(8, "backward", {"parameters": held["parameters"], "temporary": GIB}, "aten::add"),
        Moment(10, "update", {"parameters": held["parameters"]}, "aten::mul"),
    ]
    return Plan(
        setting=setting,
        hardware=replace(find_hardware("h100"), memory=memory * GIB),
        unit="tokens",
        units_per_row=100,
        peak=moments[1],
        num_operations=12,
        room=Room(used, used, used, GIB // 2, memory * GIB, host),
        time=StepTime(seconds, {"compute": seconds * 0.75, "memory": seconds * 0.25}, 0.0, 4e12, 3e12, 0.4),
        traffic={"all-gather": Traffic(4, 3 * GIB, 3 * GIB)} if shards > 1 else {},
        course=moments,
        assumptions=["aten::nonzero"],
        model="Made",
    )
