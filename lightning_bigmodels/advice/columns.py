"""What the columns of rows say: whether they are pictures, texts, conversations, interactions or a plain table."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from lightning_bigmodels.advice.facts import Kind
from lightning_bigmodels.data.vision.files import SUFFIXES as PICTURES
from lightning_bigmodels.data.vision.sources_folders import PART_FOLDERS

AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac")
Columns = Mapping[str, Sequence[Any]]

_BOXES = ("image_path", "xmin", "ymin", "xmax", "ymax", "label")
_TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "answers"),
    ("source", "target"),
    ("src", "tgt"),
    ("input", "output"),
    ("input", "target"),
    ("document", "summary"),
    ("article", "highlights"),
)
_USERS = ("user", "user_id", "userid", "customer_id", "session_id", "visitor_id")
_ITEMS = ("item", "item_id", "itemid", "movie_id", "movieid", "product_id", "song_id", "article_id")
_LABELS = ("label", "labels", "class", "class_name", "category", "target", "sentiment", "y")
_TEXTS = ("text", "content", "body", "document", "sentence", "review", "caption")
_SPLITS = ("split", "part", "subset", "set")
_SEPARATORS = ("|", ";")
_EMPTY = ("", "na", "n/a", "nan", "null", "none", "?")
_LOOKED_AT = 1000
_PROSE = 20
"""Characters from which on a column's middle value counts as a text."""
_CATEGORIES = 50


class Roles(NamedTuple):
    """What rows are, and which of their columns is what; None: there is none."""

    kind: Kind
    path: str | None = None
    text: str | None = None
    label: str | list[str] | None = None
    separator: str | None = None
    split: str | None = None


def roles_of(columns: Columns) -> Roles:
    """Return what rows are by the names and first values of their columns."""
    named = {name.lower(): name for name in columns}
    if all(name in columns for name in _BOXES):
        return Roles("boxes", path="image_path", label="label")
    pictures = next((name for name in columns if _are_files(columns[name], PICTURES)), None)
    rest = {name: values for name, values in columns.items() if name != pictures}
    split = next((named[name] for name in _SPLITS if name in named and _are_parts(columns[named[name]])), None)
    if pictures is not None:
        return _of_pictures(pictures, {name: values for name, values in rest.items() if name != split}, split)
    if any(_are_files(values, AUDIO) for values in columns.values()):
        return Roles("audio")
    if any(name in named and _are_lists(columns[named[name]]) for name in _TURNS):
        return Roles("conversations")
    if any(first in named and second in named for first, second in _PAIRS) or "translation" in named:
        return Roles("pairs of texts")
    if any(name in named for name in _USERS) and any(name in named for name in _ITEMS):
        return Roles("interactions")
    text = _text_column(columns)
    if text is None:
        return Roles("table")
    others = [name for name in columns if name != text]
    label = next((named[name] for name in _LABELS if name in named and named[name] != text), None)
    if label is not None:
        return Roles("labelled text", text=text, label=label, split=split)
    numbers = sum(_are_numbers(columns[name]) for name in others)
    # a text among many numbers is one feature of several
    return Roles("table") if numbers > 3 else Roles("text", text=text, split=split)


def describe(values: Sequence[Any]) -> str:
    """Return in words what a column holds."""
    known = [value for value in values if not is_empty(value)]
    if not known:
        return "nothing"
    if _are_numbers(known):
        numbers = [float(value) for value in known]
        return f"numbers from {min(numbers):g} to {max(numbers):g}"
    if all(isinstance(value, (list, dict)) for value in known):
        return "lists"
    distinct = len({str(value) for value in known})
    if distinct <= _CATEGORIES and distinct <= len(known) / 2:
        return f"{distinct} categories" if distinct > 1 else "one value"
    return "texts" if _middle_length(known) >= _PROSE else "names"


def target_of(columns: Columns) -> tuple[str, dict[str, int]] | None:
    """Return the column that is most likely to be told from the others, with the rows of each of its classes.

    It is called so, or is the last one; None: it has no classes.
    """
    named = {name.lower(): name for name in columns}
    name = next((named[label] for label in _LABELS if label in named), list(columns)[-1])
    counts = Counter(str(value) for value in columns[name] if not is_empty(value))
    return (name, dict(counts)) if 1 < len(counts) <= min(_CATEGORIES, sum(counts.values()) / 10) else None


def is_empty(value: Any) -> bool:
    """Return whether a cell holds no value."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in _EMPTY)


# ---- what decides


def _of_pictures(path: str, rest: Columns, split: str | None) -> Roles:
    named = {name.lower(): name for name in rest}
    caption = next((named[name] for name in ("text", "caption") if name in named), None)
    if caption is not None:
        return Roles("captions", path=path, text=caption, split=split)
    label = next((named[name] for name in _LABELS if name in named), None)
    if label is None:
        flags = [name for name, values in rest.items() if _are_zeros_and_ones(values)]
        if len(flags) > 1:
            return Roles("classes", path=path, label=flags, split=split)
        prose = _text_column(rest)
        if prose is not None:
            return Roles("captions", path=path, text=prose, split=split)
        label = next((name for name, values in rest.items() if describe(values).endswith("categories")), None)
    if label is None:
        return Roles("pictures", path=path, split=split)
    values = [str(value) for value in rest[label][:_LOOKED_AT]]
    separator = next((mark for mark in _SEPARATORS if any(mark in value for value in values)), None)
    return Roles("classes", path=path, label=label, separator=separator, split=split)


def _text_column(columns: Columns) -> str | None:
    named = {name.lower(): name for name in columns}
    for name in _TEXTS:
        if name in named and _are_texts(columns[named[name]], 1):
            return named[name]
    prose = [name for name, values in columns.items() if _are_texts(values, _PROSE)]
    return max(prose, key=lambda name: _middle_length(columns[name]), default=None)


def _first(values: Sequence[Any]) -> list[Any]:
    return [value for value in values[:_LOOKED_AT] if not is_empty(value)]


def _are_files(values: Sequence[Any], suffixes: tuple[str, ...]) -> bool:
    first = _first(values)
    return bool(first) and all(
        isinstance(value, str) and PurePath(value.strip()).suffix.lower() in suffixes for value in first
    )


def _are_parts(values: Sequence[Any]) -> bool:
    first = [str(value).strip().lower() for value in _first(values)]
    return bool(first) and all(value in PART_FOLDERS for value in first)


def _are_lists(values: Sequence[Any]) -> bool:
    first = _first(values)
    return bool(first) and all(isinstance(value, (list, tuple)) for value in first)


def _are_texts(values: Sequence[Any], least: int) -> bool:
    first = _first(values)
    return bool(first) and all(isinstance(value, str) for value in first) and _middle_length(first) >= least


def _are_numbers(values: Sequence[Any]) -> bool:
    first = _first(values)
    try:
        return bool(first) and all(math.isfinite(float(value)) for value in first)
    except (TypeError, ValueError):
        return False


def _are_zeros_and_ones(values: Sequence[Any]) -> bool:
    first = {str(value).strip() for value in _first(values)}
    return bool(first) and first <= {"0", "1"}


def _middle_length(values: Sequence[Any]) -> int:
    lengths = sorted(len(str(value)) for value in _first(values))
    return lengths[len(lengths) // 2] if lengths else 0
