"""What a plan assumes of torchvision's detectors, whose shapes hang on what is in the pictures.

Bounds that torchvision itself keeps hold here too: so many anchors and proposals are drawn for a picture's losses, so
many proposals are kept. All proposals are assumed to lie on one level of a feature pyramid, the finest, and no box to
be suppressed by a better one.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lightning_bigmodels.planner.assumptions import at_most, zeros
from lightning_bigmodels.planner.trace import StepTrace


@contextmanager
def assume_detections(trace: StepTrace) -> Iterator[None]:
    """Let detectors, where the program knows any, run on pictures without values; the trace tells what is assumed."""
    if "torchvision.models.detection" not in sys.modules:
        yield
        return
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
    from torchvision.ops.poolers import LevelMapper

    from lightning_bigmodels.networks.detection import PictureSampler

    def keep_all(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        # it would look at one class after the other, of which there might be as many as boxes
        trace.assumptions.add("torchvision.ops.batched_nms")
        return torch.empty(len(scores), dtype=torch.int64)

    with ExitStack() as stack:
        stack.enter_context(mock.patch("torchvision.ops.boxes._batched_nms_vanilla", keep_all))
        for kind, changed in (
            (BalancedPositiveNegativeSampler, _drawing),
            (PictureSampler, _drawing),
            (LevelMapper, _levelling),
        ):
            stack.enter_context(mock.patch.object(kind, "__call__", changed(kind.__call__)))
        yield


def _drawing(draw: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(sampler: Any, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positives, negatives = draw(sampler, matched)
        number = sampler.batch_size_per_image
        most = int(number * sampler.positive_fraction)
        return [at_most(mask, most) for mask in positives], [at_most(mask, number - most) for mask in negatives]

    return drawn


def _levelling(find: Callable[..., Any]) -> Callable[..., Any]:
    def found(mapper: Any, boxes: list[Tensor]) -> Tensor:
        return zeros(find(mapper, boxes))

    return found
