"""What all autoencoders share: codes and reconstructions as predictions, pictures to look at, export in two halves."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torchmetrics import MeanMetric, Metric
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER, ImageBatch
from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.exportable import Exportable, Exported, LibraryFolder
from lightning_bigmodels.modules.autoencoder.architectures import (
    AUTOENCODER_KL,
    Shape,
    check_architecture,
    kl_config,
    read_kl,
    whole_kl,
)
from lightning_bigmodels.networks.autoencoder import PictureCoder
from lightning_bigmodels.pictures import as_rgb
from lightning_bigmodels.png import Drawn
from lightning_bigmodels.tasks import Task
from lightning_bigmodels.tasks.task import Phase

Predicts = Literal["latents", "reconstructions"]
_PREDICTS = ("latents", "reconstructions")
# pixels below which a picture is enlarged to be looked at
_LEAST = 64


class PictureCoding(Task, ABC):
    """A Task whose network makes codes of pictures, and pictures of codes.

    Args:
        architecture: Name of the network.
        config: Its arguments.
        latent_dim: Values of a code, or of each place in it.
        predicts: What predict writes: latents, as a Parquet file, or reconstructions, as PNG files.
        pretrained: A folder with the weights of an AutoencoderKL to start from; None: random ones.
        channels_last: Whether weights have their channels innermost.
        kwargs: The arguments of `Task`, and of what stands beside this class.

    Attributes:
        image_shape: Channels, height and width of a picture; whoever inherits sets it first.

    Raises:
        InputError: a name is unknown, or a value out of its range.
    """

    network: PictureCoder | None
    image_shape: Shape
    predict_help = "write codes or reconstructions of pictures"

    def __init__(
        self,
        architecture: str,
        config: dict[str, Any] | None,
        latent_dim: int,
        predicts: Predicts,
        pretrained: str | None = None,
        channels_last: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_architecture(architecture, config or {}, self.image_shape, latent_dim)
        if predicts not in _PREDICTS:
            raise InputError(f"predicts is {predicts!r}; set it to {' or '.join(_PREDICTS)}")
        if pretrained is not None and architecture != AUTOENCODER_KL:
            raise InputError(
                f"pretrained is a folder of diffusers, and architecture is {architecture}; set model.architecture to "
                f"{AUTOENCODER_KL}, or go on from a checkpoint with --ckpt_path"
            )
        if pretrained is not None and config:
            raise InputError("pretrained brings its own configuration; leave model.config out")
        self.architecture = architecture
        self.config = dict(config or {})
        self.latent_dim = latent_dim
        self.predicts = predicts
        self.pretrained = pretrained
        self.channels_last = channels_last

    # ---- the network

    @abstractmethod
    def new_coder(self, whole: Any | None) -> PictureCoder:
        """Return a network with random weights, or the one of a given AutoencoderKL."""

    @property
    @abstractmethod
    def to_pictures(self) -> Callable[[Tensor], Tensor]:
        """What makes (B, C, H, W) uint8 of what the decoder says."""

    @override
    def build_network(self) -> PictureCoder:
        whole = None
        if self.pretrained is not None:
            whole = read_kl(self.pretrained, self.image_shape, self.latent_dim)
        network = self.new_coder(whole)
        return self.with_channels_last(network) if self.channels_last else network

    @override
    def configure_model(self) -> None:
        if self.network is not None:
            return
        super().configure_model()
        assert self.network is not None
        for name in ("encode", "decode"):
            # what is called besides forward must gather the weights too
            register_fsdp_forward_method(self.network, name)
        if self.compile_network:
            self.network.compile()

    @override
    def blocks(self) -> list[nn.Module]:
        assert self.network is not None
        return [self.network.encoder, self.network.decoder]

    @override
    def lasting_hyper_parameters(self) -> dict[str, Any]:
        if self.pretrained is None:
            return {}
        assert self.network is not None
        return {"config": kl_config(self.network), "pretrained": None}

    # ---- codes

    def encode_pictures(self, images: Tensor) -> Tensor:
        """Return the codes (B, D) or (B, D, h, w) of pictures (B, C, H, W) uint8, the same at each call."""
        assert self.network is not None
        code, _ = self.network.encode(images)
        return self.network.quantize(code)[0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return (B, C, H, W) uint8 of codes."""
        assert self.network is not None
        return self.to_pictures(self.network.decode(latents))

    def check_pictures(self, images: Tensor) -> None:
        """Refuse a batch of pictures of another shape than the network's.

        Raises:
            InputError: the message names the argument of the data.
        """
        found, wanted = tuple(images.shape[1:]), self.image_shape
        if found[0] != wanted[0]:
            raise InputError(f"the pictures have {found[0]} channels and model.channels is {wanted[0]}; set it to that")
        if found != wanted:
            raise InputError(
                f"the pictures are {found[1]} x {found[2]} and model.image_size is {wanted[1]} x {wanted[2]}; set "
                f"data.image_size to {list(wanted[1:])}"
            )

    # ---- losses

    def log_means(self, metrics: nn.ModuleDict, phase: Phase, values: Mapping[str, Tensor], counted: Tensor) -> None:
        """Log means over the examples of an evaluation, exact over processes.

        Args:
            metrics: For each `<phase>_<name>` its metric.
            phase: val or test.
            values: (B,) by name.
            counted: (B,) float32, 0 for what counts for nothing.
        """
        found: dict[str, Metric] = {}
        for name, value in values.items():
            metric = metrics[f"{phase}_{name}"]
            assert isinstance(metric, MeanMetric)
            # selected, and not weighted by 0: torchmetrics 1.9 forgets weights where it is told not to look for NaN
            metric.update(value.detach()[counted > 0].double())
            found[f"{phase}_{name}"] = metric
        self.log_dict(found, on_step=False, on_epoch=True, batch_size=len(counted))

    # ---- what others see

    def draw(self, batch: ImageBatch) -> list[Tensor]:
        """Return each picture beside its reconstruction: (3, H, W) uint8."""
        images = batch["images"]
        return side_by_side(images, self.decode_latents(self.encode_pictures(images)))

    @override
    def predict_step(self, batch: ImageBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return for each picture its number and file; codes or reconstructions are made when they are written."""
        self.check_pictures(batch["images"])
        rows: list[dict[str, Any]] = []
        for index, file in zip(batch["indices"].tolist(), batch["files"], strict=True):
            row: dict[str, Any] = {"index": index, "file": file}
            if self.predicts == "reconstructions":
                # a name that no other picture has, in the order of the pictures
                row["picture"] = f"predictions/{index:06d}_{Path(file).stem}.png"
            if index != FILLER:
                rows.append(row)
        return rows

    @override
    def draw_predictions(self, batch: ImageBatch, rows: list[dict[str, Any]]) -> Iterator[tuple[str, Drawn]]:
        if self.predicts != "reconstructions":
            return
        with self.trainer.precision_plugin.forward_context():
            made = self.decode_latents(self.encode_pictures(batch["images"]))
        for picture, row in zip(made[batch["indices"] != FILLER], rows, strict=True):
            yield Path(row["picture"]).stem, as_rgb(picture)

    @override
    def tabulate_predictions(self, batch: ImageBatch, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if self.predicts != "latents":
            return {}
        assert self.network is not None
        counted = batch["indices"] != FILLER
        with self.trainer.precision_plugin.forward_context():
            code, log_variance = self.network.encode(batch["images"])
            latents, chosen = self.network.quantize(code)
        columns = {"latents": latents[counted].float()}
        if log_variance is not None:
            columns["std"] = (0.5 * log_variance[counted]).exp()
        if chosen is not None:
            columns["codes"] = chosen[counted].int()
        return columns

    @override
    def exportable(self) -> Exported:
        if self.network is None:
            raise RuntimeError("exportable needs the network; call configure_model or load a checkpoint first")
        network = self.network
        if self.architecture == AUTOENCODER_KL:
            return LibraryFolder(lambda folder: whole_kl(network).save_pretrained(folder), self._check_folder)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (2, *self.image_shape), dtype=torch.uint8, generator=generator)
        latents = torch.randn((2, *network.latent_shape), generator=generator)
        description = {
            "task": "autoencoding",
            "channels": self.image_shape[0],
            "image_size": list(self.image_shape[1:]),
            "latent_shape": list(network.latent_shape),
        }
        outputs = ("latents",) if network.quantizer is None else ("latents", "codes")
        halves: dict[str, tuple[nn.Module, Tensor, str, tuple[str, ...]]] = {
            "encoder": (_Encoder(network), pixels, "images", outputs),
            "decoder": (_Decoder(network, self.to_pictures), latents, "latents", ("images",)),
        }
        return {
            name: Exportable(half, (given,), (given_name,), made_names, ({0: "batch"},), description)
            for name, (half, given, given_name, made_names) in halves.items()
        }

    def _check_folder(self, folder: Path) -> None:
        """Compare a folder of diffusers, loaded back, with the network.

        Raises:
            RunError: a weight differs.
        """
        assert self.network is not None
        found = type(whole_kl(self.network)).from_pretrained(folder).state_dict()
        for name, value in whole_kl(self.network).state_dict().items():
            if name not in found or not torch.equal(found[name], value):
                raise RunError(f"{folder.name}, loaded back, does not hold the network's {name}; is the disk sound?")


class _Encoder(nn.Module):
    """From pixels (B, C, H, W) uint8 to latents, of a distribution the mean, and their places in a codebook."""

    def __init__(self, coder: PictureCoder) -> None:
        super().__init__()
        self.coder = PictureCoder(coder.encoder, nn.Identity(), coder.latent_shape, coder.gaussian, coder.quantizer)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        code, chosen = self.coder.quantize(self.coder.encode(images)[0])
        return (code,) if chosen is None else (code, chosen)


class _Decoder(nn.Module):
    """From latents to pixels (B, C, H, W) uint8."""

    def __init__(self, coder: PictureCoder, to_pictures: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.coder = PictureCoder(nn.Identity(), coder.decoder, coder.latent_shape)
        self.to_pictures = to_pictures

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return (self.to_pictures(self.coder.decode(latents)),)


def side_by_side(*columns: Tensor) -> list[Tensor]:
    """Return a picture (3, H, W) uint8 of each row of some batches (B, C, h, w) uint8, enlarged where they are tiny."""
    factor = max(1, -(-_LEAST // columns[0].shape[-1]))
    rows = []
    for pictures in zip(*columns, strict=True):
        row = torch.cat([as_rgb(picture) for picture in pictures], dim=2)
        rows.append(row.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
    return rows


def mean_metric() -> MeanMetric:
    """Return a mean over examples."""
    # one that left out what is not a number would hide it
    metric = MeanMetric(nan_strategy="disable")
    metric.set_dtype(torch.float64)
    return metric
