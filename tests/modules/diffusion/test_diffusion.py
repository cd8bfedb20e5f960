"""Diffusion: its loss, what it tells the network, guidance, what it reports, and what it refuses."""

from functools import partial

import pytest
import torch

from lightning_bigmodels import Diffusion, Images
from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.diffusion.bound import bits_per_dimension
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from tests.modules.diffusion.toys import DIT, UNET, batch_of, tiny
from tests.toy_pictures import write_folders
from tests.workers import fit_on

KINDS = [
    {},
    {"num_classes": 3, "prediction": "v_prediction", "min_snr_gamma": 5.0, "noise_schedule": "cosine"},
    {"dit": True, "num_classes": 3, "process": "flow_matching"},
    {"dit": True, "prediction": "sample"},
    {"process": "score_matching", "channels_last": True},
]


def loss_of(model, phase, batch):
    """Return the loss of a step outside a Trainer."""
    model.log = lambda *args, **kwargs: None
    return model.step(phase, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    model = tiny(**kind)
    with torch.no_grad():
        for parameter in model.network.parameters():  # a DiT begins with layers of zeros, behind which nothing learns
            parameter += 0.02 * torch.randn_like(parameter)
    loss_of(model, "train", batch_of(12)).backward()
    unmoved = [name for name, p in model.network.named_parameters() if p.grad is None or not p.grad.any()]
    assert unmoved == []
    assert {id(p) for block in model.blocks() for p in block.parameters()} < {id(p) for p in model.parameters()}


def test_the_loss_is_the_mean_squared_error_of_the_noise():
    model, batch = tiny(), batch_of(5)
    noise = model.noise("val", batch["indices"])
    t, added = model.process.draw_times(noise), noise.normal(1, 8, 8)
    clean = batch["images"].float() / 127.5 - 1
    share = torch.tensor(model.process.alpha_bars)[t].view(-1, 1, 1, 1)
    made = model.network(share.sqrt() * clean + (1 - share).sqrt() * added, t).sample
    with torch.no_grad():
        loss = loss_of(model, "val", batch)
    assert float(loss) == pytest.approx(float((made - added).square().mean().detach()), rel=1e-5)


def test_examples_that_count_for_nothing_do_not_move_the_loss_or_what_is_reported():
    model, batch = tiny(num_classes=3), batch_of(6)
    expected = loss_of(model, "val", {name: value[:4] for name, value in batch.items()})
    whole = {name: float(metric.compute()) for name, metric in model.metrics.items() if name == "val_loss"}
    model.metrics["val_loss"].reset()
    batch["indices"][4:], batch["labels"][4:] = FILLER, IGNORED
    assert torch.allclose(loss_of(model, "val", batch), expected)
    assert float(model.metrics["val_loss"].compute()) == pytest.approx(whole["val_loss"])


def test_validation_tells_the_loss_by_how_noisy_pictures_were():
    model, batch = tiny(), batch_of(64)
    loss_of(model, "val", batch)
    bins = [model.metrics[f"val_loss_t{number}"] for number in range(4)]
    assert sum(int(metric.weight) for metric in bins) == 64
    assert sum(float(metric.total) for metric in bins) == pytest.approx(float(model.metrics["val_loss"].total))
    times = model.process.draw_times(model.noise("val", batch["indices"]))
    assert [int(metric.weight) for metric in bins] == torch.bincount(times // 250, minlength=4).tolist()


@pytest.mark.parametrize("dit", [False, True])
def test_training_keeps_some_classes_back_and_evaluation_none(dit):
    model, batch = tiny(dit=dit, num_classes=3, label_dropout=0.3), batch_of(2000)
    told = model._told("train", batch, SampleNoise(batch["indices"], 0, 1))
    dropped = told == 3
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.04)
    assert torch.equal(told[~dropped], batch["labels"][~dropped])
    assert torch.equal(model._told("val", batch, SampleNoise(batch["indices"], 0)), batch["labels"])
    # a DiT of diffusers would drop more, by numbers of its own
    model.train()
    noisy, times, labels = torch.randn(64, 1, 8, 8), torch.full((64,), 500), torch.ones(64, dtype=torch.int64)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        assert torch.equal(model.predict_noise(noisy, times, labels), model.predict_noise(noisy, times, labels))
        assert not torch.equal(model.predict_noise(noisy, times, labels), model.predict_noise(noisy, times, labels + 2))


def test_guidance_asks_with_and_without_the_class():
    model = tiny(num_classes=3, guidance_scale=4.0)
    model.predict_noise = lambda noisy, times, labels: labels.view(-1, 1, 1, 1) + 0 * noisy
    made = model._predict_guided(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 2]))
    # 3 is no class: 3 + 4 (0 - 3) and 3 + 4 (2 - 3)
    assert made[:, 0, 0, 0].tolist() == [-9, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_follow_from_seed_and_class_alone(kind):
    model = tiny(**kind).eval()
    indices = torch.arange(4)
    labels = model.labels_in_turn(indices)
    with torch.no_grad():
        made = model.generate_pictures(model.noise("val", indices), labels)
        torch.manual_seed(99)
        part = model.generate_pictures(model.noise("val", indices[2:]), None if labels is None else labels[2:])
        none = model.generate_pictures(model.noise("val", indices[:0]), None if labels is None else labels[:0])
    assert made.shape == (4, 1, 8, 8)
    assert made.dtype == torch.uint8
    assert (made[2:].int() - part.int()).abs().max() <= 1
    assert none.shape == (0, 1, 8, 8)
    assert made.float().std() > 10


def test_the_bound_is_reported_where_it_is_asked_for(tmp_path, trainer):
    source = write_folders(tmp_path / "pictures", {"cat": 6, "dog": 6})
    data = Images(str(source), image_size=8, channels=1, val_fraction=0.25, test_fraction=0.25, batch_size=4)
    model = tiny(num_train_timesteps=20, bound_timesteps=5)
    (tested,) = trainer().test(model, data, verbose=False)
    pixels = torch.cat([batch["images"] for batch in data.test_dataloader()])
    indices = torch.arange(len(pixels))
    assert tested["test_bits_per_dimension"] > 0
    # the loss has drawn from the same stream before
    noise = model.noise("test", indices)
    model.process.draw_times(noise), noise.normal(1, 8, 8)
    with torch.no_grad():
        by_hand = bits_per_dimension(model.process, lambda x, t: model.predict_noise(x, t, None), pixels, noise, 5)
    counted = indices < len(data.parts["test"])
    assert tested["test_bits_per_dimension"] == pytest.approx(float(by_hand[counted].mean()), rel=1e-5)
    assert "test_bits_per_dimension" not in trainer().test(tiny(), data, verbose=False)[0]


@pytest.mark.parametrize("dit", [False, True])
def test_compiled_it_learns_and_makes_pictures_as_without(dit, monkeypatch):
    # inductor's half minute of C++ is spent in the test of the compiled classifier; here the graphs count
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    models = [tiny(dit=dit, num_classes=3, guidance_scale=2.0, compile=compile) for compile in (False, True)]
    losses = []
    for model in models:
        with torch.no_grad():
            for parameter in model.network.parameters():  # a DiT begins with layers of zeros
                parameter += 0.02 * torch.ones_like(parameter)
        losses.append(loss_of(model, "train", batch_of(4)))
        assert bool(graphs) == (model is models[1])
        losses[-1].backward()
    assert torch.allclose(*losses)
    plain, compiled = (dict(model.network.named_parameters()) for model in models)
    assert plain.keys() == compiled.keys()
    assert [name for name in plain if not torch.allclose(plain[name].grad, compiled[name].grad, atol=1e-5)] == []
    if dit:  # a U-Net takes three times as long to trace again, for what needs no gradient
        with torch.no_grad():
            expected, found = (model.eval().make_pictures([1, 2], torch.tensor([0, 2])).int() for model in models)
        assert (expected - found).abs().max() <= 1


@pytest.mark.parametrize("dit", [False, True])
def test_weights_of_16_bits_learn_and_make_pictures(dit, tmp_path, trainer):
    source = write_folders(tmp_path / "pictures", {"cat": 6, "dog": 6})
    data = Images(str(source), image_size=8, channels=1, val_fraction=0.25, batch_size=4)
    model = tiny(dit=dit)
    fitter = trainer(precision="bf16-true", max_steps=2)
    fitter.fit(model, data)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert fitter.callback_metrics["val_loss"].isfinite()
    with torch.no_grad():
        assert model.eval().make_pictures([1, 2], None).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "UNet2DMode"}, ["architecture 'UNet2DMode'", "did you mean 'UNet2DModel'?"]),
        ({"config": {**UNET, "layer_per_block": 2}}, ["model.config.layer_per_block", "mean 'layers_per_block'?"]),
        ({"config": {**UNET, "sample_size": 8}}, ["sample_size is said by model.image_size"]),
        ({"config": {**UNET, "num_class_embeds": 8}}, ["num_class_embeds is said by model.num_classes"]),
        ({"image_size": 9}, ["image_size is 9", "multiples of 2", "the next that it can make is 10"]),
        ({"image_size": [8, 9]}, ["image_size is [8, 9]", "the next that it can make is [8, 10]"]),
        ({"architecture": "DiTTransformer2DModel", "config": DIT, "image_size": 7}, ["patch_size, 2", "is 8"]),
        ({"architecture": "DiTTransformer2DModel", "config": DIT, "image_size": [7, 10]}, ["squares", "make is 10"]),
        ({"guidance_scale": 3.0}, ["guidance_scale is 3.0 and the model has no classes", "num_classes"]),
        ({"guidance_scale": 3.0, "num_classes": 2, "label_dropout": 0.0}, ["set label_dropout above 0"]),
        ({"guidance_scale": -1.0, "num_classes": 2}, ["guidance_scale is -1.0; it must be 0 or more"]),
        ({"label_dropout": 1.0}, ["label_dropout is 1.0; it must be 0 or more and below 1"]),
        ({"bound_timesteps": -1}, ["bound_timesteps is -1; it must be 0 or more"]),
        ({"bound_timesteps": 9, "process": "flow_matching"}, ["set it to 0 for flow matching"]),
        ({"pretrained": "somewhere"}, ["config is set, and pretrained brings its own"]),
        ({"sampler": "dimm"}, ["no sampler 'dimm'; did you mean 'ddim'?"]),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(InputError) as error:
        Diffusion(**{"config": UNET, "image_size": 8, "channels": 1, **changes})
    for word in words:
        assert word in str(error.value)


def test_values_that_do_not_fit_together_are_refused_when_the_network_is_built():
    with pytest.raises(InputError, match=r"config of UNet2DModel: .*; correct model.config"):
        tiny(config={**UNET, "norm_num_groups": 3})
    with pytest.raises(InputError, match=r"config of UNet2DModel: .*; correct model.config"):
        tiny(config={**UNET, "up_block_types": ["UpBlock2D"]})


def test_data_that_do_not_fit_are_refused():
    model, batch = tiny(num_classes=3), batch_of(2)
    with pytest.raises(InputError, match="set data.image_size to"):
        model.step("train", batch | {"images": torch.zeros(2, 1, 6, 6, dtype=torch.uint8)})
    with pytest.raises(InputError, match="several classes each; give data with one"):
        model.step("train", batch | {"labels": torch.zeros(2, 3)})


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_dit_learns_on_two_processes_as_on_one(strategy, tmp_path):
    source = str(write_folders(tmp_path / "pictures", {"cat": 8, "dog": 8}))

    def fit(processes, strategy):
        return fit_on(
            processes,
            strategy,
            lambda: Diffusion("DiTTransformer2DModel", DIT, image_size=8, channels=1, num_classes=2),
            lambda: Images(source, image_size=8, channels=1, val_fraction=0, batch_size=8 // processes),
        )

    alone, several = fit(1, "auto")[0], fit(2, strategy)
    mean = [sum(pair) / 2 for pair in zip(*(one.losses for one in several), strict=True)]
    assert mean == pytest.approx(alone.losses, rel=1e-4)
    for name, value in alone.weights.items():
        assert torch.allclose(several[0].weights[name], value, atol=2e-3), name
