"""The average of the weights on one process and under DDP: what it is, where it is seen, and that a resume has it."""

import functools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_bigmodels.callbacks import WeightAverage
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules import ImageClassifier
from tests.modules.cnn.classifier_toys import NUM_CLASSES, BarsData
from tests.strategies.test_precision import Data, Toy
from tests.toys import ToyData, ToyModel
from tests.workers import fit_on

ADAM = functools.partial(torch.optim.Adam, lr=0.05)


def tiny():
    torch.manual_seed(0)
    network_args = {"widths": [4, 8], "num_blocks": 1}
    return ImageClassifier("small_resnet", NUM_CLASSES, 1, 8, network_args=network_args, mixup_alpha=0.4)


def copy(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def close(found, expected):
    pairs = [(found[name], value) for name, value in expected.items() if found[name].is_floating_point()]
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def by_hand(steps, decays):
    """Average what each update sees; the first of the decays is not used."""
    average = dict(steps[0])
    for step, decay in zip(steps[1:], decays[1:], strict=True):
        average = {name: decay * average[name] + (1 - decay) * value for name, value in step.items()}
    return average


class Watch(Callback):
    """Keeps the weights after each training batch, and those that validation and test see at each of their ends."""

    def __init__(self):
        self.steps, self.validated, self.tested = [], [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.steps.append(copy(module))

    def on_validation_start(self, trainer, module):
        self.validated.append((trainer.sanity_checking, copy(module)))

    on_validation_batch_start = on_validation_end = lambda self, trainer, module, *args: self.on_validation_start(
        trainer, module
    )

    def on_test_batch_start(self, trainer, module, *args):
        self.tested.append(copy(module))


class Save(Callback):
    """Writes a checkpoint named by its step at the end of a batch."""

    def __init__(self, folder, *steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_validation_and_the_end_see_the_average_and_training_goes_on_from_its_own(trainer):
    watch, plain = Watch(), Watch()
    settings = {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1}
    trainer(callbacks=[plain], **settings).fit(tiny(), BarsData())
    model = tiny()
    run = trainer(callbacks=[WeightAverage(decay=0.5), watch], **settings)
    run.fit(model, BarsData())
    # batch norm's averages are averaged as well
    assert any("running_mean" in name for name in watch.steps[0])
    assert len(watch.validated) == 6
    for sanity_check, seen in watch.validated[:3]:
        assert not sanity_check
        assert close(seen, by_hand(watch.steps[:2], [0, 0.5]))
    assert close(copy(model), by_hand(watch.steps, [0.5] * 4))
    assert not close(copy(model), watch.steps[-1])
    # training saw nothing of it
    assert all(equal(found, expected) for found, expected in zip(watch.steps, plain.steps, strict=True))
    run.test(model, BarsData(), verbose=False)
    assert equal(watch.tested[0], copy(model))


def test_every_callback_sees_it_whatever_their_order(trainer):
    before, after = Watch(), Watch()
    run = trainer(callbacks=[before, WeightAverage(decay=0.5), after], max_steps=2, val_check_interval=2)
    run.fit(tiny(), BarsData())
    assert equal(before.validated[-1][1], after.validated[-1][1])
    assert not close(after.validated[-1][1], after.steps[-1])


@pytest.mark.parametrize(
    ("arguments", "updates", "decays"),
    [
        ({"decay": 0.9, "warm_up": True}, range(6), [0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15]),
        ({"decay": 0.3, "warm_up": True}, range(6), [0, 2 / 11, 3 / 12, 0.3, 0.3, 0.3]),
        ({"decay": 0.5, "every_n_steps": 2}, (0, 2, 4), [0.5] * 3),
        ({"decay": 0.5, "start_step": 3}, (3, 4, 5), [0.5] * 3),
    ],
)
def test_the_average_is_that_of_the_formula(arguments, updates, decays, trainer):
    watch, model = Watch(), Toy(optimizer=ADAM)
    trainer(callbacks=[WeightAverage(**arguments), watch], max_steps=6).fit(model, Data())
    assert close(copy(model), by_hand([watch.steps[index] for index in updates], decays))
    assert not close(copy(model), watch.steps[-1])


def test_before_the_first_update_the_weights_are_seen_as_they_are(trainer, tmp_path):
    watch = Watch()
    callbacks = [WeightAverage(start_step=3), Save(tmp_path, 2), watch]
    settings = {"max_steps": 4, "val_check_interval": 2}
    run = trainer(callbacks=callbacks, num_sanity_val_steps=1, **settings)
    run.fit(Toy(optimizer=ADAM), Data())
    assert [sanity for sanity, _ in watch.validated[:3]] == [True] * 3
    assert equal(watch.validated[3][1], watch.steps[1])
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)
    assert equal(saved["state_dict"], watch.steps[1])
    assert "current_model_state" not in saved
    # the steps before count after a resume as well
    again, model = Watch(), Toy(optimizer=ADAM)
    run = trainer(callbacks=[WeightAverage(start_step=3), again], **settings)
    run.fit(model, Data(), ckpt_path=tmp_path / "2.ckpt")
    assert equal(copy(model), watch.steps[3])


def test_batches_that_only_accumulate_do_not_count(trainer):
    watch, model = Watch(), Toy(optimizer=ADAM)
    run = trainer(callbacks=[WeightAverage(decay=0.5), watch], max_steps=3, accumulate_grad_batches=2)
    run.fit(model, Data())
    assert len(watch.steps) == 6
    assert close(copy(model), by_hand(watch.steps[1::2], [0.5] * 3))


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_leaves_out_do_not_count(fused, trainer):
    watch, model = Watch(), Toy((2,), functools.partial(torch.optim.Adam, lr=0.05, fused=fused))
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    trainer(callbacks=[WeightAverage(decay=0.5), watch], max_steps=5, plugins=[half]).fit(model, Data())
    assert equal(watch.steps[2], watch.steps[1])
    assert close(copy(model), by_hand([watch.steps[index] for index in (0, 1, 3, 4)], [0.5] * 4))


class TwoPlayers(ToyModel):
    """Manual optimization of two layers: one steps with each batch, the other with every second, of five none does."""

    automatic_optimization = False

    def configure_model(self):
        if self.layer is None:
            self.layer, self.other = nn.Linear(self.width, 1), nn.Linear(self.width, 1)

    def configure_optimizers(self):
        return [torch.optim.Adam(self.layer.parameters(), 0.05), torch.optim.Adam(self.other.parameters(), 0.05)]

    def training_step(self, batch, batch_idx):
        losses = [layer(batch[0]).square().mean() for layer in (self.layer, self.other)]
        for number, (loss, optimizer) in enumerate(zip(losses, self.optimizers(), strict=True)):
            if batch_idx != 4 and batch_idx % (number + 1) == 0:
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
        return sum(losses)


@pytest.mark.parametrize(("every", "updates"), [(1, (0, 1, 2, 3, 5, 6, 7)), (3, (0, 3, 7))])
def test_with_two_optimizers_the_batches_in_which_one_stepped_count(every, updates, trainer):
    watch, model = Watch(), TwoPlayers()
    callbacks = [WeightAverage(decay=0.8, every_n_steps=every, warm_up=True), watch]
    run = trainer(callbacks=callbacks, max_steps=-1, max_epochs=1)
    run.fit(model, ToyData(length=32))
    assert run.global_step == 7 + 3
    decays = [min(0.8, (1 + n) / (10 + n)) for n in range(len(updates))]
    assert close(copy(model), by_hand([watch.steps[index] for index in updates], decays))
    assert not close(copy(model), watch.steps[-1])


def test_with_two_optimizers_a_resume_is_exact(trainer, tmp_path):
    def fit(**kwargs):
        callbacks = [Save(tmp_path, 5, 9), WeightAverage(decay=0.8, warm_up=True)]
        trainer(callbacks=callbacks, max_steps=-1, max_epochs=1).fit(TwoPlayers(), ToyData(length=32), **kwargs)
        return torch.load(tmp_path / "9.ckpt", weights_only=True)

    assert_same_checkpoints(fit(), fit(ckpt_path=tmp_path / "5.ckpt"))


def assert_same_checkpoints(whole, resumed):
    for key in ("state_dict", "current_model_state"):
        assert equal(resumed[key], whole[key])
    assert not equal(whole["state_dict"], whole["current_model_state"])
    assert resumed["callbacks"]["WeightAverage"] == whole["callbacks"]["WeightAverage"]


# saved in an ordinary batch, in one after which another callback validates, and before the callback sees the batch
@pytest.mark.parametrize(("saved", "first"), [(4, False), (6, False), (4, True)])
def test_a_resumed_fit_ends_with_the_same_weights_and_the_same_average(saved, first, trainer, tmp_path):
    def fit(**kwargs):
        callbacks = [WeightAverage(decay=0.9), Save(tmp_path, saved, 8)]
        run = trainer(
            callbacks=callbacks[::-1] if first else callbacks, max_steps=8, val_check_interval=3, limit_val_batches=1
        )
        run.fit(tiny(), BarsData(), **kwargs)
        return torch.load(tmp_path / "8.ckpt", weights_only=True)

    whole = fit()
    (tmp_path / "8.ckpt").unlink()
    assert_same_checkpoints(whole, fit(ckpt_path=tmp_path / f"{saved}.ckpt"))
    # another program finds the average
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "8.ckpt", weights_only=True)
    assert equal(copy(loaded), whole["state_dict"])
    model = tiny()
    trainer(callbacks=[WeightAverage()]).validate(model, BarsData(), ckpt_path=tmp_path / "8.ckpt", verbose=False)
    assert equal(copy(model), whole["state_dict"])


def test_checkpoints_of_a_validation_and_after_the_fit_hold_both(trainer, tmp_path):
    watch = Watch()
    keep = ModelCheckpoint(tmp_path, filename="{step}", monitor=None, save_top_k=-1, every_n_epochs=1)
    callbacks = [WeightAverage(decay=0.5), keep, watch]
    run = trainer(callbacks=callbacks, max_steps=4, val_check_interval=2, enable_checkpointing=True)
    run.fit(Toy(optimizer=ADAM), Data())
    run.save_checkpoint(tmp_path / "after.ckpt")
    for name, number in (("step=2", 2), ("after", 4)):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert close(saved["state_dict"], by_hand(watch.steps[:number], [0.5] * number))
        assert equal(saved["current_model_state"], watch.steps[number - 1])
    # what was loaded since is not mixed with what training would go on from
    run.validate(datamodule=Data(), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
    run.save_checkpoint(tmp_path / "loaded.ckpt")
    loaded = torch.load(tmp_path / "loaded.ckpt", weights_only=True)
    assert equal(loaded["state_dict"], torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"])
    assert "current_model_state" not in loaded


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
def test_after_an_error_in_validation_the_weights_are_those_of_training(error, trainer):
    class Breaks(Watch):
        def on_validation_batch_start(self, *args):
            raise error

    watch, model = Breaks(), Toy(optimizer=ADAM)
    run = trainer(callbacks=[WeightAverage(decay=0.5), watch], max_steps=4, val_check_interval=2)
    with pytest.raises((RuntimeError, SystemExit)):
        run.fit(model, Data())
    assert not close(watch.validated[0][1], watch.steps[1])
    assert equal(copy(model), watch.steps[1])


class Frozen(Toy):
    """The middle layer learns from the third step on."""

    def build_network(self):
        network = super().build_network()
        network[2].requires_grad_(False)
        return network

    def parameter_groups(self):
        return [{"params": list(self.network.parameters())}]

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.network[2].requires_grad_(batch_idx >= 2)


OTHERS = [f"network.{layer}.{name}" for layer in (0, 4) for name in ("bias", "weight")]


def test_frozen_layers_are_not_copied_until_they_learn(trainer, tmp_path):
    class Count(Watch):
        def on_train_batch_end(self, trainer, module, *args):
            super().on_train_batch_end(trainer, module, *args)
            self.validated.append(trainer.callbacks[0].state_dict()["averaged"])

    def fit(**kwargs):
        watch, model = Count(), Frozen(optimizer=ADAM)
        run = trainer(callbacks=[WeightAverage(decay=0.5), watch, Save(tmp_path, 2, 4)], max_steps=4)
        run.fit(model, Data(), **kwargs)
        return watch, copy(model)

    watch, found = fit()
    assert watch.validated[1] == OTHERS
    assert watch.validated[2] == sorted([*OTHERS, "network.2.bias", "network.2.weight"])
    expected = by_hand(watch.steps[2:], [0.5] * 2)
    assert torch.allclose(found["network.2.weight"], expected["network.2.weight"])
    # nor are they written twice
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)
    assert sorted(saved["current_model_state"]) == OTHERS
    assert equal(saved["state_dict"] | saved["current_model_state"], watch.steps[1])
    assert equal(fit(ckpt_path=tmp_path / "2.ckpt")[1], found)


def test_a_second_fit_begins_a_new_average(trainer):
    average, model = WeightAverage(decay=0.5), Toy(optimizer=ADAM)
    trainer(callbacks=[average], max_steps=3).fit(model, Data())
    watch = Watch()
    trainer(callbacks=[average, watch], max_steps=2).fit(model, Data())
    assert close(copy(model), by_hand(watch.steps, [0.5] * 2))


def test_two_processes_average_alike():
    first, second = fit_on(2, "ddp", tiny, BarsData, callbacks=[WeightAverage(decay=0.5)], max_steps=3)
    parameters = [name for name in first.weights if "running" not in name and "tracked" not in name]
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in parameters)


def test_two_processes_have_the_average_of_one():
    def fit(processes, strategy):
        callbacks = [WeightAverage(decay=0.5, warm_up=True)]
        return fit_on(processes, strategy, lambda: Toy(optimizer=ADAM), Data, callbacks=callbacks)

    (alone,) = fit(1, "auto")
    for one in fit(2, "ddp"):
        assert close(one.weights, alone.weights)


def test_what_cannot_be_averaged_is_refused(trainer, tmp_path):
    with pytest.raises(InputError, match=r"decay is 1.0; it must be 0 or more and below 1"):
        WeightAverage(decay=1.0)
    with pytest.raises(InputError, match="every_n_steps is 0; it must be 1 or more"):
        WeightAverage(every_n_steps=0)
    with pytest.raises(InputError, match="start_step is -1; it must be 0 or more"):
        WeightAverage(start_step=-1)
    with pytest.raises(InputError, match=r"network.0.weight is in torch.bfloat16.* to bf16-mixed or 16-mixed"):
        trainer(callbacks=[WeightAverage()], precision="bf16-true").fit(Toy(), Data())
    lean = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(InputError, match=r"could not put the average into its .* set save_weights_only: false"):
        trainer(callbacks=[WeightAverage(), lean], enable_checkpointing=True).fit(Toy(), Data())
