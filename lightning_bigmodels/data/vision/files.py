"""Pictures from files, as uint8 tensors; what is no picture is named with its remedy."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision.io
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode

from lightning_bigmodels.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_JPEG = b"\xff\xd8\xff"
_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


def picture_files(folder: Path) -> list[Path]:
    """Return the pictures below a folder, hidden ones left out, in the order of their names.

    Raises:
        InputError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a folder of pictures")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise InputError(f"{folder} holds no picture ({', '.join(SUFFIXES)}); name a folder that does")
    return found


def read_picture(path: str | Path, channels: int = 3) -> Tensor:
    """Return a picture as (channels, H, W) uint8, turned as its EXIF says.

    Gray pictures become coloured ones and the other way round as the number of channels wants; palettes and CMYK are
    resolved; 16 bits are reduced to 8. A picture with transparency is laid on white.

    Args:
        path: JPEG, PNG, or what else Pillow reads.
        channels: 3, red, green, blue, or 1, gray; any other number is that of the file, which must have it.

    Raises:
        InputError: the file is missing, empty, cut off, damaged or no picture.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); correct the path or remove the entry") from error
    return decode_picture(content, str(path), channels)


def decode_picture(content: bytes, name: str, channels: int = 3) -> Tensor:
    """Return a picture as `read_picture` does, from what its file holds.

    Args:
        content: The bytes of the file.
        name: What the user knows it by.
        channels: As for `read_picture`.

    Raises:
        InputError: the content is empty, cut off, damaged or no picture.
    """
    if not content:
        raise InputError(f"{name} is empty; replace or remove the file")
    if content.startswith(_JPEG) and channels in _MODES:
        # the fast way, for nearly every photo
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        try:
            return torchvision.io.decode_jpeg(data, mode=_MODES[channels], apply_exif_orientation=True)
        except RuntimeError:
            pass  # CMYK, and what is broken, whose reason Pillow knows better
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that nobody reads here
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is no picture that Pillow knows; replace or remove the file") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} is damaged or cut off ({error}); replace or remove the file") from error
    return from_pillow(upright, name, channels)


def from_pillow(image: Image.Image, name: str, channels: int = 3) -> Tensor:
    """Return a picture that Pillow has read as (channels, H, W) uint8, as `read_picture` does.

    Raises:
        InputError: the picture has another number of channels, and none of 1 and 3 is wanted.
    """
    array = _as_uint8(image, channels)
    if array.shape[-1] != channels:
        raise InputError(
            f"{name} has {array.shape[-1]} channels and {channels} are wanted; convert the file or set channels to 3"
        )
    return torch.from_numpy(array).permute(2, 0, 1)


def _as_uint8(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Return (H, W, channels); other numbers of channels than 1 and 3 are left as they are in the file."""
    if image.mode.startswith("I") or image.mode == "F":
        # 16 bits, which Pillow would cut off at 255
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray((values / max(1.0, 65535.0 / 255.0)).clip(0, 255).astype(np.uint8))
    if channels in (1, 3) and ("A" in image.getbands() or "transparency" in image.info):
        own = image.convert("RGBA")
        white = Image.new("RGBA", own.size, "white")
        image = Image.alpha_composite(white, own).convert("RGB")
    if channels in (1, 3):
        image = image.convert("L" if channels == 1 else "RGB")
    array = np.asarray(image)
    # a copy, which is a tensor's own to write to
    return np.array(array[..., None] if array.ndim == 2 else array)
