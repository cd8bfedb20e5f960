"""What a check has found, as text for a terminal and as a file."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from lightning_bigmodels.data.check import Finding, Inspector
from lightning_bigmodels.errors import InputError

_KINDS = {
    "class": "classes",
    "contradiction": "copies with different labels",
    "duplicate": "copies within a part",
    "empty": "empty documents",
    "imbalance": "classes of very different size",
    "leak": "copies in two parts: what is measured on them is no measure",
    "setup": "what the run would refuse",
    "unreadable": "cannot be read",
}
_SHOWN = 10
_CLASSES = 20


def check_output(path: str | None) -> None:
    """Refuse a file that cannot be written as a report, before anything is read.

    Raises:
        InputError: it has another ending, or exists.
    """
    if path is None:
        return
    if Path(path).suffix not in (".csv", ".jsonl"):
        raise InputError(f"--output {path}: name a file that ends in .csv or .jsonl")
    if Path(path).exists():
        raise InputError(f"--output {path} exists already; name another file or remove it")


def write_report(path: Path, findings: list[Finding]) -> None:
    """Write a line for each finding, as CSV or JSON by the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.writer(file)
            writer.writerows([Finding._fields, *findings])
        else:
            file.writelines(json.dumps(finding._asdict(), ensure_ascii=False) + "\n" for finding in findings)


def summary(inspector: Inspector, findings: list[Finding]) -> Iterator[str]:
    """Yield the lines that tell what was read and what is wrong with it, with the first few of each kind."""
    yield from _table(inspector)
    for (level, kind), group in groupby(findings, key=lambda finding: (finding.level, finding.kind)):
        members = list(group)
        yield ""
        yield f"{level}: {_KINDS[kind]} ({len(members):,})"
        for finding in members[:_SHOWN]:
            yield (
                f"  {finding.part:<5}  {' '.join(finding.message.split())}" if finding.part else f"  {finding.message}"
            )
        if len(members) > _SHOWN:
            yield f"  and {len(members) - _SHOWN:,} more"
    yield ""


def tally(findings: list[Finding]) -> str:
    """Return how many errors and warnings there are, in words."""
    counts = Counter(finding.level for finding in findings)
    words = [f"{counts[level]:,} {level}{'' if counts[level] == 1 else 's'}" for level in ("error", "warning")]
    return " and ".join(words) if findings else "nothing is wrong"


def _table(inspector: Inspector) -> Iterator[str]:
    """Yield how many files each part has, and how many examples each class, as far as they fit on a screen."""
    parts = list(inspector.counts)
    classes = sorted({name for counts in inspector.classes.values() for name in counts} | {*inspector.class_names})
    known = [name for name in inspector.class_names if name in classes]
    classes = [*known, *(name for name in classes if name not in known)]
    rows = [("", parts), (inspector.unit, [f"{inspector.counts[part]:,}" for part in parts])]
    counted = any(counts for counts in inspector.classes.values())
    if counted and len(classes) <= _CLASSES:
        rows += [(name, [f"{inspector.classes[part][name]:,}" for part in parts]) for name in classes]
    width = max(len(head) for head, _ in rows)
    for head, cells in rows:
        yield f"{head:<{width}}  " + "  ".join(f"{cell:>9}" for cell in cells)
    train = inspector.classes.get("train")
    if len(classes) > _CLASSES and train:
        most, least = train.most_common()[0], train.most_common()[-1]
        yield (
            f"{len(classes):,} classes, in training from {least[1]:,} ({least[0]}) to {most[1]:,} ({most[0]}) examples"
        )
