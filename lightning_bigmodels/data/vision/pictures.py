"""Where pictures lie: in files or in an array. All are read one by one as uint8 tensors."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.data.vision.files import read_picture
from lightning_bigmodels.errors import InputError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and JPEG have it


class Pictures(ABC):
    """Pictures in a row, none of them in memory unless the source itself is."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of pictures."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what the user knows a picture by: its file, or its place in one."""

    @abstractmethod
    def read(self, index: int, channels: int) -> Tensor:
        """Return a picture as (channels, H, W) uint8.

        Raises:
            InputError: it cannot be read; the message names it.
        """

    @abstractmethod
    def digest(self, index: int) -> str:
        """Return a hash of a picture's content."""


class FilePictures(Pictures):
    """Pictures in files.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        # One array of bytes instead of a million strings: a worker process that only reads it copies nothing.
        self._paths = np.array([os.fsencode(path) for path in paths])

    @override
    def __len__(self) -> int:
        return len(self._paths)

    @override
    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[index]))

    @override
    def read(self, index: int, channels: int) -> Tensor:
        return read_picture(self.name(index), channels)

    @override
    def digest(self, index: int) -> str:
        return digest_of(Path(self.name(index)).read_bytes())


class ArrayPictures(Pictures):
    """Pictures in an array, which may be mapped from a file.

    Args:
        source: What the array is called in messages.
        array: (N, H, W) or (N, H, W, C) uint8.

    Raises:
        InputError: the array has another shape or type.
    """

    def __init__(self, source: str, array: NDArray[np.uint8]) -> None:
        if array.dtype != np.uint8:
            raise InputError(f"{source} holds pictures of {array.dtype}; save them as uint8, from 0 to 255")
        if array.ndim not in (3, 4):
            raise InputError(f"{source} holds an array of shape {array.shape}; save pictures as (N, H, W[, channels])")
        self.source = source
        self.array = array if array.ndim == 4 else array[..., None]

    @override
    def __len__(self) -> int:
        return len(self.array)

    @override
    def name(self, index: int) -> str:
        return f"{self.source}[{index}]"

    @override
    def read(self, index: int, channels: int) -> Tensor:
        picture = torch.from_numpy(np.array(self.array[index])).permute(2, 0, 1)
        try:
            return with_channels(picture, channels)
        except InputError as error:
            raise InputError(f"{self.name(index)}: {error}") from error

    @override
    def digest(self, index: int) -> str:
        return digest_of(self.array[index].tobytes())


def digest_of(content: bytes) -> str:
    """Return a hash of what a picture holds."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def with_channels(picture: Tensor, channels: int) -> Tensor:
    """Return a picture (C, H, W) uint8 with the wanted number of channels: gray from colours, or the other way round.

    Raises:
        InputError: there is no way from one number to the other.
    """
    found = picture.shape[0]
    if found == channels:
        return picture
    if found == 1 and channels == 3:
        return picture.expand(3, -1, -1)
    if found == 3 and channels == 1:
        weights = torch.tensor(_LUMA).view(3, 1, 1)
        return (picture * weights).sum(0, keepdim=True).round().to(torch.uint8)
    raise InputError(f"the picture has {found} channels and {channels} are wanted; set channels to {found}")
