"""Images with classes: from a source's name to batches of pixels."""

from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2
from typing_extensions import override

from lightning_bigmodels.data.batches import ImageBatch
from lightning_bigmodels.data.datamodule import check_at_least
from lightning_bigmodels.data.vision.classified import BarePictures, ClassifiedPictures
from lightning_bigmodels.data.vision.datamodule import VisionData
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.files import picture_files
from lightning_bigmodels.data.vision.labelled import Labelled, check_classes, with_classes_of, with_common_groups
from lightning_bigmodels.data.vision.pictures import FilePictures
from lightning_bigmodels.data.vision.sources import read_source
from lightning_bigmodels.data.vision.splits import split_off
from lightning_bigmodels.data.vision.transforms import Transforms
from lightning_bigmodels.errors import InputError


class Images(VisionData):
    """Pictures with their classes.

    Attributes:
        class_names: Names of the classes, known after `setup`; empty where only `predict_source` was read.
        multi_label: Whether an example may have several classes, known after `setup`.
        group_names: Names of the groups for fairness, known after `setup`; None: there are none.

    Args:
        source: Where the pictures are: a folder with a folder for each class, or of pictures whose names begin with
            their class and a dot (`cat.12.jpg`), either of them also inside folders `train`, `val` and `test`;
            `sklearn-digits`.
        val_source: Source of the validation part; None: the one that `source` has, else a fraction of it.
        test_source: Source of the test part; None: as for `val_source`.
        predict_source: A folder of pictures, or one picture, that predict answers for; None: the test part, or else the
            validation part.
        val_fraction: Part of the training examples, from 0 to below 1, held out for validation where `source` has no
            validation part; stratified by class.
        test_fraction: The same for testing.
        split_seed: Chooses which examples are held out.
        image_size: Height and width of the pictures in a batch, or both as a list.
        channels: 3, red, green, blue, or 1, gray; pictures are converted.
        eval_resize: Length of a picture's shorter side before its centre is cut out in evaluation; None: `image_size`
            fits tightly.
        crop_scale: Least and greatest part of a picture's area that a random crop in training shows; None: training
            sees pictures as evaluation does.
        horizontal_flip: Probability that a training picture is mirrored.
        augmentations: More that is done to training pictures: transforms of torchvision.transforms.v2.
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
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        image_size: int | list[int] = 224,
        channels: int = 3,
        eval_resize: int | None = None,
        crop_scale: tuple[float, float] | None = (0.08, 1.0),
        horizontal_flip: float = 0.5,
        augmentations: list[v2.Transform] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, on_error)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        check_at_least(1, image_size=min(height, width), channels=channels, eval_resize=eval_resize)
        check_at_least(0, split_seed=split_seed)
        self.source = source
        self.val_source = val_source
        self.test_source = test_source
        self.predict_source = predict_source
        self.fractions = {"test": test_fraction, "val": val_fraction}
        self.split_seed = split_seed
        self.image_size = (height, width)
        self.channels = channels
        self.transforms = Transforms(
            self.image_size,
            eval_resize,
            crop_scale,
            horizontal_flip=horizontal_flip,
            augmentations=augmentations or (),
        )
        self.class_names: list[str] = []
        self.multi_label = False
        self.group_names: list[str] | None = None
        self._labelled: dict[str, Labelled] = {}

    @override
    def make_parts(self, stage: str) -> dict[str, Examples[Any]]:
        if stage == "predict" and self.predict_source is not None:
            return {"predict": self._bare(Path(self.predict_source).expanduser())}
        if not self._labelled:
            self._labelled = self._read()
        train = self._labelled["train"]
        self.class_names, self.multi_label = train.class_names, train.multi_label
        self.group_names = train.group_names
        parts: dict[str, Examples[Any]] = {name: self._examples(part) for name, part in self._labelled.items()}
        if stage == "predict":
            known = [name for name in ("test", "val") if name in self._labelled]
            if not known:
                raise InputError("there is nothing to predict; set predict_source to a folder of pictures")
            parts["predict"] = self._examples(self._labelled[known[0]], with_files=True)
        return parts

    @override
    def example_batch(self, batch_size: int) -> ImageBatch:
        """Return random pixels of class 0."""
        shape = (batch_size, self.channels, *self.image_size)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        labels = (
            torch.zeros(batch_size, len(self.class_names))
            if self.multi_label
            else torch.zeros(batch_size, dtype=torch.int64)
        )
        images = pixels.contiguous(memory_format=torch.channels_last)
        return {"images": images, "labels": labels, "indices": torch.arange(batch_size)}

    def _read(self) -> dict[str, Labelled]:
        if self.source is None:
            raise InputError("source is not set; name a folder with a folder of pictures for each class")
        parts = read_source(self.source)
        for name, other in {"val": self.val_source, "test": self.test_source}.items():
            if other is not None:
                parts[name] = self._only_part(name, other)
        fractions = {name: value for name, value in self.fractions.items() if name not in parts and value > 0}
        check_classes(parts["train"], self.source)
        parts |= split_off(parts["train"], fractions, self.split_seed)
        parts = {
            name: part if name == "train" else with_classes_of(parts["train"], part, name)
            for name, part in parts.items()
        }
        return with_common_groups(parts)

    def _only_part(self, name: str, source: str) -> Labelled:
        parts = read_source(source)
        return parts.get(name, parts["train"])

    def _examples(self, part: Labelled, with_files: bool = False) -> ClassifiedPictures:
        return ClassifiedPictures(part, self.transforms, self.channels, self.seed, self.on_error, with_files)

    def _bare(self, path: Path) -> BarePictures:
        files = [path] if path.is_file() else picture_files(path)
        return BarePictures(FilePictures(files), self.transforms, self.channels, self.seed, self.on_error)
