"""Naming what an example shows: loss, metrics, predictions, for one class per example or several."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryCalibrationError,
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassStatScores,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
    MultilabelF1Score,
    MultilabelStatScores,
)
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.tasks.named_classes import NamedClasses
from lightning_bigmodels.tasks.task import Phase

_NUM_TOP = 5


class MeanLoss(Metric):
    """Mean over examples that count: neither batch size nor number of processes moves it."""

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, weights: Tensor) -> None:
        """Add a batch: the loss of each example, zero where it does not count, and its weight in the mean."""
        self.total += losses.detach().sum(dtype=torch.float64)
        self.weight += weights.sum(dtype=torch.float64)

    def compute(self) -> Tensor:
        """Return the sum of losses over the sum of weights."""
        return self.total / self.weight


class ExactMatch(Metric):
    """Share of the examples that count whose labels are all told.

    torchmetrics' own takes an example of which it is told to ignore everything for told (1.9).
    """

    full_state_update = False
    matched: Tensor
    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("matched", "counted"):
            self.add_state(name, default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch: (B, K) float32, and (B, K) int64 with rows of `IGNORED`."""
        counted = labels[:, 0] != IGNORED
        self.matched += (((probabilities >= 0.5) == labels.bool()).all(1) & counted).sum()
        self.counted += counted.sum()

    def compute(self) -> Tensor:
        """Return the share."""
        return self.matched / self.counted


class Classification(NamedClasses):
    """A Task that names the class of each example, or all classes that it shows.

    Validation and test report the plain cross entropy, without smoothing, weights or mixtures, so that runs which
    differ in those compare. Probabilities are what `validation_step` and `test_step` return, for callbacks.

    Args:
        num_classes: K, the classes.
        multi_label: Whether an example may show several classes or none: a sigmoid for each, in place of a softmax.
        label_smoothing: Share of each training label that is spread evenly over all classes.
        class_weights: Factor on each class in the training loss, such as the inverse of how often it occurs.
        kwargs: The arguments of `Task`.

    Attributes:
        class_names: The data's names of the classes; they travel in checkpoints.

    Raises:
        InputError: a value is out of range.
    """

    predict_help = "name classes"

    def __init__(
        self,
        num_classes: int,
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        if num_classes < 1 + (not multi_label):
            raise InputError(f"num_classes is {num_classes}; set it to {1 + (not multi_label)} or more")
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing is {label_smoothing}; it must be 0 or more and below 1")
        if class_weights is not None and (len(class_weights) != num_classes or min(class_weights) < 0):
            raise InputError(
                f"class_weights holds {len(class_weights)} numbers, the least {min(class_weights, default=0)}; give "
                f"one of 0 or more for each of the {num_classes} classes"
            )
        self.multi_label = multi_label
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else tuple(class_weights)
        scores = (
            MultilabelStatScores(num_labels=num_classes, average=None, ignore_index=IGNORED)
            if multi_label
            else MulticlassStatScores(num_classes=num_classes, average=None, ignore_index=IGNORED)
        )
        self.class_scores: Metric = scores
        self._table: list[tuple[str, ...]] = []
        self.metrics = nn.ModuleDict({phase: self._metrics(phase) for phase in ("val", "test")})

    @abstractmethod
    def logits(self, batch: Any) -> Tensor:
        """Return (B, K), before softmax or sigmoid."""

    def weighted_logits(self, batch: Any) -> list[tuple[float, Tensor]]:
        """Return in training the logits (B, K) of each output layer with its weight in the loss."""
        return [(1.0, self.logits(batch))]

    def mix(self, batch: Any) -> Any:
        """Return a training batch with its examples mixed, its labels (B, K) float32; here it is left as it is."""
        return batch

    # ---- loss

    def losses(self, logits: Tensor, labels: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Return the loss of each example and its weight in the mean, both (B,), zero where an example does not count.

        Args:
            logits: (B, K).
            labels: (B,) int64, or (B, K) float32 with rows of `IGNORED` where nothing counts.
            training: Whether labels are smoothed and classes weighted.

        Source: smoothing of Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7; for several
            labels each one is drawn towards one half.
        """
        logits = logits.float()
        smoothing = self.label_smoothing if training else 0.0
        weights = None
        if training and self.class_weights is not None:
            weights = torch.tensor(self.class_weights, device=logits.device)
        if self.multi_label:
            return _multi_label_losses(logits, labels, smoothing, weights)
        if labels.is_floating_point():
            counted = (labels[:, :1] != IGNORED).float()
            shares = labels * counted  # (B, K)
            log_p = logits.log_softmax(1) if weights is None else logits.log_softmax(1) * weights
            smoothed = shares * (1 - smoothing) + shares.sum(1, keepdim=True) * smoothing / self.num_classes
            return -(smoothed * log_p).sum(1), (shares if weights is None else shares * weights).sum(1)
        losses = F.cross_entropy(
            logits, labels, weights, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
        )
        counted = labels != IGNORED
        return losses, counted.float() if weights is None else weights[labels.clamp(min=0)] * counted

    @override
    def step(self, phase: Phase, batch: Any) -> Tensor:
        if phase == "train":
            batch = self.mix(batch)
            loss = torch.stack(
                [weight * self._mean_loss(logits, batch["labels"]) for weight, logits in self.weighted_logits(batch)]
            ).sum()
            self.log("train_loss", loss.detach(), prog_bar=True)
            return loss
        return self._evaluate(phase, batch)[0]

    def _mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses, weights = self.losses(logits, labels, training=True)
        return losses.sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)

    # ---- evaluation

    def _evaluate(self, phase: Phase, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits, labels = self.logits(batch).float(), batch["labels"]
        losses, weights = self.losses(logits, labels, training=False)
        probabilities = self.probabilities(logits)
        metrics = self.metrics[phase]
        assert isinstance(metrics, MetricCollection)
        metrics[f"{phase}_loss"].update(losses, weights)
        targets = labels.long()
        for name, metric in metrics.items(copy_state=False):
            if name == f"{phase}_calibration_error" and self.multi_label:
                metric.update(probabilities.flatten(), targets.flatten())
            elif name != f"{phase}_loss":
                metric.update(probabilities, targets)
        self.class_scores.update(probabilities, targets)
        shown = dict(metrics.items(copy_state=False))
        self.log_dict(shown, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(labels))
        loss = losses.sum() / weights.sum().clamp(min=1)
        return loss, {"probabilities": probabilities}

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return (B, K) float32 probabilities of logits (B, K)."""
        return logits.float().sigmoid() if self.multi_label else logits.float().softmax(1)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        return self._evaluate("val", batch)[1]

    @override
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        return self._evaluate("test", batch)[1]

    @override
    def on_validation_epoch_start(self) -> None:
        self.class_scores.reset()

    on_test_epoch_start = on_validation_epoch_start

    @override
    def on_validation_epoch_end(self) -> None:
        scores = self.class_scores.compute().tolist()  # (K, 5); every process takes part
        self._table = [
            (self.class_name(i), *_rates(true, false, count), str(count))
            for i, (true, false, _, _, count) in enumerate(scores)
        ]

    on_test_epoch_end = on_validation_epoch_end

    def class_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return heads and rows of the last evaluation's table: precision, recall, F1 and examples of each class."""
        return ("class", "precision", "recall", "f1", "support"), self._table

    def _metrics(self, phase: str) -> MetricCollection:
        count: dict[str, Any] = {"ignore_index": IGNORED}
        found: dict[str, Metric | MetricCollection] = {"loss": MeanLoss()}
        if self.multi_label:
            count["num_labels"] = self.num_classes
            found["accuracy"] = MultilabelAccuracy(average="micro", **count)
            found["exact_match"] = ExactMatch()
            found["macro_f1"] = MultilabelF1Score(average="macro", **count)
            found["average_precision"] = MultilabelAveragePrecision(**count)
            found["calibration_error"] = BinaryCalibrationError(ignore_index=IGNORED)
        else:
            count["num_classes"] = self.num_classes
            found["accuracy"] = MulticlassAccuracy(average="micro", **count)
            if self.num_classes > _NUM_TOP:
                found["top5_accuracy"] = MulticlassAccuracy(average="micro", top_k=_NUM_TOP, **count)
            found["macro_f1"] = MulticlassF1Score(average="macro", **count)
            found["calibration_error"] = MulticlassCalibrationError(**count)
        return MetricCollection(found, prefix=f"{phase}_", compute_groups=False)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        several = getattr(data, "multi_label", self.multi_label)
        if getattr(data, "class_names", None) and stage != "predict" and several != self.multi_label:
            raise InputError(
                f"the data have {'several labels' if several else 'one label'} for each example; set "
                f"model.multi_label to {str(several).lower()}"
            )

    # ---- predictions

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        rows = []
        names = [self.class_name(i) for i in range(self.num_classes)]
        places = batch["indices"].tolist()
        files = batch.get("files") or [None] * len(places)
        for place, file, own in zip(places, files, self.probabilities(self.logits(batch)).tolist(), strict=True):
            if place == FILLER:
                continue
            row: dict[str, Any] = {"index": place} | ({} if file is None else {"file": file})
            best = max(range(self.num_classes), key=own.__getitem__)
            if self.multi_label:
                row["labels"] = [name for name, p in zip(names, own, strict=True) if p >= 0.5]
            row |= {"label": names[best], "probability": own[best]}
            rows.append({**row, "probabilities": dict(zip(names, own, strict=True))})
        return rows


def _rates(true: int, false: int, count: int) -> tuple[str, str, str]:
    """Return precision, recall and F1 of true and false positives among so many examples; - where there is none."""
    rates = ((true, true + false), (true, count), (2 * true, true + false + count))
    precision, recall, f1 = (f"{part / whole:.4f}" if whole else "-" for part, whole in rates)
    return precision, recall, f1


def _multi_label_losses(
    logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    counted = (labels[:, :1] != IGNORED).float()  # (B, 1)
    targets = labels * counted * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="none") * counted
    return losses.mean(1), counted[:, 0]
