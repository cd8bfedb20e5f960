"""Mixup and CutMix on batches, in the training step."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.errors import InputError


class Mixing:
    """Mixes each picture of a batch, and its labels, with the one before it; one of two ways, drawn for each batch.

    All that is drawn comes from torch's global stream, which checkpoints hold. A picture that counts for nothing takes
    its share of the weight with it.

    Source: Zhang et al. 2018, "mixup"; Yun et al. 2019, "CutMix"; through torchvision's v2 transforms.

    Args:
        num_classes: K.
        mixup_alpha: Both parameters of the Beta distribution of the weight of one of two pictures; 0: no mixup.
        cutmix_alpha: The same for the area of one picture in the other; 0: no CutMix.
        multi_label: Whether a picture has several labels.
    """

    def __init__(self, num_classes: int, mixup_alpha: float, cutmix_alpha: float, multi_label: bool) -> None:
        for name, value in {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha}.items():
            if value < 0:
                raise InputError(f"{name} is {value}; it must be 0 or more")
        self._num_classes, self._multi_label = num_classes, multi_label
        ways = [way(alpha=alpha) for way, alpha in ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha)) if alpha > 0]
        self._mix = v2.RandomChoice(ways) if ways else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with pictures float32 in [0, 1] and labels (B, K) float32; as it is where nothing mixes."""
        if self._mix is None:
            return batch
        images, labels = batch["images"], batch["labels"]
        images = images if images.is_floating_point() else images.float() / 255
        if not labels.is_floating_point():
            counted = (labels != IGNORED).float()[:, None]
            labels = one_hot(labels.clamp(min=0), self._num_classes).float()
        else:
            counted = (labels[:, :1] != IGNORED).float()
        images, mixed = self._mix(images, torch.cat([labels * counted, counted], dim=1))
        return {**batch, "images": images, "labels": self._labels(mixed)}

    def _labels(self, mixed: Tensor) -> Tensor:
        labels, counted = mixed[:, :-1], mixed[:, -1:]
        if not self._multi_label:
            return labels  # in sum what counts
        # none of several labels would be a claim
        return torch.where(counted > 0.999, labels, torch.full_like(labels, IGNORED))
