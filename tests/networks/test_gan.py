"""DCGAN's networks: every power of two, the papers' numbers, gradients, classes, spectral norm."""

import pytest
import torch
from torch import nn

from lightning_bigmodels.networks.gan import (
    ConditionalBatchNorm,
    Discriminator,
    Generator,
    is_possible_size,
    next_size,
)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize(("channels", "num_classes"), [(1, 0), (3, 7), (5, 2)])
def test_any_power_of_two_on_meta(size, channels, num_classes):
    with torch.device("meta"):
        generator = Generator(size, channels, 10, 4, num_classes)
        discriminator = Discriminator(size, channels, 4, num_classes)
        labels = torch.zeros(2, dtype=torch.int64) if num_classes else None
        pictures = generator(torch.zeros(2, 10), labels)
        assert pictures.shape == (2, channels, size, size)
        assert discriminator(pictures, labels).shape == (2,)


def test_sizes():
    assert [size for size in range(1, 70) if is_possible_size(size)] == [8, 16, 32, 64]
    assert [next_size(size) for size in (1, 7, 8, 9, 28, 33, 64, 65, 100)] == [8, 8, 8, 16, 32, 64, 64, 128, 128]


def test_the_papers_widths_at_64_pixels():
    generator, discriminator = Generator(64, 3, 100, 128), Discriminator(64, 3, 64)
    assert [layer.out_channels for layer in generator.layers] == [1024, 512, 256, 128]
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512]
    # 4 x 4 kernels; a norm's gain and bias for each of what a layer makes; the last layers have biases
    expected = 16 * (100 * 1024 + 1024 * 512 + 512 * 256 + 256 * 128 + 128 * 3) + 2 * (1024 + 512 + 256 + 128) + 3
    assert sum(p.numel() for p in generator.parameters()) == expected
    expected = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 2 * (128 + 256 + 512) + 64 + 1
    assert sum(p.numel() for p in discriminator.parameters()) == expected


def test_weights_begin_as_the_paper_says():
    torch.manual_seed(0)
    for network in (Generator(64, 3, 100, 16), Discriminator(64, 3, 16, 9)):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)):
                weight = module.weight.detach()
                assert float(weight.mean()) == pytest.approx(0, abs=0.004)
                assert float(weight.std()) == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("norm", ["batch", "layer", "instance", "none"])
@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("conditioning", [None, "batch_norm", "embedding"])
def test_every_parameter_gets_a_gradient(norm, spectral, conditioning):
    torch.manual_seed(0)
    num_classes = 3 if conditioning else 0
    generator = Generator(16, 2, 5, 4, num_classes, conditioning or "batch_norm")
    discriminator = Discriminator(16, 2, 4, num_classes, norm, spectral)
    labels = torch.arange(6) % 3 if conditioning else None
    # a constant would be blind to what batch norm sees of a mean
    (discriminator(generator(torch.randn(6, 5), labels), labels) * torch.randn(6)).sum().backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("conditioning", ["batch_norm", "embedding"])
def test_both_networks_see_the_class(conditioning):
    torch.manual_seed(0)
    generator = Generator(8, 1, 5, 4, 3, conditioning).eval()
    discriminator = Discriminator(8, 1, 4, 3, "none").eval()
    latents = torch.randn(1, 5).expand(3, 5)
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        nn.init.normal_(parameter)
    pictures = generator(latents, torch.arange(3))
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3 < (pictures[1] - pictures[2]).abs().max()
    logits = discriminator(pictures[:1].expand(3, 1, 8, 8), torch.arange(3))
    assert logits.unique().numel() == 3


def test_the_projection_adds_the_class_by_its_inner_product_with_the_features():
    torch.manual_seed(0)
    discriminator = Discriminator(8, 1, 4, 3, "none")
    pictures, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 1, 0])
    features = discriminator.layers(pictures)
    own = discriminator.output(features).flatten()
    product = torch.einsum("bf,bfhw->b", discriminator.embedding.weight[labels], features)
    torch.testing.assert_close(discriminator(pictures, labels), own + product)


def test_conditional_batch_norm_by_hand():
    torch.manual_seed(0)
    norm = ConditionalBatchNorm(2, 3)
    nn.init.normal_(norm.bias.weight)
    x, labels = torch.randn(4, 2, 3, 3), torch.tensor([0, 1, 2, 1])
    normal = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    expected = normal * norm.gain.weight[labels][..., None, None] + norm.bias.weight[labels][..., None, None]
    torch.testing.assert_close(norm(x, labels), expected)


def test_spectral_norm_bounds_each_layer_and_so_the_logits():
    torch.manual_seed(0)
    discriminator = Discriminator(16, 1, 4, 3, "none", spectral=True)
    for name, parameter in discriminator.named_parameters():
        if name.endswith("original"):
            nn.init.normal_(parameter, 0, 5)
    for _ in range(50):
        discriminator(torch.randn(2, 1, 16, 16), torch.zeros(2, dtype=torch.int64))
    discriminator.eval()
    layers = [module for module in discriminator.modules() if isinstance(module, (nn.Conv2d, nn.Embedding))]
    assert len(layers) == 4
    for layer in layers:
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("norm", ["layer", "instance", "none"])
def test_without_batch_norm_a_picture_is_judged_alone(norm):
    torch.manual_seed(0)
    discriminator = Discriminator(16, 1, 4, norm=norm)
    pictures = torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(discriminator(pictures)[:2], discriminator(pictures[:2]))
