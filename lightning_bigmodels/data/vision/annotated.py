"""Pictures with boxes as examples: read, augmented with their boxes, put into batches of different sizes."""

import copy
from abc import ABC
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from typing_extensions import override

from lightning_bigmodels.data.batches import Boxes
from lightning_bigmodels.data.vision.boxes import AnnotatedPicture
from lightning_bigmodels.data.vision.coco import decode_mask
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.files import read_picture
from lightning_bigmodels.errors import InputError

_FILLER_SIZE = 32


class DetectionExample(NamedTuple):
    """A picture (3, H, W) uint8 and the objects in it."""

    image: Tensor
    target: Boxes


class DetectionExamples(Examples[DetectionExample], ABC):
    """One part of a data set of pictures with boxes; a subclass reads them.

    Args:
        augmentations: What is done to training pictures, with their boxes and masks.
        min_box_size: Pixels of width and height; of a training picture smaller boxes are left out.
        seed: With epoch and index it fixes what is drawn for a training example.
        on_error: Whether a file that cannot be read ends the run, or is left out and named in the batch's `errors`.
        with_files: Whether batches name files and `image_ids`, as predictions need.
    """

    def __init__(
        self,
        augmentations: Sequence[nn.Module] = (),
        min_box_size: float = 1.0,
        seed: int = 0,
        on_error: OnError = "error",
        with_files: bool = False,
    ) -> None:
        super().__init__(seed, on_error)
        self.augmentations = list(augmentations)
        self.min_box_size = min_box_size
        self.with_files = with_files

    def image_id(self, index: int) -> int | str:
        """Return what the annotations call a picture; without any, its place."""
        return index

    def listed(self) -> "DetectionExamples":
        """Return the same examples, whose batches name files and `image_ids`."""
        other = copy.copy(self)
        other.with_files = True
        return other

    @override
    def prepare(self, example: DetectionExample, epoch: int | None) -> DetectionExample:
        return example if epoch is None else augment(example, self.augmentations, self.min_box_size)

    @override
    def filler(self, epoch: int | None) -> DetectionExample:
        return DetectionExample(torch.zeros(3, _FILLER_SIZE, _FILLER_SIZE, dtype=torch.uint8), no_boxes())

    @override
    def collate(self, indices: Tensor, examples: list[DetectionExample]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "images": [example.image for example in examples],
            "targets": [example.target for example in examples],
            "indices": indices,
        }
        if self.with_files:
            known = indices.tolist()
            batch["files"] = [self.name(index) if index >= 0 else "" for index in known]
            batch["image_ids"] = [self.image_id(index) if index >= 0 else -1 for index in known]
        return batch


class AnnotatedPictures(DetectionExamples):
    """Pictures of files, with boxes and, where wanted, masks.

    Args:
        pictures: The files and what is in them.
        class_names: Name of each label, from label 1 on.
        masks: Whether targets hold masks.
        kwargs: The arguments of `DetectionExamples`.
    """

    def __init__(
        self, pictures: Sequence[AnnotatedPicture], class_names: Sequence[str], masks: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.pictures = list(pictures)
        self.class_names = list(class_names)
        self.masks = masks

    @override
    def __len__(self) -> int:
        return len(self.pictures)

    @override
    def name(self, index: int) -> str:
        return str(self.pictures[index].file)

    @override
    def image_id(self, index: int) -> int | str:
        return self.pictures[index].image_id

    @override
    def classes(self, index: int) -> list[str]:
        return [self.class_names[thing.label - 1] for thing in self.pictures[index].objects]

    @override
    def read(self, index: int) -> DetectionExample:
        picture = self.pictures[index]
        image = read_picture(picture.file)
        height, width = image.shape[1:]
        if picture.height is not None and (picture.height, picture.width) != (height, width):
            raise InputError(
                f"{picture.file} has {width} x {height} pixels, and its annotations say {picture.width} x "
                f"{picture.height}: boxes would not lie on their objects; replace the picture or its annotations"
            )
        things = picture.objects
        target: Boxes = {
            "boxes": torch.tensor([thing.box for thing in things], dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([thing.label for thing in things], dtype=torch.int64),
            "iscrowd": torch.tensor([int(thing.iscrowd) for thing in things], dtype=torch.int64),
            "area": torch.tensor([thing.area for thing in things], dtype=torch.float32),
        }
        if self.masks:
            decoded = [decode_mask(thing.segmentation, height, width) for thing in things]
            target["masks"] = torch.stack(decoded) if decoded else torch.zeros(0, height, width, dtype=torch.uint8)
        return DetectionExample(image, target)


class UnannotatedPictures(DetectionExamples):
    """Pictures of which nothing is known.

    Args:
        files: Their paths.
        on_error: Whether a file that cannot be read ends the run, or is left out.
    """

    def __init__(self, files: Sequence[Path], on_error: OnError = "error") -> None:
        super().__init__(on_error=on_error, with_files=True)
        self.files = list(files)

    @override
    def __len__(self) -> int:
        return len(self.files)

    @override
    def name(self, index: int) -> str:
        return str(self.files[index])

    @override
    def read(self, index: int) -> DetectionExample:
        return DetectionExample(read_picture(self.files[index]), no_boxes())


def no_boxes() -> Boxes:
    """Return the objects of a picture that has none."""
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def augment(example: DetectionExample, augmentations: Sequence[nn.Module], min_box_size: float) -> DetectionExample:
    """Return a training example: crowds left out, transformed, boxes clipped to the picture.

    Args:
        example: As it lies in its files.
        augmentations: torchvision's v2 transforms, which move boxes and masks with the pixels.
        min_box_size: Pixels; boxes less wide or less high than that are left out.
    """
    image, target = example
    single = target["iscrowd"] == 0 if "iscrowd" in target else torch.ones(len(target["labels"]), dtype=torch.bool)
    size = (image.shape[1], image.shape[2])
    sample: dict[str, Any] = {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(target["boxes"][single], format="XYXY", canvas_size=size),
        "labels": target["labels"][single],
    }
    if "masks" in target:
        sample["masks"] = tv_tensors.Mask(target["masks"][single])
    for transform in augmentations:
        sample = transform(sample)
    boxes = F.clamp_bounding_boxes(sample["boxes"]).as_subclass(Tensor)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    keep = (width >= min_box_size) & (height >= min_box_size) & (width > 0) & (height > 0)
    moved: Boxes = {"boxes": boxes[keep], "labels": sample["labels"][keep]}
    if "masks" in target:
        moved["masks"] = sample["masks"].as_subclass(Tensor)[keep]
    return DetectionExample(sample["image"].as_subclass(Tensor), moved)
