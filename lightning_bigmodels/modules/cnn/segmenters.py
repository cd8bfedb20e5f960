"""Networks that name each pixel's class: torchvision's by name and a U-Net, for any number of channels and classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.cnn.classifiers import (
    WEIGHT_FILES,
    bare_name,
    fetch_weights,
    first_convolution,
    replace_first_convolution,
    spread_channels,
)
from lightning_bigmodels.modules.cnn.registry import check_network, load_weights, read_weights
from lightning_bigmodels.networks.pixels import PixelNetwork
from lightning_bigmodels.networks.unet import UNet

UNET = "unet"
OUT, AUXILIARY = "out", "aux"
_BACKBONE = "backbone."


def has_auxiliary(name: str) -> bool:
    """Return whether a network can have a second output for training, made of an earlier map."""
    return name.startswith(("fcn_", "deeplabv3_"))


def build_body(name: str, num_classes: int, channels: int, auxiliary: bool, options: Mapping[str, Any]) -> nn.Module:
    """Return a network from (B, channels, H, W) to logits (B, num_classes, H, W), with random weights.

    Args:
        name: One of torchvision's, whose logits lie in a dictionary under `out` and `aux`, or unet.
        num_classes: Values for each pixel.
        channels: Channels of the pictures.
        auxiliary: Whether there is a second output, where the network can have one.
        options: More arguments of the network's builder.

    Raises:
        InputError: the name is unknown, or an option is none of the builder's.
    """
    check_network("segmentation", name, (UNET,))
    try:
        if name == UNET:
            return UNet(channels, num_classes, **options)
        # torchvision would fetch a backbone otherwise
        arguments: dict[str, Any] = {"num_classes": num_classes, "weights_backbone": None}
        if has_auxiliary(name):
            arguments["aux_loss"] = auxiliary
        body = torchvision.models.get_model_builder(name)(**arguments, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be built: {error}; correct model.network_args") from error
    if channels != 3:
        replace_first_convolution(body, channels)
    return body


def output_layers(body: nn.Module) -> list[nn.Module]:
    """Return the convolutions that make the logits."""
    if isinstance(body, UNet):
        return [body.head]
    head = body.get_submodule("classifier")
    if isinstance(head, nn.Sequential):
        auxiliary = getattr(body, "aux_classifier", None)
        return [head[-1], *([] if auxiliary is None else [auxiliary[-1]])]
    # LR-ASPP adds the logits of a coarse and of a fine map
    return [head.get_submodule(name) for name in ("low_classifier", "high_classifier")]


def blocks(body: nn.Module) -> list[nn.Module]:
    """Return the parts to shard and to gather as a whole: a residual block, a stage of the U-Net, a head."""
    if isinstance(body, UNet):
        return [*body.down, *body.up]
    found: list[nn.Module] = []
    for child in body.get_submodule("backbone").children():
        # a ResNet's layers are rows of blocks, a MobileNet is one row
        found += child.children() if type(child) is nn.Sequential else [child]
    heads = [body.get_submodule("classifier"), getattr(body, "aux_classifier", None)]
    found += [head for head in heads if head is not None]
    return [part for part in found if any(True for _ in part.parameters())]


def count_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the floating-point operations of forward and backward for one picture (C, H, W), on the meta device."""
    with FlopCounterMode(display=False) as counter:
        # two, since batch norm cannot be trained on one
        found = network(torch.zeros(2, *shape, dtype=torch.uint8))
        outputs = [found] if isinstance(found, Tensor) else list(found.values())
        torch.stack([output.sum() for output in outputs]).sum().backward()
    return counter.get_total_flops() // 2


def load_pretrained(network: PixelNetwork, name: str, weights: str, channels: int) -> None:
    """Copy pretrained weights into a network; what has other classes keeps its random ones.

    Args:
        network: What `build_body` made, behind its pixels' normalization, which becomes that of the weights.
        name: The body's name.
        weights: DEFAULT, the name of torchvision's weights, or a file.
        channels: Channels of the pictures.

    Raises:
        InputError: there are no such weights, or they are another network's.
    """
    state = _state(network, name, weights, channels)
    _load(network.body, state, weights, name)


def load_backbone(network: PixelNetwork, name: str, weights: str, channels: int) -> None:
    """Copy a classifier's weights into the backbone of a network of torchvision's.

    Args:
        network: What `build_body` made, behind its pixels' normalization, which becomes that of the weights.
        name: The body's name, which ends in the classifier's.
        weights: DEFAULT, the name of torchvision's weights of the classifier, or a file.
        channels: Channels of the pictures.

    Raises:
        InputError: the network has no such backbone, there are no such weights, or they are another network's.
    """
    if name == UNET:
        raise InputError("backbone_weights do not go with unet, which has no backbone; set weights to a U-Net's file")
    backbone = name.partition("_")[2]
    state = _state(network, backbone, weights, channels)
    # a MobileNet's backbone is what the classifier calls its features
    state = {f"{_BACKBONE}{key.removeprefix('features.')}": value for key, value in state.items()}
    _load(network.body, state, weights, name, only=_BACKBONE)


def _state(network: PixelNetwork, name: str, weights: str, channels: int) -> dict[str, Tensor]:
    if Path(weights).suffix in WEIGHT_FILES:
        return {bare_name(key): value for key, value in read_weights(weights).items()}
    if name == UNET:
        raise InputError(f"there are no weights {weights!r} for unet; name a file, or null for random weights")
    return fetch_weights(network, name, weights, channels)


def _load(body: nn.Module, state: dict[str, Tensor], weights: str, name: str, only: str = "") -> None:
    first, convolution = first_convolution(body)
    key = f"{first}.weight"
    if key in state and state[key].shape[1] != convolution.in_channels:
        state[key] = spread_channels(state[key], convolution.in_channels)
    missing = load_weights(body, state, weights)
    heads = {id(p) for layer in output_layers(body) for p in layer.parameters()}
    parameters = dict(body.named_parameters())
    other = [key for key in missing if key.startswith(only) and id(parameters[key]) not in heads]
    # of a file without it the auxiliary head is made anew, as if its classes were others
    other = [key for key in other if not key.startswith("aux_classifier.")]
    if other:
        raise InputError(
            f"{weights} has no weights of the right shape for {len(other)} parameters of {name}, the first {other[0]}; "
            f"name weights of {name}, or the network that they belong to"
        )
