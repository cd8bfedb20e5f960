"""The bound on bits per dimension against Gaussian data, for which all of it is known."""

import math

import pytest
import torch
from scipy.stats import norm

from lightning_bigmodels.modules.diffusion.bound import (
    bits_per_dimension,
    pixel_log_probabilities,
    prior_nats,
    snr_falls,
)
from lightning_bigmodels.modules.diffusion.processes import PREDICTIONS, build_process
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from tests.modules.diffusion.gaussian import exact_network, pixels_of

SPREAD = 0.25


def noise_of(count):
    return SampleNoise(torch.arange(count), seed=0)


def test_with_the_best_network_and_many_small_steps_the_bound_is_the_entropy():
    # a Gaussian's entropy in nats, and what the width of a pixel, 2 / 255, makes of it
    entropy = (0.5 * math.log(2 * math.pi * math.e * SPREAD**2) - math.log(2 / 255)) / math.log(2)
    process = build_process("score_matching", sigma_max=20.0)
    pixels = pixels_of(64, 8, SPREAD)
    found = bits_per_dimension(process, exact_network(process, SPREAD), pixels, noise_of(64), 1000)
    assert found.shape == (64,)
    assert entropy < found.mean() < entropy + 0.1
    # a network that takes the data for wider ones pays for it
    worse = bits_per_dimension(process, exact_network(process, 2 * SPREAD), pixels, noise_of(64), 1000)
    assert worse.mean() > found.mean() + 0.02


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_with_few_large_steps_the_bound_is_the_sum_by_hand(prediction):
    process = build_process(prediction=prediction, num_train_timesteps=100, beta_end=0.1)
    shares = process.alpha_bars
    # the squared error of the best guess, at the signal's share a: c^2 (1 - a) / (a c^2 + 1 - a)
    errors = [SPREAD**2 * (1 - a) / (a * SPREAD**2 + 1 - a) for a in shares]
    by_hand = sum(0.5 * fall * error for fall, error in zip(snr_falls(process), errors[1:], strict=True))
    by_hand += 0.5 * (shares[-1] * (SPREAD**2 - 1) - math.log(1 - shares[-1]))
    variance = 1 - shares[0]
    by_hand += 0.5 * math.log(2 * math.pi * variance) + errors[0] / (2 * variance) - math.log(2 / 255)
    pixels = pixels_of(64, 8, SPREAD)
    found = bits_per_dimension(process, exact_network(process, SPREAD), pixels, noise_of(64), 100)
    assert float(found.mean()) == pytest.approx(by_hand / math.log(2), abs=0.1)


def test_some_of_the_steps_give_the_bound_of_all_on_average():
    process = build_process(num_train_timesteps=100, beta_end=0.1)
    pixels, predict = pixels_of(256, 8, SPREAD), exact_network(process, SPREAD)
    whole = bits_per_dimension(process, predict, pixels, noise_of(256), 99)
    some = bits_per_dimension(process, predict, pixels, noise_of(256), 7)
    spread = float((some - whole).std() / 16)
    assert float((some - whole).mean()) == pytest.approx(0, abs=4 * spread)
    assert spread < 0.15


def test_a_steps_term_is_the_divergence_of_two_gaussians():
    # KL of N(m1, v) and N(m2, v) is (m1 - m2)^2 / (2 v), with the posterior of Ho et al. 2020, equations 6 and 7
    process = build_process(num_train_timesteps=50)
    shares, betas = process.alpha_bars, process.betas()
    for step in (1, 20, 49):
        variance = (1 - shares[step - 1]) / (1 - shares[step]) * betas[step]
        of_clean = math.sqrt(shares[step - 1]) * betas[step] / (1 - shares[step])
        by_hand = (of_clean * 0.3) ** 2 / (2 * variance)
        assert 0.5 * snr_falls(process)[step - 1] * 0.3**2 == pytest.approx(by_hand, rel=1e-6)


def test_the_end_of_the_path_costs_its_divergence_from_pure_noise():
    process = build_process(num_train_timesteps=10)
    share, value = process.alpha_bars[-1], 0.5
    mean, variance = math.sqrt(share) * value, 1 - share
    by_hand = 0.5 * (variance + mean**2 - 1 - math.log(variance))
    assert float(prior_nats(process, torch.full((1, 1, 2, 2), value))) == pytest.approx(by_hand, rel=1e-5)


def test_pixels_probabilities_add_up_and_hold_far_from_the_mean():
    clean = (torch.arange(256) / 127.5 - 1).reshape(256, 1, 1, 1)
    for mean in (-1.0, 0.1, 1.0):
        logs = pixel_log_probabilities(clean, torch.full_like(clean, mean), 0.01)
        assert float(logs.exp().sum()) == pytest.approx(1, abs=1e-4)
        assert logs.isfinite().all()
    # 0 is 100 spreads below a mean of 0.0039
    far = float(pixel_log_probabilities(clean, torch.full_like(clean, 0.0), 0.01)[0])
    assert far == pytest.approx(norm.logcdf((-1 + 1 / 255) / 0.01), rel=1e-3)
