"""Two optimizers under every strategy: turns, accumulation, clipping, precision, and resumes amid all that."""

import functools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules import GAN
from lightning_bigmodels.optim import WarmupLinear
from lightning_bigmodels.strategies.fsdp2 import FSDP2Strategy
from tests.modules.cnn.classifier_toys import NUM_CLASSES, SIZE, BarsData
from tests.workers import fit_on

PLAIN = {"discriminator_norm": "none", "spectral_norm": True}
# all that is drawn at random, and a slope's slope
PENALIZED = {
    "discriminator_norm": "layer",
    "loss": "wasserstein",
    "gradient_penalty": 1.0,
    "r1_weight": 1.0,
    "r1_interval": 2,
    "augmentation": ["color", "translation", "cutout"],
}


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {"latent_dim": 8, "generator_features": 4, "discriminator_features": 4, "num_classes": NUM_CLASSES}
    # of Adam a sum's rounding would make steps of any size
    sgd = functools.partial(torch.optim.SGD, lr=0.005)
    return GAN(SIZE, 1, **{**sizes, "optimizer": sgd, "discriminator_optimizer": sgd, **changes})


def without_batch_norm(model):
    """Let batch norm of the generator stand still: what it does depends on which pictures share a batch."""
    build = model.build_network

    def build_without():
        network = build()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.forward = lambda x: x
        return network

    model.build_network = build_without
    return model


def close(found, expected, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=atol), name


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("settings", [PLAIN, PENALIZED, {"discriminator_norm": "batch"}])
@pytest.mark.parametrize("strategy", ["ddp", FSDP2Strategy])
def test_two_processes_learn_what_one_learns(settings, strategy):
    more = {"sync_batchnorm": True, "max_steps": 6}
    (alone,) = fit_on(1, "auto", lambda: tiny(discriminator_steps=2, **settings), BarsData, **more)
    both = fit_on(2, strategy, lambda: tiny(discriminator_steps=2, **settings), lambda: BarsData(5), **more)
    for one in both:
        close(one.weights, alone.weights)
        assert one.global_step == alone.global_step == 6
    assert sum(torch.tensor(one.losses) for one in both) / 2 == pytest.approx(torch.tensor(alone.losses), rel=1e-4)


@pytest.mark.parametrize("settings", [{"discriminator_norm": "none"}, PENALIZED])
@pytest.mark.parametrize(("processes", "strategy"), [(1, "auto"), (2, "ddp"), (2, FSDP2Strategy)])
def test_accumulation_is_a_large_batch(settings, processes, strategy):
    # spectral norm takes a step of its power iteration with each pass, and batch norm sees smaller batches
    def build():
        return without_batch_norm(tiny(discriminator_steps=2, spectral_norm=False, **settings))

    (large,) = fit_on(1, "auto", build, lambda: BarsData(12))
    small = fit_on(processes, strategy, build, lambda: BarsData(6 // processes), accumulate_grad_batches=2)
    for one in small:
        assert one.global_step == 4
        close(one.weights, large.weights)


class Save(Callback):
    """Writes a checkpoint named by its number at the end of each of these batches."""

    def __init__(self, folder, *batches):
        self.folder, self.batches = folder, batches

    def on_train_batch_end(self, trainer, *args):
        number = trainer.fit_loop.total_batch_idx + 1
        if number in self.batches:
            trainer.save_checkpoint(self.folder / f"{number}.ckpt")


def adam(**changes):
    """Return a tiny model with schedules, whose optimizers have states."""
    default = {"optimizer": None, "discriminator_optimizer": None, "discriminator_steps": 2}
    schedules = {"schedule": WarmupLinear, "discriminator_schedule": WarmupLinear}
    return tiny(**{**default, **schedules, **PENALIZED, **changes})


def moments(trainer):
    """Return what the optimizers of a Trainer have to remember, and their rates."""
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    states = [
        value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values()
    ]
    return rates, [value.to_local() if hasattr(value, "to_local") else value for value in states]


# two batches a step, two steps of the discriminator for one of the generator, six batches an epoch
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6, 7])
def test_resumed_anywhere_it_ends_with_the_same_bits(batch, trainer, tmp_path):
    settings = {"accumulate_grad_batches": 2, "max_steps": 7}
    whole = trainer(callbacks=[Save(tmp_path, batch)], **settings)
    model = adam()
    whole.fit(model, BarsData())
    torch.manual_seed(5)
    other, resumed = adam(), trainer(**settings)
    resumed.fit(other, BarsData(), ckpt_path=tmp_path / f"{batch}.ckpt")
    assert equal(other.state_dict(), model.state_dict())
    assert resumed.global_step == whole.global_step == 7
    (rates, states), (expected_rates, expected) = moments(resumed), moments(whole)
    assert rates == expected_rates
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))


@pytest.mark.parametrize(("strategy", "accumulate"), [("ddp", 1), ("ddp", 2), (FSDP2Strategy, 1)])
def test_resumed_on_two_processes_both_optimizers_go_on(strategy, accumulate, tmp_path):
    settings = {"max_steps": 4, "accumulate_grad_batches": accumulate, "sync_batchnorm": True, "report": moments}
    whole = fit_on(2, strategy, adam, lambda: BarsData(5), callbacks=[Save(tmp_path, 3)], **settings)
    resumed = fit_on(2, strategy, adam, lambda: BarsData(5), seed=5, ckpt_path=tmp_path / "3.ckpt", **settings)
    assert (tmp_path / "3.ckpt").is_dir() == (strategy is FSDP2Strategy)
    for found, expected in zip(resumed, whole, strict=True):
        # in the middle of an accumulated step the mean over the processes is saved, and so rounded once more
        (close if accumulate == 2 else equal_weights)(found.weights, expected.weights)
        assert found.report[0] == expected.report[0]
        for mine, other in zip(found.report[1], expected.report[1], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4 if accumulate == 2 else 0, atol=1e-9)


def test_resumed_on_another_number_of_processes_it_goes_on_with_the_same_steps(tmp_path):
    settings = {"max_steps": 5, "sync_batchnorm": True, "report": moments}
    build = functools.partial(tiny, discriminator_steps=2, schedule=WarmupLinear, discriminator_schedule=WarmupLinear)
    whole, _ = fit_on(2, "ddp", build, lambda: BarsData(5), callbacks=[Save(tmp_path, 3)], **settings)
    (alone,) = fit_on(1, "auto", build, BarsData, seed=5, ckpt_path=tmp_path / "3.ckpt", **settings)
    close(alone.weights, whole.weights)
    assert alone.global_step == 5
    assert alone.report[0] == whole.report[0]


def test_resumed_with_another_batch_size_both_schedules_go_on_at_the_same_fraction(trainer, tmp_path):
    class Places(Callback):
        def on_train_batch_start(self, trainer, *args):
            places.append([config.scheduler.last_epoch for config in trainer.lr_scheduler_configs])

    places = []
    settings = {"max_epochs": 2, "max_steps": -1, "limit_val_batches": 0}
    # six batches an epoch, of which four are behind; then twelve
    trainer(callbacks=[Save(tmp_path, 4)], **settings).fit(adam(), BarsData())
    trainer(callbacks=[Places()], **settings).fit(adam(), BarsData(5), ckpt_path=tmp_path / "4.ckpt")
    assert places[0] == [4, 8]
    assert len(places) == 24 - 8


def equal_weights(found, expected):
    assert equal(found, expected)


def test_steps_are_the_discriminators(trainer):
    steps = {"generator": 0, "discriminator": 0}

    class Count(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            steps["generator" if optimizer is trainer.optimizers[0] else "discriminator"] += 1

    run = trainer(callbacks=[Count()], max_steps=7, accumulate_grad_batches=2)
    model = adam(discriminator_steps=3)
    run.fit(model, BarsData())
    assert steps == {"generator": 2, "discriminator": 7}
    assert run.global_step == 7
    # each schedule is laid over its own optimizer's steps, and at its end
    assert [config.scheduler.total_steps for config in run.lr_scheduler_configs] == [2, 7]
    assert [group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups] == [0.0] * 4


def test_the_generator_learns_against_the_discriminator_that_has_just_learned(trainer):
    """By hand: one step of plain SGD each."""
    model = without_batch_norm(tiny(discriminator_norm="none"))
    model.configure_model()
    by_hand = without_batch_norm(tiny(discriminator_norm="none"))
    by_hand.configure_model()
    by_hand.load_state_dict(model.state_dict())
    batch = BarsData()
    batch.setup("fit")
    batch = next(iter(batch.train_dataloader()))
    trainer(max_steps=1).fit(model, BarsData())
    generator, discriminator, labels = by_hand.network, by_hand.discriminator, batch["labels"]
    made = generator(by_hand.noise("train", batch["indices"]).normal(8), labels)
    real = discriminator(batch["images"] / 127.5 - 1, labels)
    loss = (torch.log1p(torch.exp(-real)) + torch.log1p(torch.exp(discriminator(made.detach(), labels)))).mean()
    learn(discriminator, loss)
    learn(generator, torch.log1p(torch.exp(-discriminator(made, labels))).mean())
    close(model.state_dict(), by_hand.state_dict())


def learn(network, loss):
    parameters = list(network.parameters())
    with torch.no_grad():
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter -= 0.005 * gradient


@pytest.mark.parametrize("strategy", ["auto", FSDP2Strategy])
def test_the_trainers_clipping_holds_for_each_network(strategy):
    def norms(trainer):
        return trainer.callbacks[0].norms

    (fit, *_) = fit_on(
        1, strategy, tiny, BarsData, callbacks=[Norms()], report=norms, gradient_clip_val=1e-3, max_steps=2
    )
    assert fit.report == pytest.approx([1e-3] * 4, rel=1e-3)
    (free,) = fit_on(1, "auto", tiny, BarsData, callbacks=[Norms()], report=norms, max_steps=2)
    assert min(free.report) > 1e-3


class Norms(Callback):
    """Notes by how much each step of SGD moves its network's weights, over the rate: the clipped gradient's norm."""

    def __init__(self):
        self.norms, self.handles = [], []

    def on_fit_start(self, trainer, module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self.note)

    def note(self, optimizer, *args):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        gradients = [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in gradients]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


@pytest.mark.parametrize(("strategy", "processes"), [("auto", 1), (FSDP2Strategy, 2)])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_in_mixed_precision_it_learns_about_the_same(precision, strategy, processes):
    more = {"max_steps": 4, "sync_batchnorm": True}
    settings = {"discriminator_steps": 2, **PENALIZED, "augmentation": None}
    (exact,) = fit_on(1, "auto", lambda: tiny(**settings), BarsData, **more)
    (start,) = fit_on(1, "auto", lambda: tiny(**settings), BarsData, max_steps=1, limit_train_batches=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if precision == "16-mixed" else None
    mixed = fit_on(
        processes,
        strategy,
        lambda: tiny(**settings),
        lambda: BarsData(10 // processes),
        plugins=[MixedPrecision(precision, "cpu", scaler)],
        report=lambda trainer: trainer.precision_plugin.scaler and trainer.precision_plugin.scaler.get_scale(),
        **more,
    )
    for one in mixed:
        for name, value in exact.weights.items():
            if name.endswith("weight") and "layers" in name:
                moved = (value - start.weights[name]).norm()
                assert (one.weights[name] - value).norm() < 0.1 * moved, name
        assert one.report == (1024 if precision == "16-mixed" else None)


def test_an_overflow_skips_the_step_of_one_network_and_lowers_the_scale(trainer):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**60))
    model = tiny()
    model.configure_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(plugins=[plugin], max_steps=1)
    run.fit(model, BarsData())
    assert plugin.scaler.get_scale() == 2.0**58
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_weights_of_another_precision_learn(precision, dtype, trainer):
    once, twice = (tiny(**PENALIZED) for _ in range(2))
    for steps, model in enumerate((once, twice), 1):
        trainer(max_steps=steps, precision=precision).fit(model, BarsData())
    for name in ("network", "discriminator"):
        old, new = (torch.cat([p.flatten() for p in getattr(model, name).parameters()]) for model in (once, twice))
        assert new.dtype == dtype
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def test_a_model_fits_twice(trainer):
    model = tiny()
    for _ in range(2):
        run = trainer(max_steps=2, accumulate_grad_batches=2, gradient_clip_val=1.0)
        run.fit(model, BarsData())
        assert run.global_step == 2
    run.validate(model, BarsData(), verbose=False)


# the resumed run has a folder of its own
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_checkpoints_every_few_steps_hold_what_a_resume_needs(trainer, tmp_path):
    def run(folder):
        files = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=3, save_top_k=-1)
        return trainer(callbacks=[files], enable_checkpointing=True, accumulate_grad_batches=2, max_steps=7)

    model, other = adam(), adam()
    run("whole").fit(model, BarsData())
    assert sorted(path.name for path in tmp_path.glob("whole/*")) == ["step=3.ckpt", "step=6.ckpt"]
    run("cut").fit(other, BarsData(), ckpt_path=tmp_path / "whole" / "step=3.ckpt")
    assert equal(other.state_dict(), model.state_dict())


def test_strategies_of_one_backward_pass_are_refused():
    from lightning_bigmodels.strategies.compressed_ddp import CompressedDDPStrategy

    with pytest.raises(Exception, match="set trainer.strategy to ddp or fsdp2"):
        fit_on(2, CompressedDDPStrategy, tiny, lambda: BarsData(5))


def test_the_discriminators_steps_are_checked():
    with pytest.raises(InputError, match=r"discriminator_steps is 0; set it to 1 or more"):
        tiny(discriminator_steps=0)


def test_without_synchronized_batch_norm_all_processes_validate_the_firsts():
    more = {"max_steps": 3, "val_check_interval": 3, "limit_val_batches": 2}
    first, second = fit_on(2, "ddp", lambda: tiny(discriminator_norm="batch"), lambda: BarsData(5), **more)
    assert equal(second.weights, first.weights)


def test_a_batch_that_only_keeps_step_teaches_neither_network(trainer):
    """A process whose loader has run out takes part with its last batch (`EvenBatches`, mode join)."""

    class Joined(GAN):
        def on_train_batch_start(self, batch, batch_idx):
            self._batch_counts = self.trainer.global_step > 1

    model = Joined(SIZE, 1, latent_dim=8, generator_features=4, discriminator_features=4)
    model.configure_model()
    before = [parameter.clone() for parameter in model.parameters()]
    trainer(max_steps=2).fit(model, BarsData())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    trainer(max_steps=3).fit(model, BarsData())
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
