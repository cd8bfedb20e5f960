"""Detectors whose answer has one shape, as exported programs need."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image, nms

from lightning_bigmodels.networks.detection import DetectionNetwork


class FixedDetector(nn.Module):
    """FCOS, RetinaNet or SSD for one picture of one size, whose best objects are found in steps of fixed shape.

    It finds what the detector itself finds: candidates that torchvision drops for their low score stay here, with a
    score of zero, which suppresses nothing.

    Args:
        network: A detector; its parameters are shared.

    Raises:
        TypeError: it is another kind, whose second stage depends on what the first one finds.
    """

    def __init__(self, network: DetectionNetwork) -> None:
        super().__init__()
        if not can_be_fixed(network):
            raise TypeError(f"{type(network.body).__name__} has no fixed shape")
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best D objects of a picture (3, H, W) uint8, of which the last ones may be none, with label 0.

        Returns:
            Boxes (D, 4) left, top, right, bottom in pixels, labels (D,) int64 from 1, and scores (D,) in descending
            order.
        """
        body = self.network.body
        images, _ = body.transform([image.to(torch.float32) / 255])  # type: ignore[operator]
        features = list(body.backbone(images.tensors).values())  # type: ignore[operator]
        found = body.head(features)  # type: ignore[operator]
        anchors = body.anchor_generator(images, features)[0]  # type: ignore[operator]
        size = images.image_sizes[0]
        boxes = clip_boxes_to_image(self._decode(found["bbox_regression"][0], anchors), size)  # (A, 4)
        scores = self._scores(found)  # (A, K)
        # column 0, which some heads have, is the background
        counts = (scores > body.score_thresh) & (torch.arange(scores.shape[1], device=scores.device) > 0)  # type: ignore[operator]
        scores = torch.where(counts, scores, 0.0)
        places, labels, scores = self._best(scores, [f.shape[2] * f.shape[3] for f in features])
        boxes = boxes[places]
        # boxes of several classes never touch: each class has a plane of its own
        keep = nms(boxes + (labels * (max(size) + 1)).to(boxes.dtype)[:, None], scores, float(body.nms_thresh))  # type: ignore[arg-type]
        number = int(body.detections_per_img)  # type: ignore[arg-type]
        none = torch.full((number,), scores.shape[0], device=keep.device)
        keep = torch.cat([keep, none])[:number]
        boxes, labels, scores = (
            torch.cat([value, value.new_zeros(1, *value.shape[1:])])[keep] for value in (boxes, labels, scores)
        )
        labels = torch.where(scores > 0, labels, 0)
        ratios = [own / scaled for own, scaled in zip(image.shape[-1:0:-1], reversed(size), strict=True)]
        boxes = boxes * boxes.new_tensor([*ratios, *ratios]) * (labels > 0)[:, None]
        return boxes, labels, scores

    def _decode(self, regression: Tensor, anchors: Tensor) -> Tensor:
        coder = self.network.body.box_coder
        if isinstance(self.network.body, FCOS):
            return coder.decode(regression, anchors)  # type: ignore[operator, union-attr]
        return coder.decode_single(regression, anchors)  # type: ignore[operator, union-attr]

    def _scores(self, found: dict[str, Tensor]) -> Tensor:
        logits = found["cls_logits"][0]
        if isinstance(self.network.body, SSD):
            return logits.softmax(-1)
        if isinstance(self.network.body, FCOS):
            return (logits.sigmoid() * found["bbox_ctrness"][0].sigmoid()).sqrt()
        return logits.sigmoid()

    def _best(self, scores: Tensor, cells: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return anchor, label and score of the best of each level, or for SSD of each class, (N,) each."""
        number = int(self.network.body.topk_candidates)  # type: ignore[arg-type]
        num_anchors, num_classes = scores.shape
        if isinstance(self.network.body, SSD):
            best, places = scores[:, 1:].topk(min(number, num_anchors), dim=0)
            labels = torch.arange(1, num_classes, device=scores.device).expand_as(places)
            return places.flatten(), labels.flatten(), best.flatten()
        each = num_anchors // sum(cells)
        before, found = 0, []
        for level in scores.split([cell * each for cell in cells]):
            best, places = level.flatten().topk(min(number, level.numel()))
            anchors = torch.div(places, num_classes, rounding_mode="floor") + before
            found.append((anchors, places % num_classes, best))
            before += level.shape[0]
        anchors, labels, best = (torch.cat(parts) for parts in zip(*found, strict=True))
        return anchors, labels, best


def can_be_fixed(network: DetectionNetwork) -> bool:
    """Return whether `FixedDetector` knows a detector."""
    return isinstance(network.body, (FCOS, RetinaNet, SSD))
