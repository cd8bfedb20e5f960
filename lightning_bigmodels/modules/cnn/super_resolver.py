"""Super-resolution: networks that enlarge pictures and put in what bicubic interpolation leaves out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER, SuperResolutionBatch, WholePhotoBatch
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.cnn.adversarial import adversarial_loss
from lightning_bigmodels.modules.cnn.enlargers import Swin2SRBody, build_enlarger, check_enlarger, swin2sr_config
from lightning_bigmodels.modules.cnn.enlarging import Passes, factor_to_passes
from lightning_bigmodels.modules.cnn.perceptual import PerceptualLoss
from lightning_bigmodels.modules.cnn.picture_quality import bicubic, measure, quality_metrics
from lightning_bigmodels.networks.edsr import EDSR, Enlarger
from lightning_bigmodels.networks.patch_discriminator import PatchDiscriminator
from lightning_bigmodels.networks.tiles import Tiling, to_uint8
from lightning_bigmodels.optim import UNDECAYED, ScheduleCallable
from lightning_bigmodels.png import PictureInBands
from lightning_bigmodels.strategies.collectives import gather
from lightning_bigmodels.strategies.fsdp2 import shard
from lightning_bigmodels.tasks import Task
from lightning_bigmodels.tasks.task import LR_SCALE, Exportable, Phase

# of a network of windows, whose reach ends nowhere
_BLENDED_OVERLAP = 16
_DRAWN = 96


@final
class SuperResolver(Task):
    """A network that enlarges pictures: EDSR, or transformers' Swin2SR, from scratch or with weights.

    `bigmodels predict --ckpt_path best --data.predict_source FOLDER --model.enlarge 8` enlarges a folder of pictures of
    any size, tile by tile without seams, into PNG files in the run's folder.

    Args:
        architecture: edsr, or swin2sr.
        scale: How many times larger the network makes a picture: 2, 3 or 4, for swin2sr also 8.
        config: For edsr num_blocks, num_features and residual_scale; for swin2sr values of its configuration, under
            transformers' own names.
        pretrained: Weights to start from. For edsr a file, such as a checkpoint, also of another scale; for swin2sr a
            folder or hub name.
        optimizer: From parameter groups to an optimizer; None is AdamW with lr 1e-3 and weight decay 0.1.
        schedule: From optimizer and total steps to a scheduler, stepped after each optimizer step; None is constant.
        l1_penalty: Weight of the sum of absolute values of all decayed parameters, added to the training loss.
        compile: Whether training runs the network through torch.compile.
        l1_weight: Weight of the mean absolute error of pixels in [0, 1].
        perceptual_weight: Weight of the difference of VGG-19's features.
        perceptual_weights: A file of torchvision's VGG-19, or the name of its weights: IMAGENET1K_V1.
        adversarial_weight: Weight of what a discriminator of patches says, which learns along.
        discriminator_lr_scale: Factor on the learning rate, for the discriminator.
        enlarge: How many times larger predict makes the pictures in `data.predict_source`, such as 8: the scale or, by
            repetition, a power of it, up to 32; None: the scale. They become PNG files in the run's folder.
        tile_size: Pixels of the small picture on each side of a tile.
        tile_overlap: Pixels around a tile that the network sees too. Where they cover its reach, the result is that of
            the whole picture; with fewer, neighbours are blended. None: edsr's reach, 16 for swin2sr.

    Raises:
        InputError: a name, a scale or a key of the configuration is unknown, or a value is out of its range.
    """

    network: Enlarger | None
    predict_help = "enlarge pictures"

    def __init__(
        self,
        architecture: str = "edsr",
        scale: int = 2,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        l1_penalty: float = 0.0,
        compile: bool = False,
        l1_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        perceptual_weights: str | None = None,
        adversarial_weight: float = 0.0,
        discriminator_lr_scale: float = 1.0,
        enlarge: int | None = None,
        tile_size: int = 128,
        tile_overlap: int | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule, l1_penalty=l1_penalty, compile=compile)
        check_enlarger(architecture, scale, config or {})
        weights = {
            "l1_weight": l1_weight,
            "perceptual_weight": perceptual_weight,
            "adversarial_weight": adversarial_weight,
            "discriminator_lr_scale": discriminator_lr_scale,
        }
        for name, value in weights.items():
            if value < 0:
                raise InputError(f"{name} is {value}; it must be 0 or more")
        if l1_weight == perceptual_weight == adversarial_weight == 0:
            raise InputError("all weights of the loss are 0; set l1_weight above 0")
        if perceptual_weight > 0 and perceptual_weights is None:
            raise InputError(
                "perceptual_weight compares features of a trained VGG-19; set perceptual_weights to a file of "
                "torchvision's, or to IMAGENET1K_V1 to download them, or perceptual_weight to 0"
            )
        if tile_size < 8:
            raise InputError(f"tile_size is {tile_size}; it must be 8 or more")
        if tile_overlap is not None and tile_overlap < 0:
            raise InputError(f"tile_overlap is {tile_overlap}; it must be 0 or more")
        self.architecture = architecture
        self.scale = scale
        self.config = dict(config or {})
        self.pretrained = pretrained
        self.l1_weight = l1_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_weights = perceptual_weights
        self.adversarial_weight = adversarial_weight
        self.discriminator_lr_scale = discriminator_lr_scale
        self.passes = factor_to_passes(scale if enlarge is None else enlarge, scale)
        self.tile_size = tile_size
        self.tile_overlap = tile_overlap
        self.discriminator: PatchDiscriminator | None = None
        self.metrics = nn.ModuleDict({phase: quality_metrics(phase, scale) for phase in ("val", "test")})
        self._perceptual: PerceptualLoss | None = None
        self._training_network: Any = None
        self.save_hyperparameters()

    # ---- the network

    @override
    def build_network(self) -> Enlarger:
        return build_enlarger(self.architecture, self.scale, self.config, self.pretrained)

    @override
    def configure_model(self) -> None:
        if self.network is not None:
            return
        super().configure_model()
        assert self.network is not None
        if self.adversarial_weight > 0:
            self.discriminator = PatchDiscriminator()
            if self.device_mesh is not None:
                shard(self.discriminator, self.trainer.strategy, [], {}, str(self.trainer.precision))
        self._training_network = torch.compile(self.network) if self.compile_network else self.network

    @override
    def blocks(self) -> list[nn.Module]:
        assert self.network is not None
        body = self.network.body
        if isinstance(body, EDSR):
            return list(body.blocks)
        assert isinstance(body, Swin2SRBody)
        return list(cast(Any, body.network).swin2sr.encoder.stages)

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()
        if self.discriminator is not None:
            # decay would work against spectral normalization, which takes the weights' size away
            judge = {"params": list(self.discriminator.parameters()), "name": f"{UNDECAYED}_discriminator"}
            groups.append({**judge, "weight_decay": 0.0, LR_SCALE: self.discriminator_lr_scale})
        return groups

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each network by its own norm: the discriminator's would scale the other one's gradient down."""
        if self.discriminator is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for network in (self.network, self.discriminator):
            assert network is not None
            part = cast(Optimizer, SimpleNamespace(param_groups=[{"params": list(network.parameters())}]))
            super().configure_gradient_clipping(part, gradient_clip_val, gradient_clip_algorithm)

    # ---- data, checkpoints

    @override
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        scale = getattr(data, "scale", self.scale)
        if scale != self.scale and stage != "predict":
            raise InputError(f"data.scale is {scale} and model.scale is {self.scale}; set both to the same")
        if stage == "fit" and self.perceptual_weight > 0 and self._perceptual is None:
            assert self.perceptual_weights is not None
            self._perceptual = PerceptualLoss(self.perceptual_weights)

    @override
    def lasting_hyper_parameters(self) -> dict[str, Any]:
        if self.pretrained is None:
            return {}
        assert self.network is not None
        config = self.config if self.architecture == "edsr" else swin2sr_config(self.network)
        return {"config": config, "pretrained": None}

    # ---- loss

    @override
    def step(self, phase: Phase, batch: Any) -> Tensor:
        return self._train_on(batch) if phase == "train" else self._measure(phase, batch)

    def _train_on(self, batch: SuperResolutionBatch) -> Tensor:
        made = self._training_network(batch["images"]).float()
        real = batch["targets"].to(made.dtype) / 255
        counted = (batch["indices"] != FILLER).to(made.dtype)

        def mean(losses: Tensor) -> Tensor:
            return (losses * counted).sum() / counted.sum().clamp(min=1)

        loss = self.l1_weight * mean((made - real).abs().mean((1, 2, 3)))
        if self._perceptual is not None:
            perceptual = mean(self._perceptual(made, real))
            self.log("train_perceptual_loss", perceptual.detach())
            loss = loss + self.perceptual_weight * perceptual
        self.log("train_loss", loss.detach(), prog_bar=True)
        if self.discriminator is not None:
            adversarial = adversarial_loss(self.discriminator, real, made, self.adversarial_weight, counted)
            self.log("train_adversarial_loss", adversarial.generator)
            self.log("train_discriminator_loss", adversarial.discriminator, prog_bar=True)
            loss = loss + adversarial.total
        return loss

    def _measure(self, phase: str, batch: WholePhotoBatch) -> Tensor:
        metrics = self.metrics[phase]
        assert isinstance(metrics, MetricCollection)
        losses = []
        passes = self._passes(1)
        with self._in_step(batch["images"], passes):
            for small, real, index in zip(batch["images"], batch["targets"], batch["indices"].tolist(), strict=True):
                made = passes.whole(small)
                if index != FILLER:
                    values = measure(small, made, real, self.scale)
                    metrics.update(values)
                    losses.append(values["loss"])
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(batch["indices"]))
        return torch.stack(losses).mean() if losses else torch.zeros((), device=self.device)

    # ---- enlarging

    @torch.no_grad()
    def enlarge(self, picture: Tensor, factor: int | None = None) -> Tensor:
        """Return an enlarged picture (3, f H, f W) uint8 of (3, H, W) uint8.

        Args:
            picture: Of any size.
            factor: How many times larger: the scale or a power of it; None: as `enlarge` was set.
        """
        passes = self.passes if factor is None else factor_to_passes(factor, self.scale)
        was_training = self.training
        self.eval()
        large = self._passes(passes).whole(picture.to(self.device))
        self.train(was_training)
        return large

    def tiling(self) -> Tiling:
        """Return how pictures are cut into tiles.

        Raises:
            InputError: the overlap is too large to blend over.
        """
        assert self.network is not None
        body = self.network.body
        reach, multiple = (body.radius, 1) if isinstance(body, EDSR) else (None, cast(Swin2SRBody, body).window)
        overlap = self.tile_overlap
        if overlap is None:
            overlap = _BLENDED_OVERLAP if reach is None else reach
        exact = reach is not None and overlap >= reach
        if not exact and 4 * -(-overlap // multiple) * multiple > self.tile_size:
            raise InputError(
                f"tile_overlap {overlap} is more than a quarter of tile_size {self.tile_size}; raise tile_size"
            )
        return Tiling(self.tile_size, overlap, exact, multiple)

    def _passes(self, number: int) -> Passes:
        return Passes(self._run_tile, self.scale, number, self.tiling())

    def _run_tile(self, window: Tensor) -> Tensor:
        assert self.network is not None
        with torch.no_grad():
            return self.network(window)

    @contextmanager
    def _in_step(self, pictures: list[Tensor], passes: Passes) -> Iterator[None]:
        """Let all processes of a sharded network run it equally often: its forward pass is a collective."""
        mine = sum(passes.num_tiles(*picture.shape[1:]) for picture in pictures)
        sharded = self.device_mesh is not None or isinstance(self.trainer.strategy, FSDPStrategy)
        most = max(gather(mine)) if sharded else mine
        yield
        for _ in range(most - mine):
            self._run_tile(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=self.device))

    @override
    def predict_step(self, batch: WholePhotoBatch, batch_idx: int) -> list[dict[str, Any]]:
        factor = self.scale**self.passes
        self.tiling()
        return [
            {
                "index": index,
                "file": file,
                # a name that no other picture has, in the order of the pictures
                "picture": f"predictions/{index:06d}_{Path(file).stem}.png",
                "height": picture.shape[1] * factor,
                "width": picture.shape[2] * factor,
            }
            for index, file, picture in zip(batch["indices"].tolist(), batch["files"], batch["images"], strict=True)
            if index != FILLER
        ]

    @override
    def draw_predictions(
        self, batch: WholePhotoBatch, rows: list[dict[str, Any]]
    ) -> Iterator[tuple[str, Tensor | PictureInBands]]:
        """Yield the enlarged pictures, whose rows are made while they are written."""
        bar = self.trainer.progress_bar_callback
        passes = self._passes(self.passes)
        known = [number for number, index in enumerate(batch["indices"].tolist()) if index != FILLER]
        pictures = [batch["images"][number] for number in known]
        with self._in_step(pictures, passes), self.trainer.precision_plugin.forward_context():
            for picture, row in zip(pictures, rows, strict=True):
                title = None if bar is None else Path(row["file"]).name
                yield Path(row["picture"]).stem, passes.in_bands(picture, title)

    @torch.no_grad()
    def draw(self, batch: WholePhotoBatch) -> list[Tensor]:
        """Return for each photo the middle of it: enlarged by bicubic, by the network, and as it is, side by side."""
        assert self.network is not None
        pictures = []
        for small, real in zip(batch["images"], batch["targets"], strict=True):
            rows, columns = (_middle(length) for length in small.shape[1:])
            part = small[:, rows, columns]
            made = to_uint8(self.network(part[None])[0])
            gap = torch.full((3, made.shape[1], 4), 255, dtype=torch.uint8, device=made.device)
            true = real[:, _times(rows, self.scale), _times(columns, self.scale)]
            pictures.append(torch.cat([bicubic(part, self.scale), gap, made, gap, true], dim=2))
        return pictures

    # ---- export

    @override
    def exportable(self) -> Exportable:
        assert self.network is not None
        free = {0: "batch", 2: "height", 3: "width"}
        fixed = self.architecture != "edsr"
        return Exportable(
            network=_Pixels(self.network),
            inputs=(torch.zeros(1, 3, 48, 48, dtype=torch.uint8),),
            input_names=("images",),
            output_names=("enlarged",),
            # windows are counted in Python while Swin2SR is traced
            dynamic=({} if fixed else free,),
            description={"scale": self.scale, "input": "uint8 (B, 3, H, W)", "output": "float in [0, 1]"},
        )


class _Pixels(nn.Module):
    """A network whose pixels end in [0, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.network(images).clamp(0, 1),)


def _middle(length: int) -> slice:
    start = max(0, (length - _DRAWN) // 2)
    return slice(start, min(length, start + _DRAWN))


def _times(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)
