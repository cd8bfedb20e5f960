"""torchvision's own data sets by name."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets
from PIL import Image
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.data.vision.files import from_pillow
from lightning_bigmodels.data.vision.labelled import Labelled, labelled
from lightning_bigmodels.data.vision.pictures import Pictures, digest_of, with_channels
from lightning_bigmodels.data.vision.sources_arrays import has_idx, read_idx
from lightning_bigmodels.errors import InputError, near

_SPLITS = {
    "train": ("train", "trainval", "train-standard"),
    "val": ("val", "valid"),
    "test": ("test",),
}
_LABELS = ("targets", "_labels", "labels")
"""Where data sets keep the labels of all their pictures; the others' pictures are read once."""

_IN_MNIST_FORMAT = ("MNIST", "FashionMNIST", "KMNIST")


class TorchvisionPictures(Pictures):
    """The pictures of a data set of torchvision.

    Args:
        name: What the data set is called in messages.
        dataset: Gives a Pillow picture or a tensor, and a label.
    """

    def __init__(self, name: str, dataset: Sequence[tuple[Any, Any]]) -> None:
        self._name = name
        self.dataset = dataset

    @override
    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"

    @override
    def read(self, index: int, channels: int) -> Tensor:
        try:
            picture = self.dataset[index][0]
        except (OSError, SyntaxError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.name(index)} cannot be read ({error}); fetch the data again") from error
        if isinstance(picture, Image.Image):
            return from_pillow(picture, self.name(index), channels)
        return with_channels(torch.as_tensor(picture), channels)

    @override
    def digest(self, index: int) -> str:
        return digest_of(np.asarray(self.dataset[index][0]).tobytes())


def dataset_names() -> list[str]:
    """Return the data sets that a root alone describes; not all of them have classes."""
    names = []
    for name in torchvision.datasets.__all__:
        cls = getattr(torchvision.datasets, name)
        if inspect.isclass(cls) and issubclass(cls, torchvision.datasets.VisionDataset):
            own = list(inspect.signature(cls).parameters.values())
            needed = [p.name for p in own if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
            if needed == ["root"] and name != "ImageFolder":
                names.append(name)
    return names


def read_torchvision(name: str, root: Path, download: bool) -> dict[str, Labelled]:
    """Return the parts of a data set.

    Args:
        name: Its name in torchvision.datasets.
        root: Folder where it is; MNIST, Fashion-MNIST and KMNIST may lie there as they were published.
        download: Whether it is fetched if it is not there.

    Raises:
        InputError: there is no such data set, in torchvision or in the folder, or it has no classes.
    """
    known = dataset_names()
    if name not in known:
        raise InputError(f"torchvision has no data set {name!r} that a root alone describes{near(name, known)}")
    cls = getattr(torchvision.datasets, name)
    if name in _IN_MNIST_FORMAT and has_idx(root):
        return read_idx(root, list(cls.classes))
    found = {}
    for part in _SPLITS:
        dataset = _open(cls, part, root, download)
        if dataset is not None:
            found[part] = _labelled(f"torchvision:{name}@{part}", dataset)
    return found


def _open(cls: type, part: str, root: Path, download: bool) -> Any:
    """Return a part of a data set; None where it has no such part."""
    parameters = inspect.signature(cls).parameters
    options: dict[str, Any] = {"download": True} if download and "download" in parameters else {}
    if "train" in parameters:
        choices: list[dict[str, Any]] = [] if part == "val" else [{"train": part == "train"}]
    elif "split" in parameters:
        choices = [{"split": split} for split in _SPLITS[part]]
    else:
        choices = [{}] if part == "train" else []
    for choice in choices:
        try:
            return cls(root, **choice, **options)
        except ValueError as error:  # no such split
            last = error
        except (RuntimeError, OSError) as error:
            # torchvision goes on with an argument of its own
            reason = str(error).strip().splitlines()[0].partition(" You can use download")[0].rstrip(".")
            raise InputError(
                f"{cls.__name__} is not in {root} ({reason}); set data.root to the folder it is in, or data.download "
                f"to true"
            ) from error
        except ModuleNotFoundError as error:
            raise InputError(f"{cls.__name__} needs the package {error.name}; install it") from error
    if choices and part == "train":
        raise InputError(f"{cls.__name__} has no training part ({last}); name another data set")
    return None


def _labelled(name: str, dataset: Any) -> Labelled:
    values = next((getattr(dataset, attribute) for attribute in _LABELS if hasattr(dataset, attribute)), None)
    if values is None:
        values = [dataset[index][1] for index in range(len(dataset))]
    try:
        labels = np.asarray(values)
    except ValueError:
        labels = np.empty(0)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0 or labels.min() < 0:
        raise InputError(f"{name} does not have one class for each picture; name another data set")
    classes = getattr(dataset, "classes", getattr(dataset, "categories", None))
    names = [str(number) for number in range(int(labels.max()) + 1)] if classes is None else [*map(_text, classes)]
    # some number classes that no picture has
    used = [names[number] for number in np.unique(labels)]
    return labelled(TorchvisionPictures(name, dataset), [names[label] for label in labels], used)


def _text(name: str | Sequence[str]) -> str:
    """Return a class's name; ImageNet has several for each."""
    return name if isinstance(name, str) else name[0]
