"""What pictures are: their number, sizes and channels, and what belongs to each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightning_bigmodels.advice.facts import Facts
from lightning_bigmodels.data.vision.box_files import read_csv, read_voc
from lightning_bigmodels.data.vision.boxes import Annotations, picture_size
from lightning_bigmodels.data.vision.captions import CaptionColumns, read_captions
from lightning_bigmodels.data.vision.cityscapes import CLASSES, cityscapes_parts
from lightning_bigmodels.data.vision.coco import read_coco
from lightning_bigmodels.data.vision.labelled import Labelled
from lightning_bigmodels.data.vision.mask_pairs import FilePairs
from lightning_bigmodels.data.vision.masks import MaskValues, read_mask
from lightning_bigmodels.data.vision.pictures import ArrayPictures, FilePictures, Pictures
from lightning_bigmodels.data.vision.sources import Reading, read_source
from lightning_bigmodels.errors import InputError, noting_refusals

_SIZES_READ = 200
_COLOURS_READ = 8
_MASKS_READ = 8
_MANY_VALUES = 64
_ANY_VALUE = MaskValues([str(value) for value in range(256)], ignored=())


class _Sizes(NamedTuple):
    sides: tuple[int, int] | None
    extremes: tuple[int, int] | None
    channels: int
    notes: tuple[str, ...]


# ---- the kinds


def look_at_classes(path: str, reading: Reading | None = None, data: Mapping[str, Any] | None = None) -> Facts:
    """Return the facts of what `Images` reads; pictures whose names and folders say no classes are only `pictures`.

    Args:
        path: A source of `Images`.
        reading: How it is read; None: as `Images` does by itself.
        data: Arguments of `Images`, beside the source.

    Raises:
        InputError: it cannot be read.
    """
    reading = reading or Reading()
    with noting_refusals() as refused:
        parts = read_source(path, reading)
    train = parts["train"]
    found = _measure(train.pictures, train.rows)
    common: dict[str, Any] = {
        "path": path,
        "parts": {name: len(part) for name, part in parts.items()},
        "sides": found.sides,
        "extremes": found.extremes,
        "channels": found.channels,
        "notes": (*_faults(refused), *found.notes),
    }
    arguments: dict[str, Any] = {"source": path, **(data or {})}
    if not _says_classes(train):
        return Facts("pictures", data={**arguments, "labelled": False}, **common)
    counts = dict(zip(train.class_names, train.counts().tolist(), strict=True))
    return Facts("classes", data=arguments, classes=counts, multi_label=train.multi_label, **common)


def look_at_captions(path: str, columns: CaptionColumns | None = None, data: Mapping[str, Any] | None = None) -> Facts:
    """Return the facts of what `CaptionedImages` reads.

    Raises:
        InputError: it cannot be read.
    """
    with noting_refusals() as refused:
        parts = read_captions(path, columns or CaptionColumns(), None, (0, 0))
    train = parts["train"]
    found = _measure(train.pictures, train.rows)
    words = sorted(len(train.caption(index).split()) for index in range(len(train)))
    return Facts(
        "captions",
        path,
        data={"source": path, **(data or {})},
        parts={name: len(part) for name, part in parts.items()},
        sides=found.sides,
        extremes=found.extremes,
        channels=found.channels,
        lengths=(words[len(words) // 2], words[-1]) if words else None,
        notes=(*_faults(refused), *found.notes),
    )


def look_at_boxes(path: Path, source: Path, images: Path | None) -> Facts:
    """Return the facts of what `DetectionImages` reads.

    Args:
        path: As the user named it.
        source: A COCO file, a CSV file of boxes, or a folder of Pascal VOC's XML files.
        images: Folder of the pictures; None: where the reader looks for them by itself.

    Raises:
        InputError: it cannot be read.
    """
    with noting_refusals() as refused:
        if source.suffix == ".json":
            found = read_coco(source, images, None, "drop")
        elif source.suffix == ".csv":
            found = read_csv(source, images, None, "drop")
        else:
            found = read_voc(source, images, None, "drop")
    sizes = _measure(FilePictures([picture.file for picture in found.pictures]), np.arange(len(found.pictures)))
    notes = [*_faults(refused), *sizes.notes]
    if found.dropped:
        notes.append(
            f"{len(found.dropped):,} boxes are bad, the first: {found.dropped[0]}; the command leaves them out"
        )
    empty = sum(not picture.objects for picture in found.pictures)
    if empty:
        notes.append(f"{empty:,} pictures have no box: a detector learns from them what is none")
    data: dict[str, Any] = {"source": str(source)}
    if images is not None:
        data["images"] = str(images)
    if found.dropped:
        data["bad_boxes"] = "drop"
    return Facts(
        "boxes",
        str(path),
        data=data,
        parts={"train": len(found.pictures)},
        classes=_counted(found),
        sides=sizes.sides,
        extremes=sizes.extremes,
        channels=sizes.channels,
        notes=tuple(notes),
    )


def look_at_masks(path: Path, images: Path, masks: Path, pairs: FilePairs) -> Facts:
    """Return the facts of what `SegmentationImages` reads from a folder of pictures and one of masks.

    Args:
        path: As the user named it.
        images: Folder of the pictures.
        masks: Folder of the masks.
        pairs: Those that belong together.

    Raises:
        InputError: a mask is no picture of values.
    """
    sizes = _measure(FilePictures([pairs.name(index) for index in range(len(pairs))]), np.arange(len(pairs)))
    counts: dict[int, int] = {}
    for index in _spread(len(pairs), _MASKS_READ):
        mask = _mask_of(pairs, index)
        for value in mask.unique().tolist():
            counts[value] = counts.get(value, 0) + 1
    values = sorted(counts)
    notes = list(sizes.notes)
    data: dict[str, Any] = {"source": str(images), "masks": str(masks)}
    if values == [0, 255]:
        data |= {"class_names": ["background", "object"], "class_values": [0, 255], "ignored_value": None}
        names = {0: "background", 255: "object"}
    else:
        classes = [value for value in values if value != 255]
        names = {value: str(value) for value in classes}
        data["class_names"] = [names[value] for value in classes]
        if classes != list(range(len(classes))):
            data["class_values"] = classes
        notes.append(f"the classes have no names: call them in data.class_names, in the order of the values {classes}")
        if 255 in values:
            notes.append("the value 255 is ignored, as most masks mean it")
    notes.append(f"the values are those of {min(len(pairs), _MASKS_READ)} masks; others may have more of them")
    return Facts(
        "masks",
        str(path),
        data=data,
        parts={"train": len(pairs)},
        classes={names[value]: counts[value] for value in values if value in names},
        sides=sizes.sides,
        extremes=sizes.extremes,
        channels=sizes.channels,
        notes=tuple(notes),
    )


def look_at_cityscapes(path: Path) -> Facts:
    """Return the facts of a folder with Cityscapes' layout.

    Raises:
        InputError: it has no training part.
    """
    parts = cityscapes_parts(path, "error")
    if "train" not in parts:
        raise InputError(f"{path / 'leftImg8bit'} holds no folder train; name a folder that has one")
    train = parts["train"]
    sizes = _measure(FilePictures([train.name(index) for index in range(len(train))]), np.arange(len(train)))
    return Facts(
        "masks",
        str(path),
        data={"source": str(path)},
        parts={name: len(part) for name, part in parts.items()},
        classes=dict.fromkeys(CLASSES.values(), 0),
        sides=sizes.sides,
        extremes=sizes.extremes,
        channels=sizes.channels,
        notes=sizes.notes,
    )


# ---- what they have in common


def _says_classes(part: Labelled) -> bool:
    """Return whether classes are some, and not as good as one for each picture or one for all."""
    return part.multi_label or (len(part.class_names) > 1 and 2 * len(part.class_names) <= len(part))


def _measure(pictures: Pictures, rows: Any) -> _Sizes:
    """Return the sizes of up to 200 pictures, spread over all, and whether some of them are coloured."""
    if isinstance(pictures, ArrayPictures):
        height, width, channels = pictures.array.shape[1:]
        return _Sizes((height, width), (min(height, width), max(height, width)), channels, ())
    chosen = [int(rows[place]) for place in _spread(len(rows), _SIZES_READ)]
    sizes = [picture_size(Path(pictures.name(row))) if isinstance(pictures, FilePictures) else None for row in chosen]
    known = sorted((size for size in sizes if size is not None), key=min)
    notes = []
    if len(known) < len(sizes):
        name = pictures.name(chosen[sizes.index(None)])
        notes.append(
            f"{len(sizes) - len(known)} of {len(sizes)} pictures looked at cannot be read, the first: {name}; "
            f"'bigmodels check' lists all"
        )
    if not known:
        return _Sizes(None, None, 3, tuple(notes))
    readable = [row for row, size in zip(chosen, sizes, strict=True) if size is not None]
    coloured = any(_is_coloured(pictures, readable[place]) for place in _spread(len(readable), _COLOURS_READ))
    extremes = (min(map(min, known)), max(map(max, known)))
    return _Sizes(known[len(known) // 2], extremes, 3 if coloured else 1, tuple(notes))


def _is_coloured(pictures: Pictures, row: int) -> bool:
    try:
        red, green, blue = pictures.read(row, 3)
    except InputError:
        return False  # noted where its size was asked for, or told by the run
    return not (red.equal(green) and green.equal(blue))


def _mask_of(pairs: FilePairs, index: int) -> Tensor:
    size = picture_size(Path(pairs.name(index)))
    if size is None:
        raise InputError(f"{pairs.name(index)} is no picture that can be read; replace or remove it and its mask")
    mask = pairs.read(index, 3)[1]
    assert mask is not None
    return mask


def mask_values(file: Path) -> list[int] | None:
    """Return the values of a mask; None where it is none: coloured, or of more values than there are classes."""
    size = picture_size(file)
    if size is None:
        return None
    try:
        values = read_mask(file, _ANY_VALUE, size).unique().tolist()
    except InputError:
        return None
    return values if len(values) <= _MANY_VALUES else None


def any_values() -> MaskValues:
    """Return the meaning of masks of which nothing is known: each value is a class."""
    return _ANY_VALUE


def _counted(found: Annotations) -> dict[str, int]:
    counts = dict.fromkeys(found.class_names, 0)
    for picture in found.pictures:
        for thing in picture.objects:
            counts[found.class_names[thing.label - 1]] += 1
    return counts


def _spread(total: int, count: int) -> Sequence[int]:
    """Return up to `count` places that are spread evenly over `total`."""
    if total <= count:
        return range(total)
    return [place * total // count for place in range(count)]


def _faults(refused: list[str]) -> list[str]:
    if not refused:
        return []
    return [f"{len(refused):,} faults that a run refuses, the first: {refused[0]}; 'bigmodels check' lists all"]
