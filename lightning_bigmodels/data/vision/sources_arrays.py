"""Pictures in arrays: scikit-learn's digits, NumPy files, and the format of MNIST."""

import gzip
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_bigmodels.data.vision.labelled import Labelled, labelled
from lightning_bigmodels.data.vision.pictures import ArrayPictures
from lightning_bigmodels.errors import InputError, require

PREFIXES = {"": "train", "train_": "train", "val_": "val", "test_": "test"}
_IDX_PARTS = {"train": "train", "test": "t10k"}
_UBYTE = 0x08  # the only type of values that MNIST and its kin use


def read_digits() -> Labelled:
    """Return scikit-learn's 1,797 handwritten digits, 8 x 8, their 16 shades spread over 0 to 255."""
    digits = require("sklearn.datasets", extra="vision").load_digits()
    shades = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return labelled(ArrayPictures("sklearn-digits", shades), [str(label) for label in digits.target])


def read_numpy(path: Path) -> dict[str, Labelled]:
    """Return the parts of a NumPy file.

    A `.npz` file holds `images` and `labels`, or these of each part: `train_images`, `val_images`, `test_images`,
    `train_labels` and so on (as MedMNIST has them), or `x_train`, `y_train`, `x_test`, `y_test` (as Keras has them);
    and perhaps `class_names`. A `.npy` file with `images` in its name has its labels beside it, in a file of the same
    name with `labels`.

    Raises:
        InputError: the file cannot be read, or its arrays do not fit together.
    """
    if path.suffix.lower() == ".npy":
        if "images" not in path.name:
            raise InputError(f"{path}: call it images.npy, and the file of its labels beside it labels.npy")
        beside = path.with_name(path.name.replace("images", "labels"))
        if not beside.is_file():
            raise InputError(f"{path} has no labels: there is no file {beside}; write one number or name per picture")
        return {"train": _from_arrays(str(path), _load(path), _load(beside), None)}
    arrays = _load(path)
    class_names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
    found = {}
    for prefix, part in PREFIXES.items():
        for images, labels in ((f"{prefix}images", f"{prefix}labels"), (f"x_{prefix[:-1]}", f"y_{prefix[:-1]}")):
            if images in arrays and labels in arrays:
                name = f"{path}:{images}"
                found[part] = _from_arrays(name, arrays[images], arrays[labels], class_names)
    if "train" not in found:
        raise InputError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; save the arrays images and labels, or train_images, "
            f"train_labels, test_images, test_labels"
        )
    return found


def _load(path: Path) -> Any:
    try:
        content = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix.lower() == ".npy" else None)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is no NumPy file of plain arrays ({error}); write it again") from error


def _from_arrays(name: str, images: NDArray[Any], labels: NDArray[Any], class_names: list[str] | None) -> Labelled:
    """Return pictures with classes: numbers, names, or rows of 0 and 1 with a column for each class."""
    pictures = ArrayPictures(name, images)
    if len(labels) != len(pictures):
        raise InputError(f"{name} holds {len(pictures)} pictures and {len(labels)} labels; give each picture one")
    if not len(labels):
        raise InputError(f"{name} holds no picture; save some")
    if labels.ndim == 2 and labels.shape[1] > 1:
        return _many_hot(name, pictures, labels, class_names)
    labels = labels.reshape(len(labels))  # MedMNIST's are (N, 1)
    if labels.dtype.kind in "US":
        return labelled(pictures, [str(label) for label in labels], class_names)
    if labels.dtype.kind not in "iu":
        raise InputError(f"{name} has labels of {labels.dtype}; save them as whole numbers or as names")
    if class_names is None:
        return labelled(pictures, [str(label) for label in labels.tolist()])
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise InputError(
            f"{name} has the label {labels.max() if labels.min() >= 0 else labels.min()}, which none of the "
            f"{len(class_names)} class_names belongs to; number the labels from 0"
        )
    return Labelled(pictures, np.arange(len(labels)), class_names, labels.astype(np.int64))


def _many_hot(name: str, pictures: ArrayPictures, labels: NDArray[Any], class_names: list[str] | None) -> Labelled:
    if not np.isin(labels, (0, 1)).all():
        raise InputError(f"{name} has several labels a picture that are not all 0 or 1; write 1 for a class it shows")
    names = [str(number) for number in range(labels.shape[1])] if class_names is None else class_names
    if len(names) != labels.shape[1]:
        raise InputError(f"{name} has {labels.shape[1]} columns of labels and {len(names)} class_names; match them")
    return Labelled(pictures, np.arange(len(labels)), names, labels.astype(np.bool_))


def has_idx(folder: Path) -> bool:
    """Return whether a folder holds MNIST's own files, or those of its kin, compressed or not."""
    return any(folder.glob("train-images-idx3-ubyte*"))


def read_idx(folder: Path, class_names: list[str] | None = None) -> dict[str, Labelled]:
    """Return the parts of a folder with `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte.gz` and so on.

    Raises:
        InputError: a file is missing or damaged.

    Source: LeCun, Cortes & Burges, "The MNIST database of handwritten digits", on the format.
    """
    found = {}
    for part, name in _IDX_PARTS.items():
        images = _read_idx_file(folder, f"{name}-images-idx3-ubyte")
        labels = _read_idx_file(folder, f"{name}-labels-idx1-ubyte")
        found[part] = _from_arrays(str(folder / name), images, labels, class_names)
    return found


def _read_idx_file(folder: Path, name: str) -> NDArray[np.uint8]:
    path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    if not path.is_file():
        raise InputError(f"there is no file {folder / name} or {path.name} beside it; fetch it")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); fetch it again") from error
    num_axes = content[3] if len(content) > 4 else 0
    head = 4 + 4 * num_axes
    shape = struct.unpack(f">{num_axes}I", content[4:head]) if len(content) >= head else ()
    if not shape or content[:3] != bytes([0, 0, _UBYTE]) or len(content) != head + int(np.prod(shape)):
        raise InputError(f"{path} is no whole file of MNIST's format; fetch it again")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
