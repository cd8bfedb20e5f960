"""What Horovod's calls do, done here: each row of the table in docs/scaling.md, shown on two or more processes."""

import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed, nn
from torch.utils.data import DataLoader

from lightning_bigmodels.tasks import Task
from tests.workers import fit_on

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
RATE = 0.1

# from a row's first name to the test that shows it
SHOWN = {
    "horovodrun -np 2": "tests/test_engines.py::test_the_commands_run_in_order",
    "hvd.init()": "tests/test_horovod_mapping.py::test_each_process_knows_its_place",
    "hvd.broadcast_parameters": "tests/test_horovod_mapping.py::test_all_start_with_the_weights_of_the_first",
    "hvd.broadcast_optimizer_state": "tests/test_horovod_mapping.py::test_all_go_on_with_the_optimizer_that_was_saved",
    "hvd.DistributedOptimizer": "tests/test_horovod_mapping.py::test_gradients_are_averaged_or_summed",
    "op=hvd.Sum": "tests/test_horovod_mapping.py::test_gradients_are_averaged_or_summed",
    "op=hvd.Adasum": None,
    "backward_passes_per_step": "tests/test_horovod_mapping.py::test_passes_are_averaged_before_they_are_sent",
    "hvd.Compression.fp16": "tests/test_horovod_mapping.py::test_compressed_gradients_are_half_as_long",
    "HOROVOD_FUSION_THRESHOLD": "tests/test_horovod_mapping.py::test_gradients_are_sent_in_buckets_of_a_given_size",
    "hvd.allreduce": "tests/test_horovod_mapping.py::test_tensors_and_objects_of_ones_own",
    "hvd.allgather": "tests/test_horovod_mapping.py::test_tensors_and_objects_of_ones_own",
    "hvd.broadcast_object": "tests/test_horovod_mapping.py::test_tensors_and_objects_of_ones_own",
    "hvd.ProcessSet": "tests/test_horovod_mapping.py::test_some_processes_among_themselves",
    "MetricAverageCallback": "tests/test_horovod_mapping.py::test_metrics_are_averaged",
    "lr * hvd.size()": "tests/test_horovod_mapping.py::test_gradients_are_averaged_or_summed",
    "hvd.SyncBatchNorm": "tests/test_horovod_mapping.py::test_batch_statistics_are_of_all_processes",
    "hvd.join()": "tests/data/test_uneven.py::test_processes_with_unequal_loaders_train_in_step",
    "hvd.elastic.run": "tests/test_engines.py::test_a_host_is_lost_and_another_comes",
    "hvd.elastic.ElasticSampler": "tests/test_elastic.py::test_goes_on_with_the_very_next_sample",
    "HOROVOD_TIMELINE": "tests/test_engines.py::test_the_commands_run_in_order",
}


def test_every_row_of_the_table_is_shown():
    table = re.search(r"^\| Horovod .*\n\|[ |-]+\n((?:\|.*\n)+)", PAGE, flags=re.M)
    rows = [re.match(r"\| `([^`]+)`", row)[1] for row in table[1].splitlines()]
    assert rows == list(SHOWN)
    for test in filter(None, SHOWN.values()):
        path, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), test


def batches(rank):
    return torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(rank))


def loss_of(layer, batch):
    return (layer(batch) - 1).square().mean()


class OwnRows(LightningDataModule):
    """Other rows for each process."""

    def train_dataloader(self):
        return DataLoader(batches(self.trainer.global_rank), batch_size=None)

    val_dataloader = train_dataloader


class Line(Task):
    """A linear layer; `scale` says by how much the loss is multiplied."""

    def __init__(self, scale=lambda module: 1.0, seed=lambda: 0, momentum=0.0, rate=RATE):
        super().__init__(optimizer=lambda groups: torch.optim.SGD(groups, lr=rate, momentum=momentum))
        self.scale, self.seed = scale, seed

    def build_network(self):
        torch.manual_seed(self.seed())
        self.register_buffer("start", torch.rand(2))
        return nn.Linear(3, 1)

    def step(self, phase, batch):
        return self.scale(self) * loss_of(self.network, batch)


def fit(strategy="ddp", build=Line, processes=2, **settings):
    settings = {"max_steps": 3, **settings}
    return fit_on(processes, strategy, build, OwnRows, use_distributed_sampler=False, timeout=60, **settings)


def new_layer():
    """Return the layer that process 0 starts with."""
    torch.manual_seed(0)
    torch.rand(2)
    return nn.Linear(3, 1)


def by_hand(gradient, steps=3):
    """Descend; `gradient(layer, step)` fills in the gradients."""
    layer = new_layer()
    for step in range(steps):
        layer.zero_grad()
        gradient(layer, step)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= RATE * parameter.grad
    return layer


def assert_same(fits, layer, **tolerance):
    for one in fits:
        weights = {name: one.weights[f"network.{name}"] for name, _ in layer.named_parameters()}
        torch.testing.assert_close(weights, dict(layer.state_dict()), **tolerance)


class Traffic(Callback):
    """What torch's profiler sees this process send in the batches from `first` to `last`: bytes, as they lie in memory.

    Attributes:
        sent: From collective and type to bytes; `calls` counts them.
    """

    SIZES = {"float": 4, "c10::Half": 2, "c10::BFloat16": 2}

    def __init__(self, first=2, last=2):
        self.first, self.last = first, last
        self.sent, self.calls = Counter(), Counter()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.first:
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.start()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx != self.last:
            return
        self.profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self.profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        for event in events:
            if event.get("name", "").startswith("gloo:"):
                ((kind,), (shape,)) = event["args"]["Input type"], event["args"]["Input Dims"]
                if kind not in self.SIZES:
                    continue  # what DDP tells of its buckets
                key = event["name"].removeprefix("gloo:"), kind
                self.calls[key] += 1
                self.sent[key] += self.SIZES[kind] * torch.Size(shape).numel()


def traffic(trainer):
    (callback,) = [callback for callback in trainer.callbacks if isinstance(callback, Traffic)]
    return dict(callback.sent), dict(callback.calls)


def test_each_process_knows_its_place():
    def seen(trainer):
        return trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.is_global_zero

    fits = fit(processes=4, num_nodes=2, report=seen)
    assert [one.report for one in fits] == [(4, rank, rank % 2, rank // 2, rank == 0) for rank in range(4)]


def test_all_start_with_the_weights_of_the_first():
    fits = fit(build=lambda: Line(seed=lambda: int(os.environ["RANK"]), rate=0.0))
    assert_same(fits, new_layer(), rtol=0, atol=0)
    start = torch.rand(2, generator=torch.Generator().manual_seed(0))
    assert [one.weights["start"].tolist() for one in fits] == [start.tolist()] * 2


def test_all_go_on_with_the_optimizer_that_was_saved(tmp_path):
    def save(trainer):
        trainer.save_checkpoint(tmp_path / "cut.ckpt")
        return trainer.optimizers[0].state_dict()

    def build():
        return Line(momentum=0.9)

    saved = fit(build=build, report=save)
    resumed = fit(build=build, ckpt_path=tmp_path / "cut.ckpt", report=lambda run: run.optimizers[0].state_dict())
    momenta = [[state["momentum_buffer"] for state in one.report["state"].values()] for one in [*saved, *resumed]]
    assert len(momenta[0]) == 2
    for others in momenta[1:]:
        torch.testing.assert_close(others, momenta[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scale", "factor"), [(lambda module: 1.0, 0.5), (lambda module: module.trainer.world_size, 1)]
)
def test_gradients_are_averaged_or_summed(scale, factor):
    def gradient(layer, step):
        for rank in range(2):
            (factor * loss_of(layer, batches(rank)[step])).backward()

    fits = fit(build=lambda: Line(scale), report=lambda run: run.optimizers[0].param_groups[0]["lr"])
    assert_same(fits, by_hand(gradient))
    # on any number of processes the rate is the one that was given
    assert [one.report for one in fits] == [RATE] * 2


def test_passes_are_averaged_before_they_are_sent():
    def gradient(layer, step):
        for rank in range(2):
            for batch in batches(rank)[2 * step : 2 * step + 2]:
                (loss_of(layer, batch) / 4).backward()

    fits = fit(accumulate_grad_batches=2, callbacks=[Traffic(4, 5)], report=traffic)
    assert_same(fits, by_hand(gradient))
    for one in fits:
        sent, calls = one.report
        # one message for two passes: three weights and a bias
        assert (sent["all_reduce", "float"], calls["all_reduce", "float"]) == (16, 1)


@pytest.mark.parametrize(
    ("strategy", "kind", "digits"),
    [("ddp_fp16_gradients", "c10::Half", 11), ("ddp_bf16_gradients", "c10::BFloat16", 8)],
)
def test_compressed_gradients_are_half_as_long(strategy, kind, digits):
    def gradient(layer, step):
        for rank in range(2):
            (loss_of(layer, batches(rank)[step]) / 2).backward()

    one_step = {"max_steps": 1, "callbacks": [Traffic(0, 0)], "report": traffic}
    whole, compressed = fit(**one_step), fit(strategy, **one_step)
    exact = by_hand(gradient, steps=1)
    for plain, short in zip(whole, compressed, strict=True):
        assert plain.report[0]["all_reduce", "float"] == 16
        assert short.report[0]["all_reduce", kind] == 8
        assert ("all_reduce", "float") not in short.report[0]
        for name, parameter in exact.named_parameters():
            # each process rounds its gradient, and the sum is rounded: half of the last digit each time
            mean_size = sum(_gradient(rank, name).abs() for rank in range(2)) / 2
            bound = RATE * 2 * mean_size * 2.0**-digits + 1e-7
            error = (short.weights[f"network.{name}"] - parameter.detach()).abs()
            assert (error <= bound).all()
    assert any(not torch.equal(whole[0].weights[key], value) for key, value in compressed[0].weights.items())


def _gradient(rank, name):
    layer = new_layer()
    loss_of(layer, batches(rank)[0]).backward()
    return layer.get_parameter(name).grad


def test_gradients_are_sent_in_buckets_of_a_given_size():
    class Wide(Line):
        def build_network(self):
            return nn.Sequential(nn.Linear(3, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 1))

    def calls(**kwargs):
        fits = fit(
            lambda: DDPStrategy(**kwargs), Wide, max_steps=4, callbacks=[Traffic(3, 3)], report=lambda run: traffic(run)
        )
        return fits[0].report[1]["all_reduce", "float"]

    assert calls(bucket_cap_mb=100) == 1
    assert calls(bucket_cap_mb=1) > 1


class Messages(Line):
    """Keeps what other processes said."""

    def on_train_start(self):
        super().on_train_start()
        rank, strategy = self.global_rank, self.trainer.strategy
        own = torch.tensor([rank + 1.0, 10.0 * rank])
        self.heard = {
            "sum": strategy.reduce(own.clone(), reduce_op="sum"),
            "mean": strategy.reduce(own.clone(), reduce_op="mean"),
            "max": strategy.reduce(own.clone(), reduce_op="max"),
            "gathered": self.all_gather(own),
            "broadcast": strategy.broadcast({"from": rank}, src=1),
        }


# Lightning 2.6 with torch 2.14, of its own code
@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather is deprecated")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_tensors_and_objects_of_ones_own(strategy):
    for one in fit(strategy, Messages, report=lambda run: run.lightning_module.heard):
        assert one.report["sum"].tolist() == [3, 10]
        assert one.report["mean"].tolist() == [1.5, 5]
        assert one.report["max"].tolist() == [2, 10]
        assert one.report["gathered"].tolist() == [[1, 0], [2, 10]]
        assert one.report["broadcast"] == {"from": 1}


def test_some_processes_among_themselves():
    class Groups(Line):
        def on_train_start(self):
            super().on_train_start()
            groups = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
            self.total = torch.tensor(self.global_rank)
            distributed.all_reduce(self.total, group=groups[self.global_rank % 2])

    fits = fit(build=Groups, processes=4, report=lambda run: int(run.lightning_module.total))
    assert [one.report for one in fits] == [2, 4, 2, 4]


def test_metrics_are_averaged():
    class Logs(Line):
        def training_step(self, batch, batch_idx):
            self.log("rank", float(self.global_rank), sync_dist=True)
            return super().training_step(batch, batch_idx)

    assert [one.metrics["rank"] for one in fit(build=Logs)] == [0.5, 0.5]


def test_batch_statistics_are_of_all_processes():
    class Normed(Line):
        def build_network(self):
            return nn.Sequential(nn.BatchNorm1d(3, momentum=1.0), nn.Linear(3, 1))

    first = [batches(rank)[0] for rank in (0, 1)]
    fits = fit(build=Normed, max_steps=1, sync_batchnorm=True)
    for one, own in zip(fits, first, strict=True):
        mean, variance = (one.weights[f"network.0.running_{name}"] for name in ("mean", "var"))
        torch.testing.assert_close(mean, torch.cat(first).mean(0))
        torch.testing.assert_close(variance, torch.cat(first).var(0))
        assert not torch.allclose(mean, own.mean(0), atol=1e-2)
