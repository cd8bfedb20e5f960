"""Boxes and masks in COCO's JSON format."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_bigmodels.data.vision.boxes import (
    AnnotatedPicture,
    Annotations,
    BadBoxes,
    Collector,
    check_files,
)
from lightning_bigmodels.errors import InputError, refuse, require


def read_coco(
    source: Path, images: Path | None, class_names: Sequence[str] | None, bad_boxes: BadBoxes, masks: bool = False
) -> Annotations:
    """Return the objects of a JSON file with `images`, `annotations` and `categories`.

    Args:
        source: The file.
        images: Folder of the pictures; None: that of the file.
        class_names: The classes in the order of their labels; None: the file's categories by their ids.
        bad_boxes: What happens to a bad box.
        masks: Whether each object must have an outline.

    Raises:
        InputError: the file is broken or a box is bad; the message names the line or the annotation's id.
    """
    content = read_json(source)
    categories = {c["id"]: c["name"] for c in read_entries(source, content, "categories", ("id", "name"))}
    known = _known_images(source, content, source.parent if images is None else images)
    if class_names is None:
        class_names = [categories[number] for number in sorted(categories)]
        if len(set(class_names)) < len(class_names):
            raise InputError(f"{source}: two categories have the same name; rename one")
    collector = Collector(class_names, bad_boxes)
    seen = set()
    for annotation in read_entries(source, content, "annotations", ("id", "image_id", "category_id", "bbox")):
        where = f"annotation {annotation['id']}"
        if annotation["id"] in seen:
            refuse(f"{source}, {where}: the id occurs twice; number the annotations anew or remove one")
            continue
        seen.add(annotation["id"])
        if annotation["image_id"] not in known:
            refuse(
                f"{source}, {where}: there is no image {annotation['image_id']}; add it to images or remove the "
                f"annotation"
            )
            continue
        segmentation = annotation.get("segmentation")
        if masks and not is_outline(segmentation):
            refuse(
                f"{source}, {where}: the segmentation is neither polygons of three points or more nor run lengths; "
                f"correct or remove the annotation, or set data.masks to false"
            )
            continue
        collector.add(
            known[annotation["image_id"]],
            _corners(annotation["bbox"]),
            categories.get(annotation["category_id"], str(annotation["category_id"])),
            source,
            where,
            bool(annotation.get("iscrowd", 0)),
            annotation.get("area"),
            segmentation if masks else None,
        )
    numbers = {name: number for number, name in categories.items()}
    ids = [numbers.get(name, label) for label, name in enumerate(class_names, start=1)]
    return Annotations(list(known.values()), list(class_names), ids, collector.dropped)


def read_json(source: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        InputError: it is no JSON; the message names the line.
    """
    try:
        with source.open(encoding="utf-8") as file:
            return json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}, line {error.lineno}: no JSON ({error.msg}); correct the file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 at byte {error.start}; convert the file") from error


def _known_images(source: Path, content: Any, folder: Path) -> dict[Any, AnnotatedPicture]:
    known: dict[Any, AnnotatedPicture] = {}
    files = set()
    for image in read_entries(source, content, "images", ("id", "file_name", "height", "width")):
        where = f"image {image['id']}"
        if image["id"] in known or image["file_name"] in files:
            what = "id" if image["id"] in known else f"file_name {image['file_name']!r}"
            refuse(f"{source}, {where}: the {what} occurs twice; number the images anew or remove one")
            continue
        files.add(image["file_name"])
        known[image["id"]] = AnnotatedPicture(
            folder / image["file_name"], image["id"], int(image["height"]), int(image["width"])
        )
    if not known:
        raise InputError(f"{source} has no images; name a file that has some")
    check_files(list(known.values()), source, [f"image {number}" for number in known])
    return known


def read_entries(source: Path, content: Any, key: str, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return one of a file's lists, whose entries have the keys that are needed.

    Raises:
        InputError: there is no such list, or an entry lacks a key.
    """
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{source} has no list {key!r}; name a file of COCO's instances (images, annotations, ...)")
    for number, entry in enumerate(entries):
        for name in needed:
            if not isinstance(entry, dict) or name not in entry:
                raise InputError(f"{source}, {key}[{number}] has no {name!r}; add it or remove the entry")
    return entries


def _corners(box: Any) -> Any:
    """Return left, top, right, bottom of COCO's left, top, width, height; what is not four numbers stays."""
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]] if numbers else box


def is_outline(segmentation: Any) -> bool:
    """Return whether a segmentation is polygons of three points or more, or run lengths."""
    if isinstance(segmentation, dict):
        return {"counts", "size"} <= segmentation.keys()
    return (
        isinstance(segmentation, list)
        and len(segmentation) > 0
        and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation)
    )


def decode_mask(segmentation: Any, height: int, width: int) -> Tensor:
    """Return (H, W) uint8, 1 inside of an outline as COCO writes it: polygons, or run lengths as numbers or as text."""
    mask = require("pycocotools.mask", extra="vision")
    if isinstance(segmentation, list):
        runs = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = mask.frPyObjects(segmentation, height, width)
    else:
        runs = segmentation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0 with NumPy 2
        decoded = mask.decode(runs)
    return torch.from_numpy(np.ascontiguousarray(decoded))


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """Return (H, W) of zeros and ones as COCO's run lengths, which JSON can hold."""
    runs = require("pycocotools.mask", extra="vision").encode(np.asfortranarray(mask.to(torch.uint8).cpu().numpy()))
    return {"size": list(runs["size"]), "counts": runs["counts"].decode("ascii")}
