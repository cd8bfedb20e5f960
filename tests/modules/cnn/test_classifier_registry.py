"""Every classifier of torchvision's registry, at its full width and depth on the meta device: it learns as a whole."""

import pytest
import torch
from torch import nn

from lightning_bigmodels.modules.cnn.classifiers import build_body, output_layers, repeated_blocks, undecayed_tensors
from lightning_bigmodels.modules.cnn.registry import network_names

# the others take 64 pixels; these are built for a multiple of their patches or windows, or pool more
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 28}
WITHOUT_BLOCKS = ("alexnet", "vgg", "mnasnet0_0")


def test_the_registry_is_all_there():
    assert len(network_names("classification")) >= 80


@pytest.mark.parametrize("name", network_names("classification"))
def test_each_network_takes_two_channels_and_every_parameter_gets_a_gradient(name):
    size = SIZES.get(name, 64)
    with torch.device("meta"):
        body = build_body(name, num_classes=7, channels=2, image_size=size, options={})
    found = body(torch.zeros(2, 2, size, size, device="meta"))
    outputs = [found] if isinstance(found, torch.Tensor) else list(found)
    assert [tuple(output.shape) for output in outputs] == [(2, 7)] * len(outputs)
    torch.stack([output.sum() for output in outputs]).sum().backward()
    assert [key for key, parameter in body.named_parameters() if parameter.grad is None] == []
    heads = output_layers(body)
    assert len(heads) == len(outputs)
    assert {head.out_features if isinstance(head, nn.Linear) else head.out_channels for head in heads} == {7}
    blocks = repeated_blocks(body)
    inside = [id(parameter) for block in blocks for parameter in block.parameters()]
    assert len(inside) == len(set(inside))  # none within another
    assert not {id(p) for head in heads for p in head.parameters()} & set(inside)
    if not name.startswith(WITHOUT_BLOCKS):
        share = sum(p.numel() for block in blocks for p in block.parameters()) / sum(
            p.numel() for p in body.parameters()
        )
        assert share > 0.35, share


@pytest.mark.parametrize(
    ("name", "size", "tensors"),
    [("vit_b_32", 64, 2), ("swin_t", 64, 12), ("convnext_tiny", 64, 18), ("resnet18", 64, 0)],
)
def test_tokens_positions_and_scales_are_not_decayed(name, size, tensors):
    with torch.device("meta"):
        assert len(undecayed_tensors(build_body(name, 3, 3, size, {}))) == tensors
