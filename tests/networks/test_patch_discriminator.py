"""The discriminator of patches."""

import torch

from lightning_bigmodels.networks.patch_discriminator import PatchDiscriminator


def test_one_logit_for_each_patch():
    with torch.device("meta"):
        network = PatchDiscriminator(num_features=8)
        assert network(torch.zeros(2, 3, 64, 48)).shape == (2, 1, 8, 6)


def test_every_parameter_gets_a_gradient():
    network = PatchDiscriminator(num_features=4)
    network(torch.rand(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_a_pictures_logits_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    network = PatchDiscriminator(num_features=4).eval()
    images = torch.rand(3, 3, 16, 16)
    assert torch.allclose(network(images)[1:2], network(images[1:2]), atol=1e-6)


def test_no_layer_stretches_what_it_gets():
    torch.manual_seed(0)
    network = PatchDiscriminator(num_features=4)
    for _ in range(50):
        network(torch.rand(1, 3, 16, 16))  # each call brings the estimate of the norm nearer
    for layer in network.layers:
        if hasattr(layer, "weight"):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.05
