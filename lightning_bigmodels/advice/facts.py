"""What is known of some data after a look at them, whatever they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal[
    "classes",
    "pictures",
    "captions",
    "boxes",
    "masks",
    "text",
    "labelled text",
    "pairs of texts",
    "conversations",
    "table",
    "interactions",
    "audio",
]

NAMES: dict[Kind, str] = {
    "classes": "pictures with classes",
    "pictures": "pictures, of which nothing else is known",
    "captions": "pictures with captions",
    "boxes": "pictures with boxes around objects",
    "masks": "pictures with the class of each pixel",
    "text": "text",
    "labelled text": "texts with classes",
    "pairs of texts": "pairs of texts, one of which follows from the other",
    "conversations": "conversations",
    "table": "a table",
    "interactions": "who took which item (interactions)",
    "audio": "audio",
}

LACKING: dict[Kind, str] = {
    "labelled text": "a data module for texts with classes, and a text classifier",
    "pairs of texts": "a data module for pairs of texts, and a loss on the answers alone",
    "conversations": "a data module for conversations, and a loss on the answers alone",
    "table": "a data module for tables, and networks for their columns",
    "interactions": "a data module for interactions, and recommenders",
    "audio": "data modules for audio, and networks that hear",
}
"""Kinds that no recipe is made for, and what is missing for one."""


@dataclass(frozen=True)
class Facts:
    """What a look at data has found.

    Attributes:
        kind: What they are.
        path: As the user named them.
        data: Arguments of the data module that reads them, beside what a recipe says.
        unit: What is counted: `pictures`, `documents`, `rows`.
        parts: Examples of each part, `train` first; more than that where the data name parts themselves.
        classes: Training examples of each class, or objects; empty: there are none.
        multi_label: Whether an example may have several classes.
        sides: Height and width of the middle picture, by the shorter side; None: no pictures.
        extremes: Least and greatest side of all pictures that were looked at.
        channels: 1 where all pictures looked at are gray, else 3, or the number that arrays have.
        num_bytes: Of text, all documents together.
        lengths: Middle and greatest length, in characters of documents or words of captions; None: no texts.
        columns: Of a table, for each column what it holds, in words.
        missing: Of a table, empty values of each column that has some.
        notes: What is worth a look before a run.
    """

    kind: Kind
    path: str
    data: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "pictures"
    parts: Mapping[str, int] = field(default_factory=dict)
    classes: Mapping[str, int] = field(default_factory=dict)
    multi_label: bool = False
    sides: tuple[int, int] | None = None
    extremes: tuple[int, int] | None = None
    channels: int = 3
    num_bytes: int = 0
    lengths: tuple[int, int] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_train(self) -> int:
        """Training examples."""
        return self.parts.get("train", 0)

    @property
    def side(self) -> int:
        """Shorter side of the middle picture; 0: no pictures."""
        return min(self.sides) if self.sides else 0

    @property
    def imbalance(self) -> float:
        """Examples of the largest class over those of the smallest; 1 where there are none."""
        counts = [count for count in self.classes.values() if count]
        return max(counts) / min(counts) if counts else 1.0
