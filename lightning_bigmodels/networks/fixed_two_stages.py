"""Faster R-CNN and Mask R-CNN with an answer of one shape, as exported programs need."""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, roi_align
from typing_extensions import override

from lightning_bigmodels.networks.detection import DetectionNetwork
from lightning_bigmodels.networks.fixed_detection import (
    FixedDetector,
    Seen,
    at_least,
    best,
    best_of_each,
    with_none,
)

SMALLEST = 1e-2
"""Shortest side in pixels of what torchvision's second stage finds."""


@final
class TwoStages(FixedDetector):
    """Faster R-CNN or Mask R-CNN, whose second stage always looks at the same number of places.

    Where the first stage finds fewer, the others are empty boxes, whose scores count for nothing.

    Args:
        network: A detector of two stages; its parameters are shared.
    """

    def __init__(self, network: DetectionNetwork) -> None:
        super().__init__(network)
        self.finds_masks = network.body.roi_heads.has_mask()  # type: ignore[union-attr, operator]

    @override
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        seen = self.see(image)
        proposals, counts = self._propose(seen)
        boxes, scores = self.classify(seen, proposals, levels_of(self.heads.box_roi_pool, seen, proposals))
        num_classes = scores.shape[1]
        counts = counts[:, None] & (scores > self.heads.score_thresh) & at_least(boxes, SMALLEST)
        scores = torch.where(counts & (torch.arange(num_classes, device=scores.device) > 0), scores, 0.0).flatten()
        places = scores.nonzero()[:, 0]
        boxes, scores = boxes.view(-1, 4)[places], scores[places]
        boxes, labels, scores = self._finish(boxes, places % num_classes, scores, seen.size)
        whole = boxes * self.ratios(image, seen)
        if not self.finds_masks:
            return whole, labels, scores
        return whole, labels, scores, self.masks(seen, boxes, labels, whole, image.shape[-2:])

    @property
    @override
    def limits(self) -> tuple[float, int]:
        return float(self.heads.nms_thresh), int(self.heads.detections_per_img)

    @property
    def heads(self) -> Any:
        """Return the second stage."""
        return self.network.body.roi_heads

    @property
    def first(self) -> Any:
        """Return the first stage."""
        return self.network.body.rpn

    def look(self, seen: Seen) -> tuple[Tensor, Tensor, list[int]]:
        """Return the first stage's boxes (A, 4) in the scaled picture, their logits (A,) and how many a level has."""
        features = list(seen.features.values())
        objectness, regression = self.first.head(features)
        sizes = [math.prod(level.shape[1:]) for level in objectness]
        objectness, regression = concat_box_prediction_layers(objectness, regression)
        anchors = self.first.anchor_generator(seen.images, features)[0]
        boxes = self.first.box_coder.decode_single(regression, anchors)
        return clip_boxes_to_image(boxes, seen.size), objectness.flatten(), sizes

    def _propose(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Return proposals (P, 4), and which of them there are, (P,)."""
        boxes, logits, sizes = self.look(seen)
        places = best_of_each(logits, sizes, self.first.pre_nms_top_n())
        levels = torch.cat([torch.full((size,), level) for level, size in enumerate(sizes)]).to(places.device)[places]
        boxes, scores = boxes[places], logits[places].sigmoid()
        counts = at_least(boxes, self.first.min_size) & (scores >= self.first.score_thresh)
        scores = torch.where(counts, scores, -1.0)  # behind all others, which they cannot suppress then
        number = min(self.first.post_nms_top_n(), len(places))
        keep = best(boxes, scores, levels, self.first.nms_thresh, number, max(seen.size))
        return with_none(boxes)[keep], with_none(counts)[keep]

    def classify(self, seen: Seen, proposals: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the boxes (P, K, 4) and scores (P, K) of each class for proposals (P, 4), taken from such levels."""
        found = self.heads.box_head(pool_boxes(self.heads.box_roi_pool, seen, proposals, levels))
        logits, regression = self.heads.box_predictor(found)
        boxes = self.heads.box_coder.decode_single(regression, proposals).view(*logits.shape, 4)
        return clip_boxes_to_image(boxes, seen.size), logits.softmax(-1)

    def masks(self, seen: Seen, boxes: Tensor, labels: Tensor, whole: Tensor, size: Sequence[int]) -> Tensor:
        """Return masks (D, H, W) uint8 of boxes (D, 4) in the scaled picture, `whole` in that of such size."""
        heads = self.heads
        found = heads.mask_head(
            pool_boxes(heads.mask_roi_pool, seen, boxes, levels_of(heads.mask_roi_pool, seen, boxes))
        )
        logits = heads.mask_predictor(found)
        small = logits[torch.arange(len(labels), device=labels.device), labels].sigmoid()  # (D, M, M)
        pasted = paste(small, whole, size) * (labels > 0)[:, None, None]
        return (pasted * 255).round().to(torch.uint8)


# ---- steps of fixed shape


def levels_of(pool: MultiScaleRoIAlign, seen: Seen, boxes: Tensor, nearness: float = 0.0) -> Tensor:
    """Return the level (P,) from 0 that each box (P, 4) in the scaled picture is cut from.

    Args:
        pool: What cuts.
        seen: The picture.
        boxes: In the scaled picture.
        nearness: By what share sides are taken for longer.

    Source: Lin et al. 2017, "Feature pyramid networks", equation 1, as torchvision has it, but for its logarithm, which
        rounds differently elsewhere.
    """
    strides = [round(math.log2(seen.size[0] / level.shape[2])) for level in _pooled(pool, seen)]
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt() * (1 + nearness)
    found = torch.zeros_like(sides, dtype=torch.int64)
    for stride in range(strides[0] + 1, strides[-1] + 1):
        # torchvision adds 1e-6 to the logarithm
        found = found + (sides >= pool.canonical_scale * 2 ** (stride - pool.canonical_level - 1e-6))
    return found


def pool_boxes(pool: MultiScaleRoIAlign, seen: Seen, boxes: Tensor, levels: Tensor) -> Tensor:
    """Return what the boxes (P, 4) hold, (P, C, *output_size), each cut from its level (P,).

    Every box is cut from every level, since how many belong to one hangs on the picture.
    """
    places = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)  # of picture 0
    found = boxes.new_zeros(1)
    for number, level in enumerate(_pooled(pool, seen)):
        scale = 0.5 ** round(math.log2(seen.size[0] / level.shape[2]))
        cut = roi_align(level, places, pool.output_size, scale, pool.sampling_ratio)
        found = torch.where((levels == number)[:, None, None, None], cut, found)
    return found


def _pooled(pool: MultiScaleRoIAlign, seen: Seen) -> list[Tensor]:
    return [level for name, level in seen.features.items() if name in pool.featmap_names]


def paste(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Return masks (D, H, W) that fill their boxes, and are 0 elsewhere.

    It is what torchvision's `paste_masks_in_image` does, one after the other and box by box: a frame of zeros around
    the mask, boxes grown by it and cut to whole pixels, and linear interpolation, here as a product of matrices.

    Args:
        masks: (D, M, M).
        boxes: (D, 4) in pixels.
        size: Height and width of the picture.
    """
    masks = pad(masks, (1, 1, 1, 1))
    cells = masks.shape[1]
    centers, halves = (boxes[:, :2] + boxes[:, 2:]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5 * (cells / (cells - 2))
    firsts, lasts = (centers - halves).to(torch.int64), (centers + halves).to(torch.int64)  # (D, 2) left and top
    weights = []
    for axis, length in enumerate(reversed(size)):
        first, last = firsts[:, axis, None], lasts[:, axis, None]
        pixels = torch.arange(length, device=boxes.device)
        sources = (pixels - first + 0.5) * (cells / (last - first + 1).clamp(min=1)) - 0.5  # (D, length)
        sources = sources.clamp(0, cells - 1)[:, :, None] - torch.arange(cells, device=boxes.device)
        inside = (pixels >= first) & (pixels <= last)
        weights.append((1 - sources.abs()).clamp(min=0) * inside[:, :, None])  # (D, length, cells)
    across, down = (weight.to(masks.dtype) for weight in weights)
    return down @ masks @ across.mT
