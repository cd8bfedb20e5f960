"""Pictures whose pixels' colours are their classes, and masks that say the same."""

import numpy as np
import torch
from PIL import Image

from lightning_bigmodels.data import SegmentationImages
from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.palette import class_palette

NAMES = ["ground", "tree", "car"]
COLORS = [[200, 40, 40], [40, 200, 40], [40, 40, 200]]


def draw(number, height=40, width=60):
    """Return a mask (H, W) uint8 of large regions."""
    generator = np.random.default_rng(number)
    mask = np.zeros((height, width), dtype=np.uint8)
    for kind in (1, 2):
        top, left = generator.integers(0, height // 2), generator.integers(0, width // 2)
        mask[top : top + height // 2, left : left + width // 3] = kind
    return mask


def as_picture(mask):
    return Image.fromarray(np.array(COLORS, dtype=np.uint8)[mask])


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_folder(folder):
    """Write ten pictures whose pixels' colours are their classes, with paletted masks."""
    for number in range(10):
        mask = draw(number, 30 + number, 60 - number)
        write(folder / "pictures" / f"{number}.png", as_picture(mask))
        paletted = Image.fromarray(mask)
        paletted.putpalette(class_palette())
        write(folder / "masks" / f"{number}.png", paletted)
    return folder


def open_data(folder, stage="fit", **changes):
    values = {
        "source": str(folder / "pictures"),
        "masks": str(folder / "masks"),
        "class_names": NAMES,
        "image_size": [32, 48],
        "batch_size": 4,
    }
    data = SegmentationImages(**{**values, **changes})
    data.setup(stage)
    return data


def read_all(data, part="val"):
    return data.parts[part].__getitems__(list(range(len(data.parts[part]))))


def agreement(image, mask):
    """Return which share of the counted pixels have the colour that is nearest to their class's."""
    colors = torch.tensor(COLORS).float()
    nearest = (image.permute(1, 2, 0).float()[:, :, None] - colors).square().sum(-1).argmin(-1)
    counted = mask != IGNORED
    assert counted.any()
    return (nearest == mask)[counted].float().mean()
