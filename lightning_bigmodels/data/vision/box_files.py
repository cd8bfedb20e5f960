"""Boxes in a CSV file or in the XML files of Pascal VOC."""

import csv
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from xml.parsers import expat

from lightning_bigmodels.data.vision.boxes import (
    AnnotatedPicture,
    Annotations,
    BadBoxes,
    Collector,
    check_files,
    picture_size,
)
from lightning_bigmodels.errors import InputError, near, refuse

CSV_COLUMNS = ("image_path", "xmin", "ymin", "xmax", "ymax", "label")


def read_csv(
    source: Path,
    images: Path | None,
    class_names: Sequence[str] | None,
    bad_boxes: BadBoxes,
    columns: Sequence[str] = CSV_COLUMNS,
) -> Annotations:
    """Return the boxes of a CSV file with a header and one box a line; a picture without objects has its box empty.

    Args:
        source: The file, UTF-8.
        images: Folder that the pictures' paths start from; None: that of the file.
        class_names: The classes in the order of their labels; None: those of the file, sorted.
        bad_boxes: What happens to a bad box.
        columns: The header's names for path, left, top, right, bottom and class.

    Raises:
        InputError: a column or a picture is missing, or a box is bad; the message names the line.
    """
    folder = source.parent if images is None else images
    rows = _csv_rows(source, columns)
    path, *corners, label = columns
    if class_names is None:
        class_names = sorted({row[label].strip() for _, row in rows} - {""})
    collector = Collector(class_names, bad_boxes)
    pictures: dict[str, AnnotatedPicture] = {}
    wheres = []
    for line, row in rows:
        name = row[path].strip()
        if name not in pictures:
            pictures[name] = AnnotatedPicture(folder / name, name)
            wheres.append(f"line {line}")
    check_files(list(pictures.values()), source, wheres)
    for picture in pictures.values():
        picture.height, picture.width = picture_size(picture.file) or (None, None)
    for line, row in rows:
        box = [row[name].strip() for name in corners]
        if any(box) or row[label].strip():
            collector.add(pictures[row[path].strip()], box, row[label].strip(), source, f"line {line}")
    ids = list(range(1, len(class_names) + 1))
    return Annotations(list(pictures.values()), list(class_names), ids, collector.dropped)


def _csv_rows(source: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    if len(columns) != len(CSV_COLUMNS):
        raise InputError(
            f"csv_columns has {len(columns)} names; give six: path, left, top, right, bottom and class, such as "
            f"{', '.join(CSV_COLUMNS)}"
        )
    rows = []
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or []
            for column in columns:
                if column not in header:
                    raise InputError(
                        f"{source}, line 1: no column {column!r}{near(column, header)}; rename it, or set "
                        f"data.csv_columns to the names of path, left, top, right, bottom and class"
                    )
            for row in reader:
                if any(row[column] is None for column in columns):
                    refuse(f"{source}, line {reader.line_num}: too few columns; complete or remove the line")
                    continue
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise InputError(f"{source}, line {reader.line_num}: no CSV ({error}); correct the line") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 at byte {error.start}; convert the file") from error
    if not rows:
        raise InputError(f"{source} has no line below its header; name a file with boxes")
    return rows


def read_voc(source: Path, images: Path | None, class_names: Sequence[str] | None, bad_boxes: BadBoxes) -> Annotations:
    """Return the boxes of Pascal VOC's XML files, whose corners count from 1 and belong to the box.

    Args:
        source: A folder of XML files; or a list of names, one a line, as in `ImageSets/Main/train.txt` of VOC, whose
            XML files are in `Annotations` two folders above it.
        images: Folder of the pictures; None: `JPEGImages` beside the XML files' folder, or that folder itself.
        class_names: The classes in the order of their labels; None: those of the files, sorted.
        bad_boxes: What happens to a bad box.

    Raises:
        InputError: an XML file or a picture is missing or broken, or a box is bad; the message names the line.
    """
    folder = source if source.is_dir() else source.parent.parent.parent / "Annotations"
    files = sorted(folder.glob("*.xml")) if source.is_dir() else _listed(source, folder)
    if not files:
        raise InputError(f"{source} names no XML file; name a folder of Pascal VOC's annotations")
    if images is None:
        images = folder.parent / "JPEGImages"
        images = images if images.is_dir() else folder
    parsed = []
    for file in files:
        try:
            parsed.append((file, *_parse(file)))
        except InputError as error:
            refuse(str(error))
    if class_names is None:
        roots = [root for _, root, _ in parsed]
        class_names = sorted({(name.text or "").strip() for root in roots for name in root.findall("object/name")})
    collector = Collector(class_names, bad_boxes)
    pictures = []
    for file, root, lines in parsed:
        entry = root.find("filename")
        name = "" if entry is None else (entry.text or "").strip()
        if entry is None or not name:
            refuse(f"{file}, line 1: no <filename>; name the picture there")
            continue
        picture = AnnotatedPicture(images / name, file.stem)
        check_files([picture], file, [f"line {lines[entry]}"])
        picture.height, picture.width = picture_size(picture.file) or (None, None)
        for element in root.findall("object"):
            corners = [element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
            class_name = (element.findtext("name") or "").strip()
            collector.add(picture, _from_one(corners), class_name, file, f"line {lines[element]}")
        pictures.append(picture)
    return Annotations(pictures, list(class_names), list(range(1, len(class_names) + 1)), collector.dropped)


def _from_one(corners: Sequence[str | None]) -> list[float | str | None]:
    """Return corners that count from 0, the right and lower one outside of the box; what is no number stays."""
    try:
        left, top, right, bottom = (float(corner) for corner in corners)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return list(corners)
    return [left - 1, top - 1, right, bottom]


def _listed(source: Path, folder: Path) -> list[Path]:
    files = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        if line.split():
            file = folder / f"{line.split()[0]}.xml"
            if not file.is_file():
                refuse(f"{source}, line {number}: there is no {file}; correct or remove the line")
                continue
            files.append(file)
    return files


def _parse(file: Path) -> tuple[ET.Element, dict[ET.Element, int]]:
    """Return an XML file's root, and the line on which each element begins."""
    builder, parser = ET.TreeBuilder(), expat.ParserCreate()
    lines: dict[ET.Element, int] = {}

    def start(tag: str, attributes: dict[str, str]) -> None:
        lines[builder.start(tag, attributes)] = parser.CurrentLineNumber

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(file.read_bytes(), True)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise InputError(f"{file}, line {error.lineno}: no XML ({reason}); correct or remove the file") from error
    return builder.close(), lines
