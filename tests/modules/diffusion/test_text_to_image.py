"""Text to image: what the network is told, latents, low-rank changes, pipelines, and what is refused."""

import json
import os

import lightning.pytorch as pl
import pytest
import torch

from lightning_bigmodels import CaptionedImages, TextToImage
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.diffusion.latent_cache import LatentCache
from lightning_bigmodels.modules.diffusion.pipelines import load_pipeline
from lightning_bigmodels.modules.diffusion.text_denoisers import draw_latents, moments
from lightning_bigmodels.modules.diffusion.text_encoders import CaptionTokenizer
from lightning_bigmodels.modules.diffusion.text_pipelines import call_of
from tests.conftest import QUIET
from tests.recipe_text_to_image import ENCODER, NETWORK, SIZE, write_autoencoder, write_encoder, write_pictures

PIXART = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 4}


def model(**changes):
    values = {"config": NETWORK, "text_encoder_config": ENCODER, "image_size": SIZE, "num_sampling_steps": 4}
    return TextToImage(**{**values, **changes})


def data(source="shapes:24", **changes):
    values = {"source": str(source), "image_size": SIZE, "batch_size": 8, "seed": 1}
    return CaptionedImages(**{**values, **changes})


def fitted(module, datamodule, **changes):
    trainer = pl.Trainer(**{**QUIET, "max_steps": 2, **changes})
    trainer.fit(module, datamodule=datamodule)
    return module.eval()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with an autoencoder, a text encoder, pictures, and a pipeline of diffusers made of them."""
    folder = tmp_path_factory.mktemp("sources")
    write_autoencoder(folder / "vae")
    write_encoder(folder / "text")
    write_pictures(folder / "pictures", 16)
    module = model(**latent_arguments(folder), train_text_encoder=True)
    fitted(module, data(folder / "pictures", val_fraction=0.0), max_steps=1)
    module.exportable().write(folder / "pipeline")
    return folder


def latent_arguments(folder):
    return {"text_encoder_config": None, "text_encoder": str(folder / "text"), "autoencoder": str(folder / "vae")}


@pytest.fixture(scope="module")
def of_pixels():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fitted(model(guidance_scale=2.0, fold=2, prediction="v_prediction"), data(val_fraction=0.0))


# ---- what it is told


def test_every_parameter_gets_a_gradient():
    module = model()
    fitted(module, data(val_fraction=0.0), max_steps=1)
    module.train()
    batch = next(iter(module.trainer.datamodule.train_dataloader()))
    module.trainer.fit_loop.epoch_progress.current.processed = 0
    module.zero_grad()
    tokens = module.caption_tokenizer()(batch["captions"], module.device)
    noisy, times = torch.randn(8, 3, SIZE, SIZE), torch.arange(8)
    module.network("told", noisy, times, tokens.ids, tokens.mask).square().sum().backward()
    # positions behind all captions' ends are told too: they are filled up
    assert [name for name, p in module.network.named_parameters() if p.grad is None] == []


def test_weights_of_16_bits_learn_and_make_pictures(sources):
    pictures = data(sources / "pictures", val_fraction=0.25)
    module = fitted(model(**latent_arguments(sources)), pictures, precision="bf16-true", limit_val_batches=1)
    assert {p.dtype for p in module.network.parameters()} == {torch.bfloat16}
    assert module.trainer.callback_metrics["val_loss"].isfinite()
    with torch.no_grad():
        assert module.make_pictures(["a red circle"], [5]).shape == (1, 3, SIZE, SIZE)


def test_a_picture_depends_on_its_prompt_seed_and_nothing_else(of_pixels):
    with torch.no_grad():
        both = of_pixels.make_pictures(["a red circle", "a blue square"], [5, 6])
        alone = of_pixels.make_pictures(["a blue square"], [6])
        other = of_pixels.make_pictures(["a red circle"], [6])
    assert both.shape == (2, 3, SIZE, SIZE)
    assert torch.allclose(both[1].float(), alone[0].float(), atol=1)
    assert (alone.float() - other.float()).abs().max() > 1
    assert of_pixels.make_pictures([], []).shape == (0, 3, SIZE, SIZE)


def test_guidance_goes_from_no_caption_to_the_caption_and_beyond(of_pixels, monkeypatch):
    asked = []

    def predict(part, *inputs):
        if part == "states":
            return torch.zeros(len(inputs[0]), 1, 1)
        asked.append(len(inputs[0]))
        without, told = torch.zeros(1), torch.ones(1)
        return torch.cat([without, told]).view(2, 1, 1, 1).expand(2, *inputs[0].shape[1:])

    made = []
    monkeypatch.setattr(of_pixels.network, "forward", predict)
    monkeypatch.setattr(
        "lightning_bigmodels.modules.diffusion.denoising.sample",
        lambda scheduler, predict, seeds, shape, *rest: (
            made.append(predict(torch.zeros(1, *shape), torch.zeros(1))) or torch.zeros(1, *shape)
        ),
    )
    of_pixels.make_pictures(["a red circle"], [0])
    assert asked == [2]
    assert (made[0] == 2.0).all()


def test_captions_are_dropped_for_some_examples_and_always_the_same(of_pixels, monkeypatch):
    told = []
    inner = of_pixels.network.forward
    monkeypatch.setattr(of_pixels.network, "forward", lambda part, *x: told.append(x[2]) or inner(part, *x))
    monkeypatch.setattr(of_pixels, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(of_pixels, "caption_dropout", 0.5)
    batch = data(batch_size=64, source="shapes:64", val_fraction=0.0)
    batch.setup("fit")
    batch = next(iter(batch.train_dataloader()))
    with torch.no_grad():
        losses = [of_pixels.step("train", batch) for _ in range(2)]
        of_pixels.step("val", batch)
    empty = of_pixels.caption_tokenizer()([""], of_pixels.device).ids
    untold = [(ids == empty).all(1) for ids in told]
    assert 16 < int(untold[0].sum()) < 48
    assert torch.equal(untold[0], untold[1])
    assert losses[0] == losses[1]
    assert not untold[2].any()


def test_a_longer_caption_is_cut_and_counted(tmp_path):
    folder = tmp_path / "set"
    write_pictures(folder, 8)
    (folder / "003.txt").write_text("word " * 40, encoding="utf-8")
    module = model(caption_dropout=0.0, guidance_scale=1.0)
    datamodule = data(folder, val_fraction=0.0, batch_size=4)
    with pytest.warns(UserWarning, match="the caption 'word word .*' has more than 16 tokens.*train_cut_captions"):
        fitted(module, datamodule, max_steps=-1, max_epochs=1)
    trainer = module.trainer
    assert trainer.callback_metrics["train_cut_captions"] == 1
    tokens = CaptionTokenizer(module.tokenizer, 16)(["word " * 40, "a red circle"], torch.device("cpu"))
    assert tokens.ids.shape == (2, 16)
    assert tokens.cut == [0]


# ---- latents


def test_latents_are_drawn_as_the_paper_has_it():
    mean, log_variance = torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 1, 1), 2.0).log()
    found = draw_latents(torch.cat([mean, log_variance], 1), torch.full((1, 2, 1, 1), 2.0), scale=0.5, shift=1.0)
    assert torch.allclose(found, torch.full((1, 2, 1, 1), 0.5 * (3 + 2 * 2**0.5 - 1)))


def test_kept_latents_are_those_of_the_pictures_and_made_once(sources, tmp_path):
    def losses(cache):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = model(**latent_arguments(sources), latent_cache=cache)
            datamodule = data(sources / "pictures", aspect_buckets=True, bucket_step=4, batch_size=2, val_fraction=0.3)
            fitted(module, datamodule, val_check_interval=2)
        return float(module.trainer.callback_metrics["val_loss"])

    plain, kept = losses(None), losses(str(tmp_path))
    # kept in batches of another size, which rounds elsewhere
    assert kept == pytest.approx(plain, rel=1e-5)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert len(files) == 2
    assert losses(str(tmp_path)) == kept
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")} == files


def test_what_changes_has_other_latents(sources, tmp_path):
    folder = tmp_path / "pictures"
    write_pictures(folder, 4)

    def name(source=folder, scale=0.5, **changes):
        module = model(**latent_arguments(sources))
        autoencoder = module.parts.cached_autoencoder()
        autoencoder.register_to_config(scaling_factor=scale)
        if changes.pop("weights", False):
            next(autoencoder.parameters()).data += 1
        datamodule = data(source, val_fraction=0.0, **changes)
        datamodule.setup("fit")
        return LatentCache(str(tmp_path), datamodule.captioned("train"), autoencoder).path.name

    first = name()
    assert name() == first
    others = [name(weights=True), name(image_size=2 * SIZE), name(interpolation="nearest"), name(scale=0.4)]
    os.utime(folder / "001.png", ns=(1, 1))
    others.append(name())
    assert len({first, *others}) == 6


def test_a_cache_wants_pictures_that_stay_the_same(sources, tmp_path):
    arguments = {**latent_arguments(sources), "latent_cache": str(tmp_path)}
    for changes, words in [
        ({"horizontal_flip": 0.5}, "set data.crop_scale to null and data.horizontal_flip to 0"),
        ({"on_error": "skip"}, "set data.on_error to error"),
    ]:
        with pytest.raises(InputError, match=words):
            fitted(model(**arguments), data(sources / "pictures", **changes))
    with pytest.raises(InputError, match="the model works on pixels; set model.autoencoder"):
        fitted(model(latent_cache=str(tmp_path)), data())


def test_moments_are_those_of_diffusers(sources):
    autoencoder = model(**latent_arguments(sources)).parts.cached_autoencoder()
    pixels = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    found = moments(autoencoder, pixels)
    with torch.no_grad():
        expected = autoencoder.encode(pixels).latent_dist
    assert torch.allclose(found.chunk(2, 1)[0], expected.mean, atol=2e-3)
    assert torch.allclose(found.chunk(2, 1)[1], expected.logvar, atol=2e-3)


# ---- pipelines


def pictures_of(folder, module, prompts=("a red circle", "a blue square"), seeds=(1, 2)):
    found = load_pipeline(folder)(output_type="np", **call_of(module, prompts, list(seeds), 4)).images
    with torch.no_grad():
        expected = module.make_pictures(prompts, list(seeds), 4)
    return torch.from_numpy(found).permute(0, 3, 1, 2) * 255, expected.float()


@pytest.mark.parametrize(
    "changes",
    [
        {"fold": 2, "prediction": "v_prediction", "noise_schedule": "cosine"},
        {"process": "flow_matching", "guidance_scale": 1.0},
        {"architecture": "PixArtTransformer2DModel", "config": PIXART},
    ],
)
def test_a_folder_for_diffusers_makes_the_same_pictures(changes, tmp_path):
    module = fitted(model(**changes), data(val_fraction=0.0))
    exported = module.exportable()
    exported.write(tmp_path)
    exported.check(tmp_path)
    found, expected = pictures_of(tmp_path, module)
    assert (found - expected).abs().max() < 1
    assert "trust_remote_code" in json.loads((tmp_path / "description.json").read_text())["load"]


def test_a_pipeline_of_stable_diffusion_is_its_own_and_can_be_trained_further(sources, tmp_path):
    from diffusers import StableDiffusionPipeline

    assert isinstance(load_pipeline(sources / "pipeline"), StableDiffusionPipeline)
    module = model(config=None, text_encoder_config=None, pretrained=str(sources / "pipeline"))
    module.configure_model()
    found, expected = pictures_of(sources / "pipeline", module.eval())
    assert (found - expected).abs().max() < 1
    assert not any(p.requires_grad for p in module.network.text_encoder.parameters())
    trainer = pl.Trainer(**{**QUIET, "max_steps": 1})
    trainer.fit(module, datamodule=data(sources / "pictures", val_fraction=0.0))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = TextToImage.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True).eval()
    with torch.no_grad():
        assert torch.equal(again.make_pictures(["a"], [0]), module.eval().make_pictures(["a"], [0]))


def test_low_rank_changes_learn_alone_and_load_into_their_pipeline(sources, tmp_path):
    lora = {"rank": 2, "alpha": 8, "target_modules": ["to_q", "to_v"]}
    module = model(config=None, text_encoder_config=None, pretrained=str(sources / "pipeline"), lora=lora)
    module.configure_model()
    before = {name: p.clone() for name, p in module.network.named_parameters()}
    trainer = pl.Trainer(**{**QUIET, "max_steps": 3})
    trainer.fit(module, datamodule=data(sources / "pictures", val_fraction=0.0))
    module.eval()
    changed = {name for name, p in module.network.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed == {name for name in before if "lora_" in name}
    for parameter in module.network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    exported = module.exportable()
    exported.write(tmp_path / "out")
    exported.check(tmp_path / "out")
    base = load_pipeline(sources / "pipeline")
    call = call_of(module, ("a red circle",), [4], 4)
    untouched = base(output_type="np", **call).images
    base.load_lora_weights(tmp_path / "out" / "lora")
    call["generator"] = [torch.Generator().manual_seed(4)]
    found = torch.from_numpy(base(output_type="np", **call).images).permute(0, 3, 1, 2) * 255
    with torch.no_grad():
        expected = module.make_pictures(["a red circle"], [4], 4).float()
    assert (found - expected).abs().max() < 1
    assert abs(found.permute(0, 2, 3, 1).numpy() - 255 * untouched).max() > 1
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    again = TextToImage.load_from_checkpoint(tmp_path / "lora.ckpt", weights_only=True).eval()
    with torch.no_grad():
        assert torch.equal(again.make_pictures(["a red circle"], [4], 4).float(), expected)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "UNet2DConditionalModel"}, "did you mean 'UNet2DConditionModel'?"),
        (
            {"config": {"layers_per_blok": 1}},
            "model.config.layers_per_blok is not in .* did you mean 'layers_per_block'",
        ),
        ({"config": {"in_channels": 3}}, "model.config.in_channels is said by model.channels"),
        ({"text_encoder_config": {"hidden_size": 8}}, "text_encoder_config names no model_type"),
        ({"text_encoder_config": {"model_type": "clip_txt"}}, "transformers knows no model_type 'clip_txt'"),
        ({"text_encoder_config": {**ENCODER, "hiden_size": 8}}, "did you mean 'hidden_size'?"),
        ({"text_encoder_config": None}, "the model has no text encoder; set text_encoder"),
        ({"pretrained": "folder"}, "config is set, and pretrained brings its own"),
        ({"autoencoder_config": {"latent_chanels": 4}}, "did you mean 'latent_channels'?"),
        ({"lora": {"rnk": 4}}, "model.lora.rnk is unknown; did you mean 'rank'?"),
        ({"lora": {"rank": 0}}, "model.lora.rank is 0; it must be above 0"),
        ({"fold": 0}, "fold is 0; set it to 1 or more"),
        ({"fold": 2, "autoencoder": "folder"}, "fold is 2; set it to 1 or more, in latents to 1"),
        ({"caption_dropout": 1.0}, "caption_dropout is 1.0"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5; it must be 1 or more"),
    ],
)
def test_impossible_arguments(changes, words):
    with pytest.raises(InputError, match=words):
        model(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 18}, r"makes multiples of 4; the next that it can make is \[20, 20\]"),
        ({"max_caption_tokens": 99}, None),
        ({"text_encoder": "/nowhere", "text_encoder_config": None}, "text_encoder '/nowhere' cannot be read"),
        ({"autoencoder": "/nowhere"}, "/nowhere cannot be read as AutoencoderKL"),
        ({"config": {**NETWORK, "norm_num_groups": 3}}, "config of UNet2DConditionModel: .*; correct model.config"),
    ],
)
def test_what_cannot_be_built(changes, words):
    module = model(**{"fold": 1 if "autoencoder" in changes else 2, **changes})
    if words is None:
        with pytest.raises(InputError, match="max_caption_tokens is 99, and the text encoder has 16 positions"):
            module.parts.find_tokenizer(None, 99, ["a caption"])
        return
    with pytest.raises(InputError, match=words):
        module.configure_model()


@pytest.mark.parametrize(
    ("changes", "of_data", "words"),
    [
        ({"caption_dropout": 0.0}, {}, "set caption_dropout above 0, such as 0.1, or guidance_scale to 1"),
        ({"lora": {"rank": 2}}, {}, "set model.pretrained to its folder or hub name, or lora to null"),
        ({"autoencoder_config": {"latent_channels": 4}}, {}, "makes latents of random weights"),
        ({"train_text_encoder": False}, {}, "a text encoder from scratch has to learn"),
        ({}, {"channels": 1}, "the pictures have 1 channels and the network 3; set data.channels"),
        ({}, {"image_size": 12}, r"the pictures are \[12, 12\] and the network makes \[16, 16\]"),
        ({"image_size": 18, "fold": 2}, {}, r"the next that it can make is \[20, 20\]: set model.image_size and data"),
        ({}, {"aspect_buckets": True, "bucket_step": 1}, "set data.bucket_step to a multiple of 2"),
        ({"text_encoder_config": {**ENCODER, "vocab_size": 100}}, {}, "vocab_size is 100; set it to 257 or more"),
    ],
)
def test_what_cannot_be_trained(changes, of_data, words):
    with pytest.raises(InputError, match=words):
        fitted(model(**changes), data(**of_data))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prediction": "v_prediction"}, "predicts epsilon; set model.prediction to it"),
        ({"noise_schedule": "linear"}, "was trained with another noise; set model.noise_schedule"),
        ({"process": "flow_matching"}, "was trained with steps of noise; set model.process to ddpm"),
        ({"image_size": 6}, r"the next that it can make is \[8, 8\]"),
    ],
)
def test_a_pipeline_that_was_trained_otherwise(changes, words, sources):
    module = model(config=None, text_encoder_config=None, pretrained=str(sources / "pipeline"), **changes)
    with pytest.raises(InputError, match=words):
        module.configure_model()


def test_no_tokenizer_no_pictures():
    module = model()
    module.configure_model()
    with pytest.raises(InputError, match="the model has no tokenizer; load one of its checkpoints"):
        module.make_pictures(["a"], [0])
