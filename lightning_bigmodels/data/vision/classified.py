"""Pictures with classes as batches: read, cropped to one size, augmented, stacked."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.labelled import Labelled
from lightning_bigmodels.data.vision.pictures import Pictures
from lightning_bigmodels.data.vision.transforms import Transforms


class ClassifiedPicture(NamedTuple):
    """A picture (C, H, W) uint8."""

    image: Tensor


class BarePictures(Examples[ClassifiedPicture]):
    """Pictures of which nothing is known, such as those to predict.

    Args:
        pictures: Where they lie.
        transforms: From a picture as it was read to one of a batch.
        channels: Channels of each.
        seed: With epoch and index it fixes what is drawn for a training example.
        on_error: Whether a picture that cannot be read ends the run, or is left out.
        with_files: Whether batches hold the names of the files.
    """

    def __init__(
        self,
        pictures: Pictures,
        transforms: Transforms,
        channels: int,
        seed: int = 0,
        on_error: OnError = "error",
        with_files: bool = True,
    ) -> None:
        super().__init__(seed, on_error)
        self.pictures = pictures
        self.transforms = transforms
        self.channels = channels
        self.with_files = with_files

    def row(self, index: int) -> int:
        """Return the place of an example among the pictures."""
        return index

    @override
    def __len__(self) -> int:
        return len(self.pictures)

    @override
    def name(self, index: int) -> str:
        return self.pictures.name(self.row(index))

    @override
    def read(self, index: int) -> ClassifiedPicture:
        return ClassifiedPicture(self.pictures.read(self.row(index), self.channels))

    @override
    def prepare(self, example: ClassifiedPicture, epoch: int | None) -> ClassifiedPicture:
        return example._replace(image=self.transforms(example.image, epoch))

    @override
    def filler(self, epoch: int | None) -> ClassifiedPicture:
        size = self.transforms.size(epoch)
        return ClassifiedPicture(torch.zeros(self.channels, *size, dtype=torch.uint8))

    @override
    def collate(self, indices: Tensor, examples: list[ClassifiedPicture]) -> dict[str, Any]:
        first = examples[0].image
        # Planes, although decoders write channels innermost: a network that wants those turns its batch round on its
        # device, and in one that does not the gradients would have another layout than the weights.
        images = torch.empty((len(examples), *first.shape), dtype=torch.uint8)
        for image, example in zip(images, examples, strict=True):
            image.copy_(example.image)
        batch: dict[str, Any] = {"images": images, "labels": self.labels(indices), "indices": indices}
        if self.with_files:
            batch["files"] = ["" if index == FILLER else self.name(index) for index in indices.tolist()]
        return batch

    def labels(self, indices: Tensor) -> Tensor:
        """Return the labels of some examples; what has none is ignored."""
        return torch.full(indices.shape, IGNORED)

    @override
    def digest(self, index: int) -> str:
        return self.pictures.digest(self.row(index))


class ClassifiedPictures(BarePictures):
    """Pictures with their classes.

    Args:
        part: The examples.
        transforms: From a picture as it was read to one of a batch.
        channels: Channels of each.
        seed: With epoch and index it fixes what is drawn for a training example.
        on_error: Whether a picture that cannot be read ends the run, or is left out.
        with_files: Whether batches hold the names of the files.
    """

    def __init__(
        self,
        part: Labelled,
        transforms: Transforms,
        channels: int,
        seed: int = 0,
        on_error: OnError = "error",
        with_files: bool = False,
    ) -> None:
        super().__init__(part.pictures, transforms, channels, seed, on_error, with_files)
        self.part = part
        values = torch.from_numpy(part.labels)
        # the last row is that of index -1, which counts for nothing
        self._labels = _with_ignored(values.float() if part.multi_label else values)
        self._groups = None if part.groups is None else _with_ignored(torch.from_numpy(part.groups))

    @override
    def __len__(self) -> int:
        return len(self.part)

    @override
    def row(self, index: int) -> int:
        return int(self.part.rows[index])

    @override
    def labels(self, indices: Tensor) -> Tensor:
        return self._labels[indices]

    @override
    def collate(self, indices: Tensor, examples: list[ClassifiedPicture]) -> dict[str, Any]:
        batch = super().collate(indices, examples)
        return batch if self._groups is None else batch | {"groups": self._groups[indices]}

    @override
    def classes(self, index: int) -> list[str]:
        return self.part.names_of(index)


def _with_ignored(values: Tensor) -> Tensor:
    return torch.cat([values, torch.full_like(values[:1], IGNORED)])
