"""Advice as text for a terminal, and as plain values for programs."""

import dataclasses
import json
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_bigmodels.advice.facts import LACKING, NAMES, Facts
from lightning_bigmodels.advice.length import Length
from lightning_bigmodels.advice.recipe_facts import TASKS, Task
from lightning_bigmodels.advice.suit import Candidate
from lightning_bigmodels.peak_memory import GIB

_WIDTH = 100
_CLASSES = 8
_COLUMNS = 20
_LOADING = (
    "Times are of training alone. Where pictures are read slower than that, --data.num_workers reads them in more "
    "processes."
)
_LITTLE = 0.05
_FEW_STEPS = 200
"""Optimizer steps in which no network of this package has learned much."""


@dataclass(frozen=True)
class Planned:
    """A recipe with what the plan says.

    Attributes:
        candidate: The recipe, and why.
        options: All options beside `--config`.
        plan: What the planner returned, as `Plan.to_dict`; None where it could not.
        length: How long the run is; None without a plan.
        remark: Why there is no plan.
        hardware: Options of `bigmodels plan` for the same hardware.
    """

    candidate: Candidate
    options: Mapping[str, Any]
    plan: Mapping[str, Any] | None = None
    length: Length | None = None
    remark: str = ""
    hardware: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the run fits into the device's memory."""
        return self.plan is not None and bool(self.plan["fits"])

    @property
    def command(self) -> list[str]:
        """The words of the command that runs it; where it does not fit, of the one that finds what would."""
        named = ["--config", self.candidate.recipe.name]
        if self.plan is None or self.fits:
            return ["bigmodels", "fit", *named, *words(self.options)]
        return ["bigmodels", "plan", *named, *words(self.hardware), *words(self.options)]


def words(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", _value(value))]


def in_order(planned: Sequence[Planned]) -> list[Planned]:
    """Return what fits and has time enough first, else as it was, which is the best first within each task."""
    tasks = list(dict.fromkeys(each.candidate.recipe.task for each in planned))

    def place(each: Planned) -> tuple[int, bool, bool]:
        hurried = each.length is None or each.length.share < 0.1
        return tasks.index(each.candidate.recipe.task), not each.fits, hurried

    return sorted(planned, key=place)


# ---- for a terminal


def text(
    facts: Facts, hardware: str, memory: int, hours: float, planned: Sequence[Planned], others: Sequence[Candidate]
) -> str:
    """Return the report.

    Args:
        facts: The data.
        hardware: What it runs on, in words.
        memory: Bytes of a device.
        hours: That there are.
        planned: Recipes with their plans, best first.
        others: Recipes that were not planned.
    """
    lines = [*_data(facts), "", f"hardware  {hardware} with {_gib(memory)} GiB, for {hours:g} h"]
    if facts.kind in LACKING:
        lines += ["", *_paragraph(f"No recipe learns from {NAMES[facts.kind]} yet. Missing: {LACKING[facts.kind]}.")]
        return "\n".join(lines)
    task: Task | None = None
    for number, each in enumerate(planned, start=1):
        if each.candidate.recipe.task != task:
            task = each.candidate.recipe.task
            lines += ["", f"to {TASKS[task]}"]
        lines += ["", *_recipe(number, each)]
    if facts.sides and planned:
        lines += ["", *_paragraph(_LOADING)]
    if others:
        lines += ["", "not planned", *_others(others, {each.candidate.recipe.task for each in planned})]
    return "\n".join(lines)


def _data(facts: Facts) -> Iterator[str]:
    yield f"data      {facts.path}: {NAMES[facts.kind]}"
    for sentence in _sentences(facts):
        yield from _paragraph(sentence, "          ")
    for note in facts.notes:
        yield from _paragraph(note, "        - ", "          ")


def _sentences(facts: Facts) -> Iterator[str]:
    parts = ", ".join(f"{name} {number:,}" for name, number in facts.parts.items())
    unit = facts.unit.removesuffix("s") if facts.num_train == 1 else facts.unit
    total = f"{facts.num_train:,} {unit}" if len(facts.parts) == 1 else f"{facts.unit}: {parts}"
    if facts.num_bytes:
        total += f", {_bytes(facts.num_bytes)}"
    if facts.sides and facts.extremes:
        height, width = facts.sides
        kind = {1: "gray", 3: "coloured"}.get(facts.channels, f"{facts.channels} channels")
        span = f" (median), sides from {facts.extremes[0]:,} to {facts.extremes[1]:,}"
        alike = facts.extremes == (min(facts.sides), max(facts.sides))
        total += f", {width} x {height} pixels{'' if alike else span}, {kind}"
    yield total
    if facts.classes:
        yield _classes(facts)
    if facts.lengths:
        unit = "words a caption" if facts.kind == "captions" else "characters a text"
        yield f"{facts.lengths[0]:,} {unit} (median), {facts.lengths[1]:,} at most"
    for name, what in list(facts.columns.items())[:_COLUMNS]:
        empty = facts.missing.get(name)
        yield f"{name}: {what}" + (f", {empty:,} missing" if empty else "")
    if (more := len(facts.columns) - _COLUMNS) > 0:
        yield f"and {more} more column{'s' if more > 1 else ''}"


def _classes(facts: Facts) -> str:
    known = sorted(facts.classes.items(), key=lambda item: -item[1])
    what = f"{len(known):,} classes" if len(known) != 1 else "1 class"
    if not any(count for _, count in known):
        return f"{what}: {', '.join(name for name, _ in known[:_CLASSES])}{', ...' if len(known) > _CLASSES else ''}"
    if known[0][1] == known[-1][1]:
        names = ", ".join(name for name, _ in known[:_CLASSES])
        return f"{what} of {known[0][1]:,} each: {names}{', ...' if len(known) > _CLASSES else ''}"
    if len(known) <= _CLASSES:
        return f"{what}: " + ", ".join(f"{name} {count:,}" for name, count in known)
    return f"{what}, from {known[-1][1]:,} ({known[-1][0]}) to {known[0][1]:,} ({known[0][0]})"


def _recipe(number: int, each: Planned) -> Iterator[str]:
    recipe = each.candidate.recipe
    yield f"{number}. {recipe.name}"
    for reason in each.candidate.reasons:
        yield from _paragraph(reason, "   + ", "     ")
    for line in _plan(each):
        yield from _paragraph(line, "   = ", "     ")
    for caution in each.candidate.cautions:
        yield from _paragraph(caution, "   ! ", "     ")
    yield from _command(each.command)


def _plan(each: Planned) -> Iterator[str]:
    if each.plan is None:
        yield each.remark
        return
    memory, step = each.plan["memory"], each.plan["step"]
    used, available, uncertainty = (_gib(memory[name]) for name in ("used", "available", "uncertainty"))
    verdict = "fits" if each.fits else "DOES NOT FIT" if memory["spare"] < 0 else "MAY NOT FIT"
    yield f"{verdict}: uses {used} of {available} GiB, uncertain by {uncertainty}"
    yield (
        f"{_seconds(step['seconds'])} a step of {step['rows']:,} rows, {_count(step['units_per_second'])} "
        f"{step['unit']}/s, bound by {step['bound']}"
    )
    if each.length is not None:
        yield _length(each.length, each.fits)
    if not each.fits:
        yield "what would make it fit is found by"


def _length(length: Length, fits: bool) -> str:
    if not length.steps_per_epoch:
        return "the data do not fill a batch: give more of them, or lower --data.batch_size"
    own = f"the recipe's {_count(length.epochs)} epochs are {length.steps:,} steps and take {_hours(length.own_hours)}"
    enough = -(-_FEW_STEPS // length.steps_per_epoch)
    if length.steps < _FEW_STEPS and length.possible_epochs >= enough:
        own += f": few steps, so try --trainer.max_epochs {enough}"
    if length.share >= 1:
        return f"{own}; {length.hours:g} h would do for {_count(length.possible_epochs)} epochs"
    if not length.possible_steps:
        return f"{own}; {length.hours:g} h are not enough for a step"
    possible = f"{own}; {length.hours:g} h do for {_count(length.possible_epochs)} epochs"
    if length.share < _LITTLE:
        return f"{possible}, which is {length.share:.1%} of it and too little to learn much"
    return f"{possible}, to which the command is cut" if fits else possible


def _command(command: Sequence[str]) -> Iterator[str]:
    """Yield a command in lines that can be pasted."""
    pairs = [" ".join(map(shlex.quote, command[:4]))]
    pairs += [" ".join(map(shlex.quote, command[place : place + 2])) for place in range(4, len(command), 2)]
    line = f"   {pairs[0]}"
    for pair in pairs[1:]:
        if len(line) + len(pair) + 3 > _WIDTH:
            yield f"{line} \\"
            line = f"     {pair}"
        else:
            line += f" {pair}"
    yield line


def _others(others: Sequence[Candidate], planned: set[Task]) -> Iterator[str]:
    """Yield the other recipes of the tasks that were planned with what speaks against them, and those of others."""
    for each in others:
        if each.recipe.task in planned:
            yield from _paragraph(f"{each.recipe.name}: {', '.join(each.reasons)}", "   ", "      ")
    for task in dict.fromkeys(each.recipe.task for each in others if each.recipe.task not in planned):
        names = ", ".join(each.recipe.name for each in others if each.recipe.task == task)
        yield from _paragraph(f"to {TASKS[task]} (--task {task.replace(' ', '-')}): {names}", "   ", "      ")


def _paragraph(sentence: str, first: str = "", rest: str | None = None) -> list[str]:
    indent = first if rest is None else rest
    return textwrap.wrap(
        sentence, _WIDTH, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


# ---- for programs


def values(
    facts: Facts, hardware: str, hours: float, planned: Sequence[Planned], others: Sequence[Candidate]
) -> dict[str, Any]:
    """Return the report as what JSON can hold; bytes, seconds and hours."""
    return {
        "data": dataclasses.asdict(facts),
        "hardware": hardware,
        "hours": hours,
        "missing": LACKING.get(facts.kind),
        "recipes": [_values(each) for each in planned],
        "others": [_candidate(each) for each in others],
    }


def _values(each: Planned) -> dict[str, Any]:
    length = None
    if each.length is not None:
        length = {
            "steps": each.length.steps,
            "steps_per_epoch": each.length.steps_per_epoch,
            "hours": each.length.own_hours,
            "possible_steps": each.length.possible_steps,
            "possible_epochs": each.length.possible_epochs,
        }
    return {
        **_candidate(each.candidate),
        "options": dict(each.options),
        "command": shlex.join(each.command),
        "fits": each.fits,
        "plan": each.plan,
        "length": length,
        "remark": each.remark,
    }


def _candidate(each: Candidate) -> dict[str, Any]:
    return {
        "recipe": each.recipe.name,
        "task": each.recipe.task,
        "score": round(each.score, 3),
        "reasons": list(each.reasons),
        "cautions": list(each.cautions),
    }


# ---- numbers


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= GIB else f"{size / GIB:,.2f}"


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:,.3g} {unit}"
    return f"{size} bytes"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1000:,.3g} ms"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h"
    seconds = hours * 3600
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.2g} s"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
