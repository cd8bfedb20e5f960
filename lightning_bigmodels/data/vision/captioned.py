"""Pictures with captions as batches: read, fitted to the shape of their bucket, stacked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.data.vision.buckets import nearest_bucket
from lightning_bigmodels.data.vision.captions import Captioned
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.transforms import Transforms
from lightning_bigmodels.errors import InputError


class CaptionedPicture(NamedTuple):
    """A picture (C, H, W) uint8, or none where only captions are wanted, with the transform of its bucket."""

    image: Tensor | None
    transforms: Transforms | None


class CaptionedPictures(Examples[CaptionedPicture]):
    """Pictures with their captions.

    Attributes:
        buckets: (N,) int64 bucket of each example.
        with_pictures: Whether batches hold pictures; a network that has their latents already does without.

    Args:
        part: The examples.
        transforms: For each bucket, from a picture as it was read to one of a batch.
        channels: Channels of each.
        seed: With epoch and index it fixes what is drawn for a training example.
        on_error: Whether a picture that cannot be read ends the run, or is left out.
    """

    def __init__(
        self,
        part: Captioned,
        transforms: Sequence[Transforms],
        channels: int,
        seed: int = 0,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(seed, on_error)
        self.part = part
        self.transforms = list(transforms)
        self.channels = channels
        self.with_pictures = True
        self.buckets = torch.zeros(len(part), dtype=torch.int64)
        if len(self.transforms) > 1:
            sizes = [each.size(None) for each in self.transforms]
            for index in range(len(part)):
                try:
                    self.buckets[index] = nearest_bucket(part.size(index, channels), sizes)
                except InputError:
                    if on_error == "error":
                        raise
                    # told when it is read

    @property
    def captions(self) -> list[str]:
        """The caption of each example."""
        return [self.part.caption(index) for index in range(len(self))]

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width of an example in a batch."""
        return self.transforms[int(self.buckets[index])].size(None)

    @override
    def __len__(self) -> int:
        return len(self.part)

    @override
    def name(self, index: int) -> str:
        return self.part.pictures.name(int(self.part.rows[index]))

    @override
    def read(self, index: int) -> CaptionedPicture:
        transforms = self.transforms[int(self.buckets[index])]
        if not self.with_pictures:
            return CaptionedPicture(None, transforms)
        return CaptionedPicture(self.part.pictures.read(int(self.part.rows[index]), self.channels), transforms)

    @override
    def prepare(self, example: CaptionedPicture, epoch: int | None) -> CaptionedPicture:
        if example.image is None or example.transforms is None:
            return example
        return example._replace(image=example.transforms(example.image, epoch))

    @override
    def filler(self, epoch: int | None) -> CaptionedPicture:
        return CaptionedPicture(None, None)  # as large as the others of its batch

    @override
    def collate(self, indices: Tensor, examples: list[CaptionedPicture]) -> dict[str, Any]:
        captions = ["" if index == FILLER else self.part.caption(index) for index in indices.tolist()]
        batch: dict[str, Any] = {"captions": captions, "indices": indices}
        if not self.with_pictures:
            return batch
        size = next(
            (each.image.shape[1:] for each in examples if each.image is not None), self.transforms[0].size(None)
        )
        batch["images"] = torch.zeros((len(examples), self.channels, *size), dtype=torch.uint8)
        for image, example in zip(batch["images"], examples, strict=True):
            if example.image is not None:
                image.copy_(example.image)
        return batch

    @override
    def digest(self, index: int) -> str:
        return self.part.pictures.digest(int(self.part.rows[index]))
