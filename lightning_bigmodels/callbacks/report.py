"""One way from a callback to every logger and to the run's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_bigmodels.errors import require
from lightning_bigmodels.palette import class_palette
from lightning_bigmodels.pictures import as_rgb
from lightning_bigmodels.png import Drawn, PictureInBands, PictureWithText, write_png


def run_folder(trainer: Trainer) -> Path:
    """Return the run's folder; all processes must ask, since the first one tells the others."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def report_table(trainer: Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Send a table of text to each logger that can show one.

    Args:
        trainer: The run; its step becomes the table's.
        name: What the loggers call it.
        columns: Heads of the columns.
        rows: One text for each column.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_text(key=name, columns=list(columns), data=[list(row) for row in rows])
        elif isinstance(logger, TensorBoardLogger):
            lines = [columns, ["---"] * len(columns), *rows]
            text = "\n".join("| " + " | ".join(cell.replace("\n", "<br>") for cell in line) + " |" for line in lines)
            logger.experiment.add_text(name, text, trainer.global_step)


def report_picture(trainer: Trainer, name: str, picture: Tensor) -> Path:
    """Write a picture to `<name>/step_NNNNNNNN.png` in the run's folder, and send it to each logger that can show one.

    All processes call it, and the first one writes.

    Args:
        trainer: The run; its step becomes the picture's.
        name: What the loggers call it; no slash.
        picture: (3, H, W) uint8.

    Returns:
        The file.
    """
    folder = run_folder(trainer) / name
    path = folder / f"step_{trainer.global_step:08d}.png"
    if not trainer.is_global_zero:
        return path
    write_picture(path, picture)
    send_picture(trainer, name, picture)
    return path


def send_picture(trainer: Trainer, name: str, picture: Tensor) -> None:
    """Send (3, H, W) uint8 to each logger that can show a picture."""
    picture = picture.cpu()
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key=name, images=[picture.permute(1, 2, 0).numpy()])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, trainer.global_step)


def write_picture(path: Path, picture: Drawn) -> None:
    """Write (3, H, W) uint8, or a picture whose rows are made meanwhile, as PNG, and the folders above it.

    (H, W) holds classes: of uint8 the PNG has a palette, of uint16 it is gray of 16 bits; its values are the classes.
    Texts that go with a picture are in the file too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, PictureInBands):
        write_png(path, picture)
        return
    pillow = require("PIL.Image", extra="vision")
    texts: dict[str, str] = {}
    if isinstance(picture, PictureWithText):
        picture, texts = picture
        picture = as_rgb(picture)
    array = picture.cpu() if picture.ndim == 2 else picture.permute(1, 2, 0).cpu()
    image = pillow.fromarray(array.contiguous().numpy())
    if picture.ndim == 2 and picture.dtype == torch.uint8:
        image.putpalette(class_palette())
    image.save(path, pnginfo=_png_texts(texts))


def _png_texts(texts: dict[str, str]) -> Any:
    """Return what Pillow writes as a PNG file's texts."""
    if not texts:
        return None
    info = require("PIL.PngImagePlugin", extra="vision").PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    return info


def show(trainer: Trainer, text: str) -> None:
    """Print above the progress bar, if there is one."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if bar is None:
        print(text, flush=True)
    else:
        bar.print(text)
