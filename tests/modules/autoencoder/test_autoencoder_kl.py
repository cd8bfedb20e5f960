"""diffusers' AutoencoderKL, trained by our module and handed back to diffusers."""

import pytest
import torch
from diffusers import AutoencoderKL

from lightning_bigmodels import VariationalAutoencoder
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.export import export
from tests.modules.autoencoder.toys import KL, batch, built, digits, variational


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as diffusers writes it."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("vae") / "vae"
    config = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "sample_size": 8, **KL["config"]}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(**config, **blocks).save_pretrained(path)
    return path


def test_it_codes_and_decodes_as_diffusers_does(folder):
    module = built(variational(**{**KL, "config": None}, pretrained=str(folder))).eval()
    theirs = AutoencoderKL.from_pretrained(folder).eval()
    images = batch()["images"]
    with torch.no_grad():
        expected = theirs.encode(images / 127.5 - 1).latent_dist
        mean, log_variance = module.network.encode(images)
        assert torch.equal(mean, expected.mean)
        assert torch.equal(log_variance, expected.logvar)
        made, _ = module.network.decode(mean).chunk(2, dim=1)
        assert torch.equal(made, theirs.decode(mean).sample)
        # their sum over latent dimensions is our KL divergence
        assert torch.allclose(module._kl(module.network(images)).sum(1), expected.kl(), rtol=1e-5)


def test_a_pipeline_s_folder_will_do(folder):
    module = built(variational(**{**KL, "config": None}, pretrained=str(folder.parent)))
    assert module.network.latent_shape == (2, 4, 4)


def test_it_learns_its_checkpoint_stands_alone_and_its_export_is_diffusers_own(folder, trainer, tmp_path):
    module = variational(**{**KL, "config": None}, pretrained=str(folder))
    run = trainer(max_steps=2, enable_checkpointing=True)
    run.fit(module, digits())
    run.save_checkpoint(tmp_path / "one.ckpt")
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert content["hyper_parameters"]["pretrained"] is None
    again = VariationalAutoencoder.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    written = export(again, tmp_path / "out")
    theirs = AutoencoderKL.from_pretrained(written)
    latents = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        expected, _ = module.network.decode(latents).chunk(2, dim=1)
        assert torch.allclose(theirs.decode(latents).sample, expected, atol=1e-6)
    before = AutoencoderKL.from_pretrained(folder).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in theirs.state_dict().items())
    with pytest.raises(InputError, match="becomes a Hugging Face folder; leave formats out"):
        export(again, tmp_path / "more", ["onnx"])


BAD = [
    ({**KL, "image_size": 9}, "halves pictures 1 times, and image_size is 9 x 9; .* is 10 x 10: set .* to 10$"),
    ({**KL, "image_size": [8, 5]}, r"the next size that it can make is 8 x 6: set .* to \[8, 6\]"),
    ({**KL, "config": {"latent_channels": 4}}, "model.config.latent_channels follows from model.latent_dim; set that"),
    ({**KL, "config": {"block_out_channel": [8]}}, "not in the configuration of autoencoder_kl; did you mean"),
    ({**KL, "config": {"block_out_channels": [8]}}, "holds 8, which norm_num_groups 32 does not divide"),
    ({**KL, "pretrained": "vae"}, "pretrained brings its own configuration; leave model.config out"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        variational(**changes)


def test_what_does_not_fit_the_folder_is_refused(folder, tmp_path):
    given = {**KL, "config": None, "pretrained": str(folder)}
    with pytest.raises(InputError, match="the latent_dim of .* is 2 and model.latent_dim is 4; set it so"):
        built(variational(**{**given, "latent_dim": 4}))
    with pytest.raises(InputError, match="the channels of .* is 1 and model.channels is 3"):
        built(variational(**given, channels=3))
    with pytest.raises(InputError, match="the next size that it can make is 8 x 8"):
        built(variational(**given, image_size=7))
    with pytest.raises(InputError, match="cannot be read: .*; name a folder of an AutoencoderKL"):
        built(variational(**{**given, "pretrained": str(tmp_path)}))
    with pytest.raises(InputError, match="config of autoencoder_kl: .*; correct model.config"):
        built(variational(**{**KL, "config": {**KL["config"], "layers_per_block": "two"}}))
