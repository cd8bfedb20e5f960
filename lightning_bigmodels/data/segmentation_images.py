"""Pictures with the class of each pixel: from folders, COCO files or Cityscapes to batches."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torchvision.transforms import v2
from typing_extensions import override

from lightning_bigmodels.data.batches import IGNORED, SegmentationBatch
from lightning_bigmodels.data.datamodule import check_at_least
from lightning_bigmodels.data.vision.cityscapes import CLASSES, cityscapes_parts, is_cityscapes
from lightning_bigmodels.data.vision.datamodule import VisionData
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.mask_digits import CLASS_NAMES, digit_parts, is_digits
from lightning_bigmodels.data.vision.mask_pairs import (
    Pairs,
    bare_pictures,
    coco_pairs,
    folder_pairs,
    read_names,
)
from lightning_bigmodels.data.vision.mask_transforms import MaskTransforms
from lightning_bigmodels.data.vision.masks import MaskValues
from lightning_bigmodels.data.vision.masks_coco import CocoMasks
from lightning_bigmodels.data.vision.segmented import SegmentedPictures
from lightning_bigmodels.errors import InputError

_SAMPLED_MASKS = 8


class SegmentationImages(VisionData):
    """Pictures with the class of each pixel.

    Attributes:
        class_names: Names of the classes, known after `setup`; empty where only `predict_source` was read.

    Args:
        source: Where the pictures are: a folder, one with Cityscapes' folders `leftImg8bit` and `gtFine`, or `digits`:
            2,000 generated canvases with handwritten digits (`digits:N`: N of them).
        masks: Where their masks are: a folder of PNG files of the pictures' names, or a COCO JSON file with polygons.
        class_names: Names of the classes, in the order of the masks' values; for a COCO file `background` and the
            categories that count, null: all. Cityscapes and the digits bring theirs.
        class_values: The value in masks of each class; null: its place in `class_names`.
        ignored_value: The value in masks that no loss and no metric counts; null: none.
        class_colors: Red, green and blue of each class, for coloured masks; null: masks hold values.
        ignored_color: The colour in masks that no loss and no metric counts.
        image_suffix: What the names of pictures end in, before the file's ending; others are left alone.
        mask_suffix: What the names of masks have in its place.
        train_names: A text file with the names of the training pictures, one a line, as Pascal VOC has; null: all.
        val_names: The same for validation, where `val_source` is null.
        test_names: The same for testing.
        val_source: Pictures of the validation part; null: `val_names` of `source`, or else a fraction.
        val_masks: Their masks.
        test_source: Pictures of the test part; null: `test_names` of `source`, or else a fraction.
        test_masks: Their masks.
        predict_source: A folder of pictures, or one picture, that predict answers for; null: the test part, or else
            the validation part.
        val_fraction: Part of the training pictures, from 0 to below 1, held out for validation where nothing else is.
        test_fraction: The same for testing.
        split_seed: Chooses which pictures are held out.
        image_size: Height and width of the pictures in a training batch, or both as a list.
        eval_size: The same in evaluation; null: `image_size`.
        channels: 3, red, green, blue, or 1, gray; pictures are converted.
        own_scale: Keep the files' own scale, cut and fill up, as street scenes want it; false makes each picture as
            large as fits.
        scale_range: Least and greatest factor on that scale in training, drawn for each picture; null: 1.
        horizontal_flip: Probability that a training picture is mirrored.
        augmentations: More that is done to training pictures and their masks: transforms of torchvision.transforms.v2.
        batch_size: Pictures of a training batch, per process.
        eval_batch_size: Pictures of an evaluation batch, per process; null: as `batch_size`.
        num_workers: Processes that load batches ahead; 0: none.
        seed: Chooses the order of the training pictures and what is drawn for each.
        on_error: Whether a picture or mask that cannot be read ends the run (`error`), or is left out, counted and
            listed (`skip`).

    Raises:
        InputError: an argument is out of its range.
    """

    def __init__(
        self,
        source: str | None = None,
        masks: str | None = None,
        class_names: list[str] | None = None,
        class_values: list[int] | None = None,
        ignored_value: int | None = 255,
        class_colors: list[list[int]] | None = None,
        ignored_color: list[int] | None = None,
        image_suffix: str = "",
        mask_suffix: str = "",
        train_names: str | None = None,
        val_names: str | None = None,
        test_names: str | None = None,
        val_source: str | None = None,
        val_masks: str | None = None,
        test_source: str | None = None,
        test_masks: str | None = None,
        predict_source: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        image_size: int | list[int] = 256,
        eval_size: int | list[int] | None = None,
        channels: int = 3,
        own_scale: bool = False,
        scale_range: tuple[float, float] | None = (0.5, 2.0),
        horizontal_flip: float = 0.5,
        augmentations: list[v2.Transform] | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, on_error)
        self.image_size = _size("image_size", image_size)
        self.eval_size = self.image_size if eval_size is None else _size("eval_size", eval_size)
        check_at_least(1, channels=channels)
        check_at_least(0, split_seed=split_seed)
        _check_ranges(scale_range, horizontal_flip, {"val_fraction": val_fraction, "test_fraction": test_fraction})
        self.source = source
        self.masks = masks
        self.values_args = (class_values, ignored_value, class_colors, ignored_color)
        self.suffixes = (image_suffix, mask_suffix)
        self.names = {"train": train_names, "val": val_names, "test": test_names}
        self.others = {"val": (val_source, val_masks), "test": (test_source, test_masks)}
        self.predict_source = predict_source
        self.fractions = {"test": test_fraction, "val": val_fraction}
        self.split_seed = split_seed
        self.channels = channels
        self.transforms = MaskTransforms(
            self.image_size, self.eval_size, own_scale, scale_range, horizontal_flip, augmentations or ()
        )
        self.class_names: list[str] = list(class_names or [])
        self._pairs: dict[str, Pairs] = {}

    @override
    def make_parts(self, stage: str) -> dict[str, Examples[Any]]:
        if stage == "predict" and self.predict_source is not None:
            pairs = bare_pictures(Path(self.predict_source).expanduser())
            return {"predict": self._examples(pairs, with_files=True)}
        if not self._pairs:
            self._pairs = self._read()
        parts: dict[str, Examples[Any]] = {name: self._examples(pairs) for name, pairs in self._pairs.items()}
        if stage == "predict":
            known = [name for name in ("test", "val") if name in self._pairs]
            if not known:
                raise InputError("there is nothing to predict; set predict_source to a folder of pictures")
            parts["predict"] = self._examples(self._pairs[known[0]], with_files=True)
        return parts

    @override
    def example_batch(self, batch_size: int) -> SegmentationBatch:
        """Return random pixels of class 0."""
        shape = (batch_size, self.channels, *self.image_size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        masks = torch.zeros(batch_size, *self.image_size, dtype=torch.int64)
        return {"images": images, "masks": masks, "indices": torch.arange(batch_size)}

    def _examples(self, pairs: Pairs, with_files: bool = False) -> SegmentedPictures:
        return SegmentedPictures(
            pairs, self.transforms, self.channels, self.seed, self.on_error, with_files, self.class_names
        )

    # ---- from a source's name to its parts

    def _read(self) -> dict[str, Pairs]:
        if self.source is None:
            raise InputError("source is not set; name a folder of pictures, and data.masks for their masks")
        folder = Path(self.source).expanduser()
        parts: dict[str, Pairs] = {}
        if is_digits(self.source):
            self._take_names(CLASS_NAMES)
            parts |= digit_parts(self.source)
        elif is_cityscapes(folder):
            self._take_names(list(CLASSES.values()))
            parts |= cityscapes_parts(folder, self.on_error)
            if "train" not in parts:
                raise InputError(f"{folder / 'leftImg8bit'} holds no folder train; correct data.source")
        else:
            parts["train"] = self._part_of(self.source, self.masks, self.names["train"])
        for name, (source, masks) in self.others.items():
            if source is not None:
                parts[name] = self._part_of(source, masks, self.names[name])
            elif self.names[name] is not None:
                parts[name] = self._part_of(self.source, self.masks, self.names[name])
        return self._split(parts)

    def _part_of(self, source: str, masks: str | None, names: str | None) -> Pairs:
        folder = Path(source).expanduser()
        if masks is None:
            raise InputError(f"{source} has no masks; set data.masks to a folder of PNG masks or to a COCO JSON file")
        answers = Path(masks).expanduser()
        wanted = None if names is None else read_names(Path(names).expanduser())
        if answers.suffix == ".json":
            coco = CocoMasks(answers, self.class_names or None)
            self._take_names(coco.class_names)
            return coco_pairs(folder, coco, wanted)
        pairs = folder_pairs(folder, answers, self._values(), wanted, self.suffixes, self.on_error)
        self._warn_of_binary_masks(pairs)
        return pairs

    def _take_names(self, names: list[str]) -> None:
        if self.class_names and self.class_names != names:
            raise InputError(f"class_names is {self.class_names}, and the data's classes are {names}; leave it out")
        self.class_names = list(names)

    def _values(self) -> MaskValues:
        if not self.class_names:
            raise InputError("class_names is not set; name the classes in the order of the masks' values")
        values, ignored, colors, ignored_color = self.values_args
        return MaskValues(self.class_names, values, () if ignored is None else (ignored,), colors, ignored_color)

    def _warn_of_binary_masks(self, pairs: Pairs) -> None:
        """Warn where 255 is most likely the object itself, and not what is to be ignored."""
        values, ignored, colors, _ = self.values_args
        if len(self.class_names) != 2 or values is not None or ignored != 255 or colors is not None:
            return
        found = set()
        for index in range(min(len(pairs), _SAMPLED_MASKS)):
            try:
                mask = pairs.read(index, self.channels)[1]
            except InputError:
                return  # whoever reads it in the run says so
            assert mask is not None
            found |= set(mask.unique().tolist())
        if found == {0, IGNORED}:
            rank_zero_warn(
                f"the masks ({pairs.name(0)} and others) hold 0 and 255 alone, and 255 is ignored; if it is "
                f"{self.class_names[1]!r}, set data.class_values to [0, 255] and data.ignored_value to null"
            )

    def _split(self, parts: dict[str, Pairs]) -> dict[str, Pairs]:
        fractions = {name: part for name, part in self.fractions.items() if name not in parts and part > 0}
        train = parts["train"]
        numbers = {name: round(len(train) * fraction) for name, fraction in fractions.items()}
        for name, number in numbers.items():
            if number == 0:
                raise InputError(
                    f"{name}_fraction {fractions[name]} of {len(train)} pictures is none; set it to 0 or higher up"
                )
        if sum(numbers.values()) >= len(train):
            raise InputError(f"{len(train)} pictures leave none for training; lower val_fraction or test_fraction")
        order = np.random.default_rng(self.split_seed).permutation(len(train))
        start = 0
        for name, number in numbers.items():
            parts[name] = train.take(np.sort(order[start : start + number]))
            start += number
        if numbers:
            parts["train"] = train.take(np.sort(order[start:]))
        return parts


def _size(name: str, size: int | list[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    check_at_least(1, **{name: min(height, width)})
    return height, width


def _check_ranges(scale: tuple[float, float] | None, flip: float, fractions: dict[str, float]) -> None:
    if scale is not None and not 0 < scale[0] <= scale[1]:
        raise InputError(f"scale_range is {list(scale)}; set the least and the greatest factor, both above 0")
    if not 0 <= flip <= 1:
        raise InputError(f"horizontal_flip is {flip}; set a probability, from 0 to 1")
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}; set it from 0 to below 1")
