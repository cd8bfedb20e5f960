"""docs/planning.md is true: its blocks run in order on tiny networks, and what it names is there."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_bigmodels.planner import plan, verb
from lightning_bigmodels.planner.hardware import find_hardware
from tests import story as page

PAGE = (page.ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
# what bounds a step and where its memory is fullest is another in a tiny network, and numbers have other widths
OTHERS = r"(?<=bound by ).*|(?<=measured on ).*|aten::\w+(\.\w+)?|(?<=\w)  +"
TOLD = re.sub(OTHERS, "...", PAGE).replace("size 2048", "size 256")
SMALL, MEMORY = "l4", 200 * 2**20
"""The device of the page on which a recipe does not fit; here it is as small as the network is tiny."""


@pytest.fixture
def story(tmp_path, monkeypatch, capsys):
    def find(name, table=None):
        found = find_hardware(name, table)
        return replace(found, memory=MEMORY) if name == SMALL else found

    def room(trace, setting, hardware):
        found = estimate_room(trace, setting, hardware)
        return found if hardware.name != SMALL else replace(found, used=found.allocated, uncertainty=0)

    estimate_room = plan.estimate_room
    # so that some can be computed anew
    monkeypatch.setitem(page.NETWORK, "num_hidden_layers", 4)
    monkeypatch.setattr(verb, "find_hardware", find)
    monkeypatch.setattr(plan, "estimate_room", room)
    with page.reading(tmp_path, monkeypatch, capsys) as told:
        yield told


def test_every_block_runs_in_order(story):
    for block in page.blocks(TOLD):
        try:
            story.run(block)
        except BaseException as error:
            pytest.fail(f"docs/planning.md, the block of line {block.line}: {type(error).__name__}: {error}")
    assert story.unused == set(), "files that no command of the page uses"
    assert Path("plan/memory.png").is_file()


def test_names_exist():
    with (page.ROOT / "lightning_bigmodels/planner/hardware.csv").open(newline="", encoding="utf-8") as file:
        names = [row["name"] for row in csv.DictReader(file)]
    assert [name for name in names if f"`{name}`" not in PAGE] == []
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert [link for link in links if not (page.ROOT / "docs" / link).exists()] == []
