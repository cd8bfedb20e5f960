"""What the parts of a model that makes pictures of texts are: described, checked against each other, and built."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lightning_bigmodels.data.captioned_images import CaptionedImages
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.diffusion.processes import DiscreteProcess, Process
from lightning_bigmodels.modules.diffusion.text_denoisers import (
    ARCHITECTURES,
    TextPictureNetwork,
    build_autoencoder,
    build_text_denoiser,
    check_keys,
    check_lora,
    check_text_denoiser,
    check_text_size,
    part_config,
    size_multiple,
)
from lightning_bigmodels.modules.diffusion.text_encoders import (
    build_encoder,
    check_encoder_config,
    encoder_config,
    find_tokenizer,
    num_positions,
)

_BETAS = ("num_train_timesteps", "beta_start", "beta_end")
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_ROUNDING = 1e-4


@dataclass
class TextParts:
    """The parts as a user describes them; `TextToImage` says what each argument is."""

    architecture: str
    config: dict[str, Any]
    pretrained: str | None
    text_encoder: str | None
    text_encoder_config: dict[str, Any]
    train_text_encoder: bool | None
    autoencoder: str | None
    autoencoder_config: dict[str, Any]
    lora: dict[str, Any] | None
    channels_last: bool
    fold: int

    def check(self) -> None:
        """Refuse what is unknown or excludes each other.

        Raises:
            InputError: the message names the argument.
        """
        check_text_denoiser(self.architecture, self.config)
        if self.pretrained is not None:
            for name in ("config", "text_encoder", "autoencoder"):
                if getattr(self, name):
                    raise InputError(f"{name} is set, and pretrained brings its own; remove one of the two")
        elif self.text_encoder is None and not self.text_encoder_config:
            raise InputError(
                "the model has no text encoder; set text_encoder to a folder or hub name, or text_encoder_config for "
                "one from scratch"
            )
        if self.text_encoder_config:
            check_encoder_config(self.text_encoder_config)
        if self.autoencoder_config:
            check_keys("autoencoder_config", "AutoencoderKL", self.autoencoder_config, {})
        if self.lora is not None:
            check_lora(self.lora)
        if self.fold < 1 or (self.fold > 1 and self.latent):
            raise InputError(f"fold is {self.fold}; set it to 1 or more, in latents to 1")

    def check_weights(self) -> None:
        """Refuse to train where frozen parts would be random numbers.

        Raises:
            InputError: the message names the argument that brings weights.
        """
        if self.pretrained is not None:
            return
        if self.lora is not None:
            raise InputError(
                "lora changes a pretrained pipeline; set model.pretrained to its folder or hub name, or lora to null"
            )
        if self.autoencoder_config and self.autoencoder is None:
            raise InputError(
                "autoencoder_config alone makes latents of random weights; set model.autoencoder to a folder or hub "
                "name with trained ones"
            )
        if self.text_encoder is None and self.train_text_encoder is False:
            raise InputError(
                "a text encoder from scratch has to learn; set train_text_encoder to true, or leave it out"
            )

    def check_data(self, data: CaptionedImages, image_shape: tuple[int, int, int]) -> None:
        """Refuse a size that the network cannot make, and pictures of other sizes or channels than the network's.

        Raises:
            InputError: the message names the argument of the data.
        """
        if data.channels != image_shape[0]:
            raise InputError(
                f"the pictures have {data.channels} channels and the network {image_shape[0]}; set data.channels to it"
            )
        factor = self.fold
        if self.latent:
            config = self.autoencoder_config or part_config("AutoencoderKL", *self.autoencoder_source())  # type: ignore[arg-type]
            factor = _factor(config)
        multiple = size_multiple(self.architecture, self._denoiser_config(), factor)
        # first what it can make: the pictures are then told to be of that size
        check_text_size(self.architecture, image_shape[1:], multiple)
        if len(data.sizes) == 1 and data.sizes[0] != image_shape[1:]:
            raise InputError(
                f"the pictures are {list(data.sizes[0])} and the network makes {list(image_shape[1:])}; set "
                f"data.image_size and model.image_size to the same"
            )
        for size in data.sizes:
            if size[0] % multiple or size[1] % multiple:
                raise InputError(
                    f"pictures of {list(size)} are no multiples of {multiple}, which this {self.architecture} makes; "
                    f"set data.bucket_step to a multiple of {multiple}"
                )

    # ---- where they come from

    @property
    def latent(self) -> bool:
        """Whether pictures are made in latents."""
        return bool(self.pretrained or self.autoencoder or self.autoencoder_config)

    def encoder_source(self) -> tuple[str | None, str]:
        """Return where the text encoder's weights are: a folder or hub name, and the folder in it."""
        if self.pretrained is not None:
            return self.pretrained, "text_encoder"
        return self.text_encoder, ""

    def autoencoder_source(self) -> tuple[str | None, str | None]:
        """Return where the autoencoder's weights are: a folder or hub name, and the folder in it."""
        return (self.pretrained, "vae") if self.pretrained is not None else (self.autoencoder, None)

    def encoder_config(self) -> PreTrainedConfig:
        """Return the text encoder's configuration."""
        return encoder_config(*self.encoder_source(), self.text_encoder_config)

    def find_tokenizer(
        self, given: str | None, max_tokens: int | None, captions: Sequence[str]
    ) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a run that has none yet, which knows how long its rows are.

        Args:
            given: A tokenizer.json, folder or hub name; None: the text encoder's own, or one trained on the captions.
            max_tokens: Tokens of a caption that count; None: the text encoder's positions.
            captions: The captions of training.

        Raises:
            InputError: it cannot be loaded, or has more tokens than the text encoder.
        """
        config = self.encoder_config()
        source, subfolder = self.encoder_source()
        tokenizer = find_tokenizer(given, source, "tokenizer" if subfolder else "", captions, config.vocab_size)
        # what a pipeline of diffusers fills captions up to
        tokenizer.model_max_length = num_positions(config, max_tokens)
        return tokenizer

    def made_up_tokenizer(self, max_tokens: int | None) -> PreTrainedTokenizerBase:
        """Return a tokenizer that knows next to nothing, with rows of the right length, where nothing is to be read."""
        config = self.encoder_config()
        tokenizer = find_tokenizer(None, None, "", ["a picture"], config.vocab_size)
        tokenizer.model_max_length = num_positions(config, max_tokens)
        return tokenizer

    def cached_autoencoder(self) -> nn.Module:
        """Return the autoencoder by itself, as no strategy has split it.

        Raises:
            InputError: pictures are not made in latents.
        """
        source, subfolder = self.autoencoder_source()
        if source is None:
            raise InputError("latent_cache keeps latents, and the model works on pixels; set model.autoencoder")
        return build_autoencoder({}, source, subfolder).requires_grad_(False)

    # ---- the networks

    def build(self, image_shape: tuple[int, int, int], process: Process, contiguous: bool) -> TextPictureNetwork:
        """Return all parts as one network.

        Args:
            image_shape: Channels, height and width of a picture.
            process: How it is trained, which a pretrained one must have been too.
            contiguous: Whether weights must lie as they are, which FSDP2 wants.

        Raises:
            InputError: a part cannot be read or built, or they do not go together.
        """
        if self.pretrained is not None:
            check_process(self.pretrained, process)
        config = self.encoder_config()
        encoder = build_encoder(*self.encoder_source(), config)
        width = int(getattr(config, "hidden_size", 0) or config.d_model)
        autoencoder: Any = None
        if self.latent:
            autoencoder = build_autoencoder(self.autoencoder_config, *self.autoencoder_source())
        if autoencoder is not None and autoencoder.config["in_channels"] != image_shape[0]:
            raise InputError(
                f"the autoencoder takes {autoencoder.config['in_channels']} channels; set model.channels and "
                f"data.channels to it"
            )
        shape = self.example_shape(image_shape, autoencoder)
        denoiser = build_text_denoiser(self.architecture, self.config, self.pretrained, shape, width, self.lora)
        if self.channels_last and not contiguous:
            denoiser = denoiser.to(memory_format=torch.channels_last)
        train = self.train_text_encoder
        if train is None:
            train = self.encoder_source()[0] is None
        return TextPictureNetwork(denoiser, encoder, autoencoder, train, self.channels_last)

    def example_shape(self, image_shape: tuple[int, int, int], autoencoder: Any) -> tuple[int, int, int]:
        """Return channels, height and width of what the denoiser works on.

        Raises:
            InputError: it cannot make this size; the message has the next one.
        """
        factor = self.fold if autoencoder is None else _factor(dict(autoencoder.config))
        multiple = size_multiple(self.architecture, self._denoiser_config(), factor)
        check_text_size(self.architecture, image_shape[1:], multiple)
        folded = image_shape[0] * factor**2
        channels = folded if autoencoder is None else int(autoencoder.config["latent_channels"])
        return channels, image_shape[1] // factor, image_shape[2] // factor

    def _denoiser_config(self) -> dict[str, Any]:
        if self.pretrained is None:
            return self.config
        return part_config(self.architecture, self.pretrained, ARCHITECTURES[self.architecture])


def check_process(source: str, process: Process) -> None:
    """Refuse a process that is not the one a pipeline was trained with.

    Raises:
        InputError: the message says what to set.
    """
    scheduler = part_config("DDPMScheduler", source, "scheduler")
    name = scheduler.get("_class_name", "")
    if "Flow" in name:
        if isinstance(process, DiscreteProcess):
            raise InputError(f"{source} was trained by flow matching; set model.process to flow_matching")
        return
    if not isinstance(process, DiscreteProcess):
        raise InputError(f"{source} was trained with steps of noise; set model.process to ddpm")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != process.prediction:
        raise InputError(f"{source} predicts {prediction}; set model.prediction to it")
    found = _alpha_bars(scheduler)
    if len(found) != len(process.alpha_bars) or any(
        abs(a - b) > _ROUNDING for a, b in zip(found, process.alpha_bars, strict=True)
    ):
        schedule = _SCHEDULES.get(scheduler.get("beta_schedule", "linear"), "linear")
        values = ", ".join(f"{key} {scheduler[key]}" for key in _BETAS if key in scheduler)
        raise InputError(
            f"{source} was trained with another noise; set model.noise_schedule to {schedule}, and {values}"
        )


def _alpha_bars(scheduler: dict[str, Any]) -> list[float]:
    from diffusers import DDPMScheduler

    known = {key: scheduler[key] for key in (*_BETAS, "beta_schedule", "trained_betas") if key in scheduler}
    # on the CPU also where networks are built on meta
    with torch.device("cpu"):
        return DDPMScheduler(**known).alphas_cumprod.tolist()


def _factor(config: dict[str, Any]) -> int:
    """Return the pixels of a latent's side."""
    return 2 ** (len(config.get("block_out_channels", (64,))) - 1)
