"""What models that make pictures share: the noise of each example, pictures by number and class, and their files."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.data.batches import GenerationBatch
from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.pictures import as_rgb
from lightning_bigmodels.png import Drawn
from lightning_bigmodels.tasks.named_classes import NamedClasses
from lightning_bigmodels.tasks.sample_noise import EVALUATION, SampleNoise
from lightning_bigmodels.tasks.task import Phase


class PictureGeneration(NamedClasses, ABC):
    """A Task whose network makes pictures out of noise, on their own or as their class wants.

    A picture is a function of the weights, `noise_seed`, its number and its class, whatever batch or process makes it:
    the first ones of a sample grid, of `SampleQuality` and of predict are the same.

    Args:
        image_size: Height and width of the pictures, or both as a list.
        channels: Channels of the pictures.
        num_classes: Classes that the pictures are made by; 0: none.
        noise_seed: Chooses all noise, in training and when pictures are made.
        kwargs: The arguments of `Task`.

    Attributes:
        image_shape: Channels, height and width of a picture.

    Raises:
        InputError: a number is out of its range.
    """

    predict_help = "make pictures"

    def __init__(
        self,
        image_size: int | list[int],
        channels: int = 3,
        num_classes: int = 0,
        noise_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
        if len(size) != 2 or min(size) < 1:
            raise InputError(f"image_size is {image_size}; give one number of 1 or more, or two: height and width")
        for name, value, bound in [("channels", channels, 1), ("num_classes", num_classes, 0)]:
            if value < bound:
                raise InputError(f"{name} is {value}; set it to {bound} or more")
        super().__init__(num_classes, **kwargs)
        self.image_shape = (channels, size[0], size[1])
        self.noise_seed = noise_seed
        self._made: dict[int, Tensor] = {}

    @abstractmethod
    def generate_pictures(self, noise: SampleNoise, labels: Tensor | None = None) -> Tensor:
        """Return (B, C, H, W) uint8 pictures, made of nothing but noise and labels.

        The caller has put the network into evaluation mode and switched gradients off.

        Args:
            noise: Of the B pictures.
            labels: (B,) int64 classes; not there where `num_classes` is 0.
        """

    def noise(self, phase: Phase, indices: Tensor) -> SampleNoise:
        """Return the noise of a batch's examples: of this epoch in training, else always the same."""
        return SampleNoise(indices, self.noise_seed, self.current_epoch if phase == "train" else EVALUATION)

    def labels_in_turn(self, indices: Tensor) -> Tensor | None:
        """Return (B,) int64 the classes of pictures by their numbers, one after the other; None without classes."""
        return indices.clamp(min=0) % self.num_classes if self.num_classes else None

    def check_pictures(self, images: Tensor) -> None:
        """Refuse a batch of pictures of another shape than the network's.

        Raises:
            InputError: the message names the argument of the data.
        """
        found, wanted = tuple(images.shape[1:]), self.image_shape
        if found[0] != wanted[0]:
            raise InputError(
                f"the pictures have {found[0]} channels and the network {wanted[0]}; set data.channels to it"
            )
        if found != wanted:
            raise InputError(
                f"the pictures are {found[1]} x {found[2]} and the network makes {wanted[1]} x {wanted[2]}; set "
                f"data.image_size to {list(wanted[1:])}"
            )

    @override
    def predict_step(self, batch: GenerationBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return for each picture to be made its number, seed, class and file; `draw_predictions` has the pictures."""
        if "images" in batch:
            raise InputError(
                f"{type(self).__name__} makes pictures and predicts nothing of given ones; set data.num_generated to "
                f"how many it is to make"
            )
        indices = batch["indices"]
        labels = self._labels_of(batch)
        pictures = self.generate_pictures(self.noise("test", indices), labels)
        self._made = dict(zip(indices.tolist(), pictures, strict=True))
        rows: list[dict[str, Any]] = [
            {"index": index, "seed": self.noise_seed, "picture": f"predictions/{_stem(index)}.png"}
            for index in self._made
        ]
        if labels is not None:
            for row, label in zip(rows, labels.tolist(), strict=True):
                row["class"] = self.class_name(label)
        return rows

    @override
    def draw_predictions(self, batch: GenerationBatch, rows: list[dict[str, Any]]) -> Iterator[tuple[str, Drawn]]:
        for row in rows:
            yield _stem(row["index"]), as_rgb(self._made[row["index"]])

    def _labels_of(self, batch: GenerationBatch) -> Tensor | None:
        """Return (B,) int64 the classes that a batch asks for."""
        names = batch.get("classes")
        if names is None:
            return self.labels_in_turn(batch["indices"])
        if not self.num_classes:
            raise InputError("the model makes pictures of no class in particular; remove data.generated_classes")
        known = {self.class_name(number): number for number in range(self.num_classes)}
        for name in names:
            if name not in known:
                raise InputError(
                    f"data.generated_classes names {name!r}, which the model does not know{near(name, known)}"
                )
        return torch.tensor([known[name] for name in names], device=batch["indices"].device)


def _stem(index: int) -> str:
    return f"{index:06d}"
