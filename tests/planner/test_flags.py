"""The Trainer's lines are a Setting, whether they are names, class paths or instances."""

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy

from lightning_bigmodels import CausalLanguageModel, Text
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner.flags import changed_flags, replicas, setting_from_lines, setting_of
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.simulation import simulate
from lightning_bigmodels.strategies import CompressedDDPStrategy, FSDP2Strategy
from tests.toys import ToyData

OURS = "lightning_bigmodels.strategies."
LIGHTNINGS = "lightning.pytorch.strategies."


class Own(DDPStrategy):
    """It may shard, as DeepSpeed's does, which is one of these too."""


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (None, "auto"),
        ("fsdp", "fsdp"),
        ({"class_path": OURS + "FSDP2Strategy"}, "fsdp2"),
        ({"class_path": OURS + "FSDP2Strategy", "init_args": {"tensor_parallel_size": 2}}, "fsdp2_tp2"),
        ({"class_path": OURS + "FSDP2Strategy", "init_args": {"tensor_parallel_size": 16}}, "tp"),
        ({"class_path": OURS + "FSDP2Strategy", "init_args": {"offload": True}}, "fsdp2_offload"),
        (
            {"class_path": OURS + "FSDP2Strategy", "init_args": {"offload": True, "tensor_parallel_size": "auto"}},
            "fsdp2_offload_tp16",
        ),
        ({"class_path": OURS + "CompressedDDPStrategy", "init_args": {"compression": "powersgd"}}, "ddp_powersgd"),
        ({"class_path": LIGHTNINGS + "DDPStrategy", "init_args": {"bucket_cap_mb": 50}}, "ddp"),
        (
            {
                "class_path": OURS + "CompressedDDPStrategy",
                "init_args": {"compression": "powersgd", "powersgd_rank": 4},
            },
            "ddp_powersgd_rank4",
        ),
        ({"class_path": LIGHTNINGS + "DDPStrategy", "init_args": {"gradient_as_bucket_view": True}}, "ddp_bucket_view"),
        ({"class_path": LIGHTNINGS + "FSDPStrategy", "init_args": {"cpu_offload": True}}, "fsdp_cpu_offload"),
        ({"class_path": LIGHTNINGS + "DeepSpeedStrategy"}, "deepspeed_stage_2"),
        (
            {"class_path": LIGHTNINGS + "DeepSpeedStrategy", "init_args": {"stage": 3, "offload_parameters": True}},
            "deepspeed_stage_3_offload",
        ),
        ({"class_path": LIGHTNINGS + "DeepSpeedStrategy", "init_args": {"config": "zero.json"}}, "deepspeed_config"),
        ({"class_path": "my.Strategy"}, "my.Strategy"),
        # whoever makes a strategy of his own may give it any name
        ({"class_path": "my.DDPStrategy"}, "my.DDPStrategy"),
    ],
)
def test_lines_name_a_strategy(strategy, name):
    assert setting_from_lines({"strategy": strategy, "devices": 16}, ToyData()).strategy == name


@pytest.mark.parametrize(
    ("devices", "number"), [("auto", 1), (-1, 1), (None, 1), ("8", 8), ("0,1", 2), ([0, 2, 3], 3), (4, 4)]
)
def test_lines_count_devices(devices, number):
    lines = {"devices": devices, "num_nodes": 2, "precision": "16-mixed", "accumulate_grad_batches": 3}
    found = setting_from_lines({**lines, "gradient_clip_val": 1, "sync_batchnorm": True}, ToyData(batch_size=5))
    assert found == Setting("auto", "16-mixed", number, 2, 5, 3, 1.0, sync_batchnorm=True)
    callbacks = [{"class_path": "Throughput"}, {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging"}]
    assert setting_from_lines({"devices": devices, "callbacks": callbacks}, ToyData()).averages_weights
    assert not setting_from_lines({"devices": devices, "callbacks": callbacks[:1]}, ToyData()).averages_weights


def test_short_names_of_a_precision_are_long_ones():
    given = (None, 16, "bf16", "32", "bf16-true", "transformer-engine")
    found = [setting_from_lines({"precision": name}, ToyData()).precision for name in given]
    assert found == ["32-true", "16-mixed", "bf16-mixed", "32-true", "bf16-true", "transformer-engine"]


@pytest.mark.parametrize("devices", [0, "none", []])
def test_devices_that_are_none_are_refused(devices):
    with pytest.raises(InputError, match=r"trainer.devices is .*; give how many there are"):
        setting_from_lines({"devices": devices}, ToyData())
    lines = {"class_path": OURS + "FSDP2Strategy", "init_args": {"tensor_parallel_size": "all"}}
    with pytest.raises(
        InputError, match=r"tensor_parallel_size is 'all'; set it to auto, or to 1 or more of the 6 proc"
    ):
        setting_from_lines({"strategy": lines, "devices": 6}, ToyData())


def test_layers_may_be_split_over_any_number_of_processes():
    config = {"vocab_size": 300, "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 6, "max_position_embeddings": 32}
    data = Text("python-docs", vocab_size=300, block_size=32, batch_size=16)
    held = {}
    for size in (1, 3):
        arguments = {"tensor_parallel_size": size, "data_parallel_size": 6 // size}
        lines = {"strategy": {"class_path": OURS + "FSDP2Strategy", "init_args": arguments}, "devices": 6}
        setting = setting_from_lines(lines, data)
        assert replicas(setting) == 6 // size
        held[size] = simulate(CausalLanguageModel("llama", config), data, setting).peak.held
    # each of six has a sixth of the weights either way, but of three that split a layer a third of what it makes
    assert held[3]["parameters"] == pytest.approx(held[1]["parameters"], rel=0.1)
    assert held[3]["activations"] < 0.8 * held[1]["activations"]


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("auto", "auto"),
        ("ddp", "ddp"),
        (DDPStrategy(), "ddp"),
        (CompressedDDPStrategy("bf16"), "ddp_bf16_gradients"),
        (FSDP2Strategy(tensor_parallel_size=2), "fsdp2_tp2"),
        (FSDP2Strategy(offload=True), "fsdp2_offload"),
        (DDPStrategy(gradient_as_bucket_view=True), "ddp_bucket_view"),
        (CompressedDDPStrategy("fp16", gradient_as_bucket_view=True), "ddp_fp16_gradients_bucket_view"),
        (Own(), "Own"),
    ],
)
def test_a_trainer_is_a_setting(strategy, name):
    trainer = Trainer(
        accelerator="cpu",
        devices=4 if name != "auto" else 1,
        strategy=strategy,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        sync_batchnorm=name == "ddp",
        logger=False,
        enable_checkpointing=False,
        callbacks=[EMAWeightAveraging()] if name == "ddp" else [],
    )
    found = setting_of(trainer, ToyData())
    more = {"sync_batchnorm": name == "ddp", "averages_weights": name == "ddp"}
    assert found == Setting(name, "32-true", trainer.num_devices, 1, 4, 2, 0.5, **more)
    # the processes that split a layer see the same rows
    assert replicas(found) == {"auto": 1, "fsdp2_tp2": 2}.get(name, 4)


def test_what_differs_is_flags():
    old = Setting("ddp", "32-true", 4, 2, 8)
    new = Setting("fsdp2", "bf16-mixed", 8, 1, 4, 2, activation_checkpointing=True)
    assert changed_flags(old, old) == []
    assert changed_flags(old, new) == [
        "--data.batch_size 4",
        "--trainer.accumulate_grad_batches 2",
        "--model.activation_checkpointing true",
        "--trainer.strategy fsdp2",
        "--trainer.precision bf16-mixed",
        "--trainer.devices 8",
        "--trainer.num_nodes 1",
    ]
    assert replicas(Setting("tp", devices=8, num_nodes=3)) == 3
