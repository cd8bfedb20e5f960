"""COCO's average precision of boxes and masks, the same on any number of processes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.strategies.collectives import gather

_STATES = (
    "detection_box",
    "detection_mask",
    "detection_scores",
    "detection_labels",
    "groundtruth_box",
    "groundtruth_mask",
    "groundtruth_labels",
    "groundtruth_crowds",
    "groundtruth_area",
)


_VALUES = ("map", "map_50", "map_75", "mar_100", "map_per_class")


class AveragePrecision(MeanAveragePrecision):
    """torchmetrics' mean average precision over pictures that each count once, in the order of their indices.

    torchmetrics 1.9 gathers its lists element by element, which hangs where processes hold unequally many pictures, and
    leaves them in an order in which equal scores rank differently from one process's.

    Args:
        masks: Whether masks are judged beside the boxes.
    """

    pictures: list[Tensor]

    def __init__(self, masks: bool = False) -> None:
        super().__init__(
            iou_type=("bbox", "segm") if masks else "bbox",
            # torchmetrics' own are float32: an overlap of exactly 0.6 would be too little for 0.60000002
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            class_metrics=True,
        )
        self.warn_on_many_detections = False  # COCO's metric takes the best 100 of each class, and so does this one
        self.masks = masks
        self.add_state("pictures", default=[], dist_reduce_fx=None)

    def add(self, indices: Tensor, detections: Sequence[dict[str, Tensor]], targets: Sequence[Any]) -> None:
        """Add the pictures of a batch, those that count for nothing left out.

        Args:
            indices: (B,) int64 place of each in its part, or `FILLER`.
            detections: `boxes`, `labels`, `scores` and, if judged, `masks` (N, H, W) bool of each.
            targets: The objects of each (`Boxes`).
        """
        counted = [row for row, index in enumerate(indices.tolist()) if index != FILLER]
        self.update([_plain(detections[row]) for row in counted], [_plain(targets[row]) for row in counted])
        self.pictures.extend(indices[row].cpu() for row in counted)

    @override
    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None) -> None:
        names = [name for name in _STATES if len(getattr(self, name)) == len(self.pictures)]
        everyone = gather({name: getattr(self, name) for name in (*names, "pictures")})
        places = {
            int(index): (process, row)
            for process, states in enumerate(everyone)
            for row, index in enumerate(states["pictures"])
        }
        order = [places[index] for index in sorted(places)]
        for name in (*_STATES, "pictures"):
            if all(name in states for states in everyone):  # masks are not, where only boxes are judged
                setattr(self, name, [everyone[process][name][row] for process, row in order])

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return `map`, `map_50`, ... and `map_per_class` of `classes`; with masks, each behind `bbox_` or `segm_`."""
        if self.pictures:
            return super().compute()
        names = [f"{p}{name}" for p in (("bbox_", "segm_") if self.masks else ("",)) for name in _VALUES]
        none = {name: torch.empty(0) if name.endswith("class") else torch.tensor(-1.0) for name in names}
        return {"classes": torch.empty(0, dtype=torch.int64), **none}


def _plain(objects: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what is compared on the CPU, where it is compared, in float32."""
    moved = {name: value.detach().cpu() for name, value in objects.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in moved.items()}
