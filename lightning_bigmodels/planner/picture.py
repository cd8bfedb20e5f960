"""The memory over a step, stacked by kind: a PNG, and an HTML page that needs no network."""

import html
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from lightning_bigmodels.errors import InputError, require
from lightning_bigmodels.peak_memory import GIB
from lightning_bigmodels.planner.plan import Plan, kinds_of
from lightning_bigmodels.planner.report import title, verdict
from lightning_bigmodels.planner.trace import Kind, Phase

PNG_NAME, HTML_NAME, JSON_NAME = "memory.png", "memory.html", "plan.json"
# Okabe and Ito's colours, which those who see fewer colours tell apart
COLOURS: dict[Kind, str] = {
    "parameters": "#0072B2",
    "gradients": "#009E73",
    "optimizer state": "#56B4E9",
    "activations": "#E69F00",
    "communication": "#CC79A7",
    "temporary": "#D55E00",
    "inputs": "#999999",
    "workspace": "#F0E442",
}
_SHADES: dict[Phase, str] = {"forward": "#ffffff", "backward": "#eeeeee", "update": "#dddddd"}


def check_output(folder: str) -> Path:
    """Return the folder, made, for pictures that can be drawn.

    Raises:
        InputError: it cannot be written to, or matplotlib is not installed.
    """
    require("matplotlib", extra="vision")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{PNG_NAME}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--output {folder} cannot be written: {error.strerror}; name another folder") from error
    return path


def write_pictures(plan: Plan, report: str, folder: Path) -> None:
    """Write the memory over the step as PNG and HTML.

    Args:
        plan: The plan.
        report: Its text, which the page shows too.
        folder: A folder that exists.
    """
    _draw(plan, folder / PNG_NAME)
    (folder / HTML_NAME).write_text(_page(plan, report), encoding="utf-8")


def _draw(plan: Plan, path: Path) -> None:
    figure_module = require("matplotlib.figure", extra="vision")
    canvas_module = require("matplotlib.backends.backend_agg", extra="vision")
    figure = figure_module.Figure(figsize=(10, 5.5), layout="constrained")
    # its own canvas: no window system is asked
    canvas_module.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kinds = kinds_of(plan)
    places = [moment.operation for moment in plan.course]
    columns = [[moment.held.get(kind, 0) / GIB for moment in plan.course] for kind in kinds]
    for phase, start, end in _phases(plan):
        axes.axvspan(start, end, color=_SHADES[phase], zorder=0)
    axes.stackplot(places, *columns, labels=kinds, colors=[COLOURS[kind] for kind in kinds], step="post")
    top = plan.peak.total / GIB
    place = plan.peak.operation / max(1, plan.num_operations)
    axes.plot(plan.peak.operation, top, "k.", zorder=3)
    axes.annotate(
        f"{top:,.3f} GiB",
        (plan.peak.operation, top),
        xytext=(0, 6),
        textcoords="offset points",
        # inside the axes wherever it is
        ha="left" if place < 0.1 else "right" if place > 0.9 else "center",
    )
    limit, text = plan.room.memory / GIB, _limit(plan)
    if text is not None:
        axes.axhline(limit, color="black", linestyle="--", linewidth=1)
        box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1.5}
        axes.annotate(text, (0, limit), xytext=(4, 6), textcoords="offset points", bbox=box)
    axes.set_xlim(0, max(1, plan.num_operations))
    axes.set_ylim(0, 1.12 * max(top, limit if text is not None else 0))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("operations of the step (white: forward, gray: backward, darker: update)")
    axes.set_ylabel("allocated on each device, GiB")
    axes.set_title(f"{title(plan)}\n{verdict(plan)}", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def _limit(plan: Plan) -> str | None:
    """Return what is said of the memory that a device has; None where that is far above the peak."""
    room = plan.room
    if room.memory >= 2 * room.allocated:
        return None
    others = (room.used - room.allocated) / GIB
    name = "each process" if plan.hardware.name == "cpu" and plan.setting.devices > 1 else plan.hardware.name
    return f"{name} has {room.memory / GIB:,.2f} GiB, of which {others:,.2f} are not for tensors"


def _phases(plan: Plan) -> Iterable[tuple[Phase, int, int]]:
    """Yield each phase with the operations at which it begins and ends."""
    start, phase = 0, plan.course[0].phase
    for moment in plan.course:
        if moment.phase != phase:
            yield phase, start, moment.operation
            start, phase = moment.operation, moment.phase
    yield phase, start, plan.num_operations


def _page(plan: Plan, report: str) -> str:
    template = resources.files(__package__).joinpath("memory.html").read_text(encoding="utf-8")
    kinds = kinds_of(plan)
    data = {
        "kinds": [{"name": kind, "colour": COLOURS[kind]} for kind in kinds],
        "moments": [
            [moment.operation, moment.phase, *(moment.held.get(kind, 0) for kind in kinds)] for moment in plan.course
        ],
        "phases": list(_phases(plan)),
        "operations": plan.num_operations,
        "peak": [plan.peak.operation, plan.peak.total, plan.peak.name],
        "limit": [_limit(plan), plan.room.memory],
    }
    # a name with a tag in it must not end the script
    values = json.dumps(data).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(title(plan)), "VERDICT": html.escape(verdict(plan)), "REPORT": html.escape(report)}
    for name, text in {**parts, "DATA": values}.items():
        template = template.replace(f"%{name}%", text)
    return template
