"""From allocated bytes to those of the device: the allocator's segments, the context, the verdict."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from lightning_bigmodels.planner.allocator import reserved_bytes
from lightning_bigmodels.planner.hardware import find_hardware
from lightning_bigmodels.planner.room import Room, estimate_room
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.trace import Change, Moment

MIB = 2**20
GIB = 2**30


def trace_of(changes, peak=0, **start):
    held = {name.replace("_", " "): size for name, size in start.items()}
    return SimpleNamespace(changes=changes, start=held, peak=Moment(0, "forward", {"activations": peak}))


def held(*sizes, phase="forward", kind="activations"):
    """Take blocks, and give them back in the same order."""
    return [Change(0, phase, kind, size) for size in (*sizes, *(-size for size in sizes))]


def test_segments_are_whole():
    assert reserved_bytes(trace_of(held(1000))) == 2 * MIB
    assert reserved_bytes(trace_of(held(*[1000] * 2000))) == 2 * MIB
    assert reserved_bytes(trace_of(held(2 * MIB))) == 20 * MIB
    assert reserved_bytes(trace_of(held(2 * MIB, 3 * MIB, 16 * MIB))) == 36 * MIB
    assert reserved_bytes(trace_of(held(13 * MIB))) == 14 * MIB
    assert reserved_bytes(trace_of([])) == 0


def test_free_neighbours_become_one_block_and_too_small_holes_are_no_use():
    halves = [Change(0, "forward", "activations", size) for size in (4 * MIB, 4 * MIB, 4 * MIB, 8 * MIB)]
    given = [Change(0, "forward", "activations", -size) for size in (4 * MIB, 4 * MIB, 4 * MIB, 8 * MIB)]
    whole = held(20 * MIB)
    assert reserved_bytes(trace_of(halves + given + whole)) == 20 * MIB
    kept = halves + given[:2] + whole + given[2:]
    assert reserved_bytes(trace_of(kept)) == 40 * MIB


def test_segments_that_are_free_as_a_whole_go_back_to_a_device_that_is_full():
    steps = held(64 * MIB) + held(96 * MIB)
    assert reserved_bytes(trace_of(steps)) == 160 * MIB
    assert reserved_bytes(trace_of(steps), limit=100 * MIB) == 96 * MIB
    assert reserved_bytes(trace_of(steps), limit=90 * MIB) == 96 * MIB
    # a part of it is taken
    kept = [steps[0], steps[1], Change(0, "forward", "activations", 12 * MIB), *held(96 * MIB), steps[1]]
    kept[-1] = kept[-1]._replace(difference=-12 * MIB)
    assert reserved_bytes(trace_of(kept), limit=100 * MIB) == 160 * MIB


def test_memory_of_another_stream_is_apart():
    changes = held(16 * MIB) + [change._replace(operation=1) for change in held(16 * MIB, kind="communication")]
    assert reserved_bytes(trace_of(changes)) == 32 * MIB


def test_the_optimizers_state_lies_where_activations_were():
    step = [Change(0, "backward", "gradients", 64 * MIB), *held(128 * MIB)]
    step += [Change(1, "update", "temporary", 64 * MIB), Change(1, "update", "temporary", -64 * MIB)]
    step += [Change(2, "forward", "gradients", -64 * MIB)]
    plain = reserved_bytes(trace_of(step, parameters=64 * MIB))
    assert plain == 256 * MIB
    # two states of 64 MiB fill the hole of 128, so the update's temporary and the next step's activations need others
    stateful = reserved_bytes(trace_of(step, parameters=64 * MIB, optimizer_state=128 * MIB))
    assert stateful == plain + 64 * MIB + 128 * MIB


def test_bytes_that_turn_out_to_be_gradients_stay_where_they_are():
    step = [Change(0, "backward", "temporary", 64 * MIB), Change(0, "backward", "temporary", -64 * MIB)]
    step += [Change(0, "backward", "gradients", 64 * MIB), Change(1, "update", "gradients", -64 * MIB)]
    assert reserved_bytes(trace_of(step)) == 64 * MIB


def test_gradients_that_are_kept_take_their_room():
    step = held(100 * MIB, phase="backward") + held(MIB, phase="update")
    assert reserved_bytes(trace_of(step, parameters=64 * MIB, gradients=64 * MIB)) >= 228 * MIB


def test_a_device_needs_more_than_tensors():
    h100 = find_hardware("h100")
    room = estimate_room(trace_of(held(40 * GIB), peak=40 * GIB), Setting(), h100)
    assert room.allocated == 40 * GIB + 64 * MIB
    assert 1.0 < room.reserved / room.allocated < 1.05
    assert 0.5 * GIB < room.used - room.reserved < 1.3 * GIB
    several = estimate_room(trace_of(held(40 * GIB), peak=40 * GIB), Setting(devices=8), h100)
    assert GIB < several.used - room.used < 2 * GIB
    assert room.fits
    assert room.spare == h100.memory - room.used


def test_holes_do_not_make_it_too_large_for_a_device():
    h100 = find_hardware("h100")
    holes = trace_of(held(40 * GIB) + held(50 * GIB), peak=50 * GIB)
    assert 50 * GIB < estimate_room(holes, Setting(), h100).reserved < 52 * GIB
    larger = estimate_room(holes, Setting(), replace(h100, memory=120 * GIB))
    assert larger.reserved > 90 * GIB
    assert larger.fits


def test_a_cpu_has_no_segments_and_its_processes_share_it():
    cpu = find_hardware("cpu")
    room = estimate_room(trace_of(held(GIB), peak=GIB), Setting(), cpu)
    assert room.reserved == room.allocated == GIB
    assert room.used > GIB
    assert room.memory == cpu.memory
    several = estimate_room(trace_of(held(GIB), peak=GIB), Setting("ddp", devices=2, num_nodes=3), cpu)
    assert several == replace(room, memory=cpu.memory // 2)


@pytest.mark.parametrize(("used", "fits"), [(70, True), (77, False), (90, False)])
def test_what_fits_fits_with_the_uncertainty(used, fits):
    room = Room(used, used, used, uncertainty=5, memory=80)
    assert room.fits is fits
    assert room.spare == 80 - used
