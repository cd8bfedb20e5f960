"""Pictures with captions: from a source's name to batches of pixels and texts."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_bigmodels.data.batches import CaptionBatch
from lightning_bigmodels.data.datamodule import check_at_least
from lightning_bigmodels.data.loading import EpochSampler, ResumableDataLoader
from lightning_bigmodels.data.prompts import Prompts, read_prompts
from lightning_bigmodels.data.vision.buckets import (
    BucketEvaluationSampler,
    BucketSampler,
    bucket_sizes,
    samples_in_batches,
)
from lightning_bigmodels.data.vision.captioned import CaptionedPictures
from lightning_bigmodels.data.vision.captions import CaptionColumns, Captioned, read_captions
from lightning_bigmodels.data.vision.datamodule import VisionData
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.splits import check_fractions
from lightning_bigmodels.data.vision.transforms import Interpolation, Transforms
from lightning_bigmodels.errors import InputError


class CaptionedImages(VisionData):
    """Pictures with their captions, and prompts to make pictures of.

    Args:
        source: Where the pictures are. A folder with a `.txt` file beside each picture, or with `metadata.csv` or
            `metadata.jsonl`, any of them also in folders `train`, `val` and `test`; a table (`.csv`, `.tsv`,
            `.parquet`, `.jsonl`) with a line for each picture; `hub:NAME[:CONFIGURATION][@SPLIT]`, a data set of
            Hugging Face; `shapes` or `shapes:N`: N generated pictures such as "a red circle left of a blue square",
            whose test part shows objects that training never does.
        val_source: Source of the validation part; None: what `source` calls so, or else a fraction of it.
        test_source: Source of the test part; None: as for `val_source`.
        predict_prompts: What predict makes pictures of: a text file with one prompt a line, a `.jsonl` file with a
            column `prompt`, or a list, none of them blank; None: the captions of the test part, or else of the
            validation part.
        pictures_per_prompt: How many pictures predict makes of each prompt.
        val_fraction: Part of the training examples, from 0 to below 1, held out for validation where no source has a
            validation part.
        test_fraction: The same for testing.
        split_seed: Chooses which examples are held out.
        root: Folder from which a table's paths start; None: the table's own folder.
        path_column: Column of a table that holds the picture's file.
        caption_column: Column of a table or hub data set that holds the caption.
        split_column: Column of a table that says train, val or test.
        image_size: Height and width of the pictures in a batch, or both as a list; with `aspect_buckets` the side of
            the square whose area none exceeds.
        aspect_buckets: Whether pictures keep about their own shape: each batch then holds pictures of one of several
            shapes.
        bucket_step: What heights and widths of these shapes are multiples of.
        max_aspect: Longer side of these shapes over the shorter one, at most.
        channels: 3: red, green, blue; 1: gray; pictures are converted.
        crop_scale: Least and greatest part of a picture's area that a random crop in training shows; null: the middle.
        horizontal_flip: Probability that a training picture is mirrored; captions may then speak of the wrong side.
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
        predict_prompts: str | list[str] | None = None,
        pictures_per_prompt: int = 1,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        root: str | None = None,
        path_column: str = "file_name",
        caption_column: str = "text",
        split_column: str | None = None,
        image_size: int | list[int] = 512,
        aspect_buckets: bool = False,
        bucket_step: int = 64,
        max_aspect: float = 2.0,
        channels: int = 3,
        crop_scale: tuple[float, float] | None = None,
        horizontal_flip: float = 0.0,
        interpolation: Interpolation = "bicubic",
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, on_error)
        check_at_least(1, channels=channels, pictures_per_prompt=pictures_per_prompt, bucket_step=bucket_step)
        check_at_least(0, split_seed=split_seed)
        self.fractions = {
            "test": 0.0 if test_source else test_fraction,
            "val": 0.0 if val_source else val_fraction,
        }
        check_fractions(self.fractions)
        size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
        if len(size) != 2 or min(size) < 1:
            raise InputError(f"image_size is {image_size}; give one number of 1 or more, or two: height and width")
        self.source = source
        self.other_sources = {"val": val_source, "test": test_source}
        self.predict_prompts = predict_prompts
        self.pictures_per_prompt = pictures_per_prompt
        self.split_seed = split_seed
        self.root = None if root is None else Path(root).expanduser()
        self.columns = CaptionColumns(path_column, caption_column, split_column)
        self.image_size = (size[0], size[1])
        self.channels = channels
        self.sizes = [self.image_size]
        if aspect_buckets:
            self.sizes = _bucket_sizes(self.image_size, bucket_step, max_aspect)
        self.transforms = [
            Transforms(
                each,
                crop_scale=crop_scale,
                crop_ratio=(each[1] / each[0],) * 2 if aspect_buckets else (3 / 4, 4 / 3),
                horizontal_flip=horizontal_flip,
                interpolation=interpolation,
            )
            for each in self.sizes
        ]
        self._captioned: dict[str, Captioned] = {}
        self._prompts: Prompts | None = None

    # ---- parts

    @override
    def make_parts(self, stage: str) -> dict[str, Examples[Any]]:
        if stage == "predict":
            self._prompts = Prompts([each for each in self._read_prompts() for _ in range(self.pictures_per_prompt)])
            return {}
        known = self._known_parts()
        if "val" not in known:
            # Lightning takes no validation loader for an oversight
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return {name: self._examples(part) for name, part in known.items() if name not in self.parts}

    @property
    def captions(self) -> list[str]:
        """The captions of the training part, known after `setup`."""
        return self.captioned("train").captions

    def captioned(self, name: str) -> CaptionedPictures:
        """Return the examples of a part, known after `setup`.

        Raises:
            InputError: there is no such part.
        """
        part = self._part(name)
        assert isinstance(part, CaptionedPictures)
        return part

    @override
    def part_remedy(self, name: str) -> str:
        return f"set data.{name}_source, or data.{name}_fraction above 0"

    @override
    def example_batch(self, batch_size: int) -> CaptionBatch:
        """Return random pixels, of the first shape, and short captions."""
        shape = (batch_size, self.channels, *self.sizes[0])
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        captions = [f"a picture of {number}" for number in range(batch_size)]
        return {"images": pixels, "captions": captions, "indices": torch.arange(batch_size)}

    def _known_parts(self) -> dict[str, Captioned]:
        if not self._captioned:
            self._captioned = self._read()
        return self._captioned

    def _read(self) -> dict[str, Captioned]:
        if self.source is None:
            raise InputError("data.source is not set; name a folder of pictures with a .txt file beside each")
        parts = read_captions(self.source, self.columns, self.root, self.image_size)
        for name, other in self.other_sources.items():
            if other is not None:
                found = read_captions(other, self.columns, self.root, self.image_size)
                parts[name] = found.get(name, found["train"])
        train = parts["train"]
        order = np.random.default_rng(self.split_seed).permutation(len(train))
        start = 0
        for name, fraction in self.fractions.items():
            if name in parts or fraction == 0:
                continue
            number = round(len(train) * fraction)
            if number == 0:
                raise InputError(
                    f"{name}_fraction {fraction} of {len(train)} pictures is none; set it to 0 or higher up"
                )
            parts[name] = train.take(np.sort(order[start : start + number]))
            start += number
        if start == len(train):
            raise InputError(f"{len(train)} pictures leave none for training; lower val_fraction or test_fraction")
        return {**parts, "train": train.take(np.sort(order[start:]))}

    def _examples(self, part: Captioned) -> CaptionedPictures:
        return CaptionedPictures(part, self.transforms, self.channels, self.seed, self.on_error)

    def _read_prompts(self) -> Sequence[str]:
        given = self.predict_prompts
        if given is None:
            parts = self._known_parts()
            name = next((name for name in ("test", "val") if name in parts), None)
            if name is None:
                raise InputError("there is no prompt; set data.predict_prompts to a text file with one prompt a line")
            return [parts[name].caption(index) for index in range(len(parts[name]))]
        if isinstance(given, str):
            path = Path(given).expanduser()
            if not path.is_file():
                raise InputError(
                    f"data.predict_prompts: no such file {given!r}; name a text file with one prompt a line, or give a "
                    f'list: ["a red circle"]'
                )
            given = read_prompts(path)
        if not given:
            raise InputError("data.predict_prompts is empty; give at least one prompt")
        prompts = [prompt.strip() for prompt in given]
        if "" in prompts:
            raise InputError(
                f"data.predict_prompts: prompt {prompts.index('') + 1} is blank; write what its picture shows, or "
                f"leave it out"
            )
        return prompts

    # ---- loaders

    @property
    @override
    def num_train_samples(self) -> int:
        if len(self.sizes) == 1:
            return super().num_train_samples
        return samples_in_batches(self.captioned("train").buckets, self.global_batch_size)

    @override
    def train_dataloader(self) -> ResumableDataLoader:
        if len(self.sizes) == 1:
            return self.resumable_loader(self._part("train"), EpochSampler)
        assert self.num_train_batches > 0
        part = self.captioned("train")
        return ResumableDataLoader(
            part,
            batch_size=self.batch_size,
            sampler=BucketSampler(part.buckets, self.batch_size, *self.shard(), seed=self.seed),
            drop_last=True,
            **self._loader_options(),
        )

    @override
    def evaluation_loader(self, dataset: Any) -> DataLoader[Any]:
        if len(self.sizes) == 1 or not isinstance(dataset, CaptionedPictures):
            return super().evaluation_loader(dataset)
        return DataLoader(
            dataset,
            batch_size=self.eval_batch_size,
            sampler=BucketEvaluationSampler(dataset.buckets, self.eval_batch_size, *self.shard()),
            generator=torch.Generator(),  # validation leaves the training stream alone
            **self._loader_options(),
        )

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of prompts, in order."""
        assert self._prompts is not None
        return super().evaluation_loader(self._prompts)


def _bucket_sizes(size: tuple[int, int], step: int, most: float) -> list[tuple[int, int]]:
    if size[0] != size[1]:
        raise InputError(f"image_size is {list(size)}; with aspect_buckets it is the side of a square: set one number")
    if size[0] % step:
        raise InputError(
            f"image_size is {size[0]}, no multiple of bucket_step {step}; set it to {-(-size[0] // step) * step}, or "
            f"another bucket_step"
        )
    if most < 1:
        raise InputError(f"max_aspect is {most}; set it to 1 or more")
    return bucket_sizes(size[0], step, most)
