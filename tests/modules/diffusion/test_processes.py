"""Processes: noise against its closed form, targets against each other, weights against the paper's formula."""

import itertools
import math

import pytest
import torch

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.diffusion.processes import (
    PREDICTIONS,
    build_process,
    denoising_losses,
    geometric_sigmas,
)
from lightning_bigmodels.tasks.sample_noise import SampleNoise

NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
EVERY = [
    *({"prediction": name} for name in PREDICTIONS),
    {"process": "score_matching", "sigma_max": 5.0},
    {"process": "flow_matching"},
]


def noise_of(count):
    return SampleNoise(torch.arange(count), seed=0)


def some(process):
    """Return times off both ends of the path, clean examples and noise."""
    noise = noise_of(64)
    t = process.draw_times(noise)
    t = t.clamp(50, 900) if t.dtype == torch.int64 else t.clamp(0.05, 0.9)
    return t, noise.normal(3, 4, 4), noise.normal(3, 4, 4)


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("num_steps", [10, 1000])
def test_noise_schedules_are_those_of_diffusers(schedule, num_steps):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_steps, beta_schedule=NAMES[schedule]).alphas_cumprod.double()
    ours = build_process(noise_schedule=schedule, num_train_timesteps=num_steps).alpha_bars
    assert torch.allclose(torch.tensor(ours, dtype=torch.float64), theirs, rtol=2e-3, atol=2e-6)


def test_noise_added_step_by_step_is_the_closed_form():
    # variance and mean of x_t = sqrt(1 - beta) x_(t - 1) + sqrt(beta) noise, by hand
    process = build_process(num_train_timesteps=100, beta_end=0.1)
    mean, variance = 1.0, 0.0
    for step, beta in enumerate(process.betas()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        signal, spread = process.scales(torch.tensor([step]))
        assert float(signal) == pytest.approx(mean, rel=1e-6)
        assert float(spread) ** 2 == pytest.approx(variance, rel=1e-6)


def test_noise_of_score_matching_is_a_geometric_row_of_sigmas_in_scaled_coordinates():
    sigmas = geometric_sigmas(0.01, 50.0, 10)
    assert sigmas[0] == pytest.approx(0.01)
    assert sigmas[-1] == pytest.approx(50.0)
    factors = [after / before for before, after in itertools.pairwise(sigmas)]
    assert factors == pytest.approx([factors[0]] * 9)
    process = build_process("score_matching", num_train_timesteps=10)
    t, clean, noise = torch.arange(10), torch.ones(10, 1), torch.full((10, 1), -2.0)
    sigma = torch.tensor(sigmas)[:, None]
    assert torch.allclose(process.add_noise(clean, noise, t), (clean + sigma * noise) / (1 + sigma**2).sqrt())
    # the error of the score, weighed by sigma squared, is that of epsilon (Song and Ermon 2019, equations 5 and 6)
    score_error = (-torch.tensor(0.5) / sigma + noise / sigma).square() * sigma**2
    assert torch.allclose(score_error, (torch.tensor(0.5) - process.target(clean, noise, t)).square())


def test_flow_matching_goes_straight_from_the_example_to_the_noise():
    process = build_process("flow_matching")
    clean, noise = torch.randn(3, 2), torch.randn(3, 2)
    ends = [process.add_noise(clean, noise, torch.full((3,), end)) for end in (0.0, 0.25, 1.0)]
    assert torch.equal(ends[0], clean)
    assert torch.equal(ends[2], noise)
    # the velocity is the path's derivative, the same all along it
    assert torch.allclose(clean + 0.25 * process.target(clean, noise, torch.full((3,), 0.1)), ends[1], atol=1e-6)


@pytest.mark.parametrize("arguments", EVERY)
def test_a_perfect_prediction_stands_for_what_the_example_was_made_of(arguments):
    process = build_process(**arguments)
    t, clean, noise = some(process)
    noisy = process.add_noise(clean, noise, t)
    parts = process.parts(noisy, process.target(clean, noise, t), t)
    assert torch.allclose(parts.clean, clean, atol=1e-3)
    assert torch.allclose(parts.noise, noise, atol=1e-3)


def test_predictions_of_each_kind_that_stand_for_the_same_are_told_apart_by_nothing():
    processes = [build_process(prediction=name) for name in PREDICTIONS]
    t, noisy, wrong = some(processes[0])
    clean = processes[0].parts(noisy, wrong, t).clean
    for process in processes:
        parts = process.parts(noisy, process.target(clean, wrong, t), t)
        assert torch.allclose(parts.clean, clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arguments", EVERY)
def test_min_snr_makes_the_error_of_the_clean_example_weigh_min_snr_and_gamma(arguments):
    process = build_process(**arguments, min_snr_gamma=5.0)
    t, clean, noise = some(process)
    noisy, target = process.add_noise(clean, noise, t), process.target(clean, noise, t)
    error = torch.full_like(target, 0.1)
    of_clean = (process.parts(noisy, target + error, t).clean - process.parts(noisy, target, t).clean)[:, 0, 0, 0]
    signal, spread = process.scales(t)
    expected = (signal / spread).square().clamp(max=5.0) * of_clean.square()
    assert torch.allclose(process.weight(t) * 0.01, expected, rtol=2e-2)


def test_min_snr_has_the_papers_weights():
    # Hang et al. 2023: epsilon min(SNR, gamma) / SNR, v min(SNR, gamma) / (SNR + 1), x0 min(SNR, gamma)
    t = torch.tensor([0, 100, 500, 999])
    for prediction, formula in {
        "epsilon": lambda snr: min(snr, 5) / snr,
        "sample": lambda snr: min(snr, 5),
        "v_prediction": lambda snr: min(snr, 5) / (snr + 1),
    }.items():
        process = build_process(prediction=prediction, min_snr_gamma=5.0)
        ratios = [process.alpha_bars[step] / (1 - process.alpha_bars[step]) for step in t.tolist()]
        assert process.weight(t).tolist() == pytest.approx([formula(snr) for snr in ratios], rel=1e-4)


@pytest.mark.parametrize("arguments", EVERY)
def test_the_loss_of_a_perfect_network_is_zero_and_belongs_to_the_example(arguments):
    process = build_process(**arguments, min_snr_gamma=5.0)
    clean = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def perfect(noisy, times):
        assert times.max() <= process.num_train_timesteps
        given = noise_of(16)
        t = process.draw_times(given)
        assert torch.equal(times, process.network_times(t))
        return process.target(clean, given.normal(1, 4, 4), t)

    assert denoising_losses(process, perfect, clean, noise_of(16)).losses.max() == 0
    whole = denoising_losses(process, lambda noisy, times: 0 * noisy, clean, noise_of(16))
    part = denoising_losses(process, lambda noisy, times: 0 * noisy, clean[5:7], SampleNoise(torch.tensor([5, 6]), 0))
    assert torch.equal(part.losses, whole.losses[5:7])
    assert 0 <= whole.positions.min() < 0.3 < 0.7 < whole.positions.max() <= 1


def test_logit_normal_times_gather_in_the_middle():
    t = build_process("flow_matching", time_sampling="logit_normal").draw_times(noise_of(10_000))
    # a normal number lies within ln 3 of its mean with probability 0.728
    assert float(((t > 0.25) & (t < 0.75)).float().mean()) == pytest.approx(0.728, abs=0.02)


def test_shifted_times_are_nearer_to_the_noise():
    plain, shifted = (build_process("flow_matching", time_shift=shift).draw_times(noise_of(10_000)) for shift in (1, 3))
    assert shifted.min() >= 0
    assert shifted.max() <= 1
    assert bool((shifted >= plain).all())
    # half of them are beyond 3 / 2 / (1 + 2 / 2)
    assert float((shifted > 0.75).float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"time_shift": 0.0}, "time_shift is 0.0; set it to 1 for none, or above for more noise"),
        ({"process": "ddmp"}, "there is no process 'ddmp'; did you mean 'ddpm'?"),
        ({"noise_schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"prediction": "v"}, "there is no prediction 'v'; known: epsilon, sample, v_prediction"),
        ({"process": "flow_matching", "prediction": "epsilon"}, "flow_matching predicts velocity; set prediction to"),
        ({"process": "score_matching", "prediction": "sample"}, "score_matching predicts epsilon; set prediction to"),
        ({"time_sampling": "normal"}, "there is no time_sampling 'normal'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1; it must be 2 or more"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma is 0.0; set it above 0, or to null"),
        ({"beta_start": 0.1, "beta_end": 0.01}, "beta_start is 0.1 and beta_end 0.01; let them rise"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min is 2.0 and sigma_max 1.0; let them rise"),
    ],
)
def test_impossible_processes_are_refused(arguments, words):
    with pytest.raises(InputError) as error:
        build_process(**arguments)
    assert words in str(error.value)
