"""Pictures with their classes, as a source lists them, and whether the parts of a data set fit together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.data.vision.pictures import Pictures
from lightning_bigmodels.errors import InputError, near, refuse


@dataclass(frozen=True)
class Labelled:
    """The examples of one part.

    Legend: N examples, K classes.

    Attributes:
        pictures: Where the pictures lie; `rows` says which of them are meant.
        rows: (N,) int64 place of each example's picture.
        class_names: The K names; none where the pictures are not labelled.
        labels: (N,) int64 class of each example; (N, K) bool where an example may have several.
        group_names: Names of the groups by which fairness is judged; None: there are none.
        groups: (N,) int64 group of each example.
    """

    pictures: Pictures
    rows: NDArray[np.int64]
    class_names: list[str]
    labels: NDArray[np.int64] | NDArray[np.bool_]
    group_names: list[str] | None = None
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def multi_label(self) -> bool:
        """Whether an example may have several classes."""
        return self.labels.ndim == 2

    def counts(self) -> NDArray[np.int64]:
        """Return (K,) how many examples each class has."""
        if self.multi_label:
            return self.labels.sum(0, dtype=np.int64)
        return np.bincount(self.labels, minlength=len(self.class_names)).astype(np.int64)

    def names_of(self, index: int) -> list[str]:
        """Return the names of an example's classes."""
        if not self.class_names:
            return []
        label = self.labels[index]
        return [self.class_names[k] for k in np.flatnonzero(label)] if self.multi_label else [self.class_names[label]]

    def with_groups(self, names: Sequence[str]) -> "Labelled":
        """Return the examples with the group of each."""
        group_names = sorted_names(set(names))
        places = {name: place for place, name in enumerate(group_names)}
        return replace(self, group_names=group_names, groups=np.array([places[name] for name in names], dtype=np.int64))

    def take(self, chosen: NDArray[np.int64]) -> "Labelled":
        """Return some of the examples, in the order given."""
        groups = None if self.groups is None else self.groups[chosen]
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen], groups=groups)


def labelled(
    pictures: Pictures,
    names: Sequence[str],
    class_names: list[str] | None = None,
    rows: NDArray[np.int64] | None = None,
) -> Labelled:
    """Return pictures with one class each.

    Args:
        pictures: The pictures.
        names: The class of each example.
        class_names: All classes in their order; None: those that occur, sorted: as numbers where all are.
        rows: Place of each example's picture; None: one example for each picture, in order.
    """
    class_names = sorted_names(set(names)) if class_names is None else class_names
    places = {name: place for place, name in enumerate(class_names)}
    labels = np.array([places[name] for name in names], dtype=np.int64)
    return Labelled(pictures, np.arange(len(names)) if rows is None else rows, class_names, labels)


def unlabelled(pictures: Pictures, rows: NDArray[np.int64] | None = None) -> Labelled:
    """Return pictures without classes.

    Args:
        pictures: The pictures.
        rows: Place of each example's picture; None: one example for each picture, in order.
    """
    rows = np.arange(len(pictures)) if rows is None else rows
    return Labelled(pictures, rows, [], np.full(len(rows), IGNORED))


def sorted_names(names: set[str]) -> list[str]:
    """Return names in the order of their numbers where all are whole numbers, else of the alphabet."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def check_classes(part: Labelled, where: str) -> None:
    """Refuse a training part in which a class has no example, or that has fewer than two classes.

    Raises:
        InputError: with the class and the source.
    """
    if not part.class_names:
        return
    empty = [name for name, count in zip(part.class_names, part.counts(), strict=True) if count == 0]
    if empty:
        names = ", ".join(repr(name) for name in empty[:5])
        refuse(f"{where}: no training example of class {names}; add some, or remove the class from the data")
    if len(part.class_names) < 2 and not part.multi_label:
        refuse(f"{where} holds one class only, {part.class_names[0]!r}; a classifier needs two or more")


def with_classes_of(train: Labelled, part: Labelled, name: str) -> Labelled:
    """Return a part with the training part's numbering of classes.

    Raises:
        InputError: an example has a class that training lacks.
    """
    if part.multi_label != train.multi_label:
        raise InputError(
            f"the {name} examples have {'several classes' if part.multi_label else 'one class'} each and those of "
            f"training {'several' if train.multi_label else 'one'}; label both alike"
        )
    if not train.class_names:
        return part
    places = {class_name: place for place, class_name in enumerate(train.class_names)}
    for number in np.flatnonzero(part.counts()).tolist():
        class_name = part.class_names[number]
        if class_name not in places:
            column = part.labels[:, number] if part.multi_label else part.labels == number
            row = int(part.rows[int(np.flatnonzero(column)[0])])
            refuse(
                f"{part.pictures.name(row)} of the {name} part has the class {class_name!r}, which no training example "
                f"has{near(class_name, places)}; correct the label or add training examples"
            )
            if not part.multi_label:
                part = part.take(np.flatnonzero(part.labels != number))
    if part.multi_label:
        labels = np.zeros((len(part), len(train.class_names)), dtype=np.bool_)
        for number, class_name in enumerate(part.class_names):
            if class_name in places:
                labels[:, places[class_name]] = part.labels[:, number]
        return replace(part, class_names=train.class_names, labels=labels)
    numbers = np.array([places.get(class_name, -1) for class_name in part.class_names], dtype=np.int64)
    return replace(part, class_names=train.class_names, labels=numbers[part.labels])


def with_common_groups(parts: dict[str, Labelled]) -> dict[str, Labelled]:
    """Return parts whose groups are numbered alike: all their names, sorted."""
    names = {name for part in parts.values() for name in part.group_names or []}
    if not names:
        return parts
    common = sorted_names(names)
    places = {name: place for place, name in enumerate(common)}
    found = {}
    for key, part in parts.items():
        if part.groups is None or part.group_names is None:
            raise InputError(f"the {key} examples have no group and others have; give all parts a group column")
        numbers = np.array([places[name] for name in part.group_names], dtype=np.int64)
        found[key] = replace(part, group_names=common, groups=numbers[part.groups])
    return found
