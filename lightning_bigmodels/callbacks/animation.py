"""Pictures of a run's steps as an animation."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_bigmodels.errors import require
from lightning_bigmodels.pictures import captioned

_MOST_FRAMES = 100
_SECONDS = 8.0  # of the whole, at most
_LONGEST, _LAST = 400, 1500  # milliseconds of a frame


def animate(path: Path, folder: Path, steps: Sequence[int]) -> None:
    """Write a GIF of `step_NNNNNNNN.png` files, each above its step; files that are not there are left out.

    Args:
        path: The GIF; it is replaced when the new one is whole.
        folder: Where the pictures lie.
        steps: Their steps, in order; of many, frames are spread evenly over them, and the last is always one.
    """
    found = [(step, file) for step in steps if (file := folder / f"step_{step:08d}.png").is_file()]
    number = min(len(found), _MOST_FRAMES)
    if not number:
        return
    places = torch.linspace(0, len(found) - 1, number).round().int().tolist()
    image_module = require("PIL.Image", extra="vision")
    pictures = [_captioned(*found[place]) for place in places]
    size = max(picture.shape[1] for picture in pictures), max(picture.shape[2] for picture in pictures)
    frames = []
    for picture in pictures:
        canvas = torch.full((3, *size), 255, dtype=torch.uint8)
        canvas[:, : picture.shape[1], : picture.shape[2]] = picture
        frame = image_module.fromarray(canvas.permute(1, 2, 0).contiguous().numpy())
        is_gray = bool((canvas == canvas[:1]).all())
        # Pillow's own way to 256 colours takes up to a second for a frame
        octree = image_module.Quantize.FASTOCTREE
        frames.append(frame.convert("L") if is_gray else frame.quantize(256, method=octree))
    milliseconds = [int(min(_LONGEST, 1000 * _SECONDS / number))] * number
    milliseconds[-1] = _LAST
    half = path.with_name(f".{path.name}.part")
    frames[0].save(half, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    half.replace(path)


def _captioned(step: int, file: Path) -> Tensor:
    """Return (3, H, W) uint8: the picture above its step; no two frames are alike then, which Pillow would make one."""
    image_module = require("PIL.Image", extra="vision")
    to_tensor = require("torchvision.transforms.v2.functional", extra="vision").pil_to_tensor
    with image_module.open(file) as picture:
        return captioned(to_tensor(picture), [f"step {step}"])
