"""Finding objects: the network's losses, COCO's average precision, predictions and pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER, Boxes
from lightning_bigmodels.data.loading import sample_generator
from lightning_bigmodels.data.vision.coco import decode_mask, encode_mask
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.networks.detection import DetectionNetwork, Detections
from lightning_bigmodels.networks.drawing import beside, draw_objects
from lightning_bigmodels.tasks.average_precision import AveragePrecision
from lightning_bigmodels.tasks.classification import MeanLoss
from lightning_bigmodels.tasks.named_classes import NamedClasses
from lightning_bigmodels.tasks.task import Phase

_IDS = "category_ids"
_REPORTED = ("map", "map_50", "map_75", "mar_100")
PREDICTIONS = "predictions.json"


class Detection(NamedClasses):
    """A Task that finds objects with a `DetectionNetwork`.

    Args:
        num_classes: Classes, the background not counted; None: those of the data.
        loss_names: What the network's losses are called, without torchvision's `loss_` before some.
        finds_masks: Whether the network finds masks beside boxes.
        drawn_score: Least score of the boxes that are drawn into pictures.
        kwargs: The arguments of `Task`.

    Attributes:
        num_classes: Classes, the background not counted; 0 while neither argument nor data have told.
        category_ids: What the data's annotations call each class; they travel in checkpoints with the names.

    Raises:
        InputError: a value is out of range.
    """

    network: DetectionNetwork | None
    predict_help = "find objects"

    def __init__(
        self,
        num_classes: int | None,
        loss_names: Sequence[str],
        finds_masks: bool,
        drawn_score: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes or 0, **kwargs)
        if num_classes is not None and num_classes < 1:
            raise InputError(f"num_classes is {num_classes}; set it to 1 or more, or null for those of the data")
        if not 0 <= drawn_score <= 1:
            raise InputError(f"drawn_score is {drawn_score}; set it to a score from 0 to 1")
        self.finds_masks = finds_masks
        self.drawn_score = drawn_score
        self.category_ids: list[int] | None = None
        names = ("loss", *(f"loss_{name}" for name in loss_names))
        self.losses = nn.ModuleDict({p: nn.ModuleDict({n: MeanLoss() for n in names}) for p in ("val", "test")})
        self.precisions = nn.ModuleDict({phase: AveragePrecision(finds_masks) for phase in ("val", "test")})

    # ---- the classes

    @override
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "class_names", None)
        if names and not self.num_classes:
            self.num_classes = len(names)
        super().setup(stage)
        if stage == "predict" or not names:
            return
        if self.finds_masks and not getattr(data, "masks", True):
            raise InputError("the network learns from masks, and the data have none; set data.masks to true")
        self.category_ids = list(getattr(data, _IDS, range(1, len(names) + 1)))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_IDS] = self.category_ids

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.category_ids = checkpoint.get(_IDS)

    def name_of(self, label: int) -> str:
        """Return the name of a class, from label 1 on; its number where the names are not known."""
        return str(label) if self.class_names is None else self.class_names[label - 1]

    # ---- loss and metrics

    @override
    def step(self, phase: Phase, batch: Any) -> Tensor:
        return self._learn(batch) if phase == "train" else self._judge(phase, batch)

    def _learn(self, batch: Any) -> Tensor:
        assert self.network is not None
        indices = batch["indices"].tolist()
        counted = [row for row, index in enumerate(indices) if index != FILLER]
        # a process without a picture answers the others' collectives with one that counts for nothing
        rows = counted or [0]
        losses = self.network(
            [batch["images"][row] for row in rows],
            [_single(batch["targets"][row]) for row in rows],
            [self._seed(self.current_epoch, indices[row]) for row in rows],
        )
        loss = torch.stack(list(losses.values())).sum()
        for name, value in losses.items():
            self.log(f"train_loss_{name.removeprefix('loss_')}", value.detach(), batch_size=len(rows))
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(rows))
        return loss if counted else 0.0 * loss

    def _seed(self, epoch: int, index: int) -> int:
        """Return what fixes the anchors and proposals that a picture's loss looks at."""
        return sample_generator(0, epoch, index).initial_seed()

    def _judge(self, phase: Phase, batch: Any) -> Tensor:
        assert self.network is not None
        found = self.detect(batch["images"])
        totals = []
        for index, image, target in zip(batch["indices"].tolist(), batch["images"], batch["targets"], strict=True):
            losses = self.network([image], [_single(target)], [self._seed(0, index)])
            counts = torch.tensor(float(index != FILLER), device=image.device)
            named = {f"loss_{name.removeprefix('loss_')}": value for name, value in losses.items()}
            named["loss"] = torch.stack(list(losses.values())).sum()
            for name, metric in self.losses[phase].items():  # type: ignore[operator]
                metric.update(named[name] * counts, counts)
            totals.append(named["loss"] * counts)
        for name, metric in self.losses[phase].items():  # type: ignore[operator]
            shown = name == "loss"
            self.log(f"{phase}_{name}", metric, on_step=False, on_epoch=True, prog_bar=shown, batch_size=len(found))
        self.precisions[phase].add(batch["indices"], found, batch["targets"])  # type: ignore[operator]
        return torch.stack(totals).mean()

    @override
    def on_validation_epoch_end(self) -> None:
        self._report("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, phase: Phase) -> None:
        metric = self.precisions[phase]
        assert isinstance(metric, AveragePrecision)
        values = metric.compute()
        metric.reset()
        for kind, prefix in {"bbox_": "", "segm_": "mask_"}.items() if self.finds_masks else [("", "")]:
            named = {f"{prefix}{name}": values[f"{kind}{name}"] for name in _REPORTED}
            classes = values.get("classes", torch.empty(0, dtype=torch.int64)).reshape(-1).tolist()
            for label, value in zip(
                classes, values.get(f"{kind}map_per_class", torch.empty(0)).reshape(-1), strict=False
            ):
                named[f"{prefix}map_of_{self.name_of(label).replace('/', '_')}"] = value
            for name, value in named.items():
                # all processes have the same value, which a mean over them might round
                self.log(
                    f"{phase}_{name}",
                    value.to(self.device),
                    prog_bar=name == "map",
                    sync_dist=True,
                    reduce_fx="max",
                )

    # ---- predictions

    def detect(self, images: list[Tensor]) -> list[Detections]:
        """Return what is found in each picture, whatever the others are.

        Args:
            images: Each (3, H, W) uint8.

        Returns:
            For each picture `boxes` (N, 4) in its pixels, `labels` (N,) from 1, `scores` (N,) in descending order, and
            `masks` (N, H, W) bool of a network that finds them.
        """
        if self.network is None:
            raise RuntimeError("detect needs the network; call configure_model or load a checkpoint first")
        rows = []
        for image in images:
            found = self.network([image])[0]
            known = found["labels"] > 0  # some heads have a logit for the background
            row = {name: value[known] for name, value in found.items()}
            if "masks" in row:
                row["masks"] = row["masks"][:, 0] >= 0.5
            rows.append(row)
        return rows

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        rows = []
        places = batch["indices"].tolist()
        for number, found in enumerate(self.detect(batch["images"])):
            if places[number] == FILLER:
                continue
            labels = found["labels"].tolist()
            row = {
                "index": places[number],
                "file": batch["files"][number],
                "image_id": batch["image_ids"][number],
                "boxes": found["boxes"].tolist(),
                "labels": labels,
                "names": [self.name_of(label) for label in labels],
                "scores": found["scores"].tolist(),
            }
            if "masks" in found:
                row["masks"] = [encode_mask(mask) for mask in found["masks"]]
            rows.append(row)
        return rows

    @override
    def collect_predictions(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Return `predictions.json`: a list in COCO's format of results."""
        results = []
        for row in rows:
            for number, (left, top, right, bottom) in enumerate(row["boxes"]):
                label = row["labels"][number]
                result = {
                    "image_id": row["image_id"],
                    "category_id": label if self.category_ids is None else self.category_ids[label - 1],
                    "bbox": [left, top, right - left, bottom - top],
                    "score": row["scores"][number],
                }
                if "masks" in row:
                    result["segmentation"] = row["masks"][number]
                results.append(result)
        return {PREDICTIONS: results}

    @override
    def draw_predictions(self, batch: Any, rows: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
        images = dict(zip(batch["indices"].tolist(), batch["images"], strict=True))
        for row in rows:
            found: dict[str, Tensor] = {
                "boxes": torch.tensor(row["boxes"]).view(-1, 4),
                "labels": torch.tensor(row["labels"], dtype=torch.int64),
                "scores": torch.tensor(row["scores"]),
            }
            image = images[row["index"]]
            if row.get("masks"):
                found["masks"] = torch.stack([decode_mask(runs, *image.shape[1:]) for runs in row["masks"]])
            name = f"{row['index']:06d}_{Path(row['file']).stem}"
            yield name, self._draw_found(image, found)

    def draw(self, batch: Any) -> list[Tensor]:
        """Return pictures (3, H, W) uint8 with the true objects on the left and those found on the right."""
        pictures = []
        found = self.detect(batch["images"])
        for index, image, target, row in zip(
            batch["indices"].tolist(), batch["images"], batch["targets"], found, strict=True
        ):
            if index == FILLER:
                continue
            labels = target["labels"].tolist()
            names = [self.name_of(label) for label in labels]
            true = draw_objects(image, target["boxes"], labels, names, target.get("masks"))
            pictures.append(beside(true, self._draw_found(image, row)))
        return pictures

    def _draw_found(self, image: Tensor, found: Detections) -> Tensor:
        sure = found["scores"] >= self.drawn_score
        labels = found["labels"][sure].tolist()
        scores = found["scores"][sure].tolist()
        texts = [f"{self.name_of(label)} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        masks = found["masks"][sure] if "masks" in found else None
        return draw_objects(image, found["boxes"][sure], labels, texts, masks)


def _single(target: Boxes) -> dict[str, Tensor]:
    """Return the objects that a loss looks at: those that are no crowd."""
    keep = target["iscrowd"] == 0 if "iscrowd" in target else slice(None)
    return {name: target[name][keep] for name in ("boxes", "labels", "masks") if name in target}
