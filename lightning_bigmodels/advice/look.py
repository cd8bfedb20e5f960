"""A look at data that nobody has described: which kind they are, by names, endings and first values."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_bigmodels.advice.columns import AUDIO
from lightning_bigmodels.advice.facts import Facts
from lightning_bigmodels.advice.look_pictures import (
    any_values,
    look_at_boxes,
    look_at_captions,
    look_at_cityscapes,
    look_at_classes,
    look_at_masks,
    mask_values,
)
from lightning_bigmodels.advice.look_rows import look_at_rows
from lightning_bigmodels.advice.look_text import look_at_text
from lightning_bigmodels.data.sources import PYTHON_DOCS
from lightning_bigmodels.data.text_files import kind
from lightning_bigmodels.data.vision.cityscapes import is_cityscapes
from lightning_bigmodels.data.vision.coco import read_json
from lightning_bigmodels.data.vision.files import SUFFIXES as PICTURES
from lightning_bigmodels.data.vision.mask_pairs import FilePairs, folder_pairs
from lightning_bigmodels.data.vision.sources_arrays import has_idx
from lightning_bigmodels.errors import InputError, near

_FAMILIES: dict[str, tuple[str, ...]] = {
    "pictures": PICTURES,
    "text files": (".txt", ".md"),
    "files of rows": (".jsonl", ".parquet"),
    "tables": (".csv", ".tsv"),
    "audio files": AUDIO,
    "arrays": (".npz", ".npy"),
    "annotations": (".json", ".xml"),
}
KNOWN = (
    "a folder with a folder of pictures for each class, a folder of pictures (perhaps a .txt caption, a mask or a .xml "
    "file for each), text (.txt, .md, .jsonl, .parquet, also .gz and .zst), a COCO .json file, a table (.csv, .tsv, "
    ".parquet), a .npz file, MNIST's files"
)
_MASKS = ("mask", "masks", "labels", "annotations", "segmentation", "segmentations", "gt", "groundtruth", "targets")
_HELP = ("readme", "license", "licence", "changelog", "classes", "labels", "credits", "attribution", "sources")
"""Names of texts that tell of data, and are none."""
_STRAY = 0.05
"""Part of all files up to which those of another kind are left aside."""
_PAIRED = 0.5
_PROBED = 4


def look(path: str) -> Facts:
    """Return what data are.

    Args:
        path: A file, a folder, or `python-docs`.

    Raises:
        InputError: there is nothing, it is of several kinds, or of none that is known; the message says what was found.
    """
    if path == PYTHON_DOCS:
        return look_at_text(path)
    place = Path(path).expanduser()
    if place.is_dir():
        return _look_at_folder(place)
    if place.is_file():
        return _look_at_file(place)
    beside = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
    hint = near(place.name, beside) if place.name else ""
    raise InputError(
        f"--data {path}: no such file or folder{hint if 'did you mean' in hint else ''}; name the folder or file that "
        f"holds your data"
    )


# ---- files


def _look_at_file(file: Path) -> Facts:
    if file.stat().st_size == 0:
        raise InputError(f"--data {file} is empty; name a file that holds data")
    suffix = kind(file)
    family = _family(file)
    if suffix in (".txt", ".md"):
        return look_at_text(str(file))
    if family in ("tables", "files of rows"):
        return look_at_rows(file)
    if family == "arrays":
        return look_at_classes(str(file))
    if family == "audio files":
        return _audio(file, [file])
    if suffix == ".json":
        return _look_at_json(file, file)
    if family == "pictures":
        raise InputError(f"--data {file} is one picture; name the folder of all pictures")
    what = f"{file.suffix} files are" if file.suffix else "a file without ending is"
    raise InputError(f"--data {file}: {what} no data that is known; known: {KNOWN}")


def _look_at_json(path: Path, file: Path, val: Path | None = None) -> Facts:
    """Look at a COCO file, whose pictures lie beside it or in a folder of another name."""
    content = read_json(file)
    if not _has_instances(content):
        found = ", ".join(list(content)[:8]) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise InputError(
            f"--data {file} holds {found}, and of .json files COCO's instances are known (images, annotations, "
            f"categories); write rows as .jsonl, one object a line"
        )
    images = _folder_of(file, content)
    facts = look_at_boxes(path, file, None if images == file.parent else images)
    if val is not None:
        other = read_json(val)
        data = {**facts.data, "val_source": str(val), "val_images": str(_folder_of(val, other))}
        facts = replace(facts, data=data, parts={**facts.parts, "val": len(other["images"])})
    objects = content["annotations"]
    if objects and all(entry.get("segmentation") for entry in objects):
        note = "objects have outlines too: --data.masks true and --model.network maskrcnn_resnet50_fpn learn these"
        return replace(facts, notes=(*facts.notes, note))
    return facts


def _folder_of(file: Path, content: Any) -> Path:
    """Return the folder below which pictures lie: beside their annotations, beside those' folder, or in one beside."""
    names = [str(entry.get("file_name")) for entry in content["images"][:_PROBED]]
    near_by = [file.parent, file.parent.parent]
    inner = [folder for place in near_by for folder in sorted(place.iterdir()) if folder.is_dir()]
    part = next((name for name in ("train", "val", "test") if name in file.name.lower()), "")
    # names may be the same in the folders of several parts
    inner.sort(key=lambda folder: part not in folder.name.lower())
    for folder in (*near_by, *inner):
        if names and all((folder / name).is_file() for name in names):
            return folder
    return file.parent


# ---- folders


def _look_at_folder(folder: Path) -> Facts:
    if has_idx(folder):
        return look_at_classes(str(folder))
    if is_cityscapes(folder):
        return look_at_cityscapes(folder)
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(f"--data {folder} holds no file; name a folder that holds data")
    families: dict[str, list[Path]] = {}
    for file in files:
        families.setdefault(_family(file), []).append(file)
    if "pictures" in families:
        return _look_at_pictures(folder, families)
    known = {name: found for name, found in families.items() if name != "others"}
    if not known:
        endings = Counter(file.suffix.lower() or "no ending" for file in files)
        found = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(5))
        raise InputError(f"--data {folder} holds files of no kind that is known ({found}); known: {KNOWN}")
    name = _one_kind(folder, known)
    if name == "audio files":
        return _audio(folder, known[name])
    if name == "text files":
        return look_at_text(str(folder))
    if name == "files of rows":
        first = look_at_rows(known[name][0])
        if first.kind == "text":
            return look_at_text(str(folder), first.data.get("column", "text"))
        return _of_first(folder, first, known[name])
    if len(known[name]) == 1:
        return replace(_look_at_file(known[name][0]), path=str(folder))
    if name == "tables":
        return _of_first(folder, look_at_rows(known[name][0]), known[name])
    raise InputError(f"--data {folder} holds {len(known[name]):,} {name}; name one of them, such as {known[name][0]}")


def _look_at_pictures(folder: Path, families: dict[str, list[Path]]) -> Facts:
    """Look at a folder that holds pictures, and perhaps what belongs to them."""
    pictures, annotations = families["pictures"], families.get("annotations", [])
    counted = {name: found for name, found in families.items() if name not in ("others", "annotations")}
    stems = {file.with_suffix("") for file in pictures}
    beside = [file for file in families.get("text files", []) if file.with_suffix("") in stems]
    if len(beside) >= _PAIRED * len(pictures):
        if all(_is_yolo(file) for file in beside[:_PROBED]):
            raise InputError(
                f"--data {folder} holds boxes in YOLO's format ({beside[0]}), which nothing here reads; write them as "
                f"a COCO .json file or a .csv file (image_path, xmin, ymin, xmax, ymax, label)"
            )
        del counted["text files"]
        _one_kind(folder, counted)
        return look_at_captions(str(folder))
    tables = [file for name in ("tables", "files of rows") for file in families.get(name, []) if file.parent == folder]
    if len(tables) == 1:
        _one_kind(folder, {name: [f for f in found if f not in tables] for name, found in counted.items()})
        return _look_at_table(folder, tables[0])
    _one_kind(folder, counted)
    boxes = [file for file in annotations if file.suffix.lower() == ".xml"]
    if boxes:
        source = boxes[0].parent
        known = (source.parent / "JPEGImages").is_dir() or any(file.parent == source for file in pictures)
        return look_at_boxes(folder, source, None if known else pictures[0].parent)
    parts = _coco_parts([file for file in annotations if file.suffix.lower() == ".json"])
    if parts:
        return _look_at_json(folder, parts["train"], parts.get("val"))
    masks = _masks(folder, pictures)
    if masks is not None:
        return look_at_masks(folder, *masks)
    return look_at_classes(str(folder))


def _coco_parts(files: Sequence[Path]) -> dict[str, Path]:
    """Return COCO's files of instances for training and validation; none where there is no such file."""
    named = [file for file in files if file.name.startswith("instances")]
    found = named or [file for file in files if _is_coco(file)]
    if not found:
        return {}
    train = next((file for file in found if "train" in file.name.lower()), found[0])
    val = next((file for file in found if "val" in file.name.lower() and file != train), None)
    return {"train": train} if val is None else {"train": train, "val": val}


def _look_at_table(folder: Path, table: Path) -> Facts:
    """Look at the table beside pictures; captions are found by the folder, as the reader does by itself."""
    if table.stem == "metadata":
        try:
            return look_at_captions(str(folder))
        except InputError:
            pass  # its columns are called otherwise, or hold classes
    return replace(look_at_rows(table), path=str(folder))


def _masks(folder: Path, pictures: Sequence[Path]) -> tuple[Path, Path, FilePairs] | None:
    """Return the folders of pictures and of masks, and the pairs, where each picture has a mask of its name."""
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if len(inner) != 2 or any(file.parent == folder for file in pictures):
        return None
    stems = [{file.relative_to(path).with_suffix("") for file in pictures if path in file.parents} for path in inner]
    if stems[0] != stems[1]:
        return None
    named = [path for path in inner if path.name.lower() in _MASKS]
    candidates = named if len(named) == 1 else inner
    for masks in candidates:
        first = [file for file in pictures if masks in file.parents][:_PROBED]
        if first and all(mask_values(file) is not None for file in first):
            (images,) = (path for path in inner if path != masks)
            return images, masks, folder_pairs(images, masks, any_values())
    return None


# ---- what decides


def _family(file: Path) -> str:
    suffix = kind(file) if kind(file) in (".txt", ".md", ".jsonl") else file.suffix.lower()
    return next((name for name, suffixes in _FAMILIES.items() if suffix in suffixes), "others")


def _one_kind(folder: Path, families: dict[str, list[Path]]) -> str:
    """Return the family that nearly all files are of.

    Raises:
        InputError: there are more than a few of another one.
    """
    texts = [file for file in families.get("text files", []) if file.stem.lower() not in _HELP]
    counted = {**families, "text files": texts} if "text files" in families else families
    counts = Counter({name: len(found) for name, found in counted.items() if found or len(families) == 1})
    (most, number), *others = counts.most_common()
    mixed = [(name, count) for name, count in others if count > _STRAY * number]
    if mixed:
        shown = " and ".join(f"{count:,} {name}" for name, count in [(most, number), *mixed])
        raise InputError(
            f"--data {folder} holds {shown}, and which of them is meant is not clear; name a folder or file of one kind"
        )
    return most


def _is_coco(file: Path) -> bool:
    try:
        return _has_instances(read_json(file))
    except InputError:
        return False


def _has_instances(content: Any) -> bool:
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def _is_yolo(file: Path) -> bool:
    """Return whether lines are a class and four numbers."""
    lines = [line.split() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return bool(lines) and all(len(line) == 5 and all(_is_number(word) for word in line) for line in lines)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _audio(path: Path, files: Sequence[Path]) -> Facts:
    folders: Any = Counter(file.parent.name for file in files if file.parent != path)
    return Facts(
        "audio",
        str(path),
        unit="files",
        parts={"train": len(files)},
        classes=dict(folders) if len(folders) > 1 else {},
        num_bytes=sum(file.stat().st_size for file in files),
    )


def _of_first(folder: Path, first: Facts, files: Sequence[Path]) -> Facts:
    """Return the facts of several alike files, of which one was looked at."""
    note = f"{len(files):,} files, of which {files[0].name} was looked at"
    return replace(first, path=str(folder), notes=(*first.notes, note) if len(files) > 1 else first.notes)
