"""Pictures with masks as batches: read, scaled, cut, augmented together, stacked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.mask_pairs import Pairs
from lightning_bigmodels.data.vision.mask_transforms import MaskTransforms


class SegmentedPicture(NamedTuple):
    """A picture (C, H, W) uint8, its mask (H, W), and height and width of the file's own picture."""

    image: Tensor
    mask: Tensor
    size: tuple[int, int]


class SegmentedPictures(Examples[SegmentedPicture]):
    """Pictures with the class of each pixel.

    Args:
        pairs: Where they lie.
        transforms: From a picture and mask as they were read to those of a batch.
        channels: Channels of each picture.
        seed: With epoch and index it fixes what is drawn for a training example.
        on_error: Whether files that cannot be read end the run, or are left out.
        with_files: Whether batches hold what predictions need to lie on the files' own pictures: names, sizes, regions.
        class_names: The classes, which a check counts in the masks; empty: it does not.
    """

    def __init__(
        self,
        pairs: Pairs,
        transforms: MaskTransforms,
        channels: int,
        seed: int = 0,
        on_error: OnError = "error",
        with_files: bool = False,
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__(seed, on_error)
        self.pairs = pairs
        self.transforms = transforms
        self.channels = channels
        self.with_files = with_files
        self.class_names = list(class_names)

    @override
    def __len__(self) -> int:
        return len(self.pairs)

    @override
    def name(self, index: int) -> str:
        return self.pairs.name(index)

    @override
    def read(self, index: int) -> SegmentedPicture:
        image, mask = self.pairs.read(index, self.channels)
        size = (image.shape[1], image.shape[2])
        return SegmentedPicture(image, torch.full(size, IGNORED, dtype=torch.int16) if mask is None else mask, size)

    @override
    def prepare(self, example: SegmentedPicture, epoch: int | None) -> SegmentedPicture:
        image, mask = self.transforms(example.image, example.mask, epoch)
        return SegmentedPicture(image, mask, example.size)

    @override
    def filler(self, epoch: int | None) -> SegmentedPicture:
        size = self.transforms.size(epoch)
        image = torch.zeros(self.channels, *size, dtype=torch.uint8)
        return SegmentedPicture(image, torch.full(size, IGNORED), size)

    @override
    def collate(self, indices: Tensor, examples: list[SegmentedPicture]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "images": torch.stack([example.image for example in examples]),
            "masks": torch.stack([example.mask for example in examples]),
            "indices": indices,
        }
        if self.with_files:
            batch["sizes"] = torch.tensor([example.size for example in examples])
            batch["regions"] = torch.tensor([self.transforms.region(example.size) for example in examples])
            batch["files"] = ["" if index == FILLER else self.pairs.short_name(index) for index in indices.tolist()]
        return batch

    @override
    def classes(self, index: int) -> list[str]:
        return self.pairs.classes(index)

    @override
    def shown(self, index: int, example: SegmentedPicture) -> list[str]:
        found = example.mask.unique().tolist() if self.class_names else []
        return [self.class_names[value] for value in found if value != IGNORED]

    @override
    def digest(self, index: int) -> str:
        return self.pairs.digest(index)
