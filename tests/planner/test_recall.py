"""What a plan recalls of torch, or finds by a shorter way, is what torch would have said."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_bigmodels.planner import trace as tracing
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.simulation import simulate
from lightning_bigmodels.planner.trace import StepTrace
from tests.planner.test_simulation import ROWS, language_model

LISTS = [(3, 4), (2,), (3, 4)]
CALLS = {
    "a product": lambda x: x @ x.t(),
    "a view of a view": lambda x: x[1:].t()[::2],
    "a view that copies": lambda x: x.t().reshape(-1),
    "in place": lambda x: x.add_(1),
    "parts": lambda x: x.split(2),
    "a sum and a place": lambda x: x.max(0),
    "a whole number": lambda x: torch.full((2,), 1),
    "a number": lambda x: torch.full((2,), 1.0),
    "a truth": lambda x: torch.full((2,), True),
    "nothing of three": lambda x: torch.ops.aten.native_layer_norm_backward(
        x, x, [6], x[:, :1], x[:, :1], None, None, [True, False, False]
    ),
    "lists": lambda x: torch._foreach_mul([x.new_ones(shape) for shape in LISTS], [1.0, 2.0, 3.0]),
    "lists in place": lambda x: torch._foreach_add_([x.new_ones(shape) for shape in LISTS], 1.0),
}


def look(result, x):
    """Return all that a plan sees of a result: shapes, strides, formats, and what lies in the same memory."""
    if result is None or isinstance(result, (list, tuple)):
        return [look(part, x) for part in result or ()]
    same = result.untyped_storage()._cdata == x.untyped_storage()._cdata
    size = result.untyped_storage().nbytes()
    return result is x, same, size, result.shape, result.stride(), result.storage_offset(), result.dtype, result.device


@pytest.mark.parametrize("name", CALLS)
def test_a_recalled_result_is_what_torch_makes(name):
    with FakeTensorMode() as mode:
        x = torch.empty(4, 6)
        expected = look(CALLS[name](x), x)
        trace = StepTrace()
        trace.mode = mode
        trace.note([x], "inputs")
        found = []
        with trace:
            for _ in range(2):
                trace.restart()
                found.append((look(CALLS[name](x), x), trace.changes, trace.operations))
    assert found[0][0] == found[1][0] == expected
    assert found[0][1:] == found[1][1:]


def test_another_shape_number_or_format_is_another_call():
    with FakeTensorMode() as mode:
        trace = StepTrace()
        trace.mode = mode
        with trace:
            x = torch.empty(4, 6)
            assert x.sum(0).shape == (6,)
            assert x.sum(1).shape == (4,)
            assert x.t().sum(0).shape == (4,)
            assert x.double().sum(0).dtype == torch.float64
            assert x.t().contiguous().stride() == (4, 1)
            assert x.contiguous() is x


@pytest.mark.parametrize("strategy", ["fsdp2", "tp"])
def test_a_step_is_the_same_without_any_short_way(strategy, monkeypatch):
    model, data = language_model()
    setting = Setting(strategy, "bf16-mixed", devices=2, batch_size=ROWS, gradient_clip_val=1.0)
    short = simulate(model, data, setting, 512, like_cuda=True)
    monkeypatch.setattr(tracing, "describe", lambda *_: None)
    monkeypatch.setattr(tracing, "run_shards", lambda *_: NotImplemented)
    whole = simulate(model, data, setting, 512, like_cuda=True)
    assert short.changes == whole.changes
    assert short.operations == whole.operations
    assert short.transfers == whole.transfers
    assert short.peak == whole.peak
    assert short.assumptions == whole.assumptions
