"""Detectors whose answer has one shape, as exported programs need: what all have, and those of one stage."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image, nms
from typing_extensions import override

from lightning_bigmodels.networks.detection import DetectionNetwork


class Seen(NamedTuple):
    """A picture as the detector sees it: scaled, and what its backbone makes of it, by level."""

    images: ImageList
    features: dict[str, Tensor]

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width of the scaled picture, without what pads it."""
        return self.images.image_sizes[0]


class FixedDetector(nn.Module, ABC):
    """A detector for one picture of one size, whose best objects are found in steps of fixed shape.

    It finds what the detector itself finds: candidates that torchvision drops stay here, with a score that suppresses
    nothing.

    Args:
        network: A detector; its parameters are shared.
    """

    finds_masks = False

    def __init__(self, network: DetectionNetwork) -> None:
        super().__init__()
        self.network = network

    @abstractmethod
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the best D objects of a picture (3, H, W) uint8, of which the last ones may be none, with label 0.

        Returns:
            Boxes (D, 4) left, top, right, bottom in pixels, labels (D,) int64 from 1, and scores (D,) in descending
            order; and of a detector that finds masks, these (D, H, W) uint8: 255 times the probability that a pixel
            belongs to the object.
        """

    @property
    @abstractmethod
    def limits(self) -> tuple[float, int]:
        """Return the overlap of two boxes of a class above which the better one alone is kept, and D."""

    def see(self, image: Tensor) -> Seen:
        """Return what the backbone makes of a picture (3, H, W) uint8."""
        body = self.network.body
        dtype = next(p.dtype for p in body.parameters() if p.is_floating_point())
        images, _ = body.transform([image.to(dtype) / 255])  # type: ignore[operator]
        return Seen(images, body.backbone(images.tensors))  # type: ignore[operator]

    def ratios(self, image: Tensor, seen: Seen) -> Tensor:
        """Return (4,) by how much boxes are larger in the picture than in the scaled one."""
        ratios = [own / scaled for own, scaled in zip(image.shape[-1:0:-1], reversed(seen.size), strict=True)]
        return torch.tensor([*ratios, *ratios], device=image.device)

    def _finish(self, boxes: Tensor, labels: Tensor, scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return the D best of candidates (N, 4), (N,) and (N,), of which those with score 0 are none."""
        keep = best(boxes, scores, labels, *self.limits, max(size))
        boxes, labels, scores = (with_none(value)[keep] for value in (boxes, labels, scores))
        labels = torch.where(scores > 0, labels, 0)
        return boxes * (labels > 0)[:, None], labels, scores


@final
class OneStage(FixedDetector):
    """FCOS, RetinaNet or SSD."""

    @override
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        seen = self.see(image)
        boxes, scores = self.look(seen)
        scores = torch.where(scores > self.score_threshold, scores, 0.0)
        # of each level, or for SSD of each class
        found = [
            (places[values.flatten().topk(min(self.num_candidates, values.numel())).indices])
            for places, values in self.groups(seen, scores)
        ]
        places = torch.cat(found)
        num_classes = scores.shape[1]
        anchors, labels = torch.div(places, num_classes, rounding_mode="floor"), places % num_classes
        boxes, labels, scores = self._finish(boxes[anchors], labels, scores.flatten()[places], seen.size)
        return boxes * self.ratios(image, seen), labels, scores

    @property
    @override
    def limits(self) -> tuple[float, int]:
        body = self.network.body
        return float(body.nms_thresh), int(body.detections_per_img)  # type: ignore[arg-type]

    @property
    def score_threshold(self) -> float:
        """Return the score that a candidate must pass."""
        return float(self.network.body.score_thresh)  # type: ignore[arg-type]

    @property
    def num_candidates(self) -> int:
        """Return how many candidates of a level, or for SSD of a class, are looked at."""
        return int(self.network.body.topk_candidates)  # type: ignore[arg-type]

    def look(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Return boxes (A, 4) in the scaled picture and scores (A, K), 0 for the background, label 0."""
        body, size = self.network.body, seen.size
        features = list(seen.features.values())
        found = body.head(features)  # type: ignore[operator]
        anchors = body.anchor_generator(seen.images, features)[0]  # type: ignore[operator]
        decode = body.box_coder.decode if isinstance(body, FCOS) else body.box_coder.decode_single  # type: ignore[union-attr]
        boxes = clip_boxes_to_image(decode(found["bbox_regression"][0], anchors), size)  # type: ignore[operator]
        scores = self._scores(found)
        # some heads have a logit for the background
        return boxes, torch.where(torch.arange(scores.shape[1], device=scores.device) > 0, scores, 0.0)

    def _scores(self, found: dict[str, Tensor]) -> Tensor:
        logits = found["cls_logits"][0]
        if isinstance(self.network.body, SSD):
            return logits.softmax(-1)
        if isinstance(self.network.body, FCOS):
            return (logits.sigmoid() * found["bbox_ctrness"][0].sigmoid()).sqrt()
        return logits.sigmoid()

    def groups(self, seen: Seen, scores: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return places among all scores (A * K,), and scores, of each group that has its own best candidates."""
        places = torch.arange(scores.numel(), device=scores.device).view_as(scores)
        if isinstance(self.network.body, SSD):
            return [(places[:, label], scores[:, label]) for label in range(1, scores.shape[1])]
        cells = [level.shape[2] * level.shape[3] for level in seen.features.values()]
        sizes = [cell * (scores.shape[0] // sum(cells)) for cell in cells]
        return [(p.flatten(), s.flatten()) for p, s in zip(places.split(sizes), scores.split(sizes), strict=True)]


# ---- steps of fixed shape


def best(boxes: Tensor, scores: Tensor, planes: Tensor, overlap: float, number: int, side: int) -> Tensor:
    """Return the places (number,) of the best boxes that no better one overlaps, and N where there are no more.

    Args:
        boxes: (N, 4) in a picture.
        scores: (N,), greater than -2.
        planes: (N,) int64; boxes of two planes never overlap.
        overlap: Share of both that two boxes may have in common.
        number: How many.
        side: The picture's longer side.
    """
    # planes lie in rows of 16 beside one another: with all in one row, their numbers would lose more digits
    rows, columns = torch.div(planes, 16, rounding_mode="floor"), planes % 16
    shifts = torch.stack([columns, rows, columns, rows], dim=1) * (side + 1)
    # programs assert that two boxes or more are kept, as torchvision 0.29 declares; these two stand aside, and are none
    aside = boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
    keep = nms(torch.cat([boxes + shifts.to(boxes.dtype), aside]), torch.cat([scores, aside[:, 0]]), overlap)
    none = torch.full((number,), scores.shape[0], device=keep.device)
    return torch.cat([keep.clamp(max=scores.shape[0]), none])[:number]


def with_none(values: Tensor) -> Tensor:
    """Return values (N + 1, ...) of which the last is zero, where `best` points to if there are no more."""
    return torch.cat([values, values.new_zeros(1, *values.shape[1:])])


def at_least(boxes: Tensor, side: float) -> Tensor:
    """Return which boxes (..., 4) have both sides so long, (...)."""
    return ((boxes[..., 2] - boxes[..., 0]) >= side) & ((boxes[..., 3] - boxes[..., 1]) >= side)


def best_of_each(values: Tensor, sizes: Sequence[int], number: int) -> Tensor:
    """Return the places of the best values of each of consecutive groups of such sizes, at most `number` of each."""
    before, found = 0, []
    for group in values.split(list(sizes)):
        found.append(group.topk(min(number, len(group))).indices + before)
        before += len(group)
    return torch.cat(found)
