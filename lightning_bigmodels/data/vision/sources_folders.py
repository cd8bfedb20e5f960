"""Folders of pictures: one folder per class, or the class in the file's name; parts in folders of their own."""

from pathlib import Path

from lightning_bigmodels.data.vision.files import SUFFIXES, picture_files
from lightning_bigmodels.data.vision.labelled import Labelled, labelled, unlabelled
from lightning_bigmodels.data.vision.pictures import FilePictures
from lightning_bigmodels.errors import InputError, refuse

PART_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Names of folders that hold a part, and the part."""


def read_folder(folder: Path, with_classes: bool = True) -> dict[str, Labelled]:
    """Return the parts of a folder; one that names no parts is all `train`.

    Where every folder in it is called like a part, these are the parts. Else each folder in it is a class; without any,
    the class of a picture is its name up to the first dot.

    Args:
        folder: Holds pictures, or folders of them.
        with_classes: False: names of files and folders say nothing of classes.

    Raises:
        InputError: there is no picture, or an empty class.
    """
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = {path.name.lower() for path in inner}
    if names and names <= PART_FOLDERS.keys() and "train" in {PART_FOLDERS[name] for name in names}:
        return {PART_FOLDERS[path.name.lower()]: _one_part(path, with_classes) for path in inner}
    return {"train": _one_part(folder, with_classes)}


def _one_part(folder: Path, with_classes: bool) -> Labelled:
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = picture_files(folder)
    if not with_classes:
        return unlabelled(FilePictures(files))
    loose = [path for path in files if path.parent == folder]
    if not inner:
        named = {path: name for path in files if (name := _name_of(path))}
        return labelled(FilePictures(list(named)), list(named.values()))
    if loose:
        raise InputError(
            f"{folder} holds pictures ({loose[0].name}) beside folders ({inner[0].name}); move every picture into the "
            f"folder of its class, or remove the folders"
        )
    names = [path.relative_to(folder).parts[0] for path in files]
    for empty in [path for path in inner if path.name not in set(names)]:
        refuse(
            f"{empty} holds no picture ({', '.join(SUFFIXES)}): its class has no example; add some or remove the folder"
        )
    return labelled(FilePictures(files), names)


def _name_of(path: Path) -> str:
    name = path.name.partition(".")[0]
    if not name:
        refuse(f"{path}: no label before the first dot of its name; call it LABEL.jpg or LABEL.NUMBER.jpg")
    return name
