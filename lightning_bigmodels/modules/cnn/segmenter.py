"""Image segmenters: torchvision's networks and a U-Net, which name the class of each pixel."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.exportable import Exportable
from lightning_bigmodels.modules.cnn import segmenters
from lightning_bigmodels.modules.cnn.registry import check_network
from lightning_bigmodels.modules.cnn.segmentation_metrics import (
    COLUMNS,
    class_rows,
    dice_losses,
    pixel_metrics,
    summed_cross_entropy,
)
from lightning_bigmodels.modules.cnn.segmentation_pictures import (
    as_rgb,
    likeliest_class,
    nearest,
    overlay,
    side_by_side,
)
from lightning_bigmodels.networks.pixels import PixelNetwork, statistics
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.palette import NUM_COLORS
from lightning_bigmodels.tasks.classification import MeanLoss
from lightning_bigmodels.tasks.named_classes import NamedClasses
from lightning_bigmodels.tasks.task import Phase

_EXAMPLE = (2, 96, 128)  # pictures of an export's example, their height and width; all three are free


@final
class ImageSegmenter(NamedClasses):
    """Names the class of each pixel, with torchvision's FCN, DeepLabV3 and LR-ASPP or a U-Net.

    Validation and test report the plain cross entropy per pixel, without weights, Dice and auxiliary outputs, so that
    runs which differ in those compare; mean IoU, mean Dice and pixel accuracy over all pixels that count.

    Args:
        network: unet, or a name in torchvision's registry, such as deeplabv3_resnet50 or lraspp_mobilenet_v3_large.
        num_classes: Classes, as many as the data have, the background among them.
        channels: Channels of the pictures; another number than 3 replaces the first convolution.
        weights: Weights to start from: DEFAULT or another name of torchvision's, or a local .pth or .safetensors file;
            null draws random ones. Layers that do not fit (classes, channels) are made anew.
        backbone_weights: The same for the backbone alone, from a classifier: of ImageNet, or a local file.
        network_args: More arguments of the network's builder, such as depth, width and norm of the U-Net.
        class_weights: Factor on each class in the training loss, such as the inverse of how often it occurs.
        dice: Weight in the training loss of one minus the mean soft Dice of the classes that a picture shows.
        auxiliary: Weight in the training loss of the second output that FCN and DeepLabV3 have; 0 leaves it out.
        mean: Mean of each channel, of pixels in [0, 1]; null: that of the weights, ImageNet's, or one half.
        std: Standard deviation of each channel; null: as for the mean.
        channels_last: Keep pictures and weights with their channels innermost, which convolutions are fastest with.
        optimizer: From parameter groups to an optimizer; None is AdamW with lr 1e-3 and weight decay 0.1.
        schedule: From optimizer and total steps to a scheduler, stepped after each optimizer step; None is constant.
        l1_penalty: Weight of the sum of absolute values of all decayed parameters, added to the training loss.
        compile: Run the network through torch.compile.

    Attributes:
        class_names: The data's names of the classes; they travel in checkpoints.

    Raises:
        InputError: an unknown network, or a value out of range.
    """

    network: PixelNetwork | None
    predict_help = "name the class of each pixel"

    def __init__(
        self,
        network: str = segmenters.UNET,
        num_classes: int = 2,
        channels: int = 3,
        weights: str | None = None,
        backbone_weights: str | None = None,
        network_args: dict[str, Any] | None = None,
        class_weights: Sequence[float] | None = None,
        dice: float = 0.0,
        auxiliary: float = 0.5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels_last: bool = False,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        l1_penalty: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__(num_classes, optimizer=optimizer, schedule=schedule, l1_penalty=l1_penalty, compile=compile)
        check_network("segmentation", network, (segmenters.UNET,))
        for name, (value, bound) in {
            "num_classes": (num_classes, 2),
            "channels": (channels, 1),
            "dice": (dice, 0),
            "auxiliary": (auxiliary, 0),
        }.items():
            if value < bound:
                raise InputError(f"{name} is {value}; set it to {bound} or more")
        for name, values, needed in (
            ("mean", mean, channels),
            ("std", std, channels),
            ("class_weights", class_weights, num_classes),
        ):
            if values is not None and len(values) != needed:
                whose = "class" if name == "class_weights" else "channel"
                raise InputError(f"{name} holds {len(values)} numbers; give one for each {whose}, {needed}")
        self.network_name = network
        self.channels = channels
        self.weights = weights
        self.backbone_weights = backbone_weights
        self.network_args = dict(network_args or {})
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self.dice = dice
        self.auxiliary = auxiliary
        self.statistics = mean, std
        self.channels_last = channels_last
        self.losses = nn.ModuleDict({phase: MeanLoss() for phase in ("val", "test")})
        self.metrics = nn.ModuleDict({phase: pixel_metrics(phase, num_classes) for phase in ("val", "test")})
        self._rows: list[tuple[str, ...]] = []
        self._predicted: dict[int, tuple[Tensor, Tensor]] = {}
        self._flops: dict[tuple[int, ...], int] = {}
        self._batch_shape: tuple[int, ...] | None = None
        self.save_hyperparameters()

    # ---- the network

    def _random_network(self) -> PixelNetwork:
        body = segmenters.build_body(
            self.network_name, self.num_classes, self.channels, self.auxiliary > 0, self.network_args
        )
        return PixelNetwork(body, *statistics(self.channels, *self.statistics))

    @override
    def build_network(self) -> PixelNetwork:
        network = self._random_network()
        if network.mean.device.type != "meta":
            if self.backbone_weights is not None:
                segmenters.load_backbone(network, self.network_name, self.backbone_weights, self.channels)
            if self.weights is not None:
                segmenters.load_pretrained(network, self.network_name, self.weights, self.channels)
        return self.with_channels_last(network) if self.channels_last else network

    @override
    def configure_model(self) -> None:
        is_new = self.network is None
        super().configure_model()
        if is_new and self.compile_network:
            assert self.network is not None
            self.network.compile()

    @override
    def output_modules(self) -> list[nn.Module]:
        assert self.network is not None
        return segmenters.output_layers(self.network.body)

    @override
    def blocks(self) -> list[nn.Module]:
        assert self.network is not None
        return segmenters.blocks(self.network.body)

    def _outputs(self, images: Tensor) -> dict[str, Tensor]:
        assert self.network is not None
        self._batch_shape = tuple(images.shape)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        found = self.network(images)
        return {segmenters.OUT: found} if isinstance(found, Tensor) else found

    def logits(self, batch: Any) -> Tensor:
        """Return (B, K, H, W) float32 of a batch's pictures."""
        return self._outputs(batch["images"])[segmenters.OUT].float()

    @property
    @override
    def flops_per_batch(self) -> int | None:
        if self._batch_shape is None:
            raise RuntimeError("flops_per_batch is known after the first batch")
        rows, *shape = self._batch_shape
        key = tuple(shape)
        if key not in self._flops:
            # a validation asks without gradients
            with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
                self._flops[key] = segmenters.count_flops(self._random_network(), key)
        return rows * self._flops[key]

    # ---- steps

    @override
    def step(self, phase: Phase, batch: Any) -> Tensor:
        return self._train(batch) if phase == "train" else self._evaluate(phase, batch)

    def _train(self, batch: Any) -> Tensor:
        outputs, masks = self._outputs(batch["images"]), batch["masks"]
        main = outputs[segmenters.OUT]
        weights = None if self.class_weights is None else torch.tensor(self.class_weights, device=main.device)
        total, weight = summed_cross_entropy(main, masks, weights)
        if segmenters.AUXILIARY in outputs and self.auxiliary > 0:
            total = total + self.auxiliary * summed_cross_entropy(outputs[segmenters.AUXILIARY], masks, weights)[0]
        # processes may count different numbers of pixels, and their gradients are averaged: each pixel shall weigh the
        # same as on one process
        loss = total / self._mean_over_processes(weight).clamp(min=torch.finfo(torch.float32).tiny)
        if self.dice:
            loss = loss + self.dice * dice_losses(main, masks).mean()
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        trainer = self._trainer
        if trainer is None or trainer.world_size == 1:
            return value
        mean = trainer.strategy.reduce(value.detach().clone(), reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean

    def _evaluate(self, phase: Phase, batch: Any) -> Tensor:
        logits, masks = self.logits(batch), batch["masks"]
        total, weight = summed_cross_entropy(logits, masks)
        loss, metrics = self.losses[phase], self.metrics[phase]
        assert isinstance(loss, MeanLoss)
        assert isinstance(metrics, MetricCollection)
        loss.update(total, weight)
        metrics.update(logits.argmax(1), masks)
        options: dict[str, Any] = {"prog_bar": True, "on_step": False, "on_epoch": True, "batch_size": len(masks)}
        self.log(f"{phase}_loss", loss, **options)
        self.log_dict(metrics, **options)
        return total / weight.clamp(min=1)

    # ---- the table of classes

    @override
    def on_validation_epoch_end(self) -> None:
        self._count_classes("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._count_classes("test")

    def _count_classes(self, phase: Phase) -> None:
        metric: Any = self.metrics[phase][f"{phase}_mean_iou"]  # type: ignore[index]
        with metric.sync_context():
            self._rows = class_rows(metric.confmat, [self.class_name(i) for i in range(self.num_classes)])

    def class_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the heads and the rows of the last evaluation's table, for `ClassTable`."""
        return COLUMNS, self._rows

    # ---- data and checkpoints

    @override
    def setup(self, stage: str) -> None:
        channels = getattr(getattr(self.trainer, "datamodule", None), "channels", self.channels)
        if channels != self.channels:
            raise InputError(
                f"data.channels is {channels} and model.channels is {self.channels}; give both the same number"
            )
        super().setup(stage)

    @override
    def lasting_hyper_parameters(self) -> dict[str, Any]:
        return {"weights": None, "backbone_weights": None}

    # ---- pictures and predictions

    @torch.no_grad()
    def draw(self, batch: Any) -> list[Tensor]:
        """Return of each picture (3, H, W'): the picture, the truth and the prediction side by side."""
        predicted = self.logits(batch).argmax(1)
        return [
            side_by_side([as_rgb(image), overlay(image, truth), overlay(image, own)])
            for image, truth, own, index in zip(
                batch["images"], batch["masks"], predicted, batch["indices"].tolist(), strict=True
            )
            if index != FILLER
        ]

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        logits = self.logits(batch)
        places = batch["indices"].tolist()
        shape = list(logits.shape[-2:])
        sizes = batch["sizes"].tolist() if "sizes" in batch else [shape] * len(places)
        regions = batch["regions"].tolist() if "regions" in batch else [shape] * len(places)
        files = batch.get("files") or [None] * len(places)
        # masks are no plain values, as rows must be: `draw_predictions`, which comes next, yields them
        self._predicted = {}
        rows = []
        for i, (place, file, region, size) in enumerate(zip(places, files, regions, sizes, strict=True)):
            if place == FILLER:
                continue
            image = batch["images"][i, :, : region[0], : region[1]]
            mask = likeliest_class(logits[i, :, : region[0], : region[1]], (size[0], size[1])).cpu()
            self._predicted[place] = mask, image.cpu()
            shares = (torch.bincount(mask.flatten(), minlength=self.num_classes) / mask.numel()).tolist()
            row: dict[str, Any] = {"index": place} | ({} if file is None else {"file": file})
            row |= {"height": size[0], "width": size[1]}
            rows.append(row | {"shares": {self.class_name(i): share for i, share in enumerate(shares) if share}})
        return rows

    @override
    def draw_predictions(self, batch: Any, rows: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        """Yield of each picture its mask at the file's own size, and the picture as the network saw it under it."""
        for row in rows:
            mask, image = self._predicted[row["index"]]
            name = str(PurePosixPath(row.get("file", f"{row['index']:06d}")).with_suffix(""))
            yield name, mask.to(torch.uint8 if self.num_classes <= NUM_COLORS else torch.uint16)
            yield f"{name}_overlay", overlay(image, nearest(mask, (image.shape[1], image.shape[2])))

    @override
    def exportable(self) -> Exportable:
        assert self.network is not None
        count, height, width = _EXAMPLE
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, self.channels, height, width), dtype=torch.uint8, generator=generator)
        return Exportable(
            network=_Probabilities(self.network),
            inputs=(images,),
            input_names=("images",),
            output_names=("probabilities",),
            dynamic=({0: "batch", 2: "height", 3: "width"},),
            description={
                "task": "segmentation",
                "class_names": [self.class_name(i) for i in range(self.num_classes)],
                "channels": self.channels,
                "probabilities": "(batch, class, height, width): of each pixel, the classes' probabilities",
            },
        )


class _Probabilities(nn.Module):
    """A segmenter's network with a softmax over the classes of each pixel.

    Args:
        network: Pixels in, logits out.
    """

    def __init__(self, network: PixelNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return (B, K, H, W) float32 of (B, C, H, W) uint8."""
        found = self.network(images)
        return ((found if isinstance(found, Tensor) else found[segmenters.OUT]).float().softmax(1),)
