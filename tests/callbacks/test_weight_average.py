"""The average of the weights: what it is, where it is used, and that a resume goes on with it."""

import pytest
import torch
from lightning.pytorch import Callback

from lightning_bigmodels.callbacks import WeightAverage
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules import ImageClassifier
from tests.modules.cnn.classifier_toys import NUM_CLASSES, BarsData
from tests.workers import fit_on


def tiny():
    torch.manual_seed(0)
    network_args = {"widths": [4, 8], "num_blocks": 1}
    return ImageClassifier("small_resnet", NUM_CLASSES, 1, 8, network_args=network_args, mixup_alpha=0.4)


def copy(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Watch(Callback):
    """Keeps the weights after each step, and those that validation sees."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_start(self, trainer, module):
        self.steps.append(copy(module))

    def on_train_batch_end(self, trainer, module, *args):
        self.steps.append(copy(module))

    def on_validation_batch_start(self, trainer, module, *args):
        if not trainer.sanity_checking:
            self.validated.append(copy(module))


def test_validation_and_the_end_see_the_average_and_training_goes_on_from_its_own(trainer):
    watch = Watch()
    model = tiny()
    run = trainer(callbacks=[WeightAverage(decay=0.5), watch], max_steps=4, val_check_interval=2, limit_val_batches=1)
    run.fit(model, BarsData())
    raw = [step["network.body.head.weight"] for step in watch.steps]
    average = raw[1]  # the first update copies
    for step in raw[2:3]:
        average = 0.5 * average + 0.5 * step
    assert torch.allclose(watch.validated[0]["network.body.head.weight"], average)
    for step in raw[3:]:
        average = 0.5 * average + 0.5 * step
    assert torch.allclose(model.network.body.head.weight, average)
    assert not torch.allclose(average, raw[-1])
    # training was not put back to the average at the validation in its middle
    assert not torch.equal(raw[2], watch.validated[0]["network.body.head.weight"])


def test_a_resumed_fit_ends_with_the_same_weights_and_the_same_average(trainer, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, run, *args):
            if run.global_step in (4, 8):
                run.save_checkpoint(tmp_path / f"{run.global_step}.ckpt")

    def fit(**kwargs):
        callbacks = [WeightAverage(decay=0.9), Save()]
        run = trainer(callbacks=callbacks, max_steps=8, val_check_interval=3, limit_val_batches=1)
        run.fit(tiny(), BarsData(), **kwargs)
        return torch.load(tmp_path / "8.ckpt", weights_only=True)

    whole = fit()
    (tmp_path / "8.ckpt").unlink()
    resumed = fit(ckpt_path=tmp_path / "4.ckpt")
    for key in ("state_dict", "current_model_state"):
        for name, value in whole[key].items():
            assert torch.equal(value, resumed[key][name]), (key, name)
    assert any(
        not torch.equal(value, whole["state_dict"][name]) for name, value in whole["current_model_state"].items()
    )
    # another program finds the average
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "8.ckpt", weights_only=True)
    assert all(torch.equal(value, whole["state_dict"][name]) for name, value in loaded.state_dict().items())
    trainer(callbacks=[WeightAverage()]).validate(tiny(), BarsData(), ckpt_path=tmp_path / "8.ckpt", verbose=False)


def test_two_processes_average_alike():
    first, second = fit_on(2, "ddp", tiny, BarsData, callbacks=[WeightAverage(decay=0.5)], max_steps=3)
    parameters = [name for name in first.weights if "running" not in name and "tracked" not in name]
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in parameters)


def test_wrong_values_and_sharding_are_refused():
    with pytest.raises(InputError, match="decay is 1.0; it must be 0 or more and below 1"):
        WeightAverage(decay=1.0)
    with pytest.raises(InputError, match="every_n_steps is 0; it must be 1 or more"):
        WeightAverage(every_n_steps=0)
    with pytest.raises(Exception, match="WeightAverage needs a whole network on each process.* use ddp, or remove it"):
        fit_on(1, "fsdp2", tiny, BarsData, callbacks=[WeightAverage()])
