"""Images with classes: from a source's name to batches of pixels."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from typing_extensions import override

from lightning_bigmodels.data.batches import IGNORED, ImageBatch
from lightning_bigmodels.data.datamodule import check_at_least
from lightning_bigmodels.data.vision.classified import BarePictures, ClassifiedPictures
from lightning_bigmodels.data.vision.datamodule import VisionData
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.files import picture_files
from lightning_bigmodels.data.vision.generated import PicturesToMake
from lightning_bigmodels.data.vision.labelled import Labelled, check_classes, with_classes_of, with_common_groups
from lightning_bigmodels.data.vision.pictures import FilePictures
from lightning_bigmodels.data.vision.sources import Reading, read_source
from lightning_bigmodels.data.vision.sources_tables import Columns
from lightning_bigmodels.data.vision.splits import check_fractions, split_off
from lightning_bigmodels.data.vision.transforms import Interpolation, Size, Transforms
from lightning_bigmodels.errors import InputError


class Images(VisionData):
    """Pictures with their classes, or with several labels each.

    Attributes:
        class_names: Names of the classes, known after `setup`; empty where there are none or only `predict_source` was
            read.
        multi_label: Whether a picture may have several classes.
        group_names: Names of the groups by which fairness is judged, known after `setup`; None: there are none.

    Args:
        source: Where the pictures are. A folder that holds a folder for each class, or pictures whose names begin with
            their class and a dot (`cat.12.jpg`), either of them also in folders `train`, `val` and `test`; a table
            (`.csv`, `.tsv`, `.parquet`) with a line for each picture; `torchvision:NAME`, such as
            `torchvision:FashionMNIST`; `hub:NAME[:CONFIGURATION][@SPLIT]`, a data set of Hugging Face; a `.npz` file
            with `images` and `labels`, or `images.npy` beside `labels.npy`; a folder with MNIST's files;
            `sklearn-digits`.
        val_source: Source of the validation part; None: what `source` calls so, or else a fraction of it.
        test_source: Source of the test part; None: as for `val_source`.
        predict_source: A folder of pictures, or one picture, for predict; None: the test part, or else the validation
            part.
        num_generated: How many pictures predict asks a generative model for, which then sees none; None: predict reads
            pictures.
        generated_classes: Classes of these, in turn; None: all of them.
        val_fraction: Part of the training examples, from 0 to below 1, held out for validation where no source has a
            validation part; stratified by class.
        test_fraction: The same for testing.
        split_seed: Chooses which examples are held out.
        root: Folder in which torchvision's data set lies (None: `data`), or from which a table's paths start (None: the
            table's own folder).
        download: Whether torchvision may fetch a data set that is not in `root`.
        path_column: Column of a table that holds the picture's file.
        labelled: False: pictures without classes, for a model that needs none; names of folders say nothing then.
        label_column: Column of a table or hub data set that holds the picture's class, or a list of columns of 0 and 1,
            whose names are the classes, of which a picture may have several.
        label_separator: What stands between the classes in `label_column`, of which a picture may then have several.
        group_column: Column that holds the group of each example, by which fairness is judged.
        split_column: Column of a table that says train, val or test.
        image_size: Height and width of the pictures in a batch, or both as a list.
        channels: 3: red, green, blue; 1: gray; pictures are converted. Any other number is that of the pictures.
        eval_resize: Length of a picture's shorter side before its centre is cut out in evaluation; None: `image_size`
            fits tightly.
        crop_scale: Least and greatest part of a picture's area that a random crop in training shows; null: training
            sees pictures as evaluation does.
        crop_ratio: Least and greatest width over height of that crop.
        crop_padding: Black pixels round a training picture, from which `image_size` is cut out at a random place, for
            small pictures; `crop_scale` is null then.
        horizontal_flip: Probability that a training picture is mirrored.
        augmentations: More that is done to training pictures, in this order: transforms of torchvision.transforms.v2 by
            name, such as RandAugment, TrivialAugmentWide, ColorJitter, RandomErasing.
        progressive_sizes: From which epoch on training pictures have which size instead of `image_size`, such as
            `{0: 128, 20: 192, 40: 224}`.
        interpolation: How pixels are made when pictures are resized.
        batch_size: Pictures of a training batch, per process.
        eval_batch_size: Pictures of an evaluation batch, per process; None: as `batch_size`.
        num_workers: Processes that load batches ahead; 0: none.
        seed: Chooses the order of the training pictures and what is drawn for each.
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
        num_generated: int | None = None,
        generated_classes: list[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        root: str | None = None,
        download: bool = False,
        path_column: str = "path",
        labelled: bool = True,
        label_column: str | list[str] = "label",
        label_separator: str | None = None,
        group_column: str | None = None,
        split_column: str | None = None,
        image_size: int | list[int] = 224,
        channels: int = 3,
        eval_resize: int | None = None,
        crop_scale: tuple[float, float] | None = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        crop_padding: int = 0,
        horizontal_flip: float = 0.5,
        augmentations: list[v2.Transform] | None = None,
        progressive_sizes: dict[int, int | list[int]] | None = None,
        interpolation: Interpolation = "bilinear",
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, on_error)
        check_at_least(1, channels=channels)
        check_at_least(0, split_seed=split_seed, crop_padding=crop_padding)
        if num_generated is not None:
            check_at_least(1, num_generated=num_generated)
        elif generated_classes:
            raise InputError("generated_classes is set and num_generated is not; set both, or neither")
        self.fractions = {
            "test": 0.0 if test_source else test_fraction,
            "val": 0.0 if val_source else val_fraction,
        }
        check_fractions(self.fractions)
        self.source = source
        self.other_sources = {"val": val_source, "test": test_source}
        self.predict_source = predict_source
        self.to_make = None if num_generated is None else PicturesToMake(num_generated, generated_classes or ())
        self.split_seed = split_seed
        columns = Columns(path_column, label_column if labelled else None, label_separator, group_column, split_column)
        folder = None if root is None else Path(root).expanduser()
        self.reading = Reading(columns, folder, download, check_files=on_error == "error")
        self.image_size = _size(image_size, "image_size")
        self.channels = channels
        self.transforms = Transforms(
            self.image_size,
            eval_resize,
            crop_scale,
            crop_ratio,
            crop_padding,
            horizontal_flip,
            augmentations or (),
            {epoch: _size(size, "progressive_sizes") for epoch, size in (progressive_sizes or {}).items()},
            interpolation,
        )
        self.class_names: list[str] = list(label_column) if labelled and isinstance(label_column, list) else []
        self.multi_label = columns.multi_label
        self.group_names: list[str] | None = None
        self._labelled: dict[str, Labelled] = {}

    @override
    def make_parts(self, stage: str) -> dict[str, Examples[Any]]:
        if stage == "predict" and self.to_make is not None:
            return {}
        if stage == "predict" and self.predict_source is not None:
            return {"predict": self._bare(Path(self.predict_source).expanduser())}
        if not self._labelled:
            self._labelled = self._read()
        train = self._labelled["train"]
        self.class_names, self.multi_label, self.group_names = train.class_names, train.multi_label, train.group_names
        parts: dict[str, Examples[Any]] = {name: self._examples(part) for name, part in self._labelled.items()}
        if stage == "fit":
            self.transforms.check(self.channels)
            if "val" not in parts:
                # Lightning takes no validation loader for an oversight
                warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        if stage == "predict":
            part = self._labelled.get("test", self._labelled.get("val"))
            if part is None:
                raise InputError("there is nothing to predict; set data.predict_source to a folder of pictures")
            parts["predict"] = self._examples(part, with_files=True)
        return parts

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of the pictures to predict, in order, or of the numbers of those to make."""
        return super().predict_dataloader() if self.to_make is None else self.evaluation_loader(self.to_make)

    @override
    def part_remedy(self, name: str) -> str:
        return f"set data.{name}_source, or data.{name}_fraction above 0"

    @override
    def example_batch(self, batch_size: int) -> ImageBatch:
        """Return random pixels, of the first class, or of none where there may be several or are none.

        Pictures that grow from epoch to epoch are as large as the largest in training.
        """
        shape = (batch_size, self.channels, *self.transforms.largest_size())
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        labels = torch.zeros(batch_size, dtype=torch.int64)
        if self.reading.columns.label is None:
            labels = torch.full((batch_size,), IGNORED)
        elif self.multi_label:
            labels = torch.zeros(batch_size, len(self.class_names))
        return {"images": pixels, "labels": labels, "indices": torch.arange(batch_size)}

    def _read(self) -> dict[str, Labelled]:
        if self.source is None:
            raise InputError("data.source is not set; name a folder that holds a folder of pictures for each class")
        parts = read_source(self.source, self.reading)
        for name, other in self.other_sources.items():
            if other is not None:
                found = read_source(other, self.reading)
                parts[name] = found.get(name, found["train"])
        check_classes(parts["train"], self.source)
        fractions = {name: value for name, value in self.fractions.items() if value > 0 and name not in parts}
        parts |= split_off(parts["train"], fractions, self.split_seed)
        train = parts.pop("train")
        return with_common_groups(
            {"train": train} | {name: with_classes_of(train, part, name) for name, part in parts.items()}
        )

    def _examples(self, part: Labelled, with_files: bool = False) -> ClassifiedPictures:
        return ClassifiedPictures(part, self.transforms, self.channels, self.seed, self.on_error, with_files)

    def _bare(self, path: Path) -> BarePictures:
        files = [path] if path.is_file() else picture_files(path)
        return BarePictures(FilePictures(files), self.transforms, self.channels, self.seed, self.on_error)


def _size(value: int | list[int], name: str) -> Size:
    size = [value, value] if isinstance(value, int) else list(value)
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"{name} holds {value}; give one number of 1 or more, or two: height and width")
    return size[0], size[1]
