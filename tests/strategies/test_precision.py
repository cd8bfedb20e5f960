"""Precision does what its flag says: real float16 with loss scaling on CPUs, alike under every strategy."""

import functools
import itertools

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import TensorDataset

from lightning_bigmodels import optim
from lightning_bigmodels.data.loading import ResumableDataLoader, ResumableSampler
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.strategies import FSDP2Strategy
from lightning_bigmodels.strategies.precision import WorldGradScaler, with_true_precision
from lightning_bigmodels.tasks import Task
from tests.workers import fit_on, run_on

SGD = functools.partial(torch.optim.SGD, lr=0.1)
PROCESSES = {"auto": 1, "ddp": 2, "fsdp2": 2, "fsdp2_tp2": 4}


class Toy(Task):
    """Regression; the loss of one process overflows at the steps asked for."""

    def __init__(self, overflow_at=(), optimizer=SGD):
        super().__init__(optimizer=optimizer)
        self.overflow_at = overflow_at
        self.kinds = []

    def build_network(self):
        return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))

    def blocks(self):
        return [self.network[0], self.network[2]]

    def tensor_parallel_plan(self, size):
        return {"0": ColwiseParallel(), "2": RowwiseParallel()}

    def step(self, phase, batch):
        (x,) = batch
        y = self.network(x)
        self.kinds.append(str(y.dtype))
        loss = (y - x.sum(1, keepdim=True)).square().mean()
        if self.global_step in self.overflow_at and self.global_rank == self.trainer.world_size - 1:
            loss = loss * torch.inf
        return loss


class Data(LightningDataModule):
    def train_dataloader(self):
        rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        share = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = ResumableSampler(TensorDataset(rows), **share, seed=0)
        return ResumableDataLoader(TensorDataset(rows), batch_size=8 // share["num_replicas"], sampler=sampler)

    val_dataloader = train_dataloader


def half(**settings):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **settings))


def fit(strategy, overflow_at=(), optimizer=SGD, **settings):
    return fit_on(PROCESSES[strategy], strategy, lambda: Toy(overflow_at, optimizer), Data, max_steps=6, **settings)


def mean(fits):
    return [sum(losses) / len(fits) for losses in zip(*(fit.losses for fit in fits), strict=True)]


@pytest.fixture(scope="module")
def float32():
    return mean(fit("auto"))


HALF = ("16-mixed", "torch.float16", 2e-3)
BFLOAT = ("bf16-mixed", "torch.bfloat16", 2e-2)


@pytest.mark.parametrize(
    ("strategy", "precision", "kind", "tolerance"),
    [("auto", *HALF), ("ddp", *HALF), ("fsdp2", *HALF), ("auto", *BFLOAT), ("fsdp2", *BFLOAT)],
)
def test_mixed_precision_computes_in_its_type_and_learns_as_float32(strategy, precision, kind, tolerance, float32):
    plugins = {"plugins": [half(init_scale=1024.0)]} if precision == "16-mixed" else {"precision": precision}
    fits = fit(strategy, **plugins, report=lambda run: (run.model.kinds, str(run.precision)))
    assert mean(fits) == pytest.approx(float32, rel=tolerance)
    assert mean(fits) != float32
    for one in fits:
        assert one.report == ([kind] * 6, precision)
        assert {value.dtype for value in one.weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [
        ("auto", torch.optim.AdamW),
        ("fsdp2", torch.optim.AdamW),
        ("ddp", optim.MuonWithAdamW),
        ("fsdp2", optim.MuonWithAdamW),
    ],
)
def test_true_bfloat16_holds_bfloat16_weights(strategy, optimizer, float32):
    fits = fit(strategy, optimizer=functools.partial(optimizer, lr=0.02), precision="bf16-true")
    for one in fits:
        assert {value.dtype for value in one.weights.values()} == {torch.bfloat16}
    losses = mean(fits)
    assert losses[0] == pytest.approx(float32[0], rel=2e-2)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("precision", "kind"), [("64-true", torch.float64), ("16-true", torch.float16)])
def test_the_other_true_types_are_the_same_under_fsdp2(precision, kind):
    (alone,), fits = fit("auto", precision=precision), fit("fsdp2", precision=precision)
    assert {value.dtype for value in fits[0].weights.values()} == {kind}
    assert mean(fits) == pytest.approx(alone.losses, rel=1e-9 if kind is torch.float64 else 5e-3)


class Watch(Callback):
    """Keeps the weights and the scale after each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *args):
        whole = [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in module.parameters()]
        self.seen.append((torch.cat([p.flatten() for p in whole]), trainer.precision_plugin.scaler.get_scale()))


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2", "fsdp2_tp2"])
def test_an_overflow_on_one_process_skips_the_step_on_all_and_halves_the_scale(strategy):
    watch = Watch()
    fits = fit(
        strategy,
        overflow_at=(2,),
        plugins=[half(init_scale=1024.0)],
        callbacks=[watch],
        gradient_clip_val=1.0,
        report=lambda run: watch_of(run).seen,
    )
    for one in fits:
        weights, scales = zip(*one.report, strict=True)
        assert scales == (1024, 1024, 512, 512, 512, 512)
        stood = [torch.equal(a, b) for a, b in itertools.pairwise(weights)]
        assert stood == [False, True, False, False, False]
        assert weights[-1].isfinite().all()
        assert torch.equal(weights[-1], fits[0].report[-1][0])


def watch_of(run):
    return next(callback for callback in run.callbacks if isinstance(callback, Watch))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_the_scaler_goes_on_where_a_checkpoint_was_written(strategy, tmp_path):
    def run(**settings):
        fits = fit(
            strategy,
            overflow_at=(1,),
            plugins=[half(init_scale=1024.0, growth_interval=3)],
            report=lambda trainer: trainer.precision_plugin.state_dict(),
            enable_checkpointing=True,
            **settings,
        )
        return fits[0]

    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole = run(callbacks=[saves])
    resumed = run(callbacks=[saves], ckpt_path=tmp_path / "step=3.ckpt")
    assert len(resumed.losses) == 3
    # halved at step 2, and doubled after three that went well: the count goes on too
    assert whole.report["scale"] == 1024
    assert whole.report == resumed.report
    torch.testing.assert_close(resumed.weights, whole.weights, rtol=0, atol=0)


def test_the_world_is_asked_even_where_the_first_parameter_is_whole_everywhere():
    def work():
        torch.distributed.init_process_group("gloo")
        mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
        norm = nn.Parameter(distribute_tensor(torch.ones(4), mesh["data_parallel"], [Shard(0)]))
        matrix = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))
        optimizer = torch.optim.SGD([norm, matrix], lr=1.0)
        for p in (norm, matrix):
            p.grad = torch.zeros_like(p)
        if torch.distributed.get_rank() == 3:
            matrix.grad.to_local().fill_(torch.inf)
        scaler = WorldGradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale()

    assert run_on(4, work) == [4.0] * 4


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled, but CUDA is not available")
@pytest.mark.parametrize(("precision", "strategy"), [("bf16-mixed", "auto"), ("16-mixed", "fsdp2")])
def test_mixed_precision_for_another_device_is_refused(precision, strategy, tmp_path):
    def work():
        settings = {"devices": 1, "max_epochs": 1, "default_root_dir": tmp_path, "logger": False}
        run = Trainer(accelerator=CPUAccelerator(), precision=precision, strategy=strategy, **settings)
        with pytest.raises(InputError) as caught:
            run.fit(Toy(), Data())
        return str(caught.value)

    (message,) = run_on(1, work)
    assert message.startswith(f"precision {precision} would be float32 here: Lightning made it for cuda")
    assert "give the accelerator as a word, accelerator='cpu'" in message


class Unknown(Precision):
    precision = "transformer-engine"


def test_fsdp2_refuses_a_precision_that_nobody_tried_with_it():
    with pytest.raises(InputError, match="FSDP2Strategy does not run with Unknown; set trainer.precision to 32-true"):
        FSDP2Strategy().precision_plugin = Unknown()


def test_fsdp2_keeps_the_settings_of_a_scaler():
    strategy = FSDP2Strategy()
    strategy.precision_plugin = half(init_scale=4.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=5)
    scaler = strategy.precision_plugin.scaler
    assert isinstance(scaler, WorldGradScaler)
    assert (scaler.get_scale(), scaler.get_growth_factor()) == (4.0, 3.0)
    assert (scaler.get_backoff_factor(), scaler.get_growth_interval()) == (0.25, 5)


@pytest.mark.parametrize("accelerator", ["cpu", "instance"])
@pytest.mark.parametrize(
    ("flag", "meant"),
    [("16-mixed", "16-mixed"), (16, "16-mixed"), ("bf16-mixed", "bf16-mixed"), ("bf16", "bf16-mixed")],
)
def test_on_a_cpu_a_mixed_precision_becomes_a_plugin_that_does_it(accelerator, flag, meant):
    given = CPUAccelerator() if accelerator == "instance" else accelerator
    other = object()
    arguments = with_true_precision({"precision": flag, "accelerator": given, "plugins": [other], "strategy": "auto"})
    assert arguments["precision"] is None
    assert arguments["plugins"][0] is other
    plugin = arguments["plugins"][1]
    assert (plugin.precision, plugin.device) == (meant, "cpu")
    assert (plugin.scaler is not None) == (meant == "16-mixed")


@pytest.mark.parametrize(
    "arguments",
    [
        {"precision": None, "accelerator": "cpu"},
        {"precision": "bf16-true", "accelerator": "cpu"},
        {"precision": "16-mixed", "accelerator": "cuda", "strategy": "fsdp2"},
    ],
)
def test_what_lightning_does_right_is_left_to_it(arguments):
    assert with_true_precision(arguments) is arguments
