"""Changes that make a step fit: the least of them, each tried, as flags that exist."""

from dataclasses import dataclass

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner.search import find_changes
from lightning_bigmodels.planner.setting import Setting
from tests.planner.made import GIB, made_plan


@dataclass
class Model:
    activation_checkpointing: bool = False
    automatic_optimization: bool = True


class Fixed:
    """A model without anything to change."""


def tried(setting, model, **sizes):
    """Return flags and used GiB of all trials, and the flags of those that fit."""
    plans = []

    def replan(changed):
        plans.append(changed)
        return made_plan(changed, **sizes)

    trials = find_changes(made_plan(setting, **sizes), model, replan)
    assert len(plans) == len(set(plans)), "nothing is planned twice"
    assert setting not in plans
    found = {" ".join(trial.flags): trial.plan.room.used / GIB for trial in trials}
    return found, [" ".join(trial.flags) for trial in trials if trial.fits]


def test_the_largest_batch_that_fits_keeps_the_rows_of_a_step():
    # 8 + 4 x rows within 24, of which half a GiB is uncertain: 3 rows, and 2 divides 8
    found, fitting = tried(Setting(batch_size=8), Fixed())
    assert fitting == ["--data.batch_size 2 --trainer.accumulate_grad_batches 4"]
    assert found == {fitting[0]: 16}
    found, fitting = tried(Setting(batch_size=12, accumulate_grad_batches=3), Fixed())
    assert fitting == ["--data.batch_size 3 --trainer.accumulate_grad_batches 12"]


def test_where_one_row_cannot_be_planned_the_fewest_that_can_take_its_place():
    def changes(state, **setting):
        def replan(changed):
            if changed.batch_size == 1:
                raise InputError("batch norm")
            return made_plan(changed, state)

        trials = find_changes(made_plan(Setting(**setting), state), Fixed(), replan)
        return [" ".join(trial.flags) for trial in trials if trial.fits], [trial.reason for trial in trials]

    fitting, reasons = changes(8, batch_size=8)
    assert fitting == ["--data.batch_size 2 --trainer.accumulate_grad_batches 4"]
    assert reasons == ["batch norm", ""]
    assert changes(8, batch_size=9)[0] == ["--data.batch_size 3 --trainer.accumulate_grad_batches 3"]
    # where there is no smaller batch, other changes are tried with this one
    others = ["--trainer.strategy fsdp2_offload", "--trainer.strategy fsdp2 --trainer.devices 2"]
    assert changes(20, batch_size=2)[0] == others


def test_two_changes_that_fit_are_enough_of_a_choice():
    _, fitting = tried(Setting(batch_size=8, devices=4), Model())
    assert fitting == [
        "--data.batch_size 2 --trainer.accumulate_grad_batches 4",
        "--model.activation_checkpointing true",
    ]
    # it is on already, and a batch of one row cannot be less
    _, fitting = tried(Setting(batch_size=1, devices=4, precision="bf16-mixed"), Model(True), state=40)
    assert fitting == ["--trainer.strategy fsdp2"]


def test_changes_are_put_together_where_none_is_enough():
    # alone: 40 + 4, 40 + 8 and 10 + 32 of 24 GiB
    found, fitting = tried(Setting("ddp", batch_size=8, devices=4), Model(), state=40)
    assert list(found.values()) == [44, 48, 42, 18]
    assert fitting == ["--model.activation_checkpointing true --trainer.strategy fsdp2"]
    # with one more row the batch has to give way too
    found, fitting = tried(Setting("ddp", batch_size=8, devices=4), Model(), state=40, row=8)
    assert fitting == [
        "--data.batch_size 4 --trainer.accumulate_grad_batches 2 --model.activation_checkpointing true "
        "--trainer.strategy fsdp2"
    ]


def test_host_memory_comes_before_what_changes_the_result_and_after_what_changes_neither_it_nor_the_time():
    offload = "--trainer.strategy fsdp2_offload"
    found, fitting = tried(Setting("fsdp2", batch_size=1, devices=4), Fixed(), state=40, row=20)
    assert fitting == [offload, "--trainer.precision bf16-mixed"]
    assert found[offload] == 20
    _, fitting = tried(Setting(batch_size=2, precision="bf16-true"), Fixed(), state=80)
    assert fitting[0] == offload
    # sharding is enough; activations alone are too much; a node's layers are split, which has no such name
    for setting, row in (
        (Setting("ddp", devices=4), 4),
        (Setting("fsdp2", devices=8), 40),
        (Setting("fsdp2_tp2", devices=4), 4),
    ):
        found, _ = tried(setting, Fixed(), state=70, row=row)
        assert not [flags for flags in found if "offload" in flags]


def test_weights_go_to_host_memory_at_the_very_last_where_nothing_else_is_enough():
    def replan(setting):
        if setting.world_size > 1:
            raise InputError("there is one device")
        return made_plan(setting, state=100, row=40)

    trials = find_changes(made_plan(Setting(), state=100, row=40), Fixed(), replan)
    assert [" ".join(trial.flags) for trial in trials if trial.fits] == [
        "--trainer.strategy fsdp2_offload --trainer.precision bf16-mixed"
    ]


def test_precision_and_split_layers_come_before_more_devices():
    found, fitting = tried(Setting("fsdp2", batch_size=1, devices=4), Fixed(), state=8, row=26)
    split = "--trainer.accumulate_grad_batches 2 --trainer.strategy fsdp2_tp2"
    assert fitting == ["--trainer.precision bf16-mixed", split]
    assert found == {fitting[0]: 15, split: 15}
    _, fitting = tried(Setting("fsdp2", batch_size=1, devices=8, precision="bf16-true"), Fixed(), state=8, row=40)
    assert fitting == ["--trainer.accumulate_grad_batches 2 --trainer.strategy fsdp2_tp2"]


def test_more_devices_are_as_many_as_the_state_needs():
    _, fitting = tried(Setting(precision="bf16-true", accumulate_grad_batches=8), Fixed(), state=100)
    # 100 / 8 + 4 GiB
    assert fitting == [
        "--trainer.strategy fsdp2_offload",
        "--trainer.accumulate_grad_batches 1 --trainer.strategy fsdp2 --trainer.devices 8",
    ]
    # the batch may stay with what was won
    found, fitting = tried(Setting("fsdp2", precision="bf16-true", batch_size=2), Fixed(), state=100)
    assert fitting[1:] == ["--trainer.devices 8"]
    assert found[fitting[1]] == 20.5
    _, fitting = tried(Setting("fsdp2", precision="bf16-true", devices=8), Fixed(), state=400)
    assert fitting[1:] == ["--trainer.num_nodes 4"]


def test_where_nothing_helps_everything_that_was_tried_is_told():
    found, fitting = tried(Setting(precision="32-true"), Fixed(), row=200)
    assert fitting == []
    assert list(found) == ["--trainer.precision bf16-mixed", "--trainer.precision bf16-true"]
    # optimizers that the step itself steps see a batch as a whole
    found, fitting = tried(Setting(batch_size=4, precision="bf16-true"), Model(automatic_optimization=False), row=20)
    assert next(iter(found)) == "--model.activation_checkpointing true"
    assert fitting == [
        "--model.activation_checkpointing true --trainer.strategy fsdp2_offload",
        "--model.activation_checkpointing true --trainer.strategy fsdp2 --trainer.devices 4",
    ]


def test_what_cannot_be_planned_is_told_with_its_reason():
    def refuse(setting):
        raise InputError(f"{setting.strategy} is not for this network; use another")

    trials = find_changes(made_plan(Setting(batch_size=1, devices=2, precision="bf16-true"), state=80), Fixed(), refuse)
    assert trials[0].to_dict() == {
        "flags": ["--trainer.strategy fsdp2"],
        "reason": "fsdp2 is not for this network; use another",
    }
    assert trials[1].flags == ["--trainer.strategy fsdp2_offload"]
    assert not any(trial.fits for trial in trials)
