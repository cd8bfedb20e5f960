"""What is wrong with data, all of it, before a run: every file of every part is read once, in several processes."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from lightning_bigmodels.errors import RunError

Level = Literal["error", "warning"]
_CHUNK = 32
_IMBALANCE = 10
_SHOWN = 5


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        level: An error spoils a run or its numbers; a warning is worth a look.
        kind: In one word: `unreadable`, `leak`, `duplicate`, ...
        part: `train`, `val` or `test`; empty where it is about none of them.
        file: The file, or the document in it; empty where it is about none.
        message: A sentence that ends in an action.
    """

    level: Level
    kind: str
    part: str
    file: str
    message: str


class Record(NamedTuple):
    """What reading one file, or one document in it, has told.

    Attributes:
        place: What its reader's `name` takes.
        digest: A hash of its content; None where it could not be read.
        classes: Names of the classes that it shows, of each object one.
        problem: What is wrong with it; None: nothing.
        size: UTF-8 bytes of a document; 0 for other files.
    """

    place: int
    digest: bytes | None
    classes: tuple[str, ...] = ()
    problem: str | None = None
    size: int = 0


class Reader(ABC):
    """Reads the files of a part; it is sent to worker processes."""

    @abstractmethod
    def jobs(self) -> Sequence[Any]:
        """Return pieces of work, none of them large."""

    @abstractmethod
    def read(self, job: Any) -> Iterator[Record]:
        """Yield what is told by each file of a piece of work; what is wrong with it is a record too."""

    @abstractmethod
    def name(self, place: int) -> str:
        """Return a file as the user knows it."""

    def __len__(self) -> int:
        """Return the number of files, 0 where it is not known before they are read."""
        return 0


class _Work(IterableDataset[list[Record]]):
    """The records of a reader in small lists; of several workers each takes every n-th job."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __iter__(self) -> Iterator[list[Record]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for job in self.reader.jobs()[first::step]:
            records: list[Record] = []
            for record in self.reader.read(job):
                records.append(record)
                if len(records) == _CHUNK:
                    yield records
                    records = []
            if records:
                yield records


class Inspector:
    """Takes the files of all parts, one after another, and finds what is wrong with each and with all together.

    It keeps of each readable file a hash and its place, some 200 bytes.

    Args:
        num_workers: Processes that read files; 0: this one.

    Attributes:
        class_names: The classes that training is to have examples of; empty: unknown.
        unit: What is counted: `files` or `documents`.
        counts: For each part, what was taken.
        classes: For each part, the examples, or objects, of each class.
    """

    unit = "files"

    def __init__(self, num_workers: int = 0) -> None:
        self.num_workers = num_workers
        self.class_names: list[str] = []
        self.counts: Counter[str] = Counter()
        self.classes: dict[str, Counter[str]] = {}
        self._findings: list[Finding] = []
        self._seen: dict[bytes, tuple[str, Reader, int, tuple[str, ...]]] = {}

    def note(self, level: Level, kind: str, message: str, part: str = "", file: str = "") -> None:
        """Add what is wrong."""
        self._findings.append(Finding(level, kind, part, file, message))

    def read(self, reader: Reader, title: str) -> Iterator[Record]:
        """Yield the records of a reader, read in the worker processes, and show how far they are.

        Raises:
            RunError: a process was killed.
        """
        loader = DataLoader(_Work(reader), batch_size=None, num_workers=min(self.num_workers, len(reader.jobs())))
        # on a terminal alone: a log holds what is found, and not how long it took
        with tqdm(total=len(reader) or None, desc=title, unit=" " + self.unit, disable=None, leave=False) as bar:
            try:
                for records in loader:
                    bar.update(len(records))
                    yield from records
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise RunError(
                    "a process that reads files was killed, perhaps because memory ran out; set a smaller --num_workers"
                ) from error

    def take(self, part: str, reader: Reader, records: Iterable[Record], left_out: bool = False) -> None:
        """Count the files of a part, and compare them with all that were taken before.

        Args:
            part: `train` before `val` and `test`.
            reader: Knows their names.
            records: What was read.
            left_out: Whether a run goes on without what cannot be read.
        """
        classes = self.classes.setdefault(part, Counter())
        self.counts[part] += 0
        for record in records:
            self.counts[part] += 1
            if record.problem is not None:
                level: Level = "warning" if left_out else "error"
                self.note(level, "unreadable", record.problem, part, reader.name(record.place))
            if record.digest is None:
                continue
            classes.update(record.classes)
            if record.digest in self._seen:
                self._compare(part, reader, record)
            else:
                self._seen[record.digest] = (part, reader, record.place, record.classes)

    def _compare(self, part: str, reader: Reader, record: Record) -> None:
        other_part, other_reader, place, classes = self._seen[record.digest or b""]
        name, other = reader.name(record.place), other_reader.name(place)
        level: Level = "warning"
        if part != other_part:
            kind = "leak"
            level = "error" if other_part == "train" else "warning"
            text = f"{name} is a copy of {other} of the {other_part} part; remove one of them"
        elif sorted(classes) != sorted(record.classes):
            kind = "contradiction"
            text = (
                f"{name} is a copy of {other}, and one is labelled {_listed(record.classes)}, the other "
                f"{_listed(classes)}; correct one label and remove one of them"
            )
        else:
            kind = "duplicate"
            text = f"{name} is a copy of {other}; remove one of them unless it is to count twice"
        self.note(level, kind, text, part, name)

    def findings(self) -> list[Finding]:
        """Return all that is wrong, errors first, what is about classes included."""
        found = [*self._findings, *self._about_classes()]
        parts = {part: number for number, part in enumerate(("", "train", "val", "test"))}
        return sorted(found, key=lambda finding: (finding.level, finding.kind, parts[finding.part]))

    def _about_classes(self) -> Iterator[Finding]:
        train = self.classes.get("train", Counter())
        for name in self.class_names:
            if train and not train[name]:
                text = f"no training example of class {name!r}; add some, or remove the class"
                yield Finding("error", "class", "train", "", text)
        for part, counts in self.classes.items():
            for name in sorted(counts.keys() - train.keys()) if train else ():
                if name not in self.class_names:
                    text = (
                        f"{counts[name]} examples of the {part} part are of class {name!r}, which no training example "
                        f"has; correct their label or add training examples"
                    )
                    yield Finding("error", "class", part, "", text)
            missing = [name for name in train if not counts[name]]
            if counts and missing:
                text = (
                    f"no {part} example of class {_listed(missing)}: nothing is measured for "
                    f"{'it' if len(missing) == 1 else 'them'}; add some"
                )
                yield Finding("warning", "class", part, "", text)
        if len(train) > 1:
            (most, high), (least, low) = train.most_common()[0], train.most_common()[-1]
            if high > _IMBALANCE * low:
                text = (
                    f"{high:,} training examples of class {most!r} and {low:,} of {least!r}: more than {_IMBALANCE} to "
                    f"1; look at the metrics of each class, and weigh classes or add examples"
                )
                yield Finding("warning", "imbalance", "train", "", text)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(repr(name) for name in names[:_SHOWN]) or "as nothing") + more
