"""Photos and the small pictures made from them: crops for training, whole ones for evaluation."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.data.loading import sample_randomness
from lightning_bigmodels.data.vision.degradation import MARGINS, Degradation, degrade
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.files import read_picture
from lightning_bigmodels.errors import InputError, near, require

SKIMAGE = "skimage-photos"
# of skimage.data, what is a photo in colours and in its wheel
_SKIMAGE_NAMES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
# the seed's own stream of evaluation, which no epoch has
_EVALUATION = -1
_FILLER_SIDE = 16


class Pair(NamedTuple):
    """A photo and its small picture.

    Attributes:
        place: Index in its part.
        large: (3, s H, s W) uint8; of a picture to predict, nothing.
        small: (3, H, W) uint8; not there before `prepare`.
    """

    place: int
    large: Tensor | None
    small: Tensor | None = None


class TrainingCrops(Examples[Pair]):
    """Random crops, several of each photo in an epoch, mirrored and turned, with the small pictures made from them.

    Args:
        files: The photos.
        scale: Factor between small and large.
        crop_size: Side of the small crops.
        crops_per_photo: Crops of each photo in an epoch.
        degradation: How small pictures are made.
        flips: Whether crops are mirrored and turned by quarters.
        cache_bytes: Bytes of decoded photos that are kept.
        seed: With epoch and index it fixes what is drawn for a crop.
        on_error: Whether a photo that cannot be read ends the run or is left out.
    """

    def __init__(
        self,
        files: Sequence[Path],
        scale: int,
        crop_size: int,
        crops_per_photo: int,
        degradation: Degradation,
        flips: bool,
        cache_bytes: int,
        seed: int = 0,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(seed, on_error)
        self.files = list(files)
        self.scale = scale
        self.crop_size = crop_size
        self.crops_per_photo = crops_per_photo
        self.degradation: Degradation = degradation
        self.flips = flips
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[int, Tensor] = OrderedDict()

    @override
    def __len__(self) -> int:
        return len(self.files) * self.crops_per_photo

    @override
    def name(self, index: int) -> str:
        return str(self.files[index // self.crops_per_photo])

    @override
    def distinct(self) -> Sequence[int]:
        return range(0, len(self), self.crops_per_photo)

    @override
    def read(self, index: int) -> Pair:
        number = index // self.crops_per_photo
        if number in self._cache:
            self._cache.move_to_end(number)
            return Pair(index, self._cache[number])
        photo = read_picture(self.files[number])
        side = self.crop_size * self.scale
        if min(photo.shape[1:]) < side:
            raise InputError(
                f"{self.files[number]} is {photo.shape[2]} x {photo.shape[1]} pixels, smaller than a crop of {side} "
                f"(crop_size {self.crop_size} times scale {self.scale}); lower data.crop_size or remove the photo"
            )
        self._cache[number] = photo
        while len(self._cache) > 1 and sum(kept.numel() for kept in self._cache.values()) > self.cache_bytes:
            self._cache.popitem(last=False)
        return Pair(index, photo)

    @override
    def prepare(self, example: Pair, epoch: int | None) -> Pair:
        photo = example.large
        assert photo is not None
        side = self.crop_size * self.scale
        top, left = (int(torch.randint(length - side + 1, ())) for length in photo.shape[1:])
        large, small = crop_pair(photo, top, left, self.crop_size, self.scale, self.degradation)
        if self.flips:
            # each of the eight ways to lay a square
            turns, mirrored = int(torch.randint(4, ())), bool(torch.randint(2, ()))
            large, small = (_turned(picture, turns, mirrored) for picture in (large, small))
        return Pair(example.place, large, small)

    @override
    def filler(self, epoch: int | None) -> Pair:
        return _filler(self.crop_size, self.scale)

    @override
    def collate(self, indices: Tensor, examples: list[Pair]) -> dict[str, Any]:
        small = [example.small for example in examples if example.small is not None]
        large = [example.large for example in examples if example.large is not None]
        return {"images": torch.stack(small), "targets": torch.stack(large), "indices": indices}


class WholePhotos(Examples[Pair]):
    """Whole photos, cut at the right and at the bottom to a multiple of the scale, with their small pictures.

    Args:
        files: The photos.
        scale: Factor between small and large.
        degradation: How small pictures are made; what it draws belongs to (seed, index).
        least_side: Pixels that both sides of a photo must have, for the metrics.
        seed: With the index it fixes what is drawn.
        on_error: Whether a photo that cannot be read ends the run or is left out.
    """

    def __init__(
        self,
        files: Sequence[Path],
        scale: int,
        degradation: Degradation,
        least_side: int,
        seed: int = 0,
        on_error: OnError = "error",
    ) -> None:
        super().__init__(seed, on_error)
        self.files = list(files)
        self.scale = scale
        self.degradation: Degradation = degradation
        self.least_side = least_side

    @override
    def __len__(self) -> int:
        return len(self.files)

    @override
    def name(self, index: int) -> str:
        return str(self.files[index])

    @override
    def read(self, index: int) -> Pair:
        photo = read_picture(self.files[index])
        if min(photo.shape[1:]) < self.least_side:
            raise InputError(
                f"{self.files[index]} is {photo.shape[2]} x {photo.shape[1]} pixels, and a photo that is measured "
                f"needs {self.least_side} on each side; remove it or give a larger one"
            )
        return Pair(index, photo)

    @override
    def prepare(self, example: Pair, epoch: int | None) -> Pair:
        assert example.large is not None
        height, width = (length // self.scale * self.scale for length in example.large.shape[1:])
        large = example.large[:, :height, :width].contiguous()
        with sample_randomness(self.seed, _EVALUATION, example.place):
            return Pair(example.place, large, degrade(large, self.scale, self.degradation))

    @override
    def filler(self, epoch: int | None) -> Pair:
        return _filler(_FILLER_SIDE, self.scale)

    @override
    def collate(self, indices: Tensor, examples: list[Pair]) -> dict[str, Any]:
        small, large = [example.small for example in examples], [example.large for example in examples]
        return {"images": small, "targets": large, "indices": indices, "files": _files(self, indices)}


class PicturesToEnlarge(Examples[Pair]):
    """Pictures of any size, as they are in their files.

    Args:
        files: The pictures.
        seed: Not used: nothing is drawn.
        on_error: Whether a picture that cannot be read ends the run or is left out.
    """

    def __init__(self, files: Sequence[Path], seed: int = 0, on_error: OnError = "error") -> None:
        super().__init__(seed, on_error)
        self.files = list(files)

    @override
    def __len__(self) -> int:
        return len(self.files)

    @override
    def name(self, index: int) -> str:
        return str(self.files[index])

    @override
    def read(self, index: int) -> Pair:
        return Pair(index, None, read_picture(self.files[index]))

    @override
    def prepare(self, example: Pair, epoch: int | None) -> Pair:
        return example

    @override
    def filler(self, epoch: int | None) -> Pair:
        return _filler(_FILLER_SIDE, 1)

    @override
    def collate(self, indices: Tensor, examples: list[Pair]) -> dict[str, Any]:
        return {"images": [example.small for example in examples], "indices": indices, "files": _files(self, indices)}


def crop_pair(
    photo: Tensor, top: int, left: int, crop_size: int, scale: int, degradation: Degradation
) -> tuple[Tensor, Tensor]:
    """Return a crop of a photo and its small picture, whose edges know what lies around the crop.

    Args:
        photo: (3, H, W) uint8.
        top: First row of the crop.
        left: First column.
        crop_size: Side of the small picture.
        scale: Factor between both.
        degradation: How the small picture is made.

    Returns:
        (3, s c, s c) and (3, c, c) uint8, with s the scale and c the crop's size.
    """
    side = crop_size * scale
    bounds = []
    for start, length in ((top, photo.shape[1]), (left, photo.shape[2])):
        before = min(MARGINS[degradation], start // scale)
        after = min(MARGINS[degradation], (length - start - side) // scale)
        bounds.append((before, start - before * scale, start + side + after * scale))
    (above, first_row, last_row), (beside, first_column, last_column) = bounds
    around = photo[:, first_row:last_row, first_column:last_column]
    small = degrade(around, scale, degradation)[:, above : above + crop_size, beside : beside + crop_size]
    return photo[:, top : top + side, left : left + side], small


def photo_files(source: str, folder_files: Any) -> list[Path]:
    """Return the photos of a source: a folder, a file or `skimage-photos`.

    Args:
        source: As the user gave it.
        folder_files: Lists the pictures of a folder.
    """
    if source == SKIMAGE:
        folder = Path(str(require("skimage.data", extra="vision").__file__)).parent
        return [folder / name for name in _SKIMAGE_NAMES if (folder / name).is_file()]
    path = Path(source).expanduser()
    return [path] if path.is_file() else folder_files(path)


def take_named(files: list[Path], names: Sequence[str], argument: str) -> list[Path]:
    """Return the photos that have these names, with or without suffix, in their order among all.

    Raises:
        InputError: there is none, or more than one, of a name.
    """
    taken = set()
    for name in names:
        found = [path for path in files if name in (path.name, path.stem, str(path))]
        if not found:
            raise InputError(f"{argument} names {name!r}, and no photo has that name{near(name, _names(files))}")
        if len(found) > 1:
            raise InputError(f"{argument} names {name!r}, as {found[0]} and {found[1]} both are; name a whole path")
        taken.add(found[0])
    return [path for path in files if path in taken]


def take_fraction(files: list[Path], fraction: float, seed: int, argument: str) -> list[Path]:
    """Return this part of the photos, drawn by the seed alone, in their order among all.

    Raises:
        InputError: the part is none of them, or all.
    """
    number = round(fraction * len(files))
    if number in (0, len(files)):
        raise InputError(
            f"{argument} {fraction} of {len(files)} photos is {number or 'none'}; change it, or name the photos"
        )
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:number])
    return [path for place, path in enumerate(files) if place in chosen]


def _files(part: Examples[Pair], indices: Tensor) -> list[str]:
    return [part.name(index) if index >= 0 else "" for index in indices.tolist()]


def _names(files: list[Path]) -> list[str]:
    return [path.name for path in files]


def _turned(picture: Tensor, turns: int, mirrored: bool) -> Tensor:
    picture = torch.rot90(picture, turns, (1, 2))
    return picture.flip(2) if mirrored else picture


def _filler(side: int, scale: int) -> Pair:
    small = torch.zeros(3, side, side, dtype=torch.uint8)
    return Pair(_EVALUATION, small.repeat_interleave(scale, 1).repeat_interleave(scale, 2), small)
