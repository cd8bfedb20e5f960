"""The average of a network that is sharded: shards of the same average, in every kind of checkpoint."""

import functools

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.multiprocessing import ProcessRaisedException

from lightning_bigmodels.callbacks import WeightAverage
from lightning_bigmodels.strategies import FSDP2Strategy
from lightning_bigmodels.strategies.checkpoint_io import WholeCheckpointIO, consolidate
from tests.callbacks.test_weight_average import ADAM, Save, assert_same_checkpoints, by_hand, close, copy, equal
from tests.conftest import QUIET
from tests.strategies.test_fsdp1 import OnCPU
from tests.strategies.test_precision import Data, Toy, half
from tests.workers import fit_on, run_on


class Block(nn.Sequential):
    """A layer that is gathered as a whole."""


class Net(Toy):
    """Two blocks that FSDP shards apart, and layers of the root, whose gathered weights outlive an evaluation."""

    def build_network(self):
        blocks = [Block(nn.Linear(8, 8), nn.GELU()), Block(nn.Linear(8, 8), nn.GELU())]
        network = nn.Sequential(*blocks, nn.Linear(8, 1), nn.Linear(1, 1))
        network.register_buffer("scale", torch.ones(()))
        network[3].bias.requires_grad_(False)
        return network

    def blocks(self):
        return list(self.network)[:2]

    def tensor_parallel_plan(self, size):
        return {"0.0": ColwiseParallel(), "1.0": RowwiseParallel()}

    def step(self, phase, batch):
        if phase == "train":
            self.network.scale.mul_(0.5)
        return super().step(phase, batch)


def net():
    # gradients that are rounding alone, which differ between strategies, make no steps
    return Net(optimizer=functools.partial(torch.optim.Adam, lr=0.05, eps=1e-2))


def whole(module):
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in module.state_dict().items()
    }


class Watch(Callback):
    """Keeps the gathered weights after each training batch and at both ends of validations."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.steps.append(whole(module))

    def on_validation_start(self, trainer, module):
        self.validated.append(whole(module))

    on_validation_end = on_validation_start


def fit(processes, strategy, *callbacks, **settings):
    callbacks = [WeightAverage(decay=0.5), *callbacks]
    plugins = [WholeCheckpointIO()]
    return fit_on(processes, strategy, net, Data, callbacks=callbacks, plugins=plugins, **settings)


def one_file():
    return FSDP2Strategy(save_distributed_checkpoint=False)


def read(path):
    return WholeCheckpointIO().load_checkpoint(path, weights_only=True)


@pytest.mark.parametrize(("strategy", "processes"), [("fsdp2", 1), ("fsdp2", 2), ("tp", 2)])
def test_each_process_averages_its_shards(strategy, processes):
    watch = Watch()

    def report(run):
        average, watch = run.callbacks[:2]
        numbers = sum(value.numel() for value in average._copies.values())
        return watch.steps, watch.validated, numbers / sum(value.numel() for value in whole(run.model).values())

    settings = {"val_check_interval": 2, "limit_val_batches": 1, "report": report}
    for one in fit(processes, strategy, watch, **settings):
        steps, validated, share = one.report
        assert len(validated) == 4
        assert all(close(seen, by_hand(steps[:2], [0.5] * 2)) for seen in validated[:2])
        assert all(close(seen, by_hand(steps, [0.5] * 4)) for seen in [*validated[2:], one.weights])
        assert not close(one.weights, steps[-1])
        # one copy on all processes together, but for what is too small to divide
        assert share < 1 / processes + 0.25
    (plain,) = fit_on(1, "auto", net, Data)
    torch.testing.assert_close(steps[-1], plain.weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_async", one_file])
def test_a_resumed_fit_ends_with_the_same_weights_and_the_same_average(strategy, tmp_path):
    for folder, ckpt_path in ((tmp_path / "whole", None), (tmp_path / "resumed", tmp_path / "whole" / "3.ckpt")):
        settings = {"max_steps": 6, "val_check_interval": 2, "limit_val_batches": 1, "ckpt_path": ckpt_path}
        fits = fit(2, strategy, Save(folder, 3, 6), **settings)
        saved = read(folder / "6.ckpt")
        for one in fits:
            assert equal(one.weights, saved["state_dict"])
        assert saved["state_dict"].keys() - saved["current_model_state"].keys() == {"network.3.bias"}
    expected, resumed = read(tmp_path / "whole" / "6.ckpt"), read(tmp_path / "resumed" / "6.ckpt")
    assert_same_checkpoints(expected, resumed)
    for state, again in zip(expected["optimizer_states"], resumed["optimizer_states"], strict=True):
        torch.testing.assert_close(again["state"], state["state"], rtol=0, atol=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    fit(1, "auto", Save(folder, 6), max_steps=6)
    return read(folder / "6.ckpt")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, "fsdp2"), (1, "auto")),
        ((2, "fsdp2"), (2, "tp")),
        ((2, one_file), (2, "ddp")),
        ((1, "auto"), (2, "fsdp2")),
    ],
)
def test_any_strategy_goes_on_from_the_checkpoint_of_any(first, then, alone, tmp_path):
    fit(*first, Save(tmp_path, 3), max_steps=3)
    fit(*then, Save(tmp_path, 6), max_steps=6, ckpt_path=tmp_path / "3.ckpt")
    found = read(tmp_path / "6.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert close(found[key], alone[key])
    assert found["callbacks"]["WeightAverage"] == alone["callbacks"]["WeightAverage"]


def test_the_average_is_what_others_find_in_a_sharded_checkpoint(trainer, tmp_path):
    watch = Watch()
    (steps, _) = fit(2, "fsdp2", watch, Save(tmp_path, 4), report=lambda run: run.callbacks[1].steps)
    average = by_hand(steps.report, [0.5] * 4)
    consolidate(tmp_path / "4.ckpt", tmp_path / "plain.ckpt")
    loaded = net()
    loaded.configure_model()
    loaded.load_state_dict(torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"])
    assert close(copy(loaded), average)
    for path in (tmp_path / "4.ckpt", tmp_path / "plain.ckpt"):
        model = net()
        run = trainer(callbacks=[WeightAverage()], plugins=[WholeCheckpointIO()])
        run.validate(model, Data(), ckpt_path=path, verbose=False)
        assert close(copy(model), average)


def test_a_step_that_a_scaler_leaves_out_does_not_count(tmp_path):
    def build():
        return Net((2,), ADAM)

    watch = Watch()
    callbacks = [WeightAverage(decay=0.5), watch]
    settings = {"plugins": [half(init_scale=1024.0)], "max_steps": 5, "report": lambda run: run.callbacks[1].steps}
    for one in fit_on(2, "fsdp2", build, Data, callbacks=callbacks, **settings):
        found = [name for name in one.weights if name != "network.scale"]
        expected = by_hand([one.report[index] for index in (0, 1, 3, 4)], [0.5] * 4)
        assert close({name: one.weights[name] for name in found}, {name: expected[name] for name in found})


def test_after_an_error_within_a_forward_pass_of_validation_the_shards_are_those_of_training():
    class Breaks(Net):
        def step(self, phase, batch):
            if phase == "val":
                self.network[-1].forward = lost
            return super().step(phase, batch)

    def lost(*args):
        raise RuntimeError("lost")

    class Shards(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            self.parameters = list(module.parameters())
            self.trained = [p.to_local().clone() for p in self.parameters]

        def on_validation_batch_start(self, trainer, module, *args):
            self.validated = [p.to_local().clone() for p in self.parameters]

    def run():
        shards = Shards()
        settings = {"devices": 2, "strategy": "fsdp2", "val_check_interval": 2, "limit_val_batches": 1}
        trainer = Trainer(**{**QUIET, **settings}, callbacks=[WeightAverage(decay=0.5), shards])
        with pytest.raises(RuntimeError, match="lost"):
            trainer.fit(Breaks(optimizer=ADAM), Data())
        found = [p.to_local() for p in shards.parameters]
        return [
            [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
            for expected in (shards.trained, shards.validated)
        ]

    for trained, validated in run_on(2, run):
        assert all(trained)
        assert not all(validated)


@pytest.mark.filterwarnings("ignore:FSDP", "ignore:.*NO_SHARD")
@pytest.mark.parametrize("processes", [1, 2])
def test_fsdp1_averages_its_flat_shards(processes, tmp_path):
    def fit(strategy, count, *callbacks, **settings):
        # with Adam this subclass does not go on exactly, with or without an average (Lightning 2.6)
        sgd = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.5)
        callbacks = [WeightAverage(decay=0.5), *callbacks]
        return fit_on(count, strategy, lambda: Net(optimizer=sgd), Data, callbacks=callbacks, **settings)

    settings = {"val_check_interval": 2, "limit_val_batches": 1}
    fit("auto", 1, Save(tmp_path / "alone", 6), max_steps=6, **settings)
    fit(OnCPU, processes, Save(tmp_path / "whole", 3, 6), max_steps=6, **settings)
    resume = {"max_steps": 6, "ckpt_path": tmp_path / "whole" / "3.ckpt", **settings}
    fit(OnCPU, processes, Save(tmp_path / "resumed", 6), **resume)
    fit("auto", 1, Save(tmp_path / "plain", 6), **resume)
    saved = {name: read(tmp_path / name / "6.ckpt") for name in ("alone", "whole", "resumed", "plain")}
    assert_same_checkpoints(saved["whole"], saved["resumed"])
    for name in ("whole", "plain"):
        for key in ("state_dict", "current_model_state"):
            assert close(saved[name][key], saved["alone"][key])


def test_sharded_checkpoints_of_fsdp1_are_refused():
    def sharded():
        return OnCPU(state_dict_type="sharded")

    with pytest.raises(ProcessRaisedException, match=r"set state_dict_type: full, or use fsdp2"):
        fit(1, sharded)
