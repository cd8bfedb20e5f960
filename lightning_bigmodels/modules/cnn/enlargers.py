"""Networks that enlarge, by name: our EDSR and transformers' Swin2SR, from scratch or with weights."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.modules.cnn.registry import load_weights, read_weights
from lightning_bigmodels.networks.edsr import EDSR, MEAN, SCALES, STD, Enlarger

ARCHITECTURES = {"edsr": SCALES, "swin2sr": (2, 3, 4, 8)}
"""For each architecture the scales that it has."""

_PREFIX = "network."


class Swin2SRBody(nn.Module):
    """transformers' Swin2SR as a body from pixels to pixels, for pictures of any size.

    Args:
        network: A `Swin2SRForImageSuperResolution`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        config: Any = network.config
        self.window = int(config.window_size)
        self.scale = int(config.upscale)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 3, s H, s W) of (B, 3, H, W), both in [0, 1]."""
        height, width = images.shape[-2:]
        # the library reflects, which fails where a picture is smaller than what is missing to a whole window
        missing = (0, -width % self.window, 0, -height % self.window)
        large = self.network(F.pad(images, missing, mode="replicate")).reconstruction
        return large[..., : height * self.scale, : width * self.scale]


def check_enlarger(architecture: str, scale: int, config: dict[str, Any]) -> None:
    """Refuse an architecture, a scale or a key of the configuration that is not known.

    Raises:
        InputError: with the near match.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(f"no network that enlarges is named {architecture!r}{near(architecture, ARCHITECTURES)}")
    scales = ARCHITECTURES[architecture]
    if scale not in scales:
        others = [name for name, known in ARCHITECTURES.items() if scale in known]
        more = f", or model.architecture to {others[0]}" if others else ""
        raise InputError(
            f"scale is {scale}, and {architecture} enlarges by {_or(scales)}; set model.scale to one of them{more}"
        )
    known = _known_keys(architecture)
    for key in config:
        if key not in known:
            raise InputError(f"model.config.{key} is not in the configuration of {architecture}{near(key, known)}")


def build_enlarger(architecture: str, scale: int, config: dict[str, Any], pretrained: str | None) -> Enlarger:
    """Return a network with random weights, or with those of a file or folder.

    Raises:
        InputError: the configuration's values do not fit, or the weights do not.
    """
    if architecture == "edsr":
        return _build_edsr(scale, config, pretrained)
    return _build_swin2sr(scale, config, pretrained)


def swin2sr_config(network: Enlarger) -> dict[str, Any]:
    """Return the configuration of a Swin2SR, as `config` takes it."""
    body = network.body
    assert isinstance(body, Swin2SRBody)
    values: dict[str, Any] = body.network.config.to_diff_dict()  # type: ignore[union-attr,operator]
    return {key: value for key, value in values.items() if key in _known_keys("swin2sr")}


def _build_edsr(scale: int, config: dict[str, Any], pretrained: str | None) -> Enlarger:
    for key in ("num_blocks", "num_features"):
        if int(config.get(key, 1)) < 1:
            raise InputError(f"model.config.{key} is {config[key]}; it must be 1 or more")
    network = Enlarger(EDSR(scale, **config), MEAN, STD)
    if pretrained is not None:
        tensors = {name.removeprefix(_PREFIX): value for name, value in read_weights(pretrained).items()}
        # another scale has another upsampler, which begins at random (Lim et al. 2017, section 3.3)
        missing = load_weights(network, tensors, pretrained)
        others = [name for name in missing if not name.startswith("body.upsampler.")]
        if others:
            raise InputError(
                f"{pretrained} has no {others[0]} of this shape; describe the network of its run in model.config"
            )
    return network


def _build_swin2sr(scale: int, config: dict[str, Any], pretrained: str | None) -> Enlarger:
    # seconds, which EDSR need not wait for
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    if pretrained is None:
        try:
            network = Swin2SRForImageSuperResolution(Swin2SRConfig(**{"upscale": scale, **config}))
        except Exception as error:  # transformers raises its own, unrelated classes for a value of the wrong kind
            last = str(error).strip().splitlines()[-1].strip().rstrip(".")
            raise InputError(f"config of swin2sr: {last}; correct model.config") from error
    else:
        try:
            network = Swin2SRForImageSuperResolution.from_pretrained(
                pretrained, dtype=torch.get_default_dtype(), **config
            )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0].rstrip(".")
            raise InputError(
                f"pretrained {pretrained!r} cannot be read: {first}; name a folder of a Swin2SR, or a hub name"
            ) from error
        if network.config.upscale != scale:
            raise InputError(
                f"the weights of {pretrained!r} enlarge by {network.config.upscale}; set model.scale to that"
            )
        network.train()
    # the library subtracts and adds a mean itself
    return Enlarger(Swin2SRBody(network), (0.0,) * 3, (1.0,) * 3)


def _known_keys(architecture: str) -> set[str]:
    if architecture == "edsr":
        return set(inspect.signature(EDSR).parameters) - {"scale"}
    from transformers import Swin2SRConfig

    # pictures have three channels, and scale has an argument of its own
    return set(Swin2SRConfig.__dataclass_fields__) - {"model_type", "transformers_version", "upscale", "num_channels"}


def _or(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
