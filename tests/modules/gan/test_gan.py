"""The GAN: what its losses add up to, what is measured on any number of processes, its pictures, what is refused."""

import pytest
import torch

from lightning_bigmodels.callbacks import SampleQuality, WeightAverage
from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.export import export, load_exported
from lightning_bigmodels.modules import GAN
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from tests.modules.cnn.classifier_toys import NUM_CLASSES, SIZE, BarsData
from tests.workers import run_on

TINY = {"latent_dim": 8, "generator_features": 4, "discriminator_features": 4}


def built(**changes):
    torch.manual_seed(0)
    model = GAN(**{"image_size": SIZE, "channels": 1, **TINY, **changes})
    model.configure_model()
    return model


def batch_of(number=6, size=SIZE):
    images = torch.randint(256, (number, 1, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return {"images": images, "labels": torch.arange(number) % NUM_CLASSES, "indices": torch.arange(number)}


class Noted:
    """Stands for a Trainer at a step, and notes what is logged."""

    def __init__(self, model, global_step=0):
        self.values, self.global_step = {}, global_step
        model.log = lambda name, value, **kwargs: self.values.update({name: float(value)})
        model._trainer = self
        self.current_epoch = 0


@pytest.mark.parametrize("loss", ["non_saturating", "hinge", "least_squares", "wasserstein"])
def test_both_losses_are_means_of_the_formulas(loss):
    model = built(loss=loss, discriminator_norm="none", num_classes=NUM_CLASSES)
    noted, batch = Noted(model), batch_of()
    made = model.make(batch)
    expected = model.network(model.noise("train", batch["indices"]).normal(8), batch["labels"])
    real = model.discriminator(batch["images"] / 127.5 - 1, batch["labels"])
    fake = model.discriminator(expected, batch["labels"])
    total = (model.loss.real(real) + model.loss.made(fake)).mean()
    torch.testing.assert_close(model.discriminator_loss(batch, made.detach()), total)
    torch.testing.assert_close(model.generator_loss(batch, made), model.loss.generator(fake).mean())
    assert noted.values == pytest.approx(
        {
            "train_discriminator_loss": float(total.detach()),
            "train_generator_loss": model.loss.generator(fake).mean().item(),
        },
        rel=1e-5,
    )


def test_channels_last_changes_nothing_but_the_layout():
    changes = {"image_size": 16, "discriminator_norm": "layer", "gradient_penalty": 1.0}
    models = [built(**changes, channels_last=last) for last in (False, True)]
    batch = batch_of(size=16)
    losses = []
    for model in models:
        Noted(model)
        made = model.make(batch)
        losses.append((model.discriminator_loss(batch, made.detach()), model.generator_loss(batch, made)))
        sum(losses[-1]).backward()
    torch.testing.assert_close(losses[0], losses[1])
    for name in ("network", "discriminator"):
        plain, last = (dict(getattr(model, name).named_parameters()) for model in models)
        for key, weight in plain.items():
            torch.testing.assert_close(last[key].grad, weight.grad)
    assert models[1].discriminator.layers[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert models[1].network.layers[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_an_export_leaves_the_module_as_its_weights_lie(tmp_path):
    model = built(image_size=16, channels_last=True)
    export(model, tmp_path / "out", ["weights"])
    assert (tmp_path / "out" / "weights.safetensors").is_file()
    assert model.network.layers[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_penalties_are_added_with_their_weights_and_r1_only_at_its_interval():
    batch = batch_of()
    plain = built(discriminator_norm="layer")
    Noted(plain)
    made = plain.make(batch).detach()
    loss = plain.discriminator_loss(batch, made)
    found = []
    for step in range(4):
        model = built(discriminator_norm="layer", gradient_penalty=10.0, r1_weight=3.0, r1_interval=2)
        noted = Noted(model, step)
        penalized = model.discriminator_loss(batch, made)
        extra = 10 * noted.values["train_gradient_penalty"] + 3 * 2 * noted.values.get("train_r1_penalty", 0)
        assert float((penalized - loss).detach()) == pytest.approx(extra, rel=1e-4)
        found.append("train_r1_penalty" in noted.values)
    assert found == [True, False, True, False]


def test_what_could_not_be_read_counts_for_nothing():
    model, batch = built(discriminator_norm="none", num_classes=NUM_CLASSES, gradient_penalty=1.0), batch_of(4)
    Noted(model)
    # its batch norm sees what is not there, as that of all networks does
    model.network.eval()
    made = model.make(batch)
    expected = [model.discriminator_loss(batch, made.detach()), model.generator_loss(batch, made)]
    more = {name: torch.cat([value, value[:1]]) for name, value in batch.items()}
    more["indices"][-1], more["labels"][-1] = FILLER, IGNORED
    made = model.make(more)
    found = [model.discriminator_loss(more, made.detach()), model.generator_loss(more, made)]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_classes": NUM_CLASSES, "spectral_norm": True, "augmentation": ["color", "translation", "cutout"]},
        {"discriminator_norm": "layer", "gradient_penalty": 1.0, "r1_weight": 1.0, "conditioning": "embedding"},
    ],
)
def test_every_parameter_learns(settings):
    # at 16 pixels there are hidden layers with a norm
    model, batch = built(image_size=16, **settings), batch_of(12, 16)
    Noted(model)
    made = model.make(batch)
    model.discriminator_loss(batch, made.detach()).backward()
    assert all(p.grad is None for p in model.network.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.discriminator.parameters())
    model.generator_loss(batch, made).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.network.parameters())


def test_what_a_picture_is_made_of_does_not_choose_how_it_is_altered():
    model = built(augmentation=["color"])
    indices = torch.arange(2000)
    latents = model.noise("test", indices).normal(8)
    shifts = model._noise_beside("test", indices).uniform(3)
    correlations = torch.corrcoef(torch.cat([latents, shifts], 1).T)[:8, 8:]
    assert correlations.abs().max() < 0.1


# ---- measured


def test_validation_is_the_same_on_any_number_of_processes():
    settings = {"num_classes": NUM_CLASSES, "discriminator_norm": "batch"}

    def validate(processes):
        from lightning.pytorch import Trainer

        run = Trainer(
            accelerator="cpu",
            devices=processes,
            strategy="ddp" if processes > 1 else "auto",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
        )
        (values,) = run.validate(built(**settings), BarsData(), verbose=False)
        return values

    (alone,) = run_on(1, lambda: validate(1))
    # worked by hand, in evaluation mode
    model = built(**settings).eval()
    data = BarsData(eval_batch_size=50)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        made = model.network(SampleNoise(batch["indices"], 0).normal(8), batch["labels"])
        real, fake = (model.discriminator(x, batch["labels"]) for x in (batch["images"] / 127.5 - 1, made))
    softplus = torch.nn.functional.softplus
    assert alone == pytest.approx(
        {
            "val_generator_loss": float(softplus(-fake).mean()),
            "val_discriminator_loss": float((softplus(-real) + softplus(fake)).mean()),
        },
        rel=1e-5,
    )
    for values in run_on(3, lambda: validate(3)):
        assert values == pytest.approx(alone, rel=1e-6)


def test_it_learns_bars_and_checkpoints_hold_the_average(trainer, tmp_path):
    """The pictures' distance from the real ones falls to less than half of what it is before."""
    torch.manual_seed(0)
    model = GAN(
        SIZE,
        1,
        num_classes=NUM_CLASSES,
        latent_dim=8,
        generator_features=16,
        discriminator_features=16,
        optimizer=lambda params: torch.optim.Adam(params, lr=2e-3, betas=(0.5, 0.999)),
        discriminator_optimizer=lambda params: torch.optim.Adam(params, lr=2e-3, betas=(0.5, 0.999)),
    )
    run = trainer(
        callbacks=[WeightAverage(decay=0.9), SampleQuality(collapse_threshold=0)],
        max_steps=120,
        inference_mode=False,
        limit_val_batches=1.0,
    )
    (before,) = run.validate(model, BarsData(20), verbose=False)
    run.fit(model, BarsData(20))
    run.save_checkpoint(tmp_path / "last.ckpt")
    (after,) = run.validate(model, BarsData(20), verbose=False)
    assert after["val_fid_pixels"] < before["val_fid_pixels"] / 2
    loaded = GAN.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    (again,) = run.validate(loaded, BarsData(20), verbose=False)
    assert again == after


# ---- pictures


@pytest.mark.parametrize("num_classes", [0, 3])
def test_pictures_are_pixels_by_noise_and_class_alone(num_classes):
    model = built(num_classes=num_classes).eval()
    indices = torch.arange(5)
    labels = model.labels_in_turn(indices)
    with torch.no_grad():
        pictures = model.generate_pictures(SampleNoise(indices, 0), labels)
        some = model.generate_pictures(SampleNoise(indices[2:4], 0), None if labels is None else labels[2:4])
        values = model.network(SampleNoise(indices, 0).normal(8), labels)
    assert pictures.shape == (5, 1, SIZE, SIZE)
    assert pictures.dtype == torch.uint8
    assert torch.equal(pictures, ((values + 1) * 127.5).round().to(torch.uint8))
    assert torch.equal(some, pictures[2:4])


@pytest.mark.parametrize("settings", [{}, {"num_classes": 3}, {"num_classes": 3, "conditioning": "embedding"}])
def test_the_exported_generator_makes_the_same_pictures(settings, tmp_path):
    model = built(**settings)
    export(model, tmp_path / "out")
    latents = torch.randn(7, 8)
    labels = [torch.arange(7) % 3] if settings else []
    with torch.no_grad():
        values = model.eval().network(latents, *labels)
    for name in ("torch", "onnx"):
        found = load_exported(tmp_path / "out", name)(latents, *labels)["pictures"]
        assert found.dtype == torch.uint8
        assert (found.float() - (values + 1) * 127.5).abs().max() < 1.01
    assert (tmp_path / "out" / "weights.safetensors").is_file()


# ---- refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 28}, r"image_size is 28, .*set model\.image_size and data\.image_size to 32"),
        ({"image_size": 4}, r"image_size is 4, .*to 8"),
        ({"gradient_penalty": 10.0}, r"gradient_penalty .*batch norm.*set discriminator_norm to layer"),
        ({"r1_weight": 1.0}, r"r1_weight .*batch norm.*set discriminator_norm to layer"),
        ({"gradient_penalty": -1.0}, r"gradient_penalty is -1\.0; it must be 0 or more"),
        ({"latent_dim": 0}, r"latent_dim is 0; set it to 1 or more"),
        ({"generator_features": 0}, r"generator_features is 0"),
        ({"r1_interval": 0}, r"r1_interval is 0"),
        ({"num_classes": -1}, r"num_classes is -1"),
        ({"loss": "hing"}, r"loss names 'hing'; .*did you mean 'hinge'"),
        ({"discriminator_norm": "btch"}, r"discriminator_norm names 'btch'.*did you mean 'batch'"),
        ({"conditioning": "batch"}, r"conditioning names 'batch'"),
        ({"augmentation": ["colour"]}, r"augmentation names 'colour'.*did you mean 'color'"),
    ],
)
def test_arguments_that_cannot_be(changes, words):
    with pytest.raises(InputError, match=words):
        GAN(**changes)


def test_data_that_do_not_fit(trainer):
    cases = [
        (GAN(16, 1, **TINY), r"8 x 8 and the network makes 16 x 16; set data\.image_size to \[16, 16\]"),
        (GAN(8, 3, **TINY), r"1 channels and the network 3; set data\.channels"),
        (
            GAN(8, 1, 4, **TINY),
            r"6 classes \(a, b, c, \.\.\.\) and model\.num_classes is 4; set model\.num_classes to 6",
        ),
    ]
    for model, words in cases:
        with pytest.raises(InputError, match=words):
            trainer().fit(model, BarsData())


def test_a_model_of_classes_needs_them(trainer):
    words = r"no class each, and model\.num_classes is 3; set data\.labelled to true.*or set model\.num_classes to 0"
    with pytest.raises(InputError, match=words):
        trainer().fit(built(num_classes=3), BarsData(class_names=()))
    several = {**batch_of(), "labels": torch.zeros(6, 3)}
    with pytest.raises(InputError, match=words):
        built(num_classes=3).make(several)
