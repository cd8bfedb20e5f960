"""Steps on tensors without memory: they hold, compute and send what real ones do."""

import dataclasses
from collections import Counter
from contextlib import nullcontext
from itertools import accumulate

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_bigmodels import CausalLanguageModel, ImageClassifier, Images, Text
from lightning_bigmodels.batch_size import find_batch_size
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner.course import course_of
from lightning_bigmodels.planner.flags import setting_from_lines
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.simulation import simulate
from lightning_bigmodels.planner.trace import TO_DEVICE, TO_HOST, StepTrace
from lightning_bigmodels.planner.traffic import Traffic, traffic_of
from lightning_bigmodels.tasks import Task
from tests.conftest import TINY_LLAMA
from tests.workers import fit_on

ROWS = 8


def language_model():
    config = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return CausalLanguageModel("llama", config), Text("python-docs", vocab_size=512, block_size=128, batch_size=ROWS)


def classifier():
    data = Images("sklearn-digits", image_size=32, channels=3, batch_size=ROWS)
    return ImageClassifier("small_resnet", num_classes=10, channels=3, image_size=32), data


def step(trace, mode):
    """Run two steps of a small network by hand, and return its parameters' bytes."""
    with mode:
        network = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
        optimizer = torch.optim.AdamW(network.parameters())
        trace.note(network.parameters(), "parameters")
        with trace:
            for _ in range(2):
                trace.restart()
                trace.phase = "forward"
                loss = network(torch.ones(512, 256)).square().mean()
                trace.phase = "backward"
                loss.backward()
                trace.note([p.grad for p in network.parameters()], "gradients")
                trace.phase = "update"
                optimizer.step()
                trace.note([v for state in optimizer.state.values() for v in state.values()], "optimizer state")
                optimizer.zero_grad()
                del loss
        return sum(p.nbytes for p in network.parameters())


def test_without_memory_it_holds_and_computes_what_real_tensors_do():
    fake, real = StepTrace(), StepTrace()
    size = step(fake, FakeTensorMode())
    assert step(real, nullcontext()) == size
    assert fake.peak.held == real.peak.held
    assert fake.peak.held["parameters"] == size
    assert size * 2 <= fake.peak.held["optimizer state"] < size * 2 + 100
    # two products forward; backward their weights' gradients, and of the inputs' that of the second
    products = 2 * 512 * 256 * 1024
    assert sum(count * operation.flops for operation, count in fake.operations.items()) == 5 * products
    assert fake.held == {}


def test_blocks_are_rounded_and_views_hold_nothing():
    trace = StepTrace(block_size=512)
    with trace:
        x = torch.ones(3)
        y = x.view(1, 3)
    assert trace.held == {"activations": 512}
    del x, y
    assert trace.held == {}


@pytest.mark.parametrize("make", [language_model, classifier])
def test_the_peak_is_within_two_percent_of_a_real_one(make):
    found = simulate(*make(), Setting(batch_size=ROWS, precision="bf16-mixed")).peak.total
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    measured = find_batch_size(trainer, *make(), max_batch_size=ROWS).peaks[0]
    assert found == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("setting", [Setting(), Setting("fsdp2", "16-mixed", devices=2, activation_checkpointing=True)])
def test_gpus_of_this_machine_are_left_alone_and_change_nothing(setting, monkeypatch):
    setting = dataclasses.replace(setting, batch_size=2)
    expected = simulate(*language_model(), setting, 512, like_cuda=True)
    for name in dir(torch._C):
        if name.startswith("_cuda_"):
            monkeypatch.setattr(torch._C, name, lambda *args, name=name: pytest.fail(f"{name} was called"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # what torch does once CUDA is started
    monkeypatch.setattr(torch.cuda, "_queued_calls", [])
    found = simulate(*language_model(), setting, 512, like_cuda=True)
    assert torch.cuda._queued_calls == []
    assert (found.peak, found.operations, found.transfers) == (expected.peak, expected.operations, expected.transfers)


def test_strategies_hold_and_send_their_part():
    model, data = language_model()
    alone = simulate(model, data, Setting(batch_size=ROWS)).peak.held
    size = alone["gradients"]
    copies = simulate(model, data, Setting("ddp", batch_size=ROWS, devices=4))
    assert {transfer.name: count * transfer.size for transfer, count in copies.transfers.items()} == {
        "allreduce_": size
    }
    assert copies.peak.held["communication"] == size
    sharded = simulate(model, data, Setting("fsdp2", batch_size=ROWS, devices=4, num_nodes=2))
    assert sharded.peak.held["optimizer state"] == pytest.approx(2 * size / 8, rel=0.01)
    scattered = sum(
        count * transfer.size for transfer, count in sharded.transfers.items() if "reduce_scatter" in transfer.name
    )
    assert scattered == pytest.approx(size, rel=0.01)
    assert {transfer.processes for transfer in sharded.transfers} == {8}
    # what is outside of blocks is gathered for the whole step
    assert sharded.peak.held["communication"] >= 2 * 512 * 64 * 4
    split = simulate(model, data, Setting("tp", batch_size=ROWS, devices=2))
    assert split.peak.held["parameters"] < 0.52 * alone["parameters"]
    assert any(transfer.processes == 2 for transfer in split.transfers)
    checkpointed = simulate(model, data, Setting(batch_size=ROWS, activation_checkpointing=True))
    assert checkpointed.peak.total < 0.6 * sum(alone.values())
    averaged = simulate(model, data, Setting("fsdp2", batch_size=ROWS, devices=8, averages_weights=True)).peak.held
    assert averaged["parameters"] == pytest.approx(2 * sharded.peak.held["parameters"], rel=0.01)
    assert model.network is None


@pytest.mark.parametrize(("devices", "precision"), [(1, "bf16-mixed"), (4, "bf16-mixed"), (4, "32-true")])
def test_offloaded_weights_come_down_block_by_block_and_gradients_go_up(devices, precision):
    model, data = language_model()
    setting = Setting("fsdp2_offload", precision, devices, batch_size=ROWS, averages_weights=True)
    found = simulate(model, data, setting, like_cuda=True)
    sharded = simulate(model, data, dataclasses.replace(setting, strategy="fsdp2"), like_cuda=True)
    model.configure_model()
    whole = sum(p.nbytes for p in model.parameters()) / devices
    in_blocks = sum(p.nbytes for block in model.blocks() for p in block.parameters()) / devices
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    # weights, their average, gradients and two moments, and what the update makes for one parameter at a time
    assert 5 * whole < found.host_peak < 6 * whole
    kinds = {kind for moment in course_of(found) for kind in moment.held}
    assert kinds.isdisjoint({"gradients", "optimizer state", "host"})
    assert found.start["parameters"] == buffers
    assert found.peak.total < sharded.peak.total - whole
    sizes = Counter()
    for transfer, count in found.transfers.items():
        sizes[transfer.name, transfer.phase] += transfer.size * count
    assert sizes[TO_DEVICE, "forward"] == whole
    assert sizes[TO_DEVICE, "backward"] == in_blocks
    assert sizes[TO_HOST, "backward"] == whole


@pytest.mark.parametrize(
    ("strategy", "held", "sent"),
    [
        ("ddp_spawn", 1, 1),
        ("ddp_fp16_gradients", 1, 0.5),
        ("ddp_powersgd", 2, 0.025),
        ({"class_path": "DDPStrategy", "init_args": {"gradient_as_bucket_view": True}}, 0, 1),
    ],
)
def test_ddp_holds_and_sends_what_its_variant_does(strategy, held, sent):
    model, data = language_model()
    setting = setting_from_lines({"strategy": strategy, "devices": 2}, data)
    found = simulate(model, data, dataclasses.replace(setting, batch_size=1))
    size = found.peak.held["gradients"]
    assert found.peak.held.get("communication", 0) == held * size
    assert sum(count * one.size for one, count in found.transfers.items()) == pytest.approx(sent * size, rel=0.05)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_batch_norm_over_all_processes_sends_with_every_batch(strategy):
    model, data = classifier()
    setting = Setting(strategy, devices=4, batch_size=ROWS, accumulate_grad_batches=6)
    alone = simulate(model, data, setting, like_cuda=True)
    found = simulate(model, data, dataclasses.replace(setting, sync_batchnorm=True), like_cuda=True)
    model.configure_model()
    channels = [layer.num_features for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    before, after = traffic_of(alone, setting), traffic_of(found, setting)
    none = Traffic(0, 0, 0)
    sent = {kind: after[kind].sent - before.get(kind, none).sent for kind in after}
    calls = {kind: after[kind].calls - before.get(kind, none).calls for kind in after}
    # of four processes each passes on three parts of what is gathered, and three quarters of a sum twice
    expected = {
        "all-gather": 3 * sum(2 * c + 1 for c in channels),
        "all-reduce": 2 * 3 * sum(2 * c for c in channels) / 4,
    }
    for kind, numbers in expected.items():
        assert calls[kind] == 6 * len(channels)
        assert sent[kind] == 6 * 4 * numbers
    assert found.peak.total == pytest.approx(alone.peak.total, rel=0.01)


def test_layers_may_be_split_where_weights_are_offloaded():
    model, data = language_model()
    arguments = {"tensor_parallel_size": 2, "offload": True}
    lines = {"strategy": {"class_path": "FSDP2Strategy", "init_args": arguments}, "devices": 4}
    setting = setting_from_lines(lines, data)
    found = simulate(model, data, setting, like_cuda=True)
    on_device = simulate(model, data, dataclasses.replace(setting, strategy="fsdp2_tp2"), like_cuda=True).peak.held
    state = sum(on_device.pop(kind) for kind in ("parameters", "gradients", "optimizer state"))
    kept = found.peak.held.pop("parameters")
    assert found.peak.held == on_device
    assert kept + found.host_peak == pytest.approx(state, rel=0.1)
    assert kept < 0.01 * state


def test_a_processor_has_no_host_memory_beside_its_own():
    model, data = language_model()
    found, sharded = (simulate(model, data, Setting(name, batch_size=ROWS)) for name in ("fsdp2_offload", "fsdp2"))
    assert found.peak == sharded.peak
    assert found.transfers == sharded.transfers
    assert found.host_peak == 0


def test_numbers_of_sixteen_bits_are_those_that_are_asked_for():
    model, data = classifier()
    # a body that is frozen at first needs the memory of one that is not
    model.unfreeze_after = 0.5
    half, brain = (
        simulate(model, data, Setting(batch_size=ROWS, precision=f"{name}-mixed")) for name in ("16", "bf16")
    )
    assert half.peak.total == pytest.approx(brain.peak.total, rel=0.01)
    assert half.peak.held["gradients"] > 0.9 * half.peak.held["parameters"]
    products = {operation.dtype for operation in half.operations if operation.flops}
    assert products == {torch.float16}


class Counts(Task):
    """Its loss counts values, which hangs on them."""

    def build_network(self):
        return nn.Linear(1, 1)

    def step(self, phase, batch):
        counts = torch.bincount(batch["labels"])
        return self.network(counts[:, None].float()).mean()


def test_what_cannot_be_planned_is_named():
    _, data = classifier()
    with pytest.raises(InputError, match=r"the step cannot be planned: the result of aten::bincount hangs on values"):
        simulate(Counts(), data, Setting(batch_size=ROWS))
    with pytest.raises(InputError, match="plan with fsdp2, which holds the same shards"):
        simulate(*classifier(), Setting("fsdp", batch_size=ROWS, devices=2))


@pytest.mark.parametrize(("batches", "least"), [(1, 0), (2, 1)])
def test_gradients_of_the_last_step_are_let_go_before_the_backward_pass_of_a_step_s_first_batch(batches, least):
    trace = simulate(*language_model(), Setting(batch_size=ROWS, accumulate_grad_batches=batches))
    held = trace.start["gradients"]
    changes = [change.difference for change in trace.changes if change.kind == "gradients"]
    assert held > 0
    assert min(accumulate(changes, initial=held)) == least * held


def test_a_run_behind_a_plan_has_its_own_processes(text):
    def model():
        return CausalLanguageModel("llama", TINY_LLAMA)

    def ranks(trainer):
        (optimizer,) = trainer.optimizers
        return {state["exp_avg"].device_mesh.get_coordinate()[0] for state in optimizer.state.values()}

    data = text(batch_size=4)
    simulate(model(), data, Setting("fsdp2", batch_size=4, devices=2))
    found = fit_on(2, "fsdp2", model, lambda: data, report=ranks, max_steps=1)
    assert [one.report for one in found] == [{0}, {1}]
