"""A plan as text, numbers and pictures: all that it knows, in units that are said."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner.course import course_of
from lightning_bigmodels.planner.picture import COLOURS, check_output, write_pictures
from lightning_bigmodels.planner.report import report, verdict
from lightning_bigmodels.planner.search import Trial
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.trace import Change, Moment, StepTrace, Transfer
from lightning_bigmodels.planner.traffic import Traffic, traffic_of
from tests.planner.made import GIB, made_plan


def test_a_report_says_memory_step_run_and_verdict():
    plan = made_plan(Setting("fsdp2", devices=8, num_nodes=2, batch_size=2, accumulate_grad_batches=3), state=16)
    text = report(plan, plan.length(steps=1800, price=2.5), 2.5, None, [])
    lines = [re.sub(r" +", " ", line).strip() for line in text.splitlines()]
    assert lines[0] == "16 x h100 on 2 nodes, fsdp2, 32-true, batch_size 2, 3 batches accumulated"
    for line in (
        "parameters 1.000",
        "activations 8.000",
        "allocated 9.000 in the forward pass, aten::mm, operation 6 of 12",
        "of 24.000 h100",
        "time 6.00 s bound by compute: compute 4.50 s, memory 1.50 s",
        "TFLOP 4 on each device; MFU 40.0%",
        "all-gather 3,072 MiB sent, as much received, in 4 calls",
        "tokens/s 100 on each device, 1,600 in all",
        "tokens 9,600 in a step, on all devices",
        "Run of 1,800 steps, 17,280,000 tokens",
        "hours 3 of training alone",
        "device hours 48.0 of 16 devices",
        "cost 120.00 at 2.5 a device and hour",
        "FITS: 15.00 GiB to spare, uncertain by 0.50",
        "Upper bounds: sizes that hang on values were taken at their largest (aten::nonzero).",
    ):
        assert line in lines, f"{line!r} is not in the report:\n{text}"
    assert max(map(len, text.splitlines())) <= 100


def test_one_device_needs_fewer_words():
    plan = made_plan()
    held = {**plan.peak.held, "workspace": GIB}
    plan = replace(plan, peak=plan.peak._replace(held=held), room=replace(plan.room, allocated=13 * GIB))
    lines = [re.sub(r" +", " ", line).strip() for line in report(plan, None, None, None, []).splitlines()]
    start = lines.index("Memory of a device at the step's peak, GiB")
    assert lines[start + 1 : start + 5] == [
        "parameters 8.000",
        "workspace 1.000 of matrix products",
        "activations 4.000",
        "temporary 0.000",
    ]
    for line in ("used 12.000 with the driver's context", "TFLOP 4 MFU 40.0%", "tokens/s 100", "tokens 100 in a step"):
        assert line in lines, f"{line!r} is not in the report:\n{lines}"


def test_a_short_run_is_told_in_seconds_and_small_change():
    plan = made_plan()
    lines = [
        re.sub(r" +", " ", line).strip() for line in report(plan, plan.length(36, price=2), 2, None, []).split("\n")
    ]
    for line in ("hours 0.01 36.00 s of training alone", "cost 0.02 at 2 a device and hour"):
        assert line in lines
    assert not any("device hours" in line for line in lines)


def test_host_memory_is_told_for_a_device_and_a_node():
    plan = made_plan(Setting("fsdp2_offload", devices=4, num_nodes=2), state=16)
    plan = replace(plan, traffic={"host to device": Traffic(4, 0, 3 * GIB)})
    lines = [re.sub(r" +", " ", line).strip() for line in report(plan, None, None, None, []).splitlines()]
    assert "host memory 2.000 of weights, gradients and optimizer, 8.000 on each node" in lines
    assert "host to device 3,072 MiB, in 4 calls" in lines
    memory = plan.to_dict()["memory"]
    assert (memory["host"], memory["host_of_node"]) == (2 * GIB, 8 * GIB)


def test_a_verdict_counts_what_is_uncertain():
    assert verdict(made_plan(state=19)) == "FITS: 1.00 GiB to spare, uncertain by 0.50"
    assert verdict(made_plan(state=19.75)) == "MAY NOT FIT: 0.25 GiB to spare, uncertain by 0.50"
    assert verdict(made_plan(state=30)) == "DOES NOT FIT: 10.00 GiB too much, uncertain by 0.50"


def test_changes_are_flags_to_paste():
    plan = made_plan(Setting(batch_size=8))
    less = replace(plan.setting, batch_size=2)
    trials = [
        Trial(["--data.batch_size 2", "--x 4"], made_plan(less)),
        Trial(["--y true"], made_plan(replace(less, batch_size=6))),
        Trial(["--z"], None, "z is not for this network"),
    ]
    text = report(plan, None, None, "The length is not known", trials)
    assert text.splitlines()[-13:-2] == [
        "The length is not known",
        "",
        "DOES NOT FIT: 16.00 GiB too much, uncertain by 0.50",
        "",
        "What makes it fit, each tried (used GiB, time of a step):",
        "  --data.batch_size 2 --x 4",
        "    16.00 of 24.00, 2.00 s, 0.25 x the rows of a step",
        "Not enough, or not for sure:",
        "  --y true",
        "    32.00 of 24.00, 6.00 s, 0.75 x the rows of a step",
        "  --z: z is not for this network",
    ]
    zeros = replace(plan, assumptions=["aten::_local_scalar_dense"])
    assert "Upper bounds" not in report(zeros, None, None, None, [])
    assert "Nothing that was tried makes it fit" in report(plan, None, None, None, trials[1:])
    assert "No change of this recipe's flags could make it fit." in report(plan, None, None, None, [])


def test_a_run_is_as_long_as_its_steps_or_rows():
    plan = made_plan(Setting(batch_size=4, accumulate_grad_batches=2, devices=2))
    assert plan.rows_per_step == 16
    assert (plan.length(rows=33).steps, plan.length(rows=33).rows, plan.length(rows=0).hours) == (3, 48, 0)
    assert plan.length(steps=450).hours == 1
    assert plan.length(steps=450, price=3).cost == 6
    for numbers, words in {"rows": "--samples is -1", "price": "--price is -1"}.items():
        with pytest.raises(InputError, match=f"{words}; set it to 0 or more"):
            plan.length(steps=1, **{numbers: -1})


def test_a_plan_is_plain_numbers():
    values = json.loads(json.dumps(made_plan(Setting("fsdp2", devices=2)).to_dict()))
    assert values["memory"]["kinds"] == {"parameters": 4 * GIB, "activations": 4 * GIB}
    assert values["memory"]["available"] == 24 * GIB
    assert values["memory"]["peak"] == {"phase": "forward", "operation": 6, "name": "aten::mm", "operations": 12}
    assert values["step"]["traffic"] == {"all-gather": {"calls": 4, "sent": 3 * GIB, "received": 3 * GIB}}
    assert values["fits"] is True
    assert values["setting"]["strategy"] == "fsdp2"


def test_what_is_sent_is_counted_for_the_whole_step():
    trace = StepTrace()
    trace.transfers[Transfer("allreduce_", "backward", 1000, 4)] = 2
    trace.transfers[Transfer("_allgather_base_", "forward", 400, 4)] = 6
    trace.transfers[Transfer("reduce_scatter_tensor", "update", 400, 4)] = 1
    trace.transfers[Transfer("broadcast_", "forward", 8, 4)] = 2
    # two of three batches were traced
    sharded = traffic_of(trace, Setting("fsdp2", devices=4, accumulate_grad_batches=3))
    assert sharded == {
        "all-reduce": Traffic(3, 4500, 4500),
        "all-gather": Traffic(9, 2700, 2700),
        "reduce-scatter": Traffic(1, 300, 300),
        "broadcast": Traffic(3, 24, 24),
    }
    # gradients go once
    copies = traffic_of(trace, Setting("ddp", devices=4, accumulate_grad_batches=3))
    assert copies["all-reduce"] == Traffic(1, 1500, 1500)


def test_a_course_keeps_the_fullest_moments():
    trace = StepTrace()
    trace.start = {"parameters": 10}
    trace.changes = [
        Change(1, "forward", "activations", 5),
        Change(2, "forward", "activations", 7),
        Change(2, "forward", "activations", -12),
        Change(5, "backward", "temporary", 3),
        Change(5, "backward", "temporary", -3),
        Change(5, "backward", "gradients", 3),
        Change(9, "update", "gradients", -3),
    ]
    assert course_of(trace, num_moments=2) == [
        Moment(0, "forward", {"parameters": 10}),
        Moment(2, "forward", {"parameters": 10, "activations": 12}),
        Moment(5, "backward", {"parameters": 10, "temporary": 3}),
    ]
    assert len(course_of(trace, num_moments=100)) == 5
    assert course_of(StepTrace()) == [Moment(0, "forward", {})]


def test_pictures_stack_the_kinds(tmp_path):
    plan = made_plan()
    write_pictures(plan, "told <b>", check_output(str(tmp_path / "a" / "b")))
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["memory.html", "memory.png"]
    with Image.open(folder / "memory.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for kind in ("parameters", "activations", "temporary"):
        colour = [int(COLOURS[kind][place : place + 2], 16) for place in (1, 3, 5)]
        assert (pixels == colour).all(1).mean() > 0.005, f"{kind} is not in the picture"
    page = (folder / "memory.html").read_text(encoding="utf-8")
    assert "%" not in re.sub(r"\d+%", "", page.split("<script>")[0])
    assert "told &lt;b&gt;" in page
    assert not re.search(r"(src|href)=|https?://(?!www.w3.org/2000/svg)", page), "something from a network"
    values = json.loads(re.search(r"const plan = (.*);\n", page)[1])
    assert values["peak"] == [6, 12 * GIB, "aten::mm"]
    assert [kind["name"] for kind in values["kinds"]] == ["parameters", "activations", "temporary"]
    assert values["moments"][1] == [6, "forward", 8 * GIB, 4 * GIB, 0]
    assert values["phases"] == [["forward", 0, 8], ["backward", 8, 10], ["update", 10, 12]]
    assert values["limit"] == [None, 24 * GIB], "of a device with twice the memory nothing is said"
    write_pictures(made_plan(state=16), "", folder)
    text = "h100 has 24.00 GiB, of which 0.00 are not for tensors"
    assert json.dumps(text) in (folder / "memory.html").read_text(encoding="utf-8")
    plan = made_plan(Setting("ddp", devices=2), state=16)
    plan = replace(plan, hardware=replace(plan.hardware, name="cpu"))
    write_pictures(plan, "", folder)
    assert "each process has 24.00 GiB" in (folder / "memory.html").read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output .*file/x cannot be written: Not a directory; name another folder"):
        check_output(str(tmp_path / "file" / "x"))
