"""The layout and the classes of Cityscapes: street scenes, as seen by a car."""

from pathlib import Path

from lightning_bigmodels.data.vision.examples import OnError
from lightning_bigmodels.data.vision.mask_pairs import FilePairs, folder_pairs
from lightning_bigmodels.data.vision.masks import MaskValues

# id in the files: class. Source: Cordts et al. 2016, "The Cityscapes Dataset", table 1 and its toolkit's list of labels
CLASSES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
_NUM_IDS = 34
_LICENSE_PLATE = 255  # -1 in the list, as 8 bits
_SUFFIXES = ("_leftImg8bit", "_gtFine_labelIds")


def is_cityscapes(folder: Path) -> bool:
    """Return whether a folder holds the folders `leftImg8bit` and `gtFine`."""
    return (folder / "leftImg8bit").is_dir() and (folder / "gtFine").is_dir()


def cityscapes_values() -> MaskValues:
    """Return the 19 classes that are judged; the other ids are ignored."""
    ignored = [number for number in (*range(_NUM_IDS), _LICENSE_PLATE) if number not in CLASSES]
    return MaskValues(list(CLASSES.values()), list(CLASSES), ignored)


def cityscapes_parts(folder: Path, on_error: OnError) -> dict[str, FilePairs]:
    """Return the parts `train` and `val`, as far as they are there; the masks of `test` are not public.

    Raises:
        InputError: a picture has no mask or the other way round.
    """
    values = cityscapes_values()
    return {
        name: folder_pairs(
            folder / "leftImg8bit" / name, folder / "gtFine" / name, values, suffixes=_SUFFIXES, on_error=on_error
        )
        for name in ("train", "val")
        if (folder / "leftImg8bit" / name).is_dir()
    }
