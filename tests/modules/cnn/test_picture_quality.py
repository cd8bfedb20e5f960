"""PSNR and SSIM against the formulas worked by hand and against scikit-image."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from lightning_bigmodels.modules.cnn.picture_quality import bicubic, luma, measure, psnr, quality_metrics, shave, ssim


def noise(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_luma_is_matlabs():
    # rgb2ycbcr of white, black, red, green and blue, as MATLAB's page lists its matrix
    colours = torch.tensor([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    found = luma(colours.T[:, None])[0, 0]
    assert found.tolist() == pytest.approx([235.0, 16.0, 81.481, 144.553, 40.966])


def test_psnr_by_hand():
    expected = torch.zeros(1, 2, 2)
    found = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    # mean squared error (9 + 16) / 4 = 6.25
    assert psnr(found, expected).item() == pytest.approx(10 * math.log10(255**2 / 6.25))
    assert psnr(found, found).item() == 100


def test_ssim_is_scikit_images_with_wangs_window():
    for channels in (1, 3):
        found, expected = noise(channels, 40, 30), noise(channels, 40, 30, seed=1)
        found = (0.7 * found + 0.3 * expected).to(torch.uint8)
        reference = structural_similarity(
            found.double().numpy(),
            expected.double().numpy(),
            data_range=255,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert ssim(found, expected).item() == pytest.approx(reference, abs=1e-5)
    assert ssim(expected, expected).item() == pytest.approx(1)


def test_ssim_is_not_computed_in_half_precision():
    found, expected = noise(3, 40, 30), noise(3, 40, 30, seed=1)
    plain = ssim(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim(found, expected), plain)


def test_bicubic_is_pillows():
    picture = noise(3, 12, 9) // 2 + 64  # Pillow clips between rows and columns
    image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((27, 36), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert (bicubic(picture, 3).int() - expected.int()).abs().max() <= 2


def test_the_border_is_shaved_and_counts_for_nothing():
    small, expected = noise(3, 16, 16), noise(3, 32, 32, seed=1)
    found = noise(3, 32, 32, seed=2)
    values = measure(small, found, expected, 2)
    changed = found.clone()
    changed[:, :2] = changed[:, -2:] = 0
    changed[:, :, :2] = changed[:, :, -2:] = 255
    again = measure(small, changed, expected, 2)
    for key in values:
        if key != "loss":
            assert torch.equal(values[key], again[key]), key
    assert values["loss"] != again["loss"]
    y_found, y_expected = (luma(picture)[:, 2:-2, 2:-2] for picture in (found, expected))
    error = ((y_found - y_expected) ** 2).mean().item()
    assert values["psnr_y"].item() == pytest.approx(10 * math.log10(255**2 / error))
    rgb = ((found.double() - expected.double())[:, 2:-2, 2:-2] ** 2).mean().item()
    assert values["psnr_rgb"].item() == pytest.approx(10 * math.log10(255**2 / rgb))
    baseline = luma(bicubic(small, 2))[:, 2:-2, 2:-2]
    error = ((baseline - y_expected) ** 2).mean().item()
    assert values["psnr_y_bicubic"].item() == pytest.approx(10 * math.log10(255**2 / error))
    assert values["loss"].item() == pytest.approx(((found.double() - expected.double()).abs().mean() / 255).item())
    assert shave(found, 2).shape == (3, 28, 28)


def test_names_say_the_protocol_and_each_picture_counts_once():
    metrics = quality_metrics("val", 3)
    pictures = [
        (noise(3, 12, 12, seed=n), noise(3, 36, 36, seed=n + 9), noise(3, 36, 36, seed=n + 5)) for n in range(3)
    ]
    values = [measure(*picture, 3) for picture in pictures]
    for value in values:
        metrics.update(value)
    found = metrics.compute()
    assert sorted(found) == [
        "val_loss",
        "val_psnr_rgb_shave3",
        "val_psnr_y_shave3",
        "val_psnr_y_shave3_bicubic",
        "val_ssim_rgb_shave3",
        "val_ssim_y_shave3",
        "val_ssim_y_shave3_bicubic",
    ]
    mean = sum(value["psnr_y"].item() for value in values) / 3
    assert found["val_psnr_y_shave3"].item() == pytest.approx(mean)
