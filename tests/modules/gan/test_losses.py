"""The losses against their formulas, the penalties where the slope is known, the alterations of pictures."""

import math

import pytest
import torch

from lightning_bigmodels.modules.gan.augmentation import alter
from lightning_bigmodels.modules.gan.losses import LOSSES, gradient_penalty, r1_penalty, slopes
from lightning_bigmodels.tasks.sample_noise import SampleNoise


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


FORMULAS = {
    # real, made, generator
    "non_saturating": (
        lambda x: -math.log(sigmoid(x)),
        lambda x: -math.log(1 - sigmoid(x)),
        lambda x: -math.log(sigmoid(x)),
    ),
    "hinge": (lambda x: -min(0, x - 1), lambda x: -min(0, -x - 1), lambda x: -x),
    "least_squares": (lambda x: (x - 1) ** 2 / 2, lambda x: x**2 / 2, lambda x: (x - 1) ** 2 / 2),
    "wasserstein": (lambda x: -x, lambda x: x, lambda x: -x),
}


@pytest.mark.parametrize("name", list(FORMULAS))
def test_the_losses_are_the_formulas(name):
    assert LOSSES.keys() == FORMULAS.keys()
    logits = [-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.5]
    for loss, formula in zip(LOSSES[name], FORMULAS[name], strict=True):
        found = loss(torch.tensor(logits, dtype=torch.float64))
        assert found.tolist() == pytest.approx([formula(x) for x in logits], abs=1e-12)


def test_penalties_of_a_plane_and_what_they_teach():
    """For the logit w x the slope is w anywhere: the penalties are (|w| - 1)^2 and |w|^2 / 2."""
    weights = torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]], requires_grad=True)
    pictures = torch.randn(3, 1, 2, 2)
    found = slopes(lambda x: (x * weights).sum((1, 2, 3)), pictures)
    torch.testing.assert_close(found, weights.flatten(1).expand(3, 4))
    assert gradient_penalty(found).tolist() == pytest.approx([16.0] * 3)
    assert r1_penalty(found).tolist() == pytest.approx([12.5] * 3)
    (taught,) = torch.autograd.grad(gradient_penalty(found).mean(), weights, retain_graph=True)
    # 2 (|w| - 1) w / |w|
    torch.testing.assert_close(taught, 8 * weights.detach() / 5)
    (taught,) = torch.autograd.grad(r1_penalty(found).mean(), weights)
    torch.testing.assert_close(taught, weights.detach())


def test_slopes_are_those_at_the_pictures_and_in_full_precision():
    """For half the square of x the slope is x itself."""
    pictures = torch.randn(2, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = slopes(lambda x: 0.5 * torch.einsum("bchw,bchw->b", x, x), pictures)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, pictures.flatten(1), rtol=1e-6, atol=0)


def test_a_flat_discriminator_has_a_penalty_of_one_and_a_finite_gradient():
    weights = torch.zeros(1, 1, 2, 2, requires_grad=True)
    penalty = gradient_penalty(slopes(lambda x: (x * weights).sum((1, 2, 3)), torch.randn(2, 1, 2, 2)))
    assert penalty.tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    (gradient,) = torch.autograd.grad(penalty.sum(), weights)
    assert torch.isfinite(gradient).all()


# ---- alterations


def altered(pictures, *names, epoch=0):
    return alter(pictures, names, SampleNoise(torch.arange(len(pictures)), 0, epoch))


@pytest.mark.parametrize("name", ["color", "translation", "cutout"])
def test_alterations_keep_shape_and_gradients_and_differ_by_picture_and_epoch(name):
    pictures = torch.rand(6, 3, 16, 8).requires_grad_()
    found = altered(pictures, name)
    assert found.shape == pictures.shape
    (gradient,) = torch.autograd.grad(found.sum(), pictures)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    same = pictures[:1].detach().expand_as(pictures)
    assert len(altered(same, name).flatten(1).unique(dim=0)) > 2
    assert not torch.equal(altered(same, name), altered(same, name, epoch=1))
    assert torch.equal(altered(pictures, name), found)
    # a picture's alteration does not depend on those beside it
    torch.testing.assert_close(altered(pictures[:2], name), found[:2])


def test_color_by_hand():
    pictures = torch.rand(2, 3, 4, 4) * 2 - 1
    brightness, saturation, contrast = SampleNoise(torch.arange(2), 0, 0).uniform(3)[:, :, None, None, None].unbind(1)
    bright = pictures + (brightness - 0.5)
    gray = bright.mean(1, keepdim=True)
    vivid = (bright - gray) * (2 * saturation) + gray
    mean = vivid.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(altered(pictures, "color"), (vivid - mean) * (contrast + 0.5) + mean)


def test_translation_moves_by_whole_pixels_up_to_an_eighth_each_way():
    pictures = torch.zeros(400, 1, 16, 32)
    pictures[:, :, 8, 16] = 1
    found = altered(pictures, "translation").nonzero()[:, 2:] - torch.tensor([8, 16])
    assert len(found) == 400
    assert found.amin(0).tolist() == [-2, -4]
    assert found.amax(0).tolist() == [2, 4]
    assert len(found.unique(dim=0)) == 45


def test_cutout_hides_a_square_of_half_the_side():
    hidden = altered(torch.ones(400, 2, 8, 8), "cutout") == 0
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    rows, columns = hidden[:, 0].any(2).sum(1), hidden[:, 0].any(1).sum(1)
    assert torch.equal(hidden[:, 0].sum((1, 2)), rows * columns)
    # cut off where it reaches over the border
    assert rows.unique().tolist() == columns.unique().tolist() == [2, 3, 4]
    assert not hidden.all((2, 3)).any()
    share = hidden[:, 0].float().mean(0)
    assert share.min() > 0.05
