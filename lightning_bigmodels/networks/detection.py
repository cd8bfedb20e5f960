"""Detectors behind one call, and small ones of torchvision's parts that train on a CPU."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

Detections = dict[str, Tensor]


class DetectionNetwork(nn.Module):
    """A detector of torchvision that takes pictures as they were decoded.

    Args:
        body: What torchvision's builders return: it scales, normalizes and pads the pictures itself.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self._samplers: list[PictureSampler] = []
        for part in _parts(body)[1:]:
            part.fg_bg_sampler = PictureSampler.like(part.fg_bg_sampler)
            self._samplers.append(part.fg_bg_sampler)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Any:
        """Return the losses by name where there are targets, in evaluation too; else the detections of each picture.

        Args:
            images: Pictures (3, H, W) uint8, or in [0, 1].
            targets: The objects of each (`Boxes`).
            seeds: For each picture what the proposals are drawn by that the losses look at; None: torch's stream.

        Returns:
            Scalars by name; or for each picture `boxes` (N, 4) in its own pixels, `labels` (N,) int64 from 1, `scores`
            (N,) in descending order, and `masks` (N, 1, H, W) in [0, 1] of a network that finds them.
        """
        dtype = next(p.dtype for p in self.body.parameters() if p.is_floating_point())
        scaled = [x.to(dtype) if x.is_floating_point() else x.to(dtype) / 255 for x in images]
        for sampler in self._samplers:
            sampler.seeds = seeds
        with self._finds_losses(targets is not None):
            return self.body(scaled) if targets is None else self.body(scaled, [dict(target) for target in targets])

    @contextmanager
    def _finds_losses(self, wanted: bool) -> Iterator[None]:
        """Let the detector return its losses, or its detections, while its norms and dropout stay as they are."""
        parts = _parts(self.body)
        before = [part.training for part in parts]
        for part in parts:
            part.training = wanted  # of this module alone: `train()` would reach the norms
        try:
            yield
        finally:
            for part, was in zip(parts, before, strict=True):
                part.training = was


def _parts(body: nn.Module) -> list[nn.Module]:
    """Return the modules that ask `training` whether losses are wanted: the detector, its proposals and its heads."""
    return [body, *(getattr(body, name) for name in ("rpn", "roi_heads") if hasattr(body, name))]


class PictureSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of anchors and proposals, whose draws belong to a picture and not to its place in a batch.

    Then several processes draw for a picture what one would draw.
    """

    seeds: Sequence[int] | None = None

    @classmethod
    def like(cls, sampler: BalancedPositiveNegativeSampler) -> "PictureSampler":
        """Return one of the same size and share of positives."""
        return cls(sampler.batch_size_per_image, sampler.positive_fraction)

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return masks (A,) uint8 of the positives and of the negatives that are drawn for each picture.

        Args:
            matched_idxs: For each picture (A,): 1 and more are positives, 0 negatives, less is left out.
        """
        if self.seeds is None:
            return super().__call__(matched_idxs)
        positives: list[Tensor] = []
        negatives: list[Tensor] = []
        for matched, seed in zip(matched_idxs, self.seeds, strict=True):
            generator = torch.Generator(device=matched.device).manual_seed(seed)
            positive, negative = torch.where(matched >= 1)[0], torch.where(matched == 0)[0]
            num_positives = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
            num_negatives = min(len(negative), self.batch_size_per_image - num_positives)
            for kind, number, found in ((positive, num_positives, positives), (negative, num_negatives, negatives)):
                order = torch.randperm(len(kind), generator=generator, device=matched.device)
                mask = torch.zeros_like(matched, dtype=torch.uint8)
                mask[kind[order[:number]]] = 1
                found.append(mask)
        return positives, negatives


class SharedFCOSHead(FCOSHead):
    """torchvision's head of FCOS, whose losses are divided by the foreground of all processes' pictures.

    Then the gradient is that of one process with the whole batch. Source: Tian et al. 2019, "FCOS", equation 2, where
    N_pos is that of the batch; the authors' own code sums it over the processes too.
    """

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return `classification`, `bbox_regression` and `bbox_ctrness`."""
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return losses
        own = torch.stack([(matched >= 0).sum() for matched in matched_idxs]).sum().float()
        mean = own.clone()
        dist.all_reduce(mean)
        factor = own.clamp(min=1) / (mean.clamp(min=1) / dist.get_world_size())
        return {name: loss * factor for name, loss in losses.items()}


# ---- small detectors


def small_backbone(width: int = 32, out_channels: int = 64, extra_blocks: Any = None) -> BackboneWithFPN:
    """Return a residual network of three stages with group norm and a feature pyramid at strides 4, 8 and 16.

    Args:
        width: Channels of the first stage; each further one doubles them. A multiple of 8.
        out_channels: Channels of each level.
        extra_blocks: What adds levels; None: one, by pooling, at stride 32.

    Source: He et al. 2016, "Deep residual learning"; Wu & He 2018, "Group normalization"; Lin et al. 2017, "Feature
        pyramid networks for object detection". Half of ResNet-18's widths, one block a stage.
    """
    stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), _norm(width), nn.ReLU())
    widths = [width, 2 * width, 4 * width]
    stages = [_block(before, after) for before, after in zip([width, *widths[:2]], widths, strict=True)]
    layers = OrderedDict([("stem", stem), *((f"stage{i}", stage) for i, stage in enumerate(stages, start=1))])
    body = nn.Sequential(layers)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return BackboneWithFPN(
        body, {f"stage{i}": str(i - 1) for i in (1, 2, 3)}, widths, out_channels, extra_blocks or LastLevelMaxPool()
    )


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


def _block(before: int, after: int) -> BasicBlock:
    shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), _norm(after))
    return BasicBlock(before, after, stride=2, downsample=shortcut, norm_layer=_norm)


_SIZE = {"min_size": 96, "max_size": 512}
_STRIDES = (4, 8, 16, 32)


def fcos_small(num_classes: int, width: int = 32, channels: int = 64, num_convs: int = 2, **kwargs: Any) -> FCOS:
    """Return FCOS on `small_backbone`.

    Args:
        num_classes: Classes, the background included.
        width: Of the backbone.
        channels: Of pyramid and head; a multiple of 32.
        num_convs: Convolutions of each branch of the head.
        kwargs: The arguments of torchvision's FCOS.
    """
    backbone = small_backbone(width, channels)
    anchors = AnchorGenerator(tuple((stride,) for stride in _STRIDES), ((1.0,),) * len(_STRIDES))
    head = SharedFCOSHead(channels, 1, num_classes, num_convs)
    return FCOS(backbone, num_classes, **{**_SIZE, "anchor_generator": anchors, "head": head, **kwargs})


def retinanet_small(num_classes: int, width: int = 32, channels: int = 64, **kwargs: Any) -> RetinaNet:
    """Return RetinaNet on `small_backbone`; arguments as of `fcos_small`, and those of torchvision's RetinaNet."""
    sizes = tuple((4 * stride, int(4 * stride * 2 ** (1 / 3)), int(4 * stride * 2 ** (2 / 3))) for stride in _STRIDES)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return RetinaNet(small_backbone(width, channels), num_classes, **{**_SIZE, "anchor_generator": anchors, **kwargs})


def fasterrcnn_small(num_classes: int, width: int = 32, channels: int = 64, **kwargs: Any) -> FasterRCNN:
    """Return Faster R-CNN on `small_backbone`; arguments as of `fcos_small`, and those of torchvision's FasterRCNN."""
    return FasterRCNN(small_backbone(width, channels), None, **{**_two_stages(num_classes, channels), **kwargs})


def maskrcnn_small(num_classes: int, width: int = 32, channels: int = 64, **kwargs: Any) -> MaskRCNN:
    """Return Mask R-CNN on `small_backbone`; arguments as of `fcos_small`, and those of torchvision's MaskRCNN."""
    options = {
        "mask_roi_pool": MultiScaleRoIAlign(_POOLED, 14, 2),
        "mask_head": MaskRCNNHeads(channels, (channels, channels), 1),
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes),
        **_two_stages(num_classes, channels),
    }
    return MaskRCNN(small_backbone(width, channels), None, **{**options, **kwargs})


_POOLED = ["0", "1", "2"]
_HIDDEN = 256


def _two_stages(num_classes: int, channels: int) -> dict[str, Any]:
    sizes = tuple((4 * stride,) for stride in _STRIDES)
    return {
        **_SIZE,
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "box_roi_pool": MultiScaleRoIAlign(_POOLED, 7, 2),
        "box_head": TwoMLPHead(channels * 7**2, _HIDDEN),
        "box_predictor": FastRCNNPredictor(_HIDDEN, num_classes),
    }
