"""The class of each pixel from the outlines in a COCO JSON file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.data.vision.coco import decode_mask, is_outline, read_entries, read_json
from lightning_bigmodels.errors import InputError, near

BACKGROUND = "background"


class CocoMasks:
    """Masks from the polygons and run lengths of a COCO JSON file.

    Where objects overlap the smaller one lies on top. A crowd (`iscrowd`) is ignored. What no object covers is
    class 0, `background`.

    Args:
        path: The file.
        class_names: `background` and those categories that count, in order; None: all, by their ids. An object of
            another category is background.

    Raises:
        InputError: the file is missing or broken, or has no category of a name; the message names the annotation.
    """

    def __init__(self, path: Path, class_names: Sequence[str] | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such file; correct the path in data.masks")
        content = read_json(path)
        categories = sorted(read_entries(path, content, "categories", ("id", "name")), key=lambda entry: entry["id"])
        known = {str(entry["name"]): entry["id"] for entry in categories}
        self.class_names = [BACKGROUND, *known] if class_names is None else list(class_names)
        if self.class_names[0] != BACKGROUND:
            raise InputError(f"the first of class_names is {self.class_names[0]!r}; put {BACKGROUND!r} before it")
        for name in self.class_names[1:]:
            if name not in known:
                raise InputError(f"{path} has no category {name!r}{near(name, known)}")
        counted = {known[name]: number for number, name in enumerate(self.class_names) if number}
        self._numbers = {number: counted.get(number, 0) for number in known.values()}
        self.images = {
            str(entry["file_name"]): entry for entry in read_entries(path, content, "images", ("id", "file_name"))
        }
        self._objects: dict[Any, list[dict[str, Any]]] = {entry["id"]: [] for entry in self.images.values()}
        for entry in read_entries(path, content, "annotations", ("id", "image_id", "category_id")):
            self._check(entry)
            self._objects[entry["image_id"]].append(entry)

    def _check(self, entry: dict[str, Any]) -> None:
        where = f"{self.path}, annotation {entry['id']}"
        if entry["image_id"] not in self._objects:
            raise InputError(
                f"{where}: there is no image {entry['image_id']}; add it to images or remove the annotation"
            )
        if entry["category_id"] not in self._numbers:
            raise InputError(f"{where}: there is no category {entry['category_id']}; add it or correct the annotation")
        if not is_outline(entry.get("segmentation")):
            raise InputError(
                f"{where}: the segmentation is neither polygons of three points or more nor run lengths; correct or "
                f"remove the annotation"
            )

    def read(self, name: str, size: tuple[int, int]) -> Tensor:
        """Return (H, W) int16: the class of each pixel, or `IGNORED`.

        Args:
            name: The picture's `file_name`.
            size: Its height and width.

        Raises:
            InputError: the file has another size, or run lengths have.
        """
        image = self.images[name]
        stated = (image.get("height", size[0]), image.get("width", size[1]))
        if stated != size:
            raise InputError(
                f"{self.path} says that {name} is {stated[0]} x {stated[1]} pixels, and the file is {size[0]} x "
                f"{size[1]}; annotate the file at its size"
            )
        regions = []
        for entry in self._objects[image["id"]]:
            region = decode_mask(entry["segmentation"], *size).bool()
            if region.shape != size:
                raise InputError(
                    f"{self.path}, annotation {entry['id']}: its run lengths are of {tuple(region.shape)}, and the "
                    f"picture is of {size}; correct or remove the annotation"
                )
            regions.append((int(region.sum()), region, self._number(entry)))
        mask = torch.zeros(size, dtype=torch.int16)
        for _, region, number in sorted(regions, key=lambda triple: -triple[0]):
            mask[region] = number
        return mask

    def classes(self, name: str) -> list[str]:
        """Return the names of the classes that a picture's objects have."""
        numbers = {self._number(entry) for entry in self._objects[self.images[name]["id"]]} - {IGNORED, 0}
        return [self.class_names[number] for number in sorted(numbers)]

    def _number(self, entry: dict[str, Any]) -> int:
        return IGNORED if entry.get("iscrowd") else self._numbers[entry["category_id"]]
