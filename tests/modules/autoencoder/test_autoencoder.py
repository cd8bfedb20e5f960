"""Plain, denoising and sparse autoencoders: their losses by hand, and noise that belongs to the picture."""

import pytest
import torch

from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from tests.modules.autoencoder.toys import batch, built, plain

BAD = [
    ({"latent_dim": 0}, "latent_dim is 0; set it to 1 or more"),
    ({"gaussian_noise": -0.1}, "gaussian_noise is -0.1; set it to 0 or more"),
    ({"masking_noise": 1.0}, "masking_noise is 1.0; it is a probability: set it from 0 to below 1"),
    ({"sparsity": -1.0}, "sparsity is -1.0; set it to 0 or more"),
    ({"architecture": "convolution"}, "no autoencoder is named 'convolution'; did you mean 'convolutional'?"),
    ({"architecture": "autoencoder_kl", "config": None}, "train it as VariationalAutoencoder"),
    ({"config": {"width": [8]}}, "model.config.width is not in the configuration of convolutional; did you mean"),
    ({"config": {"widths": []}}, "widths is \\[\\]; give a list of at least one number of 1 or more"),
    ({"config": {"num_blocks": -1}}, "num_blocks is -1; set it to 0 or more"),
    (
        {"config": {"widths": [4] * 4}},
        "8 x 8 is one pixel after 3; give at most 3 widths, .*: 9 is the next image_size",
    ),
    ({"architecture": "dense", "config": {"num_blocks": 1}}, "num_blocks is not in the configuration of dense"),
    ({"image_size": [8]}, "image_size is \\[8\\]; give one number of 1 or more, or two"),
    ({"channels": 0}, "channels is 0; set it to 1 or more"),
    ({"predicts": "latent"}, "predicts is 'latent'; set it to latents or reconstructions"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        plain(**changes)


@pytest.mark.parametrize("architecture", ["convolutional", "dense"])
def test_the_loss_is_the_squared_error_of_pixels_and_the_absolute_code(architecture, monkeypatch):
    config = None if architecture == "dense" else {"widths": [8, 16]}
    module = built(plain(architecture=architecture, sparsity=0.01, config=config), monkeypatch)
    given = batch(indices=torch.tensor([0, 1, 2, 3, FILLER, FILLER]))
    loss = module.step("train", given)
    images = given["images"][:4]
    code, _ = module.network.encode(images)
    made = (module.network.decode(code) + 1) / 2
    error = (made - images / 255).square().mean((1, 2, 3))
    assert loss.item() == pytest.approx((error + 0.01 * code.abs().sum(1)).mean().item(), rel=1e-5)
    module.step("val", given)
    assert module.logged["val_mse"].compute().item() == pytest.approx(error.mean().item(), rel=1e-5)
    assert module.logged["val_loss"].compute().item() == pytest.approx(loss.item(), rel=1e-5)


def test_noise_is_as_strong_as_it_says():
    images = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    noise = SampleNoise(torch.arange(64), 0)
    gaussian = plain(gaussian_noise=0.2).disturbed(images, noise)
    assert ((gaussian + 1) / 2).std().item() == pytest.approx(0.2, rel=0.02)
    masked = plain(masking_noise=0.3).disturbed(images, noise)
    assert (masked == -1).float().mean().item() == pytest.approx(0.3, abs=0.01)
    # a pixel is black in all its channels
    assert torch.equal(masked[:, 0] == -1, masked[:, 2] == -1)


def test_noise_belongs_to_the_picture_and_evaluation_always_has_the_same(monkeypatch):
    module = built(plain(gaussian_noise=0.1, masking_noise=0.2), monkeypatch)
    whole = batch(6)
    disturbed = module.disturbed(whole["images"], module._noise("val", whole["indices"]))
    last = module.disturbed(whole["images"][4:], module._noise("val", whole["indices"][4:]))
    assert torch.equal(disturbed[4:], last)
    assert not torch.equal(disturbed, module.disturbed(whole["images"], module._noise("train", whole["indices"])))
    module.step("val", whole)
    expected = ((disturbed + 1) / 2 - whole["images"] / 255).square().mean()
    assert module.logged["val_noisy_mse"].compute().item() == pytest.approx(expected.item(), rel=1e-5)


def test_pictures_are_drawn_beside_what_was_seen_and_made():
    module = built(plain(gaussian_noise=0.1)).eval()
    drawn = module.draw(batch(2))
    assert [picture.shape for picture in drawn] == [(3, 64, 3 * 64)] * 2
    assert torch.equal(drawn[0][0, ::8, :64:8], batch(2)["images"][0, 0])
    assert built(plain()).draw(batch(2))[0].shape == (3, 64, 2 * 64)


def test_pictures_of_another_shape_are_refused():
    module = built(plain())
    with pytest.raises(InputError, match="3 channels and model.channels is 1; set it to that"):
        module.check_pictures(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"9 x 8 and model.image_size is 8 x 8; set data.image_size to \[8, 8\]"):
        module.check_pictures(torch.zeros(1, 1, 9, 8))
