"""Pictures with boxes: from COCO's, Pascal VOC's or a CSV file's annotations to batches of pictures of any sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torchvision.transforms import v2
from typing_extensions import override

from lightning_bigmodels.data.batches import Boxes, DetectionBatch
from lightning_bigmodels.data.datamodule import check_at_least
from lightning_bigmodels.data.vision.annotated import AnnotatedPictures, DetectionExamples, UnannotatedPictures
from lightning_bigmodels.data.vision.box_files import CSV_COLUMNS, read_csv, read_voc
from lightning_bigmodels.data.vision.boxes import Annotations, BadBoxes
from lightning_bigmodels.data.vision.coco import read_coco
from lightning_bigmodels.data.vision.datamodule import VisionData
from lightning_bigmodels.data.vision.digits import DIGIT_NAMES, DigitPictures
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.files import picture_files
from lightning_bigmodels.errors import InputError

DIGITS = "digits"
_KINDS = (
    "a COCO .json file, a .csv file of boxes, a folder of Pascal VOC's .xml files, a list of them (.txt), or digits"
)


class DetectionImages(VisionData):
    """Pictures with boxes around the objects in them, and masks where wanted.

    Boxes that are empty, inverted, outside of their picture or of an unknown class are refused, with file and place.
    Pictures without objects are welcome: a detector learns from them what is none.

    Attributes:
        class_names: Names of the classes, known after `setup`; empty where only a folder to predict was read.
        category_ids: What the annotations call each class: COCO's category ids, or else 1, 2, ...

    Args:
        source: Annotations of the training part: a COCO .json file, a .csv file with a header and one box a line (see
            `csv_columns`; a picture without objects has these empty), a folder of Pascal VOC's .xml files or a list of
            their names (.txt), or `digits`: scikit-learn's digits pasted on canvases, made without a disk, with parts
            for validation and test of their own.
        val_source: Annotations for validation, as `source`; None: a fraction of it.
        test_source: Annotations for testing, as `source`; None: a fraction of it.
        predict_source: A folder of pictures, one picture, or annotations, whose pictures predict answers for; None: the
            test part, or else the validation part.
        images: Folder of the pictures that `source` names; None: beside it.
        val_images: Folder of the pictures that `val_source` names; None: as `images`.
        test_images: Folder of the pictures that `test_source` names; None: as `images`.
        val_fraction: Part of the pictures, from 0 to below 1, held out for validation where there is no `val_source`.
        test_fraction: The same for testing.
        split_seed: Chooses which pictures are held out.
        class_names: The classes in the order of their labels; None: those of `source`.
        csv_columns: What the header of a .csv file calls path, left, top, right, bottom and class.
        masks: Whether targets hold masks, of COCO's polygons or run lengths.
        bad_boxes: Whether a bad box ends the run (`error`), or is left out and counted (`drop`).
        augmentations: What is done to training pictures: transforms of torchvision.transforms.v2, which move boxes and
            masks with the pixels.
        min_box_size: Pixels of width and height that a box must keep when training pictures are cropped or shrunk;
            smaller ones are left out.
        num_pictures: How many pictures `digits` makes, over all parts.
        picture_size: Height and width in pixels of the pictures that are made: `digits`, and examples for planning.
        batch_size: Pictures of a training batch, per process.
        eval_batch_size: Pictures of an evaluation batch, per process; None: as `batch_size`.
        num_workers: Processes that load batches ahead; 0: none.
        seed: Chooses the order of the training pictures, what is drawn for each, and the pictures of `digits`.
        on_error: Whether a picture that cannot be read ends the run (`error`), or is left out, counted and listed
            (`skip`).

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(
        self,
        source: str | None = None,
        val_source: str | None = None,
        test_source: str | None = None,
        predict_source: str | None = None,
        images: str | None = None,
        val_images: str | None = None,
        test_images: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        class_names: list[str] | None = None,
        csv_columns: list[str] | None = None,
        masks: bool = False,
        bad_boxes: BadBoxes = "error",
        augmentations: list[v2.Transform] | None = None,
        min_box_size: float = 1.0,
        num_pictures: int = 2000,
        picture_size: int = 96,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, on_error)
        check_at_least(0, split_seed=split_seed)
        check_at_least(3, num_pictures=num_pictures)
        check_at_least(32, picture_size=picture_size)
        fractions = {"val": val_fraction, "test": test_fraction}
        for name, value in fractions.items():
            if not 0 <= value < 1:
                raise InputError(f"{name}_fraction is {value}; set it to 0 or more and below 1")
        if sum(fractions.values()) >= 1:
            raise InputError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on")
        if min_box_size < 0:
            raise InputError(f"min_box_size is {min_box_size}; set it to 0 or more pixels")
        if class_names is not None and (len(set(class_names)) < len(class_names) or not class_names):
            raise InputError(f"class_names is {class_names}; give each class one name, once")
        if bad_boxes not in ("error", "drop"):
            raise InputError(f"bad_boxes is {bad_boxes!r}; set it to error or drop")
        for name, other in {"val_source": val_source, "test_source": test_source}.items():
            if other is not None and DIGITS in (source, other):
                raise InputError(f"{name} is {other}, and digits has parts of its own; set {name} to null")
        if masks and source == DIGITS:
            raise InputError("masks is true, and digits has none; set it to false")
        self.source = source
        self.sources = {"train": source, "val": val_source, "test": test_source}
        self.predict_source = predict_source
        self.folders = {"train": images, "val": val_images or images, "test": test_images or images}
        self.fractions = fractions
        self.split_seed = split_seed
        self.masks = masks
        self.bad_boxes: BadBoxes = bad_boxes
        self.csv_columns = list(csv_columns or CSV_COLUMNS)
        self.augmentations = list(augmentations or ())
        self.min_box_size = min_box_size
        self.num_pictures = num_pictures
        self.picture_size = picture_size
        self.class_names = list(class_names or (DIGIT_NAMES if source == DIGITS else ()))
        self.category_ids = list(range(1, len(self.class_names) + 1))

    @override
    def make_parts(self, stage: str) -> dict[str, Examples[Any]]:
        predicted = self.predict_source
        if stage == "predict" and predicted is not None and Path(predicted).suffix.lower() not in (".json", ".csv"):
            path = Path(predicted).expanduser()
            return {"predict": UnannotatedPictures([path] if path.is_file() else picture_files(path), self.on_error)}
        if "train" not in self.parts:
            self.parts |= self._digits() if self.source == DIGITS else self._read_parts()
        parts: dict[str, Examples[Any]] = {}
        if stage == "predict" and predicted is not None:
            parts["predict"] = self._examples(self._read(predicted, self.folders["train"], "predict"), with_files=True)
        elif stage == "predict":
            known = [self.parts[name] for name in ("test", "val") if name in self.parts]
            if not known:
                raise InputError("there is nothing to predict; set predict_source to a folder of pictures")
            assert isinstance(known[0], DetectionExamples)
            parts["predict"] = known[0].listed()
        return parts

    def _digits(self) -> dict[str, Examples[Any]]:
        held = {name: round(self.num_pictures * fraction) for name, fraction in self.fractions.items()}
        sizes = {"train": self.num_pictures - sum(held.values()), **held}
        return {
            name: DigitPictures(name, number, self.picture_size, **self._options())
            for name, number in sizes.items()
            if number > 0
        }

    def _read_parts(self) -> dict[str, Examples[Any]]:
        if self.source is None:
            raise InputError(f"source is not set; name {_KINDS}")
        train = self._read(self.source, self.folders["train"], "train")
        self.class_names, self.category_ids = train.class_names, train.category_ids
        parts = {"train": train}
        for name in ("val", "test"):
            source = self.sources[name]
            if source is not None:
                parts[name] = self._read(source, self.folders[name], name)
        fractions = {name: value for name, value in self.fractions.items() if name not in parts and value > 0}
        return {name: self._examples(part) for name, part in (parts | split(train, fractions, self.split_seed)).items()}

    def _read(self, source: str, images: str | None, part: str) -> Annotations:
        path = Path(source).expanduser()
        folder = None if images is None else Path(images).expanduser()
        if folder is not None and not folder.is_dir():
            raise InputError(f"{folder}: no such folder; set data.images to the folder of the pictures")
        suffix = path.suffix.lower()
        if not path.exists() or (path.is_file() and suffix not in (".json", ".csv", ".txt")):
            fault = "is none of them" if path.exists() else "no such file or folder"
            raise InputError(f"{source}: {fault}; name {_KINDS}")
        if self.masks and suffix != ".json":
            raise InputError(f"masks is true, and {source} has none; name a COCO .json file or set it to false")
        names = self.class_names or None
        if suffix == ".json":
            found = read_coco(path, folder, names, self.bad_boxes, self.masks)
        elif suffix == ".csv":
            found = read_csv(path, folder, names, self.bad_boxes, self.csv_columns)
        else:
            found = read_voc(path, folder, names, self.bad_boxes)
        if found.dropped:
            rank_zero_warn(f"{len(found.dropped)} boxes of {source} were left out, the first: {found.dropped[0]}")
        if part == "train" and not any(picture.objects for picture in found.pictures):
            raise InputError(f"{source} has no box; name annotations that have some")
        return found

    def _options(self) -> dict[str, Any]:
        return {
            "augmentations": self.augmentations,
            "min_box_size": self.min_box_size,
            "seed": self.seed,
            "on_error": self.on_error,
        }

    def _examples(self, found: Annotations, with_files: bool = False) -> AnnotatedPictures:
        options = self._options() | {"with_files": with_files}
        return AnnotatedPictures(found.pictures, found.class_names, self.masks, **options)

    @override
    def example_batch(self, batch_size: int) -> DetectionBatch:
        """Return random pixels, each picture with an object of the first class."""
        size = self.picture_size
        generator = torch.Generator().manual_seed(0)
        images = [
            torch.randint(256, (3, size, size), dtype=torch.uint8, generator=generator) for _ in range(batch_size)
        ]
        quarter = size // 4
        target: Boxes = {
            "boxes": torch.tensor([[quarter, quarter, 2 * quarter, 3 * quarter]], dtype=torch.float32),
            "labels": torch.ones(1, dtype=torch.int64),
        }
        if self.masks:
            target["masks"] = torch.zeros(1, size, size, dtype=torch.uint8)
            target["masks"][:, quarter : 3 * quarter, quarter : 2 * quarter] = 1
        return {"images": list(images), "targets": [target] * batch_size, "indices": torch.arange(batch_size)}


def split(part: Annotations, fractions: dict[str, float], seed: int) -> dict[str, Annotations]:
    """Return the parts that some fractions of the pictures make, and under `train` what remains.

    Args:
        part: What is parted.
        fractions: For each new part its fraction of the pictures.
        seed: Chooses which pictures go where.

    Raises:
        InputError: a part would be empty.
    """
    order = np.random.default_rng(seed).permutation(len(part.pictures)).tolist()
    found, taken = {}, 0
    for name, fraction in fractions.items():
        number = round(len(order) * fraction)
        if number == 0:
            raise InputError(f"{name}_fraction {fraction} of {len(order)} pictures is none; raise it, or set it to 0")
        found[name] = _take(part, order[taken : taken + number])
        taken += number
    if taken == len(order):
        raise InputError(f"of {len(order)} pictures none remain to train on; lower val_fraction and test_fraction")
    return {"train": _take(part, order[taken:]), **found}


def _take(part: Annotations, places: Sequence[int]) -> Annotations:
    return part._replace(pictures=[part.pictures[place] for place in sorted(places)])
