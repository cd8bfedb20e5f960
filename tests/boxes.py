"""Pictures with boxes in files, for tests: digits on canvases as COCO's JSON, Pascal VOC's XML and a CSV file."""

import csv
import json

import torch
from PIL import Image

from lightning_bigmodels.data.vision.coco import encode_mask
from lightning_bigmodels.data.vision.digits import DIGIT_NAMES, DigitPictures

COLUMNS = ["image_path", "xmin", "ymin", "xmax", "ymax", "label"]


def save(path, pixels):
    """Write (3, H, W) uint8 as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)


def digits(number=6, size=48, part="train"):
    """Return pictures (3, size, size) with their boxes and labels from 1, whatever the file is that they end in."""
    pictures = DigitPictures(part, number, size)
    return [pictures.read(index) for index in range(number)]


def write_coco(folder, examples, masks=False):
    """Write the pictures to `folder`/pictures, and boxes.json, in which label 1 is category 3; return that file.

    A mask is the lower left half of its box, as a polygon, or every other time as run lengths.
    """
    images, annotations = [], []
    for number, (image, target) in enumerate(examples):
        save(folder / "pictures" / f"{number:03d}.png", image)
        height, width = image.shape[1:]
        images.append({"id": 10 + number, "file_name": f"{number:03d}.png", "height": height, "width": width})
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            left, top, right, bottom = box
            entry = {
                "id": 100 + len(annotations),
                "image_id": 10 + number,
                "category_id": 2 + label,
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
            }
            if masks:
                entry["segmentation"] = [[left, top, left, bottom, right, bottom]]
                if len(annotations) % 2:
                    mask = torch.zeros(height, width)
                    mask[int(top) : int(bottom), int(left) : int(right)] = 1
                    entry["segmentation"] = encode_mask(mask)
            annotations.append(entry)
    categories = [{"id": 3 + number, "name": name} for number, name in enumerate(DIGIT_NAMES)]
    path = folder / "boxes.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def write_csv(folder, rows, name="boxes.csv"):
    """Write rows below the usual header; return the file."""
    path = folder / name
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


def write_voc(folder, name, objects, size=48):
    """Write a picture to `folder`/JPEGImages and what is in it to `folder`/Annotations; return that folder.

    Args:
        folder: Where to.
        name: Of both files, without suffix.
        objects: Pairs of a class and of xmin, ymin, xmax, ymax, counted from 1.
        size: Height and width.
    """
    save(folder / "JPEGImages" / f"{name}.png", torch.zeros(3, size, size, dtype=torch.uint8))
    lines = ["<annotation>", f"  <filename>{name}.png</filename>"]
    for class_name, box in objects:
        sides = "".join(f"<{side}>{x}</{side}>" for side, x in zip(COLUMNS[1:5], box, strict=True))
        lines += ["  <object>", f"    <name>{class_name}</name>", f"    <bndbox>{sides}</bndbox>", "  </object>"]
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{name}.xml").write_text("\n".join([*lines, "</annotation>"]))
    return folder / "Annotations"


def padded(found, number):
    """Return what a detector finds as its export gives it: `number` rows, of which the last ones are zero."""
    rows = len(found["labels"])
    answer = {}
    for name in ("boxes", "labels", "scores", "masks")[: 4 if "masks" in found else 3]:
        value = found[name].view(rows, *found[name].shape[-2:]) * 255 if name == "masks" else found[name]
        value = value.round().to(torch.uint8) if name == "masks" else value
        answer[name] = torch.cat([value, value.new_zeros(number - rows, *value.shape[1:])])
    return answer


def share_found(expected, found):
    """Return the share of the expected objects that are among those found, with edges within a hundredth of a pixel."""
    same = (expected["boxes"][:, None] - found["boxes"]).abs().amax(dim=2) < 1e-2
    return (same & (expected["labels"][:, None] == found["labels"])).any(dim=1).float().mean().item()
