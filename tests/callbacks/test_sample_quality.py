"""Generated pictures judged: the numbers, on any number of processes, of any features; a collapse; what is refused."""

import lightning
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.image import fid

from lightning_bigmodels.callbacks import SampleQuality
from lightning_bigmodels.callbacks.picture_features import InceptionFeatures, PixelFeatures, load_features
from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules import ImageClassifier
from lightning_bigmodels.tasks.sample_comparison import SampleComparison
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from tests.conftest import QUIET
from tests.painters import SIZE, Painter, pictures, write_pictures
from tests.toys import ToyModel
from tests.workers import run_on

NUMBER = 10
NAMES = ("fid", "kid", "precision", "recall", "diversity")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set.npz")


def write_classifier(path, **options):
    """Write a checkpoint of an untrained classifier, and return it."""
    torch.manual_seed(0)
    model = ImageClassifier("small_cnn", num_classes=2, **options)
    model.configure_model()
    values = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save({**values, "pytorch-lightning_version": lightning.__version__}, path)
    return model.eval()


def painter(**options):
    torch.manual_seed(0)
    model = Painter(**options)
    model.configure_model()
    return model


def validated(trainer, file, model=None, verb="validate", data=(), **options):
    run = trainer(callbacks=[SampleQuality(**options)], limit_val_batches=1.0)
    (found,) = getattr(run, verb)(model or painter(), pictures(file, **dict(data)), verbose=False)
    return found


@torch.no_grad()
def expected(file, model, number, network=None, part="val"):
    """Return the numbers by one call of everything."""
    data = pictures(file)
    data.setup("fit")
    batch = data.parts[part].__getitems__(list(range(number)))
    model.eval()
    labels = batch["labels"] if model.num_classes else None
    made = model.generate_pictures(SampleNoise(torch.arange(number), seed=0), labels)
    network = network or PixelFeatures()
    assert len(data.parts[part]) == NUMBER
    metric = SampleComparison()
    metric.update(torch.arange(number), network(batch["images"]), network(made))
    return {name: float(value.float()) for name, value in metric.compute().items()}


@pytest.mark.parametrize("num_classes", [0, 2])
def test_each_real_picture_has_a_generated_one_of_its_number_and_class(num_classes, file, trainer):
    model = painter(num_classes=num_classes)
    found = validated(trainer, file, model)
    wanted = expected(file, model, NUMBER)
    assert {name: found[f"val_{name}_pixels"] for name in NAMES} == wanted
    assert wanted["fid"] > 0.1


def test_the_test_part_has_names_of_its_own(file, trainer):
    model = painter()
    found = validated(trainer, file, model, "test")
    assert {name: found[f"test_{name}_pixels"] for name in NAMES} == expected(file, model, 10, part="test")


def test_no_more_pictures_than_asked_for_are_made(file, trainer):
    model = painter()
    found = validated(trainer, file, model, num_pictures=6)
    assert found["val_fid_pixels"] == expected(file, model, 6)["fid"]
    assert model.calls == 2 + 1  # of three batches, and for what is expected


@pytest.mark.parametrize(("processes", "strategy"), [(2, "ddp"), (3, "ddp"), (2, "fsdp2")])
def test_processes_find_the_numbers_of_one(processes, strategy, file):
    def validate(processes, strategy):
        model = Painter(num_classes=2)
        torch.manual_seed(0)
        callback = SampleQuality(num_pictures=9)
        run = Trainer(**{**QUIET, "devices": processes, "strategy": strategy, "callbacks": [callback]})
        # one picture at a time: the ninth is made by one process alone
        run.validate(model, pictures(file, eval_batch_size=1 if processes > 1 else 4), verbose=False)
        return {name: float(value) for name, value in run.callback_metrics.items() if name.endswith("pixels")}

    (alone,) = run_on(1, validate, 1, "auto")
    assert len(alone) == 5
    for found in run_on(processes, validate, processes, strategy):
        assert found == pytest.approx(alone, rel=1e-7)


def test_a_picture_is_made_of_the_caption_of_each_real_one(trainer):
    class Captioned(Painter):
        prompts = ()

        def generate_pictures_of(self, prompts, noise):
            self.prompts = prompts
            return self.generate_pictures(noise)

    images = torch.randint(256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    captions = ["a dog", "", "a cat", "a cow"]
    batch = {"images": images, "captions": captions, "indices": torch.tensor([0, FILLER, 1, 2])}
    model = Captioned()
    (found,) = trainer(callbacks=[SampleQuality()]).validate(model, DataLoader([batch], batch_size=None), verbose=False)
    assert model.prompts == ["a dog", "a cat", "a cow"]
    assert found["val_fid_pixels"] > 0
    del batch["images"]
    with pytest.raises(InputError, match="of which the network has only latents; remove it"):
        trainer(callbacks=[SampleQuality()]).validate(model, DataLoader([batch], batch_size=None))


def test_features_of_a_classifier_are_what_its_output_layer_sees(file, trainer, tmp_path):
    path = tmp_path / "cats-and-dogs.ckpt"
    model = write_classifier(path, image_size=8)
    found = validated(trainer, file, features=["pixels", str(path)])
    network = load_features(str(path))
    batch = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    body = model.network.body
    torch.testing.assert_close(body.head(network(batch)), model.network(batch))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    # pictures of another size become those that it was trained on, and gray ones get colours
    assert network(batch[:, :1].repeat_interleave(2, 2)).shape == (3, 128)
    names = {f"val_{name}_{features}" for name in NAMES for features in ("pixels", "cats_and_dogs")}
    assert names <= set(found)
    wanted = expected(file, painter(), NUMBER, network)
    assert found["val_fid_cats_and_dogs"] == pytest.approx(wanted["fid"], rel=1e-4)


def test_inception_sees_gray_pictures_in_three_channels():
    class Sees(nn.Module):
        def forward(self, images):
            assert images.dtype == torch.uint8
            return images.flatten(1).double()

    gray = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    found = InceptionFeatures(Sees())(gray)
    assert found.dtype == torch.float32
    assert torch.equal(found, gray.repeat(1, 3, 1, 1).flatten(1).float())


def test_pixels_are_averaged_to_eight_by_eight():
    picture = torch.zeros(1, 2, 16, 24, dtype=torch.uint8)
    picture[0, 1, :2, :3] = 255
    seen = PixelFeatures()(picture).view(2, 8, 8)
    assert seen[1, 0, 0] == 1
    assert (seen == -1).sum() == 127


def test_every_n_validations_also_after_a_resume(file, trainer, tmp_path):
    def fit(max_steps, **options):
        model, quality = painter(), SampleQuality(every_n_validations=2, num_pictures=2)
        run = trainer(max_steps=max_steps, val_check_interval=1, limit_val_batches=1, callbacks=[quality])
        run.fit(model, pictures(file), **options)
        run.save_checkpoint(tmp_path / "x.ckpt")
        return model.calls

    assert fit(1) == 1
    assert fit(4, ckpt_path=tmp_path / "x.ckpt") == 1  # of the second, third and fourth, the third


def test_training_goes_on_as_if_there_were_none(file, trainer):
    def fit(callbacks):
        model = painter()
        run = trainer(max_steps=4, val_check_interval=2, limit_val_batches=1.0, callbacks=callbacks)
        run.fit(model, pictures(file))
        return torch.cat([parameter.flatten() for parameter in model.parameters()]), torch.get_rng_state()

    for found, plain in zip(fit([SampleQuality()]), fit([]), strict=True):
        assert torch.equal(found, plain)


def test_a_collapse_is_noticed_once_until_it_has_passed(file, trainer, capsys):
    run = trainer(callbacks=[SampleQuality()], limit_val_batches=1.0)
    same, varied = painter(noise=0.0), painter(noise=3.0)
    for model, number in ((same, 1), (same, 0), (varied, 0), (same, 1)):
        (found,) = run.validate(model, pictures(file), verbose=False)
        said = capsys.readouterr().out
        assert said.count("collapse: by pixels") == number
        assert (found["val_diversity_pixels"] == 0) == (model is same)
    assert "generated pictures are 0.00 times as far apart as real ones" in said


def test_what_is_wrong_with_the_arguments_is_said():
    with pytest.raises(InputError, match="num_pictures is 1; set it to 2 or more"):
        SampleQuality(num_pictures=1)
    with pytest.raises(InputError, match="every_n_validations is 0; set it to 1 or more"):
        SampleQuality(every_n_validations=0)
    with pytest.raises(InputError, match="neighbours is 0; set it to 1 or more"):
        SampleQuality(neighbours=0)
    with pytest.raises(InputError, match=r"collapse_threshold is 2; set it to between 0 \(never\) and 1"):
        SampleQuality(collapse_threshold=2)
    with pytest.raises(InputError, match="each of a name of its own"):
        SampleQuality(features=["a/x.ckpt", "b/x.ckpt"])
    with pytest.raises(InputError, match="name one or more"):
        SampleQuality(features=[])


def test_features_that_cannot_be_had_are_refused_with_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"features is 'pixel'; did you mean 'pixels'\?; set it to pixels, inception"):
        load_features("pixel")
    with pytest.raises(InputError, match="x.ckpt, which is not there; correct the path"):
        load_features(str(tmp_path / "x.ckpt"))
    (tmp_path / "text.ckpt").write_text("nothing", encoding="utf-8")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    for name in ("text", "other"):
        with pytest.raises(InputError, match=f"{name}.ckpt holds no ImageClassifier .*; set features to a checkpoint"):
            load_features(str(tmp_path / f"{name}.ckpt"))
    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(InputError, match="needs torch-fidelity, which is not installed; install it with: pip install"):
        load_features("inception")
    with pytest.raises(InputError, match="inception_weights names no.pth, which is not there"):
        load_features("inception", "no.pth")

    def offline(**options):
        raise OSError("no network")

    monkeypatch.setattr(fid, "FrechetInceptionDistance", offline)
    with pytest.raises(InputError, match=r"weights cannot be had \(no network\); set inception_weights to torch-fid"):
        load_features("inception")


def test_what_does_not_fit_the_data_is_refused(trainer, file, tmp_path):
    with pytest.raises(InputError, match="ToyModel makes no pictures that SampleQuality could compare; remove it"):
        trainer(callbacks=[SampleQuality()]).validate(ToyModel(), pictures(file))
    write_classifier(tmp_path / "gray.ckpt", channels=1, image_size=SIZE)
    with pytest.raises(InputError, match="pictures have 3 channels and the classifier in features was trained on 1"):
        validated(trainer, file, features=str(tmp_path / "gray.ckpt"))
    run = trainer(callbacks=[SampleQuality()], limit_val_batches=1)
    with pytest.raises(InputError, match="the number of pictures to compare is 1"):
        run.validate(painter(), pictures(file, eval_batch_size=1))
