"""Gradients compressed on their way: fewer bytes, nearly the same descent."""

import functools

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from lightning_bigmodels import CausalLanguageModel
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.strategies import CompressedDDPStrategy
from tests.conftest import TINY_LLAMA
from tests.workers import fit_on

SGD = functools.partial(torch.optim.SGD, lr=0.5)


def build():
    return CausalLanguageModel(architecture="llama", config=TINY_LLAMA, optimizer=SGD)


@pytest.fixture(scope="module")
def plain_runs():
    return {}


@pytest.fixture
def plain(plain_runs, text):
    """Return a function from a number of steps to the run of plain DDP."""

    def run(steps):
        if steps not in plain_runs:
            plain_runs[steps] = fit_on(2, "ddp", build, lambda: text(batch_size=4), max_steps=steps)
        return plain_runs[steps]

    return run


@pytest.mark.parametrize(
    ("strategy", "kind", "tolerance"),
    [("ddp_fp16_gradients", torch.float16, 1e-4), ("ddp_bf16_gradients", torch.bfloat16, 1e-3)],
)
def test_half_the_bytes_and_nearly_the_same_weights(strategy, kind, tolerance, text, plain, monkeypatch):
    sent = []
    whole = default_hooks._compress_hook

    def watched(dtype, group, bucket):
        sent.append(dtype)
        return whole(dtype, group, bucket)

    monkeypatch.setattr(default_hooks, "_compress_hook", watched)
    fits = fit_on(2, strategy, build, lambda: text(batch_size=4), max_steps=3, report=lambda run: list(sent))
    assert fits[0].report == [kind] * 3
    for name, value in plain(3)[0].weights.items():
        torch.testing.assert_close(fits[0].weights[name], value, rtol=0, atol=tolerance)
        assert torch.equal(fits[0].weights[name], fits[1].weights[name])
    assert any(not torch.equal(fits[0].weights[name], value) for name, value in plain(3)[0].weights.items())


def test_low_rank_gradients_learn_and_keep_processes_equal(text, plain):
    def powersgd():
        return CompressedDDPStrategy("powersgd", powersgd_rank=2, powersgd_start=2)

    fits = fit_on(2, powersgd, build, lambda: text(batch_size=4), max_steps=12)
    # alike for as long as whole gradients are sent, and apart from then on
    assert fits[0].losses[:2] == pytest.approx(plain(12)[0].losses[:2], rel=1e-6)
    assert fits[0].losses[-1] != pytest.approx(plain(12)[0].losses[-1], rel=1e-6)
    assert fits[0].losses[-1] < 0.9 * fits[0].losses[0]
    for name, value in fits[0].weights.items():
        assert torch.equal(fits[1].weights[name], value)


def test_each_name_makes_its_compression():
    for name, compression in {"fp16_gradients": "fp16", "bf16_gradients": "bf16", "powersgd": "powersgd"}.items():
        assert StrategyRegistry.get(f"ddp_{name}").compression == compression


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compression": "int8"}, "compression is 'int8'; set it to fp16, bf16 or powersgd"),
        ({"powersgd_rank": 0}, "powersgd_rank is 0; set it to 1 or more"),
        ({"powersgd_start": 1}, "powersgd_start is 1; set it to 2 or more"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        CompressedDDPStrategy(**arguments)
