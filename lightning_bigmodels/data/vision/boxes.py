"""Pictures with the boxes of the objects in them, as every reader returns them, and which boxes are refused."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, UnidentifiedImageError

from lightning_bigmodels.errors import near, refuse

BadBoxes = Literal["error", "drop"]
_ROUNDING = 1.0
"""Pixels by which a box may overshoot its picture: tools round, and count from 0 or 1."""
_EXIF_ORIENTATION = 274
_SIDEWAYS = (5, 6, 7, 8)


class Object(NamedTuple):
    """One object of a picture.

    Attributes:
        box: Left, top, right, bottom in pixels.
        label: Class from 1.
        where: Where it is written, such as `line 3`.
        iscrowd: Whether the box holds a crowd, which COCO's metric neither demands nor punishes.
        area: In square pixels.
        segmentation: Its outline as COCO writes it: polygons or run lengths.
    """

    box: tuple[float, float, float, float]
    label: int
    where: str
    iscrowd: bool
    area: float
    segmentation: Any


@dataclass
class AnnotatedPicture:
    """A picture's file and what is in it.

    Attributes:
        file: Where its pixels are.
        image_id: What the annotations call it.
        height: In pixels; None where neither annotations nor file say it.
        width: In pixels, as `height`.
        objects: What is in it; may be empty.
    """

    file: Path
    image_id: int | str
    height: int | None = None
    width: int | None = None
    objects: list[Object] = field(default_factory=list)


class Annotations(NamedTuple):
    """What a reader returns.

    Attributes:
        pictures: In the order of the file.
        class_names: Name of each label, from label 1 on.
        category_ids: What the annotations call each class: COCO's numbers, which have gaps.
        dropped: What was wrong with each box that was left out.
    """

    pictures: list[AnnotatedPicture]
    class_names: list[str]
    category_ids: list[int]
    dropped: list[str]


class Collector:
    """Checks boxes, and adds the good ones to their pictures.

    Args:
        class_names: Name of each label, from label 1 on.
        bad_boxes: Whether a bad box is an error, or left out and listed in `dropped`.
    """

    def __init__(self, class_names: Sequence[str], bad_boxes: BadBoxes = "error") -> None:
        self.class_names = list(class_names)
        self.bad_boxes = bad_boxes
        self.dropped: list[str] = []
        self._labels = {name: label for label, name in enumerate(self.class_names, start=1)}

    def add(
        self,
        picture: AnnotatedPicture,
        box: Sequence[Any],
        class_name: str,
        source: Path,
        where: str,
        iscrowd: bool = False,
        area: float | None = None,
        segmentation: Any = None,
    ) -> None:
        """Add an object to its picture.

        Args:
            picture: Changed in place.
            box: Left, top, right, bottom in pixels; may be anything.
            class_name: Its class.
            source: File in which the object is written.
            where: Its line or number there.
            iscrowd: Whether the box holds a crowd.
            area: In square pixels; None: the box's.
            segmentation: Its outline.

        Raises:
            InputError: the box is bad.
        """
        fault = box_fault(box, picture.height, picture.width)
        if fault is None and class_name not in self._labels:
            fault = f"is of the unknown class {class_name!r}{near(class_name, self.class_names)}"
        if fault is not None:
            shown = ", ".join(str(value) for value in box) if isinstance(box, (list, tuple)) else str(box)
            message = f"{source}, {where}: box [{shown}] of {picture.file.name} {fault}"
            if self.bad_boxes == "error":
                refuse(f"{message}; correct or remove it, or set data.bad_boxes to drop")
            else:
                self.dropped.append(message)
            return
        left, top, right, bottom = (float(value) for value in box)
        if picture.width is not None and picture.height is not None:
            left, right = (min(max(x, 0.0), float(picture.width)) for x in (left, right))
            top, bottom = (min(max(y, 0.0), float(picture.height)) for y in (top, bottom))
        area = (right - left) * (bottom - top) if area is None else area
        box = (left, top, right, bottom)
        picture.objects.append(Object(box, self._labels[class_name], where, iscrowd, area, segmentation))


def box_fault(box: Sequence[Any], height: int | None, width: int | None) -> str | None:
    """Return what is wrong with a box (left, top, right, bottom) in a picture of this size; None: nothing.

    One pixel beyond the picture's edge is rounding, and clipped.
    """
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return "is not four numbers"
    try:
        left, top, right, bottom = (float(value) for value in box)
    except (TypeError, ValueError):
        return "is not four numbers"
    if not all(math.isfinite(value) for value in (left, top, right, bottom)):
        return "is not four finite numbers"
    if right < left or bottom < top:
        return "is inverted (left, top, right, bottom)"
    if right == left or bottom == top:
        return "is empty"
    if width is not None and height is not None:
        inside = left >= -_ROUNDING and top >= -_ROUNDING
        inside = inside and right <= width + _ROUNDING and bottom <= height + _ROUNDING
        if not inside:
            return f"lies outside of the picture's {width} x {height} pixels"
        if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
            return "is empty within the picture"
    return None


def picture_size(file: Path) -> tuple[int, int] | None:
    """Return a picture's height and width, turned as its EXIF says, without its pixels; None where it is no picture."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            sideways = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return None  # reading its pixels tells what is wrong with it, and may leave it out
    return (width, height) if sideways else (height, width)


def check_files(pictures: Sequence[AnnotatedPicture], source: Path, wheres: Sequence[str]) -> None:
    """Refuse annotations of pictures that are not there, all of them at once.

    Args:
        pictures: What is annotated.
        source: File of the annotations.
        wheres: Line or number of each picture in it.
    """
    missing = [(where, p.file) for where, p in zip(wheres, pictures, strict=True) if not p.file.is_file()]
    if missing:
        where, file = missing[0]
        more = f" ({len(missing)} pictures are missing)" if len(missing) > 1 else ""
        refuse(
            f"{source}, {where}: there is no picture {file}{more}; set data.images to the folder of the pictures or "
            f"remove the entry"
        )
