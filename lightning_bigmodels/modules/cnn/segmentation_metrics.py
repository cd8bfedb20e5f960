"""What is counted over pixels: how they were confused, and what follows from that; losses of masks."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix

from lightning_bigmodels.data.batches import IGNORED

COLUMNS = ("class", "pixels", "iou", "dice", "precision", "recall")


class _OverPixels(MulticlassConfusionMatrix):
    """Counts all pixels of an evaluation, so that neither batches nor processes move the value.

    Args:
        num_classes: K.
    """

    confmat: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, ignore_index=IGNORED, validate_args=False)


class MeanIoU(_OverPixels):
    """Intersection over union, averaged over the classes that occur in truth or prediction."""

    def compute(self) -> Tensor:
        """Return the mean of TP / (TP + FP + FN)."""
        return _iou(self.confmat).nanmean()


class MeanDice(_OverPixels):
    """Dice's coefficient, which is F1, averaged over the classes that occur in truth or prediction."""

    def compute(self) -> Tensor:
        """Return the mean of 2 TP / (2 TP + FP + FN)."""
        return _dice(self.confmat).nanmean()


class PixelAccuracy(_OverPixels):
    """Share of the pixels that got their class."""

    def compute(self) -> Tensor:
        """Return TP / pixels, over all classes."""
        return self.confmat.diagonal().sum() / self.confmat.sum()


def pixel_metrics(phase: str, num_classes: int) -> MetricCollection:
    """Return the three metrics of a phase, which share one count."""
    names = {"mean_iou": MeanIoU, "mean_dice": MeanDice, "pixel_accuracy": PixelAccuracy}
    return MetricCollection(
        {name: metric(num_classes) for name, metric in names.items()},
        prefix=f"{phase}_",
        compute_groups=[list(names)],
    )


def class_rows(confusion: Tensor, names: list[str]) -> list[tuple[str, ...]]:
    """Return a row of text for each class, under the heads `COLUMNS`.

    Args:
        confusion: (K, K), pixels of each class (row) that were called each class (column).
        names: Of the classes.
    """
    right = confusion.diagonal()
    values = (_iou(confusion), _dice(confusion), right / confusion.sum(0), right / confusion.sum(1))
    pixels = confusion.sum(1).tolist()
    shares = torch.stack([value.double() for value in values], dim=1).tolist()
    return [
        (name, str(count), *("" if share != share else f"{share:.4f}" for share in row))
        for name, count, row in zip(names, pixels, shares, strict=True)
    ]


def _iou(confusion: Tensor) -> Tensor:
    right = confusion.diagonal()
    return right / (confusion.sum(0) + confusion.sum(1) - right)


def _dice(confusion: Tensor) -> Tensor:
    return 2 * confusion.diagonal() / (confusion.sum(0) + confusion.sum(1))


def dice_losses(logits: Tensor, masks: Tensor) -> Tensor:
    """Return for each picture one minus the mean soft Dice of the classes that it shows; 0 where no pixel counts.

    Over a picture and not over the batch, so that the loss of two halves of a batch is that of the whole.

    Args:
        logits: (B, K, H, W).
        masks: (B, H, W) int64 class, or `IGNORED`.

    Returns:
        (B,) float32.

    Source: Milletari et al. 2016, "V-Net", section 3, for several classes; the sums below have no squares.
    """
    counted = (masks != IGNORED).flatten(1)  # (B, N)
    truth = masks.flatten(1).clamp(min=0)
    probabilities = logits.float().softmax(1).flatten(2) * counted[:, None]  # (B, K, N)
    of_truth = probabilities.gather(1, truth[:, None])[:, 0]
    zeros = probabilities.new_zeros(probabilities.shape[:2])
    overlap = zeros.scatter_add(1, truth, of_truth)
    present = zeros.scatter_add(1, truth, counted.to(zeros.dtype))
    dice = 2 * overlap / (present + probabilities.sum(2)).clamp(min=torch.finfo(zeros.dtype).tiny)
    shown = present > 0
    return (shown * (1 - dice)).sum(1) / shown.sum(1).clamp(min=1)


def summed_cross_entropy(logits: Tensor, masks: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sum over the pixels that count of cross entropy times their class's weight, and that of the weights.

    Args:
        logits: (B, K, H, W).
        masks: (B, H, W) int64 class, or `IGNORED`.
        weights: (K,); None: 1 each.
    """
    total = F.cross_entropy(logits.float(), masks, weights, ignore_index=IGNORED, reduction="sum")
    counted = masks != IGNORED
    if weights is None:
        return total, counted.sum().float()
    return total, (weights[masks.clamp(min=0)] * counted).sum()
