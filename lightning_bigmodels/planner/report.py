"""A plan as text: memory, the step, the run, the verdict and the changes that were tried."""

import textwrap
from collections.abc import Iterator, Sequence

from lightning_bigmodels.peak_memory import GIB
from lightning_bigmodels.planner.plan import Length, Plan, kinds_of
from lightning_bigmodels.planner.search import Trial
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.trace import Kind

MIB = 2**20
_LEAST = 0.01
"""Share of a step's time that is worth a word."""
_WIDTH, _LINE = 17, 100
_REMARKS: dict[Kind, str] = {"workspace": "of matrix products"}
_PHASES = {"forward": "the forward pass", "backward": "the backward pass", "update": "the optimizer's update"}


def report(plan: Plan, length: Length | None, price: float | None, hint: str | None, trials: Sequence[Trial]) -> str:
    """Return what the command prints.

    Args:
        plan: The plan.
        length: Of the run; None where it is not known.
        price: Of a device's hour.
        hint: How the length could be known.
        trials: Changes that were tried because it does not fit.
    """
    run = _run(plan, length, price, hint)
    sections = [_memory(plan), _step(plan), run, _calibration(plan), [verdict(plan)], _changes(plan, trials)]
    lines = [title(plan), *(line for section in sections if section for line in ("", *section))]
    # that a number is zero changes no shape
    names = ", ".join(name for name in plan.assumptions if name != "aten::_local_scalar_dense")
    if names:
        lines += ["", f"Upper bounds: sizes that hang on values were taken at their largest ({names})."]
    return "\n".join(lines)


def title(plan: Plan) -> str:
    """Return one line that says what was planned."""
    return _title(plan.setting, plan.hardware.name)


def _title(setting: Setting, hardware: str) -> str:
    words = [
        _devices(setting, hardware),
        {"auto": "ddp" if setting.world_size > 1 else "one process"}.get(setting.strategy, setting.strategy),
        setting.precision,
        f"batch_size {setting.batch_size}",
    ]
    if setting.accumulate_grad_batches > 1:
        words.append(f"{setting.accumulate_grad_batches} batches accumulated")
    return ", ".join(words)


def verdict(plan: Plan) -> str:
    """Return one line that says whether it fits, by how much, and how sure that is."""
    room = plan.room
    uncertain = f"uncertain by {_gib(room.uncertainty)}"
    if room.spare < 0:
        return f"DOES NOT FIT: {_gib(-room.spare)} GiB too much, {uncertain}"
    return f"{'FITS' if room.fits else 'MAY NOT FIT'}: {_gib(room.spare)} GiB to spare, {uncertain}"


def _memory(plan: Plan) -> list[str]:
    room, peak = plan.room, plan.peak
    place = f"in {_PHASES[peak.phase]}, {peak.name}, operation {peak.operation:,} of {plan.num_operations:,}"
    rows: list[tuple[str, int, str]] = [
        (kind, peak.held.get(kind, 0), _REMARKS.get(kind, "")) for kind in kinds_of(plan)
    ]
    rows.append(("allocated", room.allocated, place))
    several = plan.setting.world_size > 1
    if plan.hardware.name == "cpu":
        rows += [
            ("used", room.used, "with the process itself"),
            ("of", room.memory, f"available {'to each process ' if several else ''}on this machine"),
        ]
    else:
        rows += [
            ("reserved", room.reserved, "with what the allocator keeps"),
            ("used", room.used, f"with the driver's context{' and communication' if several else ''}"),
            ("of", room.memory, plan.hardware.name),
        ]
    if room.host:
        node = f"{_gib(room.host * plan.setting.devices, digits=3)} on each node"
        rows.append(("host memory", room.host, f"of weights, gradients and optimizer, {node}"))
    lines = ["Memory of a device at the step's peak, GiB"]
    return lines + [_row(name, _gib(size, digits=3), comment) for name, size, comment in rows]


def _step(plan: Plan) -> list[str]:
    time = plan.time
    parts = sorted(time.parts.items(), key=lambda part: -part[1])
    told = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in parts if seconds >= _LEAST * time.seconds)
    several = plan.setting.world_size > 1
    lines = [
        "Optimizer step",
        _row("time", _seconds(time.seconds), f"bound by {time.bound}: {told}"),
        _row("TFLOP", _figures(time.flops / 1e12), f"{'on each device; ' if several else ''}MFU {time.mfu:.1%}"),
    ]
    for name, traffic in plan.traffic.items():
        size = max(traffic.sent, traffic.received)
        if size >= MIB:
            ways = "MiB sent, as much received" if traffic.sent == traffic.received else "MiB"
            lines.append(_row(name, f"{size / MIB:,.0f}", f"{ways}, in {traffic.calls:,} calls"))
    each, in_step = _count(plan.units_per_second_and_device), _count(plan.rows_per_step * plan.units_per_row)
    return [
        *lines,
        _row(f"{plan.unit}/s", each, f"on each device, {_count(plan.units_per_second)} in all" if several else ""),
        _row(plan.unit, in_step, "in a step, on all devices" if several else "in a step"),
    ]


def _run(plan: Plan, length: Length | None, price: float | None, hint: str | None) -> list[str]:
    if length is None:
        return textwrap.wrap(hint, _LINE) if hint else []
    lines = [f"Run of {length.steps:,} steps, {length.rows * plan.units_per_row:,} {plan.unit}"]
    # nobody reads thousandths of an hour
    short = f"{_seconds(length.hours * 3600)} " if length.hours < 0.1 else ""
    lines.append(_row("hours", _figures(length.hours), f"{short}of training alone"))
    devices = plan.setting.world_size
    if devices > 1:
        lines.append(_row("device hours", _figures(length.hours * devices), f"of {devices:,} devices"))
    if length.cost is not None:
        cost = f"{length.cost:,.2f}" if length.cost >= 1 else f"{length.cost:.3g}"
        lines.append(_row("cost", cost, f"at {price:g} a device and hour"))
    return lines


def _calibration(plan: Plan) -> list[str]:
    found = plan.calibration
    if found is None:
        return []
    memory = "memory as planned, which was not measured" if found.memory is None else f"memory x {found.memory:.3g}"
    lines = [
        f"Calibrated by {found.run}: time x {found.seconds:.3g}, {memory}",
        f"  measured on {found.machine}, torch {found.machine.torch},",
        f"  in a run of {found.model} on {_title(found.setting, found.hardware)}",
    ]
    others = found.differences(plan.setting, plan.model)
    if others:
        lines.append(f"  which had another {' and '.join(others)} than this plan: the factors may be others here.")
    return lines


def _changes(plan: Plan, trials: Sequence[Trial]) -> list[str]:
    if not trials:
        return [] if plan.room.fits else ["No change of this recipe's flags could make it fit."]
    fitting = [trial for trial in trials if trial.fits]
    lines = []
    if fitting:
        lines += ["What makes it fit, each tried (used GiB, time of a step):"]
        lines += [line for trial in fitting for line in _trial(plan, trial)]
    rest = [trial for trial in trials if not trial.fits]
    if rest:
        lines += [
            "Not enough, or not for sure:"
            if fitting
            else "Nothing that was tried makes it fit (used GiB, time of a step):"
        ]
        lines += [line for trial in rest for line in _trial(plan, trial)]
    return lines


def _trial(plan: Plan, trial: Trial) -> Iterator[str]:
    flags = " ".join(trial.flags)
    if trial.plan is None:
        yield f"  {flags}: {trial.reason}"
        return
    rows = trial.plan.rows_per_step / plan.rows_per_step
    change = "" if rows == 1 else f", {rows:g} x the rows of a step"
    yield f"  {flags}"
    memory = f"{_gib(trial.plan.room.used)} of {_gib(trial.plan.room.memory)}"
    yield f"    {memory}, {_seconds(trial.plan.time.seconds)}{change}"


def _devices(setting: Setting, name: str) -> str:
    nodes = f" on {setting.num_nodes} nodes" if setting.num_nodes > 1 else ""
    return f"{setting.world_size} x {name}{nodes}"


def _row(name: str, value: str, comment: str = "") -> str:
    return f"  {name:<{_WIDTH}}{value:>12}  {comment}".rstrip()


def _gib(size: float, digits: int = 2) -> str:
    return f"{size / GIB:,.{digits}f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1000:,.3g} ms"


def _figures(number: float) -> str:
    return f"{number:,.1f}" if number >= 10 else f"{number:.3g}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
