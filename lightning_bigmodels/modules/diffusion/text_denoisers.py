"""Networks that make pictures of texts: a denoiser with cross attention, a text encoder, an autoencoder."""

import inspect
import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_bigmodels.errors import InputError, near, require
from lightning_bigmodels.modules.diffusion.attention import attend_by_hand
from lightning_bigmodels.modules.diffusion.denoisers import blocks_of
from lightning_bigmodels.modules.diffusion.text_encoders import encoder_blocks
from lightning_bigmodels.networks.pixels import as_weights

ARCHITECTURES = {"UNet2DConditionModel": "unet", "PixArtTransformer2DModel": "transformer"}
"""For each class of diffusers the folder that it has in a pipeline."""

# what arguments of the model and the text encoder say
_SAID_BY = {
    "sample_size": "image_size",
    "in_channels": "channels",
    "out_channels": "channels",
    "cross_attention_dim": "text_encoder_config",
    "caption_channels": "text_encoder_config",
}
LORA_KEYS = ("rank", "alpha", "target_modules")
_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class TextPictureNetwork(nn.Module):
    """All that pictures of texts are made with. Each part is asked through `forward`, so that it can be sharded.

    Args:
        denoiser: A UNet2DConditionModel or PixArtTransformer2DModel.
        text_encoder: Of transformers.
        autoencoder: An AutoencoderKL, in whose latents the denoiser works; None: it works on pixels.
        train_text_encoder: Whether the text encoder learns too.
        channels_last: Whether the denoiser's examples lie channel by channel in memory's last axis.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        text_encoder: nn.Module,
        autoencoder: nn.Module | None,
        train_text_encoder: bool,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.text_encoder = text_encoder
        self.autoencoder = autoencoder
        self.train_text_encoder = train_text_encoder
        self.channels_last = channels_last
        self.text_encoder.requires_grad_(train_text_encoder)
        if autoencoder is not None:
            autoencoder.requires_grad_(False)
        self.train()

    @override
    def train(self, mode: bool = True) -> "TextPictureNetwork":
        """Let the parts learn that do."""
        super().train(mode)
        self.text_encoder.train(mode and self.train_text_encoder)
        if self.autoencoder is not None:
            self.autoencoder.eval()
        return self

    def forward(self, part: str, *inputs: Tensor) -> Tensor:
        """Return what a part makes.

        Args:
            part: `told`: the prediction (B, C, h, w) of noisy examples, times, ids and mask; `states`: the text
                encoder's (B, T, D) of ids and mask; `denoise`: the prediction of noisy examples, times, states and
                mask; `encode`: `moments` (B, 2 C, h, w) of pixels in [-1, 1]; `decode`: pixels of latents.
            inputs: What it takes.
        """
        if part == "told":
            noisy, times, ids, mask = inputs
            return self._denoise(noisy, times, self._states(ids, mask), mask)
        if part == "states":
            return self._states(*inputs)
        if part == "denoise":
            return self._denoise(*inputs)
        assert self.autoencoder is not None
        return moments(self.autoencoder, *inputs) if part == "encode" else _decode(self.autoencoder, *inputs)

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        told = {"attention_mask": mask} if self._masks else {}
        with nullcontext() if self.train_text_encoder else torch.no_grad():
            return self.text_encoder(input_ids=ids, **told)[0]

    def _denoise(self, noisy: Tensor, times: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        noisy = as_weights(noisy, self.denoiser)
        if self.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        told: dict[str, Any] = {"encoder_attention_mask": mask} if self._masks else {}
        if hasattr(self.denoiser, "adaln_single"):
            told["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        made: Tensor = self.denoiser(noisy, timestep=times, encoder_hidden_states=states, return_dict=False, **told)[0]
        # a transformer of the paper says variances too
        return made[:, : noisy.shape[1]]

    @property
    def _masks(self) -> bool:
        # as their pipelines do: a U-Net looks at what fills a caption up too, a transformer does not
        return hasattr(self.denoiser, "adaln_single")

    def blocks(self) -> list[nn.Module]:
        """Return the repeated layers."""
        own: Any = self.denoiser
        layers = list(own.transformer_blocks) if self._masks else blocks_of(own)
        return [*layers, *encoder_blocks(self.text_encoder)]


def moments(autoencoder: nn.Module, pixels: Tensor) -> Tensor:
    """Return mean and logarithm of the variance of the latents (B, 2 C, h, w) of pixels (B, 3, H, W) in [-1, 1].

    They have float16's precision, in which they are kept: it makes no difference whether they are.
    """
    vae: Any = autoencoder
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        return vae.encode(as_weights(pixels, vae)).latent_dist.parameters.half().float()


def draw_latents(moments: Tensor, noise: Tensor, scale: float, shift: float) -> Tensor:
    """Return latents (B, C, h, w) of about unit variance, drawn from their distribution.

    Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.3 and G.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    # as diffusers' distribution has it
    latents = mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise
    return (latents - shift) * scale


def _decode(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    vae: Any = autoencoder
    scale, shift = scaling(vae)
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        return vae.decode(as_weights(latents / scale + shift, vae), return_dict=False)[0]


def scaling(autoencoder: nn.Module) -> tuple[float, float]:
    """Return the factor on latents, and what is taken off before."""
    config: Any = autoencoder.config
    return float(config.scaling_factor), float(config.shift_factor or 0.0)


# ---- from configurations to networks


def check_text_denoiser(architecture: str, config: dict[str, Any]) -> None:
    """Refuse an architecture or a key that diffusers does not have.

    Raises:
        InputError: with the near match.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"architecture {architecture!r} is none of diffusers' that make pictures of texts"
            f"{near(architecture, ARCHITECTURES)}"
        )
    check_keys("config", architecture, config, _SAID_BY)


def check_keys(argument: str, architecture: str, config: dict[str, Any], said: Mapping[str, str]) -> None:
    """Refuse keys that a class of diffusers does not have, or that other arguments say.

    Raises:
        InputError: with the near match.
    """
    known = inspect.signature(_class_of(architecture).__init__).parameters.keys() - {"self"}
    for key in config:
        if key in said:
            raise InputError(f"model.{argument}.{key} is said by model.{said[key]}; set that, and remove it")
        if key not in known:
            raise InputError(
                f"model.{argument}.{key} is not in the configuration of {architecture}{near(key, known - said.keys())}"
            )


def size_multiple(architecture: str, config: dict[str, Any], factor: int) -> int:
    """Return what heights and widths in pixels are multiples of.

    Args:
        architecture: A class of diffusers.
        config: Its configuration.
        factor: Pixels of a latent's side.
    """
    defaults = inspect.signature(_class_of(architecture).__init__).parameters
    key = "block_out_channels" if architecture == "UNet2DConditionModel" else "patch_size"
    value = config.get(key, defaults[key].default)
    return factor * (2 ** (len(value) - 1) if key == "block_out_channels" else int(value))


def check_text_size(architecture: str, size: tuple[int, int], multiple: int) -> None:
    """Refuse a size that the network cannot make.

    Raises:
        InputError: with the next size that it can make.
    """
    if size[0] % multiple or size[1] % multiple:
        following = [math.ceil(length / multiple) * multiple for length in size]
        raise InputError(
            f"image_size is {list(size)}, and this {architecture} makes multiples of {multiple}; the next that it can "
            f"make is {following}: set model.image_size and data.image_size to it"
        )


def build_text_denoiser(
    architecture: str,
    config: dict[str, Any],
    pretrained: str | None,
    shape: tuple[int, int, int],
    width: int,
    lora: dict[str, Any] | None,
) -> nn.Module:
    """Return a denoiser with random weights, or with those of a pipeline's folder or hub name.

    Args:
        architecture: A class of diffusers.
        config: Its configuration, but for what the other arguments say.
        pretrained: A pipeline.
        shape: Channels, height and width of an example.
        width: Of the text encoder's states.
        lora: `rank`, `alpha` and `target_modules` of low-rank changes, which alone learn; None: everything does.

    Raises:
        InputError: the configuration's values do not fit, or the weights do not.
    """
    cls = _class_of(architecture)
    if pretrained is not None:
        network = load_part(cls, pretrained, ARCHITECTURES[architecture])
        if network.config["in_channels"] != shape[0]:
            raise InputError(f"{pretrained} has {network.config['in_channels']} channels and the pictures {shape[0]}")
        found = network.config.get("caption_channels") or network.config["cross_attention_dim"]
        if found != width:
            raise InputError(f"{pretrained} takes texts of width {found}, and the text encoder makes {width}")
    else:
        channels, *sides = shape
        own: dict[str, Any] = {"in_channels": channels, "out_channels": channels, "sample_size": max(sides)}
        if architecture == "UNet2DConditionModel":
            own["cross_attention_dim"] = width
        else:
            own["caption_channels"] = width
            heads, size = (config.get(key, default) for key, default in _HEADS.items())
            own["cross_attention_dim"] = heads * size
            config = {"use_additional_conditions": False, "num_embeds_ada_norm": 1000, **config}
        try:
            network = cls(**config, **own)
        except (ValueError, TypeError, KeyError, NotImplementedError, ZeroDivisionError, RuntimeError) as error:
            raise InputError(f"config of {architecture}: {_line(error)}; correct model.config") from error
    if lora is not None:
        _add_lora(network, lora)
    return attend_by_hand(network).train()


_HEADS = {"num_attention_heads": 16, "attention_head_dim": 72}


def check_lora(lora: dict[str, Any]) -> None:
    """Refuse unknown keys of `lora`, or values out of their range.

    Raises:
        InputError: the message names the key.
    """
    for key in lora:
        if key not in LORA_KEYS:
            raise InputError(f"model.lora.{key} is unknown{near(key, LORA_KEYS)}")
    for key in ("rank", "alpha"):
        if lora.get(key, 1) <= 0:
            raise InputError(f"model.lora.{key} is {lora[key]}; it must be above 0")


def _add_lora(network: Any, lora: dict[str, Any]) -> None:
    """Freeze a denoiser, and add low-rank changes to some of its layers.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.
    """
    peft = require("peft", extra="peft")
    rank = lora.get("rank", 8)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=lora.get("alpha", rank),
        target_modules=lora.get("target_modules", _LORA_TARGETS),
        init_lora_weights="gaussian",
    )
    network.requires_grad_(False)
    try:
        network.add_adapter(config)
    except ValueError as error:
        raise InputError(f"model.lora.target_modules: {_line(error)}; name layers such as {_LORA_TARGETS}") from error


def build_autoencoder(config: dict[str, Any], source: str | None, subfolder: str | None) -> nn.Module:
    """Return an AutoencoderKL, with the weights of a folder or hub name where there is one.

    Raises:
        InputError: it cannot be read, or the configuration's values do not fit.
    """
    cls = _class_of("AutoencoderKL")
    if source is not None and not (config and torch.empty(0).device.type == "meta"):
        return load_part(cls, source, subfolder).eval()
    try:
        return cls(**config).eval()
    except (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise InputError(f"autoencoder_config: {_line(error)}; correct model.autoencoder_config") from error


def load_part(cls: Any, source: str, subfolder: str | None) -> Any:
    """Return a network of a folder or hub name; on meta without its weights.

    Raises:
        InputError: it cannot be read.
    """
    try:
        if torch.empty(0).device.type == "meta":
            return cls.from_config(cls.load_config(source, subfolder=subfolder))
        return cls.from_pretrained(source, subfolder=subfolder, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        place = source if subfolder is None else f"{source}/{subfolder}"
        raise InputError(
            f"{place} cannot be read as {cls.__name__}: {_line(error)}; name a folder of diffusers, or a hub name"
        ) from error


def part_config(cls_name: str, source: str, subfolder: str | None) -> dict[str, Any]:
    """Return the configuration of a network, or of a scheduler, of a folder or hub name.

    Raises:
        InputError: there is none.
    """
    path = Path(source, *([subfolder] if subfolder else []), "scheduler_config.json")
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    try:
        return dict(_class_of(cls_name).load_config(source, subfolder=subfolder))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source} has no {subfolder or cls_name}: {_line(error)}; name a pipeline's folder"
        ) from error


def plain_config(network: nn.Module, said: bool = True) -> dict[str, Any]:
    """Return a network's configuration as plain values.

    Args:
        network: Of diffusers.
        said: Whether to leave out what other arguments of the model say.
    """
    config: Any = network.config
    defaults = inspect.signature(type(network).__init__).parameters
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if key in defaults and not (said and key in _SAID_BY)
    }


def _class_of(name: str) -> Any:
    return getattr(require("diffusers", extra="generative"), name)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).strip().rstrip(".")
