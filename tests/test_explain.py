import importlib

import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer, get_model

from lightning_bigmodels.attribution import METHODS, attribute
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.cnn.explanation import draw_heat, explainable_pictures, find_layer
from tests.patches import TinyCNN, learn_patches, make_pairs, make_patches, pixel_network


@pytest.fixture(scope="session")
def network():
    return learn_patches()


def share(heat, mask):
    """Return the part of all heat that lies where the mask is."""
    return float((heat * mask).sum() / heat.sum())


@pytest.mark.parametrize("method", METHODS)
def test_four_fifths_of_the_mass_lie_in_the_patch_that_decides(network, method):
    pictures, labels, masks = make_patches(16, seed=1)
    assert torch.equal(network(pictures).argmax(1), labels)
    heat = attribute(explainable_pictures(network, pictures), method, labels)
    assert heat.shape == masks.shape
    assert share(heat, masks) >= 0.8
    # a place beside it of the same size fails, and so does heat everywhere
    assert share(heat, masks.roll(16, dims=2)) < 0.5
    assert share(torch.ones_like(heat), masks) < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_a_patch_as_bright_that_says_nothing_gets_less_than_half_as_much(network, method):
    pictures, labels, decides, silent = make_pairs(16, seed=1)
    assert torch.equal(network(pictures).argmax(1), labels)
    heat = attribute(explainable_pictures(network, pictures), method, labels)
    assert 2 * share(heat, silent) < share(heat, decides)


# ---- formulas


def linear(channels=2, side=4):
    torch.manual_seed(0)
    return pixel_network(nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 3)), channels)


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_of_a_linear_network_each_pixel_counts_weight_times_difference(method):
    network = linear()
    pictures = torch.randint(256, (5, 2, 4, 4), dtype=torch.uint8)
    classes = torch.tensor([0, 1, 2, 1, 0])
    weights = network.body[1].weight[classes].view(5, 2, 4, 4) / 0.25
    for baseline, value in ((None, 0.5), (0.0, 0.0)):
        explainable = explainable_pictures(network, pictures, baseline=baseline)
        expected = (weights * (pictures / 255 - value)).sum(1).clamp(min=0)
        torch.testing.assert_close(attribute(explainable, method, classes), expected, rtol=1e-3, atol=1e-4)


def test_a_window_covers_what_it_hides_and_moves_by_half_of_it():
    network = linear(channels=1)
    pictures = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    explainable = explainable_pictures(network, pictures, window=4)
    heat = attribute(explainable, "occlusion", torch.tensor([0]))
    drop = (network(pictures) - network(torch.full((1, 1, 4, 4), 0.5)))[0, 0].clamp(min=0)
    torch.testing.assert_close(heat, drop.expand(1, 4, 4))
    assert explainable.window == (1, 4, 4)
    assert explainable.stride == (1, 2, 2)


def test_grad_cam_weighs_maps_by_their_mean_gradient(network):
    pictures, labels, _ = make_patches(3, seed=2)
    maps = network.body.features(network.normalize(pictures)).detach().requires_grad_()
    scores = network.body.head(maps.mean((2, 3)))
    (gradient,) = torch.autograd.grad(scores.gather(1, labels[:, None]).sum(), maps)
    expected = (gradient.mean((2, 3), keepdim=True) * maps).sum(1).clamp(min=0).detach()
    torch.testing.assert_close(attribute(explainable_pictures(network, pictures), "grad_cam", labels), expected)


# ---- layers


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("alexnet", "features.11"),
        ("mobilenet_v3_small", "features"),
        ("resnet18", "layer4"),
        ("squeezenet1_1", "classifier.2"),
    ],
)
def test_a_convolutional_networks_layer_is_the_last_with_its_last_maps(name, layer):
    body = get_model(name, weights=None, num_classes=2)
    found = find_layer(pixel_network(body), torch.rand(1, 3, 64, 64))
    assert found.module is body.get_submodule(layer)


def vit():
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=2
    )


def swin():
    return SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=2)


@pytest.mark.parametrize(("body", "layer"), [(vit, "encoder.layers.encoder_layer_1.ln_1"), (swin, "norm")])
def test_a_transformers_layer_is_its_last_norm_with_places(body, layer):
    torch.manual_seed(0)
    network = pixel_network(body())
    nn.init.normal_(network.body.get_submodule("heads.head" if body is vit else "head").weight)
    pictures = torch.rand(2, 3, 32, 32)
    found = find_layer(network, pictures)
    assert found.module is network.body.get_submodule(layer)
    output = torch.rand(2, 17, 16) if body is vit else torch.rand(2, 4, 4, 16)
    maps = found.to_map(output)
    assert maps.shape == (2, 16, 4, 4)
    assert torch.equal(maps[0, :, 1, 2], output[0, 1 + 4 + 2] if body is vit else output[0, 1, 2])
    assert torch.equal(found.from_map(output, maps), output)
    heat = attribute(explainable_pictures(network, pictures), "grad_cam", torch.tensor([0, 1]))
    assert heat.shape == (2, 32, 32)
    assert (heat.amax((1, 2)) > 0).any()


def test_a_named_layer_is_taken_with_or_without_body(network):
    pixels = torch.rand(1, 3, 32, 32)
    for name in ("features.0", "body.features.0"):
        assert find_layer(network, pixels, name).module is network.body.features[0]
    pictures, labels, _ = make_patches(2, seed=3)
    last, first = (explainable_pictures(network, pictures, name) for name in (None, "features.0"))
    assert not torch.allclose(attribute(last, "grad_cam", labels), attribute(first, "grad_cam", labels))


def test_what_cannot_be_explained_is_refused_with_a_remedy(network):
    pixels = torch.rand(2, 3, 32, 32)
    classes = torch.tensor([0, 1])

    def refuse(words, network=network, method="grad_cam", **arguments):
        with pytest.raises(InputError, match=words):
            attribute(explainable_pictures(network, pixels, **arguments), method, classes)

    refuse("no method of explanation is named 'grad_cm'; did you mean 'grad_cam'", method="grad_cm")
    refuse("no layer 'feature.2'; did you mean 'features.2'", layer="feature.2")
    refuse("no layer 'body'", layer="body")
    refuse(r"head gives a tensor of shape .*B.*2.*, no maps of places; name a layer that does", layer="head")
    refuse("baseline is 1.5; set it to a gray level from 0", baseline=1.5)
    refuse("window is 33; set it to 1 or more pixels, and at most 32", method="occlusion", window=33)
    flat = pixel_network(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)))
    refuse("Sequential has none; choose integrated_gradients or occlusion", network=flat)
    relu = nn.ReLU()
    twice = pixel_network(nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 2, 3), relu, nn.Flatten()))
    refuse("1 is run 2 times in a forward pass; name a layer that is run once", network=twice, layer="1")


def test_the_extra_is_named_where_captum_is_not_installed(network, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="captum")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install 'lightning-bigmodels\[explain\]'"):
        attribute(explainable_pictures(network, torch.rand(1, 3, 32, 32)), "occlusion", torch.tensor([0]))


# ---- what is left behind


@pytest.mark.parametrize("method", METHODS)
def test_modes_gradients_and_hooks_are_as_before_also_after_an_error(method):
    network = pixel_network(TinyCNN()).train()
    network.body.features[0].eval()
    before = [module.training for module in network.modules()]
    gradients = [torch.rand_like(parameter) for parameter in network.parameters()]
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    explainable = explainable_pictures(network, torch.rand(2, 3, 32, 32))
    attribute(explainable, method, torch.tensor([0, 1]))
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        attribute(explainable, method, torch.tensor([7, 7]))  # there is no such class
    assert [module.training for module in network.modules()] == before
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), gradients, strict=True))
    assert all(not module._forward_hooks for module in network.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_same_in_inference_mode_under_autocast_frozen_and_compiled(network, method):
    pictures, labels, _ = make_patches(2, seed=4)
    expected = attribute(explainable_pictures(network, pictures), method, labels)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        # a loader in this process makes its batches in inference mode
        inside = explainable_pictures(network, pictures.clone())
        assert torch.equal(attribute(inside, method, labels.clone()), expected)
    compiled = pixel_network(TinyCNN())
    compiled.load_state_dict(network.state_dict())
    compiled.requires_grad_(False).compile(backend="eager")
    compiled(pictures)
    torch.testing.assert_close(attribute(explainable_pictures(compiled, pictures), method, labels), expected)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_16_bits_give_nearly_the_same(network, method):
    pictures, labels, masks = make_patches(4, seed=5)
    half = pixel_network(TinyCNN())
    half.load_state_dict(network.state_dict())
    heat = attribute(explainable_pictures(half.to(torch.bfloat16), pictures), method, labels)
    assert heat.dtype == torch.float32
    assert share(heat, masks) > 0.75


# ---- the picture


def test_a_picture_lies_beside_its_heat_with_text_below():
    pictures = torch.full((2, 1, 40, 30), 255, dtype=torch.uint8)
    heat = torch.zeros(2, 40, 30)
    heat[0, 10, 20] = 3.0
    first, second = draw_heat(pictures, heat, [["cat: 90.0 %", "true: dog"], ["x" * 400, ""]])
    factor, height = 6, 240  # 30 pixels become 160 or more
    width = 30 * factor
    assert first.shape == second.shape == (3, height + 40, 2 * width + 2)
    assert first.dtype == torch.uint8
    assert (first[:, :height, :width] == 255).all()
    over = first[:, :height, width + 2 :]
    yellow = (over == torch.tensor([255, 255, 0], dtype=torch.uint8).view(3, 1, 1)).all(0)
    assert yellow.nonzero().amin(0).tolist() == [10 * factor, 20 * factor]
    assert yellow.sum() == factor**2
    # without heat nothing is coloured
    gray = second[:, :height, width + 2 :]
    assert (gray == gray[:1]).all()
    assert (second[:, height:] < 128).any()  # text, cut to the width
