"""Classifiers by name, for any number of channels and classes: torchvision's registry and the small ones of our own."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models.vision_transformer import interpolate_embeddings

from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.modules.cnn.registry import check_network, load_weights, read_weights
from lightning_bigmodels.networks.cnn import SmallCNN, SmallResNet
from lightning_bigmodels.networks.pixels import PixelNetwork, statistics

OWN: dict[str, Callable[..., nn.Module]] = {"small_cnn": SmallCNN, "small_resnet": SmallResNet}
WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".safetensors")
# their weights were trained on pixels in [-1, 1], which they make of ImageNet's normalization
_TRANSFORM_INPUT = ("googlenet", "inception_v3")
_VISION_TRANSFORMER = "vit_"


def fixed_size(name: str) -> bool:
    """Return whether a network takes pictures of the one size that it was built for."""
    return name in ("small_cnn", "maxvit_t") or name.startswith(_VISION_TRANSFORMER)


def build_body(name: str, num_classes: int, channels: int, image_size: int, options: Mapping[str, Any]) -> nn.Module:
    """Return a network from (B, channels, H, W) to logits (B, num_classes), with random weights.

    Args:
        name: One of torchvision's, small_cnn or small_resnet.
        num_classes: Logits.
        channels: Channels of the pictures.
        image_size: Height and width, for the networks that are built for one.
        options: More arguments of the network's builder.

    Raises:
        InputError: the name is unknown, an option is none of the builder's, or the size does not fit.
    """
    check_network("classification", name, tuple(OWN))
    arguments: dict[str, Any] = {"num_classes": num_classes, **options}
    if name in OWN:
        size = {"image_size": image_size} if fixed_size(name) else {}
        return _call(OWN[name], name, {"channels": channels, **size, **arguments})
    if name in _TRANSFORM_INPUT:
        # None would warn that random weights take scipy's time, as they did
        arguments = {"init_weights": True, "aux_logits": True, "transform_input": channels == 3, **arguments}
    if name.startswith(_VISION_TRANSFORMER):
        patch = int(name.rsplit("_", 1)[1])
        if image_size % patch:
            raise InputError(f"{name} cuts pictures into patches of {patch} pixels; set image_size to a multiple of it")
        arguments["image_size"] = image_size
    if name == "maxvit_t":
        arguments["input_size"] = (image_size, image_size)
    body = _call(torchvision.models.get_model_builder(name), name, arguments)
    if channels != 3:
        replace_first_convolution(body, channels)
    return body


class _WidthsOnCPU(TorchFunctionMode):
    """Lets RegNet, which computes its widths with tensors and reads them, be built on the meta device."""

    _MAKE_TENSORS = (torch.arange, torch.tensor)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **{**({"device": "cpu"} if func in self._MAKE_TENSORS else {}), **(kwargs or {})})


def _call(builder: Callable[..., nn.Module], name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        with _WidthsOnCPU() if name.startswith("regnet") else nullcontext():
            return builder(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be built: {error}; correct model.network_args or model.image_size") from error


def first_convolution(body: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return name and module of the convolution that sees the pictures."""
    return next((name, module) for name, module in body.named_modules() if isinstance(module, nn.Conv2d))


def replace_first_convolution(body: nn.Module, channels: int) -> None:
    """Put a convolution for another number of channels in the place of the one that sees the pictures."""
    name, old = first_convolution(body)
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    parent, _, last = name.rpartition(".")
    setattr(body.get_submodule(parent), last, new)


def output_layers(body: nn.Module) -> list[nn.Module]:
    """Return the layers that make the logits: the last linear one or convolution, and those of auxiliary heads."""
    makes = (nn.Linear, nn.Conv2d)
    main = [
        module
        for name, module in body.named_modules()
        if isinstance(module, makes) and not name.lower().startswith("aux")
    ]
    auxiliary = [
        [module for module in child.modules() if isinstance(module, makes)][-1]
        for name, child in body.named_children()
        if name.lower().startswith("aux")
    ]
    return [main[-1], *auxiliary]


def repeated_blocks(body: nn.Module) -> list[nn.Module]:
    """Return the outermost layers of a kind that torchvision's file of the network defines and the network repeats."""
    candidates = [
        module
        for module in body.modules()
        if _own_kind(module) is not None
        and module is not body
        and not isinstance(module, nn.Sequential)
        and next(module.parameters(), None) is not None
    ]
    kinds = Counter(_own_kind(module) for module in candidates)
    heads = {id(layer) for layer in output_layers(body)}
    blocks: list[nn.Module] = []
    inside: set[int] = set()
    for module in candidates:
        own = {id(child) for child in module.modules()}
        if kinds[_own_kind(module)] > 1 and id(module) not in inside and not own & heads:
            blocks.append(module)
            inside |= own
    return blocks


def _own_kind(module: nn.Module) -> type | None:
    """Return the class that torchvision's file of a network defines, also where FSDP2 has put its own on top."""
    return next((kind for kind in type(module).__mro__ if kind.__module__.startswith("torchvision.models.")), None)


def undecayed_tensors(body: nn.Module) -> set[nn.Parameter]:
    """Return tensors of positions, tokens and scales, which no recipe decays although they have several axes."""
    names = ("class_token", "pos_embedding", "relative_position_bias_table", "layer_scale", "logit_scale")
    return {parameter for name, parameter in body.named_parameters() if name.rpartition(".")[2] in names}


def load_pretrained(network: PixelNetwork, name: str, weights: str, channels: int) -> None:
    """Copy pretrained weights into a network; what has other classes keeps its random ones.

    The first convolution's weights for another number of channels are those of red, green and blue, repeated, such that
    their sum over channels is what it was.

    Args:
        network: What `build_body` made, behind its pixels' normalization, which becomes that of the weights.
        name: The body's name.
        weights: DEFAULT, the name of torchvision's weights, or a file (`.pth`, `.pt`, `.ckpt`, `.safetensors`).
        channels: Channels of the pictures.

    Raises:
        InputError: there are no such weights, or they are another network's.
    """
    body = network.body
    if Path(weights).suffix in WEIGHT_FILES:
        state = read_weights(weights)
        state = {bare_name(key): value for key, value in state.items()}
    else:
        state = fetch_weights(network, name, weights, channels)
    if name.startswith(_VISION_TRANSFORMER) and "encoder.pos_embedding" in state:
        assert isinstance(body.image_size, int)
        assert isinstance(body.patch_size, int)
        state = interpolate_embeddings(body.image_size, body.patch_size, dict(state))
    key = f"{first_convolution(body)[0]}.weight"
    if key in state and state[key].shape[1] != channels:
        state[key] = spread_channels(state[key], channels)
    missing = load_weights(body, state, weights)
    heads = {id(p) for layer in output_layers(body) for p in layer.parameters()}
    parameters = dict(body.named_parameters())
    other = [parameter for parameter in missing if id(parameters[parameter]) not in heads]
    if other:
        raise InputError(
            f"{weights} has no weights of the right shape for {len(other)} parameters of {name}, the first {other[0]}; "
            f"name weights of {name}, or the network that they belong to"
        )


def spread_channels(weight: Tensor, channels: int) -> Tensor:
    """Return (O, channels, kh, kw) of (O, C, kh, kw): its channels repeated, with the same sum over them."""
    repeats = math.ceil(channels / weight.shape[1])
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, repeats, 1, 1)[:, :channels] * (weight.shape[1] / channels)


def bare_name(key: str) -> str:
    """Return a parameter's name without what trainers and this package put before it."""
    for prefix in ("module.", "network.", "body."):
        key = key.removeprefix(prefix)
    return key


def fetch_weights(network: PixelNetwork, name: str, weights: str, channels: int) -> dict[str, Tensor]:
    """Return the tensors of torchvision's weights by name, and give the network their normalization of pixels.

    Raises:
        InputError: there are none of this name, or they cannot be fetched.
    """
    if name in OWN:
        raise InputError(f"there are no weights {weights!r} for {name}; name a file, or null for random weights")
    known = torchvision.models.get_model_weights(name)
    names = ["DEFAULT", *(entry.name for entry in known)]
    wanted = weights.rpartition(".")[2]
    if wanted not in names:
        raise InputError(
            f"{name} has no weights {weights!r}{near(wanted, names)}; or name a file that ends in "
            f"{', '.join(WEIGHT_FILES)}"
        )
    entry = known[wanted]
    try:
        state: dict[str, Tensor] = dict(entry.get_state_dict(progress=False, check_hash=True))
    except OSError as error:
        raise InputError(
            f"the weights {entry} cannot be fetched ({error}); fetch {entry.url} elsewhere and name the file"
        ) from error
    preset = entry.transforms()
    if channels == 3:
        mean, std = statistics(3, preset.mean, preset.std)
        network.mean.copy_(torch.tensor(mean).view(-1, 1, 1))
        network.std.copy_(torch.tensor(std).view(-1, 1, 1))
    return state
