"""Small generated pictures whose class can be seen: noise with a bright square in a place of the class's own."""

import numpy as np
from PIL import Image


def pixels(label, number, size=(12, 16)):
    """Return (H, W, 3) uint8, the same at each call; labels 0 to 3 are the corners of the square."""
    rng = np.random.default_rng([label, number])
    height, width = size
    values = rng.integers(0, 120, (height, width, 3), dtype=np.uint8)
    top, left = (label // 2) * (height // 2), (label % 2) * (width // 2)
    values[top : top + height // 2, left : left + width // 2] += 120
    return values


def write(path, label=0, number=0, size=(12, 16), mode="RGB", **options):
    """Write one picture; the suffix says how."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(label, number, size)).convert(mode).save(path, **options)
    return path


def write_folders(folder, counts, suffix=".png", size=(12, 16)):
    """Write pictures into a folder for each class, as many as `counts` says."""
    for label, (name, count) in enumerate(counts.items()):
        for number in range(count):
            write(folder / name / f"{number:03}{suffix}", label, number, size)
    return folder


def write_truncated(path, fraction=0.6, **options):
    """Write a picture of which the end is missing."""
    write(path, size=(60, 80), **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    return path
