"""Pictures with their masks, found by their names."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.data.vision.examples import OnError
from lightning_bigmodels.data.vision.files import picture_files, read_picture
from lightning_bigmodels.data.vision.masks import MaskValues, read_mask
from lightning_bigmodels.data.vision.masks_coco import CocoMasks
from lightning_bigmodels.errors import InputError

_SHOWN = 5


class Pairs(ABC):
    """Pictures with their masks in a row, read one by one."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of pictures."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what the user knows a picture by: its file, or its place in a source."""

    @abstractmethod
    def short_name(self, index: int) -> str:
        """Return the name below the folder that the user named."""

    @abstractmethod
    def read(self, index: int, channels: int) -> tuple[Tensor, Tensor | None]:
        """Return a picture (channels, H, W) uint8 and the class of each pixel (H, W) int16, None where it has no mask.

        Raises:
            InputError: a file cannot be read, or the two do not fit together.
        """

    @abstractmethod
    def digest(self, index: int) -> str:
        """Return a hash of a picture's content."""

    @abstractmethod
    def take(self, rows: NDArray[np.int64]) -> "Pairs":
        """Return some of the pairs."""

    def classes(self, index: int) -> list[str]:
        """Return the names of the classes that a picture shows, where that is known without its pixels."""
        return []


class FilePairs(Pairs):
    """Pictures in files, with masks in files, in a COCO file, or without.

    Args:
        folder: What the pictures' names begin below.
        pictures: Their names.
        mask_files: For each the file of its mask.
        values: What the masks' values mean.
        coco: The COCO file, in place of mask files.
    """

    def __init__(
        self,
        folder: Path,
        pictures: Sequence[str],
        mask_files: Sequence[str | Path] | None = None,
        values: MaskValues | None = None,
        coco: CocoMasks | None = None,
    ) -> None:
        self.folder = folder
        # arrays of bytes instead of a million strings: a worker process that only reads them copies nothing
        self._pictures = np.array([os.fsencode(name) for name in pictures], dtype=np.bytes_)
        self._masks = None if mask_files is None else np.array([os.fsencode(p) for p in mask_files], dtype=np.bytes_)
        self.values = values
        self.coco = coco

    @override
    def __len__(self) -> int:
        return len(self._pictures)

    @override
    def short_name(self, index: int) -> str:
        return os.fsdecode(bytes(self._pictures[index]))

    @override
    def name(self, index: int) -> str:
        return str(self.folder / self.short_name(index))

    @override
    def read(self, index: int, channels: int) -> tuple[Tensor, Tensor | None]:
        image = read_picture(self.name(index), channels)
        size = (image.shape[1], image.shape[2])
        if self.coco is not None:
            return image, self.coco.read(self.short_name(index), size)
        if self._masks is None:
            return image, None
        assert self.values is not None
        return image, read_mask(Path(os.fsdecode(bytes(self._masks[index]))), self.values, size)

    @override
    def digest(self, index: int) -> str:
        return hashlib.blake2b(Path(self.name(index)).read_bytes(), digest_size=16).hexdigest()

    @override
    def classes(self, index: int) -> list[str]:
        return [] if self.coco is None else self.coco.classes(self.short_name(index))

    @override
    def take(self, rows: NDArray[np.int64]) -> "FilePairs":
        part = FilePairs(self.folder, [], values=self.values, coco=self.coco)
        part._pictures = self._pictures[rows]
        part._masks = None if self._masks is None else self._masks[rows]
        return part


def bare_pictures(path: Path) -> FilePairs:
    """Return the pictures of a folder, or one picture, without masks.

    Raises:
        InputError: there is none, or two would get the same name for what is predicted.
    """
    if path.is_file():
        return FilePairs(path.parent, [path.name])
    files = picture_files(path)
    _by_stem(path, files)
    return FilePairs(path, [str(file.relative_to(path)) for file in files])


def folder_pairs(
    folder: Path,
    masks: Path,
    values: MaskValues,
    names: Sequence[str] | None = None,
    suffixes: tuple[str, str] = ("", ""),
    on_error: OnError = "error",
) -> FilePairs:
    """Return the pictures of a folder with those masks of another that have their names, apart from endings.

    Args:
        folder: Pictures, also in folders below.
        masks: Masks in the same folders below.
        values: What the masks' values mean.
        names: The pictures that count, without file endings; None: all.
        suffixes: What the names of pictures end in, and what those of masks have in its place.
        on_error: With `skip` what lacks its other half remains: reading it says so.

    Raises:
        InputError: a picture has no mask or the other way round, or a name is not there.
    """
    found = _by_stem(folder, picture_files(folder), suffixes[0])
    answers = _by_stem(masks, picture_files(masks), suffixes[1])
    if names is None:
        wanted = sorted(found.keys() | answers.keys() if on_error == "skip" else found.keys())
        extra = sorted(answers.keys() - found.keys())
        if extra and on_error == "error":
            raise InputError(
                f"{_these([answers[stem] for stem in extra], 'masks')} have no picture of their name in {folder}; "
                f"add the pictures or remove the masks"
            )
    else:
        wanted = list(names)
    without = [stem for stem in wanted if stem not in answers]
    missing = [stem for stem in wanted if stem not in found]
    if on_error == "error" and missing:
        raise InputError(f"{folder} has no picture named {missing[0]!r}; correct the list of names")
    if on_error == "error" and without:
        raise InputError(
            f"{_these([found[stem] for stem in without], 'pictures')} have no mask of their name in {masks}; add the "
            f"masks or remove the pictures"
        )
    pictures = [found.get(stem, folder / f"{stem}{suffixes[0]}.png") for stem in wanted]
    files = [answers.get(stem, masks / f"{stem}{suffixes[1]}.png") for stem in wanted]
    return FilePairs(folder, [str(file.relative_to(folder)) for file in pictures], files, values)


def coco_pairs(folder: Path, coco: CocoMasks, names: Sequence[str] | None = None) -> FilePairs:
    """Return the pictures that a COCO file lists.

    Args:
        folder: What their names begin below.
        coco: The file.
        names: Those that count, without file endings; None: all.

    Raises:
        InputError: it lists none, or a name is not there.
    """
    stems = {str(Path(name).with_suffix("")): name for name in coco.images}
    missing = [name for name in names or () if name not in stems]
    if missing or not stems:
        raise InputError(f"{coco.path} lists no picture {missing[0] if missing else 'at all'}; correct the file")
    return FilePairs(folder, sorted(coco.images) if names is None else [stems[name] for name in names], coco=coco)


def read_names(path: Path) -> list[str]:
    """Return the names in a text file, one a line, as in Pascal VOC's ImageSets.

    Raises:
        InputError: the file is missing or empty.
    """
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as text ({error}); name a file with a picture's name a line"
        ) from error
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise InputError(f"{path} holds no name; write a picture's name a line, without its ending")
    return names


def _by_stem(folder: Path, files: Sequence[Path], suffix: str = "") -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        stem = str(file.relative_to(folder).with_suffix(""))
        if not stem.endswith(suffix):
            continue
        stem = stem.removesuffix(suffix)
        if stem in found:
            raise InputError(f"{found[stem]} and {file} have the same name but for the ending; rename or remove one")
        found[stem] = file
    if not found:
        raise InputError(f"{folder} holds no file whose name ends in {suffix!r}; correct the suffix or the folder")
    return found


def _these(files: Sequence[Path], kind: str) -> str:
    shown = ", ".join(str(file) for file in files[:_SHOWN])
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return f"{len(files)} {kind} ({shown}{more})"
