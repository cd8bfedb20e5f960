"""Pictures with their captions, as a source lists them: texts beside pictures, tables, JSON lines, the hub."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.data.vision.files import SUFFIXES, picture_files
from lightning_bigmodels.data.vision.pictures import FilePictures, Pictures, digest_of
from lightning_bigmodels.data.vision.shapes import ShapeScenes, is_shapes, shape_parts
from lightning_bigmodels.data.vision.sources_folders import PART_FOLDERS
from lightning_bigmodels.data.vision.sources_hub import hub_tables
from lightning_bigmodels.data.vision.sources_tables import Table, parts_of, read_table
from lightning_bigmodels.errors import InputError, refuse

_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_ROTATED = 5  # of EXIF's eight orientations those from the fifth on lie on their side


@dataclass(frozen=True)
class CaptionColumns:
    """What the columns of a table are called.

    Attributes:
        path: The picture's file.
        caption: Its caption.
        split: Its part: train, val or test; None: there is none.
    """

    path: str = "file_name"
    caption: str = "text"
    split: str | None = None


@dataclass(frozen=True)
class Captioned:
    """The examples of one part.

    Attributes:
        pictures: Where the pictures lie; `rows` says which of them are meant.
        captions: The caption of each picture.
        rows: (N,) int64 place of each example's picture.
    """

    pictures: Pictures
    captions: Sequence[str]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def caption(self, index: int) -> str:
        """Return the caption of an example."""
        return self.captions[int(self.rows[index])]

    def take(self, chosen: NDArray[np.int64]) -> "Captioned":
        """Return some of the examples, in the order given."""
        return replace(self, rows=self.rows[chosen])

    def size(self, index: int, channels: int) -> tuple[int, int]:
        """Return height and width of an example's picture, of a file without reading more than its head.

        Raises:
            InputError: the picture cannot be read.
        """
        row = int(self.rows[index])
        if isinstance(self.pictures, FilePictures):
            try:
                with Image.open(self.pictures.name(row)) as image:
                    turned = image.getexif().get(0x0112, 1) >= _ROTATED
                    return image.size if turned else (image.height, image.width)
            except (OSError, ValueError, SyntaxError):
                pass  # what reads it whole says what is wrong
        height, width = self.pictures.read(row, channels).shape[1:]
        return height, width


class DrawnScenes(Pictures):
    """The pictures of generated scenes.

    Args:
        scenes: What makes them.
    """

    def __init__(self, scenes: ShapeScenes) -> None:
        self.scenes = scenes

    @override
    def __len__(self) -> int:
        return self.scenes.length

    @override
    def name(self, index: int) -> str:
        return f"shapes/{self.scenes.part}/{index}"

    @override
    def read(self, index: int, channels: int) -> Tensor:
        return self.scenes.picture(index)

    @override
    def digest(self, index: int) -> str:
        return digest_of(self.scenes.picture(index).numpy().tobytes())


def read_captions(
    source: str, columns: CaptionColumns, root: Path | None, image_size: tuple[int, int]
) -> dict[str, Captioned]:
    """Return the parts of a source; one that names no parts is all `train`.

    Args:
        source: As `CaptionedImages` has it.
        columns: What the columns of a table are called.
        root: Folder that a table's paths start from; None: the table's own.
        image_size: Height and width of generated pictures.

    Raises:
        InputError: it is not there, a column is missing, or a picture and its caption do not belong together.
    """
    if is_shapes(source):
        if image_size[0] != image_size[1]:
            raise InputError(f"image_size is {list(image_size)}, and shapes are drawn on squares; set one number")
        return {name: _drawn(part) for name, part in shape_parts(source, image_size[0]).items()}
    if source.startswith("hub:"):
        return {
            name: _of_table(part.table, part.pictures, columns)["train"] for name, part in hub_tables(source).items()
        }
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, columns, root)
    if path.suffix.lower() not in (".csv", ".tsv", ".parquet", ".jsonl"):
        raise InputError(
            f"{source} is no folder, no table (.csv, .tsv, .parquet, .jsonl), hub:NAME or shapes; correct data.source"
        )
    return _read_table(path, columns, root)


def _drawn(part: ShapeScenes) -> Captioned:
    captions = [part.scene(index).caption for index in range(part.length)]
    return Captioned(DrawnScenes(part), captions, np.arange(part.length))


def _read_folder(folder: Path, columns: CaptionColumns, root: Path | None) -> dict[str, Captioned]:
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    names = {PART_FOLDERS.get(path.name.lower()) for path in inner}
    for name in _TABLES:
        if (folder / name).is_file():
            return _read_table(folder / name, columns, root)
    if "train" in names and None not in names:
        return {PART_FOLDERS[path.name.lower()]: _read_folder(path, columns, root)["train"] for path in inner}
    return {"train": _texts_beside(folder)}


def _texts_beside(folder: Path) -> Captioned:
    """Read pictures with a text file of the same name beside each."""
    files = picture_files(folder)
    stems = {path.with_suffix("") for path in files}
    for text in sorted(folder.rglob("*.txt")):
        if text.with_suffix("") not in stems:
            refuse(
                f"{text}: a caption without a picture of that name ({', '.join(SUFFIXES)}) beside it; add the picture "
                f"or remove the caption"
            )
    known, captions = [], []
    for path in files:
        text = path.with_suffix(".txt")
        if not text.is_file():
            refuse(f"{path}: a picture without a caption; write {text.name} beside it, or remove the picture")
            continue
        caption = _read_text(text)
        if not caption:
            refuse(f"{text}, line 1: the caption is empty; write what {path.name} shows, or remove both")
            continue
        known.append(path)
        captions.append(caption)
    if not known:
        raise InputError(f"{folder} holds no picture with a caption; write a .txt file beside each picture")
    return Captioned(FilePictures(known), captions, np.arange(len(known)))


def _read_text(path: Path) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}); convert it") from error


def _read_table(path: Path, columns: CaptionColumns, root: Path | None) -> dict[str, Captioned]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; correct data.source")
    table = read_json_lines(path) if path.suffix.lower() == ".jsonl" else read_table(path)
    start = path.parent if root is None else root
    files = [start / name for name in table.texts(columns.path, "data.path_column")]
    for row, file in enumerate(files):
        if not file.is_file():
            refuse(
                f"{table.place(row)}: a caption without its picture {file}; correct the path, remove the row, or set "
                f"data.root to the folder that the paths start from"
            )
    return _of_table(table, FilePictures(files), columns)


def _of_table(table: Table, pictures: Pictures, columns: CaptionColumns) -> dict[str, Captioned]:
    captions = [" ".join(text.split()) for text in table.texts(columns.caption, "data.caption_column")]
    parts = parts_of(table, columns.split, len(pictures))
    filled = np.array([bool(caption) for caption in captions])
    return {name: Captioned(pictures, captions, rows[filled[rows]]) for name, rows in parts.items()}


def read_json_lines(path: Path) -> Table:
    """Read a file with a JSON object in each line.

    Raises:
        InputError: a line is something else, or lacks a key that the first one has.
    """
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: {error.msg}; write one JSON object a line") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: {line.strip()[:40]} is no JSON object; write one a line")
            rows.append(row)
            numbers.append(number)
    if not rows:
        raise InputError(f"{path} holds no rows; write a JSON object a line for each picture")
    keys = dict.fromkeys(key for row in rows for key in row)
    return Table(str(path), {key: [row.get(key) for row in rows] for key in keys}, numbers, "line")
