import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_bigmodels.tasks.sample_noise import EVALUATION, SampleNoise, _mix


def test_the_mixing_is_splitmix64():
    # the first numbers of SplitMix64 from the state 1234567, as its reference implementation prints them
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = torch.tensor([1234567]) + torch.arange(1, 5) * (0x9E3779B97F4A7C15 - 2**64)
    assert [x % 2**64 for x in _mix(state).tolist()] == expected


def test_an_example_has_its_numbers_whatever_batch_it_is_in():
    whole = SampleNoise(torch.tensor([5, 3, 8]), seed=1, epoch=2)
    alone = SampleNoise(torch.tensor([8]), seed=1, epoch=2)
    for draw in (lambda n: n.normal(3, 5), lambda n: n.uniform(), lambda n: n.integers(10, 2), lambda n: n.normal()):
        assert torch.equal(draw(whole)[2:], draw(alone))


@pytest.mark.parametrize("other", [{"seed": 2}, {"epoch": 3}, {"indices": torch.tensor([1])}])
def test_seed_epoch_and_index_each_change_them(other):
    one = {"indices": torch.tensor([0]), "seed": 1, "epoch": 2}
    assert not torch.isclose(SampleNoise(**one).normal(16), SampleNoise(**one | other).normal(16)).any()


def test_each_call_draws_anew_and_evaluation_always_the_same():
    noise = SampleNoise(torch.arange(4), seed=0)
    first, second = noise.normal(7), noise.normal(7)
    assert not torch.isclose(first, second).any()
    assert torch.equal(first, SampleNoise(torch.arange(4), 0, EVALUATION).normal(7))


def test_normal_numbers_are_normal_and_independent():
    x = SampleNoise(torch.arange(64), seed=3, epoch=0).normal(4096).double()
    deviation = 1 / math.sqrt(x.numel())
    assert abs(x.mean()) < 4 * deviation
    assert abs(x.var() - 1) < 4 * math.sqrt(2) * deviation
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96) * deviation
    within = [(x.abs() < bound).double().mean().item() for bound in (0.5, 1, 2, 3)]
    assert within == pytest.approx([math.erf(bound / math.sqrt(2)) for bound in (0.5, 1, 2, 3)], abs=4 * deviation)
    # of neighbours in a stream, of the two halves that Box and Muller's pairs fill, and of neighbouring streams
    for a, b in [(x[:, 1:], x[:, :-1]), (x[:, :2048], x[:, 2048:]), (x[1:], x[:-1])]:
        assert abs((a * b).mean()) < 5 * deviation
        assert abs((a**2 * b**2).mean() - 1) < 20 * deviation


def test_uniform_numbers_and_integers_are_even():
    noise = SampleNoise(torch.arange(100), seed=4, epoch=1)
    uniform = noise.uniform(1000)
    assert 0 <= uniform.min() < uniform.max() < 1
    counts = torch.histc(uniform, bins=10, min=0, max=1)
    assert counts.tolist() == pytest.approx([1e4] * 10, abs=500)
    integers = noise.integers(7, 1000)
    assert torch.bincount(integers.flatten()).tolist() == pytest.approx([1e5 / 7] * 7, abs=600)
    assert noise.integers(5).shape == noise.uniform().shape == (100,)


def test_it_is_traced_without_values():
    with FakeTensorMode():
        assert SampleNoise(torch.arange(4), seed=0).normal(3, 3).shape == (4, 3, 3)
    assert SampleNoise(torch.arange(4, device="meta"), seed=0).uniform(2).device.type == "meta"
