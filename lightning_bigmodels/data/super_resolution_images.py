"""Photos for super-resolution: large pictures with the small ones made from them."""

from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lightning_bigmodels.data.batches import SuperResolutionBatch
from lightning_bigmodels.data.datamodule import check_at_least
from lightning_bigmodels.data.vision.datamodule import VisionData
from lightning_bigmodels.data.vision.degradation import Degradation
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.files import picture_files
from lightning_bigmodels.data.vision.photos import (
    PicturesToEnlarge,
    TrainingCrops,
    WholePhotos,
    photo_files,
    take_fraction,
    take_named,
)
from lightning_bigmodels.errors import InputError

_SCALES = (2, 3, 4, 8)
# the window of the structural similarity, which has to fit once the border is shaved
_WINDOW = 11


class SuperResolutionImages(VisionData):
    """Photos, and the small pictures from which a network is to make them again.

    Training sees random crops; validation and test see whole photos, cut to a multiple of the scale; predict enlarges
    pictures of any size. Gray pictures become coloured ones, and transparent ones are laid on white.

    Args:
        source: A folder of photos, or `skimage-photos`: the nine in scikit-image's package.
        val_source: Folder of the validation photos; None: some of `source`.
        test_source: Folder of the test photos; None: some of `source`.
        predict_source: A folder of pictures, or one picture, that predict enlarges; None: the small pictures of the
            test part, or else of the validation part.
        val_photos: Names of the photos in `source` that are held out for validation, with or without suffix.
        test_photos: The same for testing.
        val_fraction: Part of the photos, from 0 to below 1, held out for validation where no `val_photos` are named.
        test_fraction: The same for testing.
        split_seed: Chooses which photos a fraction holds out.
        scale: How many times larger the photos are: 2, 3, 4 or 8.
        crop_size: Side of the small crops in training; of the large ones it is `scale` times that.
        crops_per_photo: Random crops of each photo in an epoch.
        degradation: How small pictures are made: `bicubic` (antialiased, as in the field's benchmarks), or `realistic`
            (blur, resizing, noise and JPEG, twice, as in Real-ESRGAN).
        flips: Whether crops are mirrored and turned by quarters at random.
        cache_mib: MiB of decoded photos that each loading process keeps.
        batch_size: Crops of a training batch, per process.
        eval_batch_size: Photos of an evaluation batch, per process.
        num_workers: Processes that load batches ahead; 0: none.
        seed: Chooses the order of the crops and what is drawn for each.
        on_error: Whether a photo that cannot be read ends the run (`error`), or is left out, counted and listed
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
        val_photos: list[str] | None = None,
        test_photos: list[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        scale: int = 2,
        crop_size: int = 48,
        crops_per_photo: int = 16,
        degradation: Degradation = "bicubic",
        flips: bool = True,
        cache_mib: int = 1024,
        batch_size: int = 16,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, on_error)
        check_at_least(1, crop_size=crop_size, crops_per_photo=crops_per_photo)
        check_at_least(0, cache_mib=cache_mib, split_seed=split_seed)
        if scale not in _SCALES:
            raise InputError(f"scale is {scale}; set it to {', '.join(map(str, _SCALES[:-1]))} or {_SCALES[-1]}")
        if degradation not in ("bicubic", "realistic"):
            raise InputError(f"degradation is {degradation!r}; set it to bicubic or realistic")
        for name, fraction in {"val_fraction": val_fraction, "test_fraction": test_fraction}.items():
            if not 0 <= fraction < 1:
                raise InputError(f"{name} is {fraction}; set it to 0 or more, and below 1")
        self.source = source
        self.predict_source = predict_source
        self.sources = {"test": test_source, "val": val_source}
        self.held_out = {"test": list(test_photos or []), "val": list(val_photos or [])}
        self.fractions = {"test": test_fraction, "val": val_fraction}
        self.split_seed = split_seed
        self.scale = scale
        self.crop_size = crop_size
        self.crops_per_photo = crops_per_photo
        self.degradation: Degradation = degradation
        self.flips = flips
        self.cache_mib = cache_mib
        self._files: dict[str, list[Path]] = {}

    @override
    def make_parts(self, stage: str) -> dict[str, Examples[Any]]:
        if stage == "predict" and self.predict_source is not None:
            files = photo_files(self.predict_source, picture_files)
            return {"predict": PicturesToEnlarge(files, self.seed, self.on_error)}
        if not self._files:
            self._files = self._find()
        parts: dict[str, Examples[Any]] = {
            name: self._whole(files) for name, files in self._files.items() if name != "train"
        }
        parts["train"] = TrainingCrops(
            self._files["train"],
            self.scale,
            self.crop_size,
            self.crops_per_photo,
            self.degradation,
            self.flips,
            self.cache_mib * 2**20,
            self.seed,
            self.on_error,
        )
        if stage == "predict":
            known = [name for name in ("test", "val") if name in self._files]
            if not known:
                raise InputError("there is nothing to enlarge; set data.predict_source to a folder of pictures")
            parts["predict"] = self._whole(self._files[known[0]])
        return parts

    @override
    def part_remedy(self, name: str) -> str:
        return f"name its photos in data.{name}_photos, its folder in data.{name}_source, or set data.{name}_fraction"

    @override
    def example_batch(self, batch_size: int) -> SuperResolutionBatch:
        """Return random pixels."""
        generator = torch.Generator().manual_seed(0)
        sides = {"images": self.crop_size, "targets": self.crop_size * self.scale}
        pixels = {
            name: torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8, generator=generator)
            for name, side in sides.items()
        }
        return {"images": pixels["images"], "targets": pixels["targets"], "indices": torch.arange(batch_size)}

    def _find(self) -> dict[str, list[Path]]:
        """Return the files of each part."""
        if self.source is None:
            raise InputError("data.source is not set; name a folder of photos, or skimage-photos")
        rest = photo_files(self.source, picture_files)
        found: dict[str, list[Path]] = {}
        for part in ("test", "val"):
            # what is named goes first, lest a fraction take it for another part
            if self.sources[part] is None and self.held_out[part]:
                found[part] = take_named(rest, self.held_out[part], f"data.{part}_photos")
                rest = [path for path in rest if path not in found[part]]
        for part, source in self.sources.items():
            if source is not None:
                found[part] = photo_files(source, picture_files)
            elif part not in found and self.fractions[part] > 0:
                found[part] = take_fraction(rest, self.fractions[part], self.split_seed, f"data.{part}_fraction")
                rest = [path for path in rest if path not in found[part]]
        if not rest:
            raise InputError(f"all photos of {self.source} are held out, and none is left to train on; hold out fewer")
        return {"train": rest, **found}

    def _whole(self, files: list[Path]) -> WholePhotos:
        return WholePhotos(files, self.scale, self.degradation, _WINDOW + 3 * self.scale, self.seed, self.on_error)
