"""The small networks: shapes, gradients, and what makes each itself."""

import pytest
import torch
from torch import nn

from lightning_bigmodels.networks.cnn import SmallCNN, SmallResNet


@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 10, 28), (3, 2, 32), (5, 7, 9), (1, 10, 8), (1, 3, 1)])
def test_the_small_cnn_takes_any_channels_classes_and_size(channels, classes, size):
    with torch.device("meta"):
        network = SmallCNN(channels, classes, size)
        assert network(torch.zeros(2, channels, size, size)).shape == (2, classes)
    kinds = [type(module) for module in network.modules()]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.MaxPool2d) == 3
    assert network.hidden.out_features == 128


def test_every_parameter_of_the_small_cnn_gets_a_gradient():
    torch.manual_seed(0)
    network = SmallCNN(2, 3, 8)
    network(torch.randn(4, 2, 8, 8)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


@pytest.mark.parametrize(("stem_stride", "size"), [(1, 28), (2, 28), (1, 5)])
def test_the_residual_network_takes_any_size(stem_stride, size):
    with torch.device("meta"):
        network = SmallResNet(1, 10, (4, 8, 16), 2, stem_stride)
        assert network(torch.zeros(2, 1, size, size)).shape == (2, 10)
    assert len(network.blocks) == 6


def test_the_default_residual_network_is_the_papers_of_twenty_layers():
    network = SmallResNet(3, 10)
    layers = [
        m for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in name
    ]
    assert len(layers) == 20
    shortcuts = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    # table 6 of the paper: 0.27 million
    assert sum(p.numel() for p in network.parameters()) - shortcuts == 269_722


def test_every_parameter_of_the_residual_network_gets_a_gradient():
    torch.manual_seed(0)
    network = SmallResNet(1, 4, (4, 8), 1)
    (network(torch.randn(6, 1, 8, 8)) * torch.randn(6, 4)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())
