"""Networks of diffusers that take noise out of pictures: by class and configuration, or with weights."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bigmodels.errors import InputError, near, require
from lightning_bigmodels.modules.diffusion.attention import attend_by_hand
from lightning_bigmodels.networks.pixels import as_weights

ARCHITECTURES = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}
"""For each class of diffusers the folder that it has in a pipeline. `TextToImage` is for those that want texts."""

# what arguments of the model say
_SAID_BY = {
    "sample_size": "image_size",
    "in_channels": "channels",
    "out_channels": "channels",
    "num_class_embeds": "num_classes",
    "class_embed_type": "num_classes",
    "num_embeds_ada_norm": "num_classes",
}


def check_denoiser(architecture: str, config: dict[str, Any], image_shape: tuple[int, int, int]) -> None:
    """Refuse an architecture or a key that diffusers does not have, or a size that the network cannot make.

    Raises:
        InputError: with the near match, or the next size that it can make.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"architecture {architecture!r} is none of diffusers' that make pictures by themselves or by class"
            f"{near(architecture, ARCHITECTURES)}"
        )
    known = inspect.signature(_class_of(architecture).__init__).parameters.keys() - {"self"}
    for key in config:
        if key in _SAID_BY:
            raise InputError(f"model.config.{key} is said by model.{_SAID_BY[key]}; set that, and remove it")
        if key not in known:
            raise InputError(
                f"model.config.{key} is not in the configuration of {architecture}{near(key, known - _SAID_BY.keys())}"
            )
    check_size(architecture, config, image_shape)


def check_size(architecture: str, config: dict[str, Any], image_shape: tuple[int, int, int]) -> None:
    """Refuse a size that the network cannot make.

    Raises:
        InputError: with the next size that it can make.
    """
    defaults = inspect.signature(_class_of(architecture).__init__).parameters
    _, height, width = image_shape
    if architecture == "UNet2DModel":
        levels = len(config.get("block_out_channels", defaults["block_out_channels"].default))
        multiple = 2 ** (levels - 1)
        reason = f"a UNet2DModel of {levels} levels makes multiples of {multiple}"
    else:
        multiple = int(config.get("patch_size", defaults["patch_size"].default))
        reason = f"a DiTTransformer2DModel makes squares of multiples of its patch_size, {multiple}"
        if height != width:
            side = math.ceil(max(height, width) / multiple) * multiple
            raise InputError(f"image_size is {height} x {width}, and {reason}; the next that it can make is {side}")
    if height % multiple or width % multiple:
        following = [math.ceil(length / multiple) * multiple for length in (height, width)]
        size = following[0] if following[0] == following[1] else following
        raise InputError(
            f"image_size is {height if height == width else [height, width]}, and {reason}; the next that it can make "
            f"is {size}: set model.image_size and data.image_size to it"
        )


def build_denoiser(
    architecture: str,
    config: dict[str, Any],
    pretrained: str | None,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> nn.Module:
    """Return a network with random weights, or with those of a folder or hub name.

    Args:
        architecture: A class of diffusers.
        config: Its configuration, but for what the other arguments say.
        pretrained: A folder or hub name, of the network or of a pipeline with it.
        image_shape: Channels, height and width of the pictures.
        num_classes: Classes, besides that of no class; 0: none.

    Raises:
        InputError: the configuration's values do not fit, or the weights do not.
    """
    cls = _class_of(architecture)
    if pretrained is not None:
        network = _pretrained(cls, architecture, pretrained, image_shape, num_classes)
    else:
        channels, height, width = image_shape
        own: dict[str, Any] = {"in_channels": channels, "out_channels": channels}
        own["sample_size"] = height if height == width else (height, width)
        if architecture == "DiTTransformer2DModel":
            own["num_embeds_ada_norm"] = max(1, num_classes)
        elif num_classes:
            own["num_class_embeds"] = num_classes + 1
        try:
            network = cls(**config, **own)
        except (ValueError, TypeError, KeyError, NotImplementedError, ZeroDivisionError, RuntimeError) as error:
            raise InputError(f"config of {architecture}: {_line(error)}; correct model.config") from error
    module: Any
    for module in network.modules():
        if hasattr(module, "dropout_prob") and hasattr(module, "token_drop"):
            # a DiT drops labels by itself, by numbers that belong to the process and not to the example
            module.dropout_prob = 0.0
    return attend_by_hand(network).train()


def denoise(network: nn.Module, noisy: Tensor, times: Tensor, labels: Tensor | None) -> Tensor:
    """Return a network's prediction (B, C, H, W).

    Args:
        network: What `build_denoiser` returned, or a wrapper of it.
        noisy: (B, C, H, W).
        times: (B,).
        labels: (B,) int64 classes, of which the number of classes is none of them; None: a network without.
    """
    if labels is None and hasattr(network, "transformer_blocks"):  # a DiT, which is always told a class
        labels = torch.zeros(len(noisy), dtype=torch.int64, device=noisy.device)
    made: Tensor = network(as_weights(noisy, network), timestep=times, class_labels=labels, return_dict=False)[0]
    # a DiT of the paper says variances too
    return made[:, : noisy.shape[1]]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of a network, what is called apart from its layer first."""
    layers: Any = network
    if hasattr(network, "transformer_blocks"):
        # its end asks the first block's embedding once more
        return [layers.transformer_blocks[0].norm1.emb, *layers.transformer_blocks]
    middle = [] if layers.mid_block is None else [layers.mid_block]
    return [*layers.down_blocks, *middle, *layers.up_blocks]


def config_of(network: nn.Module) -> dict[str, Any]:
    """Return a network's configuration as plain values, as `build_denoiser` takes it."""
    config: Any = network.config
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if not key.startswith("_") and key not in _SAID_BY
    }


def _class_of(architecture: str) -> Any:
    return getattr(require("diffusers", extra="generative"), architecture)


def _pretrained(
    cls: Any, architecture: str, source: str, image_shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    failure: Exception | None = None
    for subfolder in (None, ARCHITECTURES[architecture]):
        try:
            config = cls.load_config(source, subfolder=subfolder)
        except (OSError, ValueError) as error:
            failure = failure or error
            continue
        _check_pretrained(config, architecture, source, image_shape, num_classes)
        try:
            if torch.empty(0).device.type == "meta":
                network = cls.from_config(config)
            else:
                network = cls.from_pretrained(source, subfolder=subfolder, low_cpu_mem_usage=False)
        except (OSError, ValueError) as error:
            raise _unreadable(source, error) from error
        height, width = image_shape[1:]
        network.register_to_config(sample_size=height if height == width else (height, width))
        return network
    assert failure is not None
    raise _unreadable(source, failure) from failure


def _check_pretrained(
    config: dict[str, Any], architecture: str, source: str, image_shape: tuple[int, int, int], num_classes: int
) -> None:
    """Refuse weights that the arguments of the model describe otherwise."""
    name = config.get("_class_name", architecture)
    if name != architecture:
        raise InputError(f"{source} holds a {name}; set model.architecture to it")
    if config["in_channels"] != image_shape[0]:
        raise InputError(f"{source} has {config['in_channels']} channels; set model.channels and data.channels to it")
    if architecture == "UNet2DModel":
        known = max(0, (config.get("num_class_embeds") or 0) - 1)
    else:
        known = config["num_embeds_ada_norm"]
        if [config["sample_size"]] * 2 != list(image_shape[1:]):
            raise InputError(f"{source} makes pictures of {config['sample_size']}; set model.image_size to it")
    if known != num_classes and (known > 1 or num_classes):
        raise InputError(f"{source} knows {known} classes and num_classes is {num_classes}; set it to {known}")
    check_size(architecture, {key: value for key, value in config.items() if value is not None}, image_shape)


def _unreadable(source: str, error: Exception) -> InputError:
    return InputError(
        f"pretrained {source!r} cannot be read: {_line(error)}; name a folder of diffusers with config.json and "
        f"weights, or a hub name"
    )


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).strip().rstrip(".")
