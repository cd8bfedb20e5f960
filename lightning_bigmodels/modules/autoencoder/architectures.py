"""Networks of autoencoders by name: our convolutional and dense ones, and diffusers' AutoencoderKL."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_bigmodels.errors import InputError, near, require
from lightning_bigmodels.networks.autoencoder import (
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    DenseDecoder,
    DenseEncoder,
    PictureCoder,
    halved_sizes,
)
from lightning_bigmodels.networks.codebook import VectorQuantizer

Shape = tuple[int, int, int]
AUTOENCODER_KL = "autoencoder_kl"
OWN: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "convolutional": (ConvolutionalEncoder, ConvolutionalDecoder),
    "dense": (DenseEncoder, DenseDecoder),
}
# these are arguments of the module, or follow from them
_OWN_ARGUMENTS = {"image_shape", "num_out", "num_in", "flat"}
_KL_ARGUMENTS = {
    "self": "",
    "in_channels": "channels",
    "out_channels": "channels",
    "latent_channels": "latent_dim",
    "sample_size": "image_size",
}


class Codebook(NamedTuple):
    """How codes are rounded.

    Attributes:
        size: Vectors in the codebook.
        decay: What remains of their moving averages at each step.
    """

    size: int
    decay: float


def picture_shape(image_size: int | Sequence[int], channels: int) -> Shape:
    """Return C, H and W.

    Raises:
        InputError: a number is below 1.
    """
    size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"image_size is {image_size}; give one number of 1 or more, or two: height and width")
    if channels < 1:
        raise InputError(f"channels is {channels}; set it to 1 or more")
    return channels, size[0], size[1]


def check_architecture(architecture: str, config: dict[str, Any], shape: Shape, latent_dim: int) -> None:
    """Refuse a name, a key or a value of the configuration, or a size of pictures that the network cannot have.

    Raises:
        InputError: with the near match, or the next size.
    """
    names = [*OWN, AUTOENCODER_KL]
    if architecture not in names:
        raise InputError(f"no autoencoder is named {architecture!r}{near(architecture, names)}")
    if latent_dim < 1:
        raise InputError(f"latent_dim is {latent_dim}; set it to 1 or more")
    for key in config:
        if key in _KL_ARGUMENTS and architecture == AUTOENCODER_KL:
            raise InputError(f"model.config.{key} follows from model.{_KL_ARGUMENTS[key]}; set that")
        if key not in (known := _known_keys(architecture)):
            raise InputError(f"model.config.{key} is not in the configuration of {architecture}{near(key, known)}")
    if architecture == AUTOENCODER_KL:
        _check_kl(config, shape)
        return
    widths = config.get("widths", (1,))
    if not isinstance(widths, Sequence) or not widths or not all(type(w) is int and w > 0 for w in widths):
        raise InputError(f"model.config.widths is {widths}; give a list of at least one number of 1 or more")
    blocks = config.get("num_blocks", 0)
    if type(blocks) is not int or blocks < 0:
        raise InputError(f"model.config.num_blocks is {blocks}; set it to 0 or more")
    most = max(1, (max(shape[1:]) - 1).bit_length())
    if architecture == "convolutional" and len(widths) > most:
        raise InputError(
            f"model.config.widths halves pictures {len(widths)} times, and image_size {shape[1]} x {shape[2]} is one "
            f"pixel after {most}; give at most {most} widths, or larger pictures: {2 ** (len(widths) - 1) + 1} is the "
            f"next image_size that it can halve so often"
        )


def build_coder(
    architecture: str,
    config: dict[str, Any],
    shape: Shape,
    latent_dim: int,
    numbers: int = 1,
    gaussian: bool = False,
    codebook: Codebook | None = None,
) -> PictureCoder:
    """Return a network with random weights.

    Args:
        architecture: Its name.
        config: The arguments of encoder and decoder, or of diffusers' AutoencoderKL.
        shape: C, H and W.
        latent_dim: D.
        numbers: What the decoder says of each pixel and channel.
        gaussian: Whether codes have a variance.
        codebook: How codes are rounded; they are maps then. None: not at all.
    """
    if architecture == AUTOENCODER_KL:
        return kl_coder(new_kl(config, shape, latent_dim), shape, numbers)
    # the classes differ in what they take: `check_architecture` has seen that config fits
    encoder_class, decoder_class = (cast(Any, kind) for kind in OWN[architecture])
    more = dict(config)
    latent_shape: tuple[int, ...] = (latent_dim,)
    if codebook is not None:
        encoder = encoder_class(shape, latent_dim, flat=False, **more)
        decoder = decoder_class(shape, latent_dim, numbers, flat=False, **more)
        num_halvings = len(decoder.enlarge)
        latent_shape = (latent_dim, *halved_sizes(shape[1:], num_halvings)[-1])
        quantizer = VectorQuantizer(codebook.size, latent_dim, codebook.decay)
        return PictureCoder(encoder, decoder, latent_shape, quantizer=quantizer)
    encoder = encoder_class(shape, 2 * latent_dim if gaussian else latent_dim, **more)
    return PictureCoder(encoder, decoder_class(shape, latent_dim, numbers, **more), latent_shape, gaussian)


# ---- diffusers


class _KLEncoder(nn.Module):
    """The half of an AutoencoderKL that makes means and log variances (B, 2 D, h, w)."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.network = whole.encoder
        self.quant_conv = whole.quant_conv
        self.whole_config = dict(whole.config)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.network(images)
        return found if self.quant_conv is None else self.quant_conv(found)


class _KLDecoder(nn.Module):
    """The half of an AutoencoderKL that makes pictures (B, C, H, W) in [-1, 1] of codes (B, D, h, w)."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.post_quant_conv = whole.post_quant_conv
        self.network = whole.decoder

    def forward(self, code: Tensor) -> Tensor:
        code = code if self.post_quant_conv is None else self.post_quant_conv(code)
        found: Tensor = self.network(code)
        return found


def new_kl(config: dict[str, Any], shape: Shape, latent_dim: int) -> Any:
    """Return diffusers' AutoencoderKL with random weights.

    Raises:
        InputError: the configuration's values do not fit.
    """
    kind = _kl_class()
    own = {"in_channels": shape[0], "out_channels": shape[0], "latent_channels": latent_dim, "sample_size": shape[1]}
    try:
        return kind(**_with_all_blocks(config), **own)
    except Exception as error:  # diffusers and torch raise classes of their own for a value of the wrong kind
        last = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise InputError(f"config of {AUTOENCODER_KL}: {last}; correct model.config") from error


def read_kl(folder: str, shape: Shape, latent_dim: int) -> Any:
    """Return diffusers' AutoencoderKL with the weights of a folder, its own or a pipeline's with a `vae` in it.

    Raises:
        InputError: it cannot be read, or has other channels or another code.
    """
    path = Path(folder).expanduser()
    if path.is_dir() and not (path / "config.json").is_file() and (path / "vae").is_dir():
        path = path / "vae"
    try:
        whole = _kl_class().from_pretrained(str(path) if path.exists() else folder)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"pretrained {folder!r} cannot be read: {first}; name a folder of an AutoencoderKL, or a hub name"
        ) from error
    for name, key, given in [("channels", "in_channels", shape[0]), ("latent_dim", "latent_channels", latent_dim)]:
        if whole.config[key] != given:
            raise InputError(f"the {name} of {folder!r} is {whole.config[key]} and model.{name} is {given}; set it so")
    _check_kl(dict(whole.config), shape)
    return whole.train()


def kl_coder(whole: Any, shape: Shape, numbers: int) -> PictureCoder:
    """Return an AutoencoderKL as a `PictureCoder`; where a pixel has a scale, one is learned for each channel."""
    factor = 2 ** (len(whole.config.block_out_channels) - 1)
    latent_shape = (int(whole.config.latent_channels), shape[1] // factor, shape[2] // factor)
    scales = shape[0] if numbers == 2 else 0
    return PictureCoder(_KLEncoder(whole), _KLDecoder(whole), latent_shape, gaussian=True, pixel_scales=scales)


def whole_kl(coder: PictureCoder) -> Any:
    """Return the AutoencoderKL of which a coder has the halves, with copies of the weights on the CPU."""
    encoder, decoder = cast(_KLEncoder, coder.encoder), cast(_KLDecoder, coder.decoder)
    with torch.device("meta"):
        whole = _kl_class().from_config(encoder.whole_config)
    halves = {
        "encoder": encoder.network,
        "decoder": decoder.network,
        "quant_conv": encoder.quant_conv,
        "post_quant_conv": decoder.post_quant_conv,
    }
    state = {
        f"{name}.{key}": value.detach().cpu().clone()
        for name, half in halves.items()
        if half is not None
        for key, value in half.state_dict().items()
    }
    whole.load_state_dict(state, assign=True)
    return whole.eval()


def kl_config(coder: PictureCoder) -> dict[str, Any]:
    """Return the configuration of a coder's AutoencoderKL, as `config` takes it."""
    config = cast(_KLEncoder, coder.encoder).whole_config
    known = _known_keys(AUTOENCODER_KL)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items() if key in known}
    return {key: value for key, value in plain.items() if value is not None}


def _kl_class() -> Any:
    return require("diffusers", extra="generative").AutoencoderKL


def _known_keys(architecture: str) -> set[str]:
    if architecture == AUTOENCODER_KL:
        return set(inspect.signature(_kl_class().__init__).parameters) - set(_KL_ARGUMENTS)
    return set(inspect.signature(cast(Any, OWN[architecture][0].__init__)).parameters) - {"self", *_OWN_ARGUMENTS}


def _with_all_blocks(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with a plain block for each width, where it names widths alone."""
    num = len(config.get("block_out_channels", (64,)))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * num, "up_block_types": ["UpDecoderBlock2D"] * num}
    return {**blocks, **config}


def _check_kl(config: dict[str, Any], shape: Shape) -> None:
    widths = config.get("block_out_channels", (64,))
    groups = config.get("norm_num_groups", 32)
    for width in widths:
        if width % groups:
            raise InputError(
                f"model.config.block_out_channels holds {width}, which norm_num_groups {groups} does not divide; "
                f"change one of them"
            )
    factor = 2 ** (len(widths) - 1)
    if any(side % factor for side in shape[1:]):
        following = [-(-side // factor) * factor for side in shape[1:]]
        raise InputError(
            f"{AUTOENCODER_KL} halves pictures {len(widths) - 1} times, and image_size is {shape[1]} x {shape[2]}; the "
            f"next size that it can make is {following[0]} x {following[1]}: set model.image_size and data.image_size "
            f"to {following[0] if following[0] == following[1] else following}"
        )
