"""FSDP2 with weights and optimizer in host memory: on CPUs, where that is no other memory, the very same training."""

import functools

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from lightning_bigmodels import CausalLanguageModel, optim
from lightning_bigmodels.callbacks import WeightAverage
from lightning_bigmodels.strategies import FSDP2Strategy
from tests.conftest import TINY_LLAMA
from tests.workers import fit_on

# the checkpoints are read by runs that write none
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path")

ADAGRAD = functools.partial(torch.optim.Adagrad, lr=0.01)  # makes its state before the first step
FUSED = functools.partial(torch.optim.AdamW, lr=0.01, fused=True)


def half():
    return MixedPrecision("16-mixed", "cpu")


def fit(strategy, text, processes=2, arguments=None, report=lambda trainer: None, **settings):
    values = {"architecture": "llama", "config": TINY_LLAMA, **(arguments or {})}
    return fit_on(
        processes,
        strategy,
        lambda: CausalLanguageModel(**values),
        lambda: text(batch_size=8 // processes),
        report=report,
        **settings,
    )


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.losses == other.losses
        assert one.metrics == other.metrics
        torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=0)


def policies(trainer):
    """What FSDP2 was told of each group of parameters that it gathers as a whole."""
    parts = [part for part in trainer.model.modules() if isinstance(part, FSDPModule)]
    return [group.offload_policy for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({"optimizer": FUSED}, {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}),
        ({"optimizer": optim.MuonWithAdamW}, {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"}),
        ({"optimizer": ADAGRAD, "activation_checkpointing": True}, {"processes": 1, "plugins": [half()]}),
    ],
    ids=["AdamW", "Muon", "Adagrad on one process in float16"],
)
def test_losses_and_weights_are_those_of_fsdp2(arguments, settings, text):
    settings = {"max_steps": 3, "arguments": arguments, **settings}
    found = fit("fsdp2_offload", text, report=policies, **settings)
    assert_same(found, fit("fsdp2", text, **settings))
    assert found[0].report == [CPUOffloadPolicy(pin_memory=False)] * (1 + TINY_LLAMA["num_hidden_layers"])


@pytest.mark.parametrize("sharded", [True, False], ids=["shards", "one file"])
def test_checkpoints_are_those_of_fsdp2_and_runs_go_on_from_either(sharded, text, tmp_path):
    def strategy(offload):
        return lambda: FSDP2Strategy(offload=offload, save_distributed_checkpoint=sharded)

    def run(offload, steps, folder=None, **settings):
        callbacks = [WeightAverage(decay=0.5)]
        if folder is not None:
            callbacks.append(ModelCheckpoint(tmp_path / folder, filename="last", every_n_train_steps=2, save_top_k=-1))
        settings = {"enable_checkpointing": folder is not None, "callbacks": callbacks, **settings}
        return fit(strategy(offload), text, max_steps=steps, arguments={"optimizer": FUSED}, **settings)

    whole = run(False, 4)
    run(True, 2, "here")
    run(False, 2, "there")
    for offload, folder in ((True, "there"), (False, "here"), (True, "here")):
        resumed = run(offload, 4, ckpt_path=tmp_path / folder / "last.ckpt")
        for one, other in zip(resumed, whole, strict=True):
            assert one.losses == other.losses[2:]
            torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=0)


class Meta(LightningModule):
    """Built without memory, as networks are that no host could hold whole; it has a buffer and a frozen companion."""

    def __init__(self):
        super().__init__()
        self.network = None
        self.companion = nn.Linear(2, 2)

    def configure_model(self):
        if self.network is None:
            with torch.device("meta"):
                self.network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"], offload_policy=CPUOffloadPolicy(False))

    def training_step(self, batch, batch_idx):
        return self.network(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


# torch's own, of networks that are drawn where they were sharded
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu")
def test_what_is_not_sharded_alone_goes_to_the_device(monkeypatch):
    """The meta device stands for a GPU: moved to it are buffers, and modules that nobody sharded."""

    def places(trainer):
        strategy, module = trainer.strategy, trainer.lightning_module
        monkeypatch.setattr(FSDP2Strategy, "root_device", torch.device("meta"))
        strategy.model_to_device()
        moved = {name: value.device.type for name, value in module.state_dict().items()}
        told = module.device.type
        monkeypatch.undo()
        module.to_empty(device="cpu")
        return moved, told

    data = DataLoader(torch.randn(8, 4), batch_size=4)
    (one,) = fit_on(1, "fsdp2_offload", Meta, lambda: data, max_steps=2, report=places)
    moved, told = one.report
    sharded = {"network.0.weight", "network.0.bias", "network.1.weight", "network.1.bias"}
    buffers = {f"network.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {name for name, place in moved.items() if place == "cpu"} == sharded
    assert {name for name, place in moved.items() if place == "meta"} == buffers | {
        "companion.weight",
        "companion.bias",
    }
    assert told == "meta"


@pytest.fixture
def on_gpu():
    """Return a function that makes a strategy which believes that it has a GPU."""

    def make(**arguments):
        strategy = FSDP2Strategy(**arguments)
        strategy.cluster_environment = LightningEnvironment()
        strategy.parallel_devices = [torch.device("cuda", 0)]
        return strategy

    return make


@pytest.mark.parametrize(("offload", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "nccl")])
def test_processes_talk_of_what_either_memory_holds(offload, backend, on_gpu):
    assert on_gpu(offload=offload)._get_process_group_backend() == backend


def test_the_scale_of_a_loss_is_where_the_gradients_are(on_gpu):
    strategy = on_gpu(offload=True)
    plugin = MixedPrecision("16-mixed", "cpu")
    strategy.precision_plugin = plugin
    on_device = plugin.scaler.scale(torch.ones((), device="meta"))
    assert on_device.device.type == "meta"
    assert plugin.scaler._scale.device.type == "cpu"
    assert plugin.scaler.get_scale() == 65536


def test_whole_weights_are_taken_while_buffers_are_beside_the_shards(on_gpu, monkeypatch):
    moved = []
    monkeypatch.setattr(FSDP2Strategy, "_move_what_is_whole", lambda self, device: moved.append(device.type))
    with on_gpu(offload=True)._on_one_device():
        assert moved == ["cpu"]
    assert moved == ["cpu", "cuda"]
    with on_gpu()._on_one_device():
        assert len(moved) == 2


def test_a_penalty_on_weights_that_are_not_on_the_device_is_refused(text):
    with pytest.raises(ProcessRaisedException, match="l1_penalty does not work with the strategy fsdp2_offl"):
        fit("fsdp2_offload", text, processes=1, arguments={"l1_penalty": 0.1}, max_steps=1)
