"""Sampling by Gumbel noise draws from the softmax, and each row from its own stream."""

import pytest
import torch

from lightning_bigmodels.modules.decoding import sampler

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])
IDS = torch.zeros(1, 1, dtype=torch.int64)


def draws(number, **settings):
    processors = sampler(range(number), **{"temperature": 1.0, "top_k": None, "top_p": None, **settings})
    scores = processors(IDS.expand(number, 1), LOGITS.expand(number, -1).clone())
    return torch.bincount(scores.argmax(1), minlength=4) / number


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_frequencies_are_the_softmax(temperature):
    number = 4000
    expected = torch.softmax(LOGITS / temperature, 0)
    # four standard deviations of a binomial frequency
    bound = 4 * torch.sqrt(expected * (1 - expected) / number)
    assert ((draws(number, temperature=temperature) - expected).abs() <= bound).all()


def test_temperature_zero_adds_nothing():
    assert len(sampler([0], 0.0, 5, 0.5)) == 0


def test_top_k_and_top_p_leave_the_likeliest():
    assert draws(200, top_k=1)[0] == 1
    assert (draws(500, top_k=2) > 0).tolist() == [True, True, False, False]
    # softmax: 0.64 0.24 0.09 0.03
    assert (draws(500, top_p=0.7) > 0).tolist() == [True, True, False, False]


def test_the_same_seeds_draw_the_same_and_leave_the_global_stream_alone():
    state = torch.get_rng_state()
    first = sampler([3, 4], 1.0, None, None)(IDS.expand(2, 1), LOGITS.expand(2, -1))
    second = sampler([3, 4], 1.0, None, None)(IDS.expand(2, 1), LOGITS.expand(2, -1))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(state, torch.get_rng_state())
