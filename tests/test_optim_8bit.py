"""AdamW in 8 bits: close to torch's own, a quarter of its bytes, and the same on shards and from checkpoints."""

import copy
import functools

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_bigmodels import CausalLanguageModel, optim, optim_8bit
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.strategies import FSDP2Strategy
from tests.conftest import TINY_LLAMA
from tests.workers import fit_on, run_on

# the checkpoints are read by runs that write none
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path")

EIGHT = functools.partial(optim.AdamW8bit, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
FULL = functools.partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
# matrices of 301 rows, which two processes do not share evenly
LLAMA = {**TINY_LLAMA, "vocab_size": 301, "hidden_size": 64, "intermediate_size": 192}


def descend(build, shapes=((64, 96),), steps=1, dtype=torch.float32, place=lambda tensor: tensor):
    """Train on gradients of noise, and return the parameters and their states."""
    generator = torch.Generator().manual_seed(0)
    members = [nn.Parameter(place(torch.randn(shape, generator=generator).to(dtype))) for shape in shapes]
    optimizer = build(members)
    for _ in range(steps):
        for p in members:
            p.grad = place(torch.randn(p.shape, generator=generator).to(dtype))
        optimizer.step()
    return members, [optimizer.state[p] for p in members]


def moments(state, name, signed):
    blocks = state[name].reshape(state[f"{name}_scale"].numel(), -1)
    return (optim_8bit._levels(signed)[blocks.int()] * state[f"{name}_scale"].view(-1, 1)).view(state[name].shape)


def test_a_step_is_that_of_adamw_and_moments_are_the_nearest_levels():
    shapes = ((64, 96), (8, 4, 32, 7), (40,), ())
    members, states = descend(EIGHT, shapes)
    expected, exact = descend(FULL, shapes)
    torch.testing.assert_close(members, expected, rtol=1e-6, atol=1e-6)
    # a block is the longest part of a row, of 256 elements at most
    assert [state["exp_avg_scale"].shape for state in states[:2]] == [(64, 1), (8, 4)]
    for state, other in zip(states[:2], exact[:2], strict=True):
        for name, levels in (("exp_avg", 64), ("exp_avg_sq", 128)):
            scales = state[f"{name}_scale"].view(-1, 1)
            torch.testing.assert_close(scales, other[name].reshape(len(scales), -1).abs().amax(1, keepdim=True))
            error = (moments(state, name, name == "exp_avg") - other[name]).reshape(len(scales), -1).abs() / scales
            # half the distance of the levels between 0.1 and 1; the least of all is a whole one, -1 for -0.993
            assert error.max() <= 0.9 / levels / 2 + 1e-6
    assert states[2]["exp_avg"].dtype == states[3]["exp_avg"].dtype == torch.float32
    assert set(states[2]) == set(states[3]) == {"step", "exp_avg", "exp_avg_sq"}


def test_moments_of_a_weight_take_two_bytes():
    _, (state,) = descend(EIGHT, ((64, 1024),))
    assert sum(value.nbytes for name, value in state.items() if name != "step") == 64 * 1024 * (2 + 2 * 4 / 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_after_many_steps_it_is_where_adamw_is(dtype):
    (start,), _ = descend(EIGHT, steps=0)
    (exact,), _ = descend(FULL, steps=50)
    (expected,), _ = descend(FULL, steps=50, dtype=dtype)
    (found,), (state,) = descend(EIGHT, steps=50, dtype=dtype)
    assert found.dtype == dtype
    assert state["exp_avg"].dtype == torch.uint8
    # bfloat16's own rounding is all there is to see of the difference
    bound = (expected - exact).norm() if dtype == torch.bfloat16 else 0.02 * (exact - start).norm()
    assert (found - exact).norm() < bound


def test_parts_and_layouts_change_nothing(monkeypatch):
    def channels_last(tensor):
        return tensor.to(memory_format=torch.channels_last)

    shapes = ((32, 16, 4, 4),)
    (expected,), (whole,) = descend(EIGHT, shapes, steps=3)
    (found,), _ = descend(EIGHT, shapes, steps=3, place=channels_last)
    assert torch.equal(found, expected)
    monkeypatch.setattr(optim_8bit, "_AT_ONCE", 1000)
    (found,), (parts,) = descend(EIGHT, shapes, steps=3)
    assert torch.equal(found, expected)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_language_model_learns_as_with_adamw(text, precision):
    settings = {"precision": precision, "gradient_clip_val": 1.0, "max_steps": 40}
    losses = []
    for optimizer in (EIGHT, FULL):
        module = functools.partial(CausalLanguageModel, "llama", LLAMA, optimizer=optimizer)
        (fit,) = fit_on(1, "auto", module, lambda: text(vocab_size=301), **settings)
        losses.append(sum(fit.losses[-5:]) / 5)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] < 0.85 * fit.losses[0]


def test_shards_equal_whole_tensors():
    shapes = ((301, 64), (128, 128), (30, 32, 3, 3), (64,))
    expected = descend(EIGHT, shapes, steps=3)

    def work():
        torch.distributed.init_process_group("gloo")
        mesh = torch.distributed.init_device_mesh("cpu", (2, 2))
        found = []
        # rows over all processes, and over two with columns over the others, in blocks that are as long then
        for shape, second in ((shapes, 0), (shapes[1:2], 1)):
            place = functools.partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0), Shard(second)])
            members, states = descend(EIGHT, shape, steps=3, place=place)
            found.append([whole(p.detach()) for p in members])
            found.append([{name: whole(value) for name, value in state.items()} for state in states])
        return found

    members, states = expected
    for rows, row_states, _, (split,) in run_on(4, work):
        assert all(torch.equal(one, other) for one, other in zip(rows, members, strict=True))
        assert_equal(row_states, states)
        assert split["exp_avg_scale"].shape == (128, 2)


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_goes_on_bit_for_bit_also_on_another_number_of_processes(text, tmp_path, sharded):
    def fit(processes, strategy, **settings):
        settings = {"max_steps": 2, "gradient_clip_val": 1.0, **settings}
        module = functools.partial(CausalLanguageModel, "llama", LLAMA, optimizer=EIGHT)
        data = functools.partial(text, vocab_size=301, batch_size=8 // processes)
        return fit_on(processes, strategy, module, data, report=states, **settings)[0]

    def states(trainer):
        (optimizer,) = trainer.optimizers
        return [{name: whole(value) for name, value in state.items()} for state in optimizer.state.values()]

    def strategy():
        return FSDP2Strategy(save_distributed_checkpoint=sharded)

    callbacks = [ModelCheckpoint(tmp_path, "half", save_on_train_epoch_end=False, every_n_train_steps=2)]
    half = fit(2, strategy, callbacks=callbacks, enable_checkpointing=True)
    through = fit(2, strategy, max_steps=4)
    again = fit(2, strategy, max_steps=4, ckpt_path=tmp_path / "half.ckpt")
    assert through.losses == half.losses + again.losses
    assert_equal(again.report, through.report)
    assert {value.dtype for state in again.report for value in state.values()} == {torch.float32, torch.uint8}
    assert_equal(fit(1, strategy if sharded else "auto", ckpt_path=tmp_path / "half.ckpt").report, half.report)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_checkpoint_is_plain_and_loads_as_it_was(tmp_path):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    optimizer = EIGHT(layers.parameters())
    for p in layers.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = optim.AdamW8bit(copy.deepcopy(layers).parameters(), lr=1.0)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.param_groups[0]["lr"] == 3e-3
    for one, saved in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert {name: value.dtype for name, value in one.items()} == {name: v.dtype for name, v in saved.items()}
        assert all(torch.equal(one[name], saved[name]) for name in saved)


def test_what_it_cannot_take_is_refused():
    def matrix():
        return nn.Parameter(torch.zeros(64, 64))

    with pytest.raises(InputError, match="lr of AdamW8bit is -1; it must be 0 or more"):
        optim.AdamW8bit([matrix()], lr=-1)
    with pytest.raises(InputError, match=r"betas of AdamW8bit are \(0.9, 1\); they must be 0 or more and below 1"):
        optim.AdamW8bit([matrix()], betas=(0.9, 1))
    with pytest.raises(InputError, match=r"found no matrix .* use torch.optim.AdamW instead, or, with the strategy f"):
        optim.AdamW8bit([nn.Parameter(torch.zeros(10_000))])
    p = matrix()
    p.grad = torch.zeros(64, 64).to_sparse()
    with pytest.raises(InputError, match="no sparse gradients; make the embedding with sparse=False"):
        optim.AdamW8bit([p]).step()
    p.grad = torch.zeros(64, 64)
    adamw = torch.optim.AdamW([p])
    adamw.step()
    with pytest.raises(InputError, match=r"of shape \(64, 64\) it holds step, exp_avg, exp_avg_sq; name the optimizer"):
        optim.AdamW8bit([p]).load_state_dict(adamw.state_dict())
