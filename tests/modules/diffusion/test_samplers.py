"""Samplers: on the exact field of a Gaussian they give that Gaussian, and each picture has its own noise."""

import pytest
import torch

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.diffusion.processes import build_process
from lightning_bigmodels.modules.diffusion.samplers import (
    begins_with_unit_noise,
    build_scheduler,
    check_sampler,
    guide,
    sample,
    seeds_of,
)
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from tests.modules.diffusion.gaussian import exact_network

CPU = torch.device("cpu")
WAYS = [
    ({"prediction": "epsilon"}, "ddim", 250),
    ({"prediction": "sample", "noise_schedule": "cosine"}, "ddim", 50),
    ({"prediction": "v_prediction", "noise_schedule": "cosine"}, "ddpm", 200),
    ({"prediction": "epsilon", "noise_schedule": "cosine"}, "dpm_solver", 50),
    ({"prediction": "sample"}, "dpm_solver", 50),
    ({"prediction": "v_prediction"}, "euler", 100),
    ({"process": "score_matching", "sigma_max": 20.0}, "euler", 50),
    ({"process": "score_matching", "sigma_max": 20.0}, "euler_ancestral", 100),
    ({"process": "score_matching", "sigma_max": 20.0}, "ddim", 50),
    ({"process": "flow_matching"}, "euler", 50),
    ({"process": "flow_matching", "time_shift": 3.0}, "euler", 100),
]


def draw(arguments, sampler, steps, seeds, clip=True, **exact):
    process = build_process(**arguments)
    check_sampler(process, sampler, steps)
    scheduler = build_scheduler(process, sampler, clip)
    return sample(scheduler, exact_network(process, **exact), seeds, (1, 8, 8), steps, CPU)


@pytest.mark.parametrize(("arguments", "sampler", "steps"), WAYS)
def test_on_the_exact_field_of_a_gaussian_a_sampler_gives_that_gaussian(arguments, sampler, steps):
    made = draw(arguments, sampler, steps, list(range(128)), spread=0.3, mean=0.1)
    # 8,192 values: the standard error of the mean is 0.003
    assert float(made.mean()) == pytest.approx(0.1, abs=0.015)
    assert float(made.std()) == pytest.approx(0.3, rel=0.08)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler_ancestral"])
def test_a_picture_does_not_depend_on_what_is_made_beside_it(sampler):
    seeds = seeds_of(SampleNoise(torch.arange(5), seed=3))
    assert len(set(seeds)) == 5
    together = draw({}, sampler, 5, seeds, spread=0.2)
    assert torch.allclose(draw({}, sampler, 5, seeds[3:4], spread=0.2), together[3:4], atol=1e-6)
    assert torch.allclose(draw({}, sampler, 5, seeds[1:4], spread=0.2), together[1:4], atol=1e-6)


def test_steps_are_as_many_as_asked_for_and_end_at_the_first_one():
    process = build_process()
    for sampler, numbers in {"ddpm": (3, 61, 999), "ddim": (4, 125, 500)}.items():
        for number in numbers:
            scheduler = build_scheduler(process, sampler, True)
            scheduler.set_timesteps(number)
            assert len(scheduler.timesteps) == number
            assert scheduler.timesteps[0] == 999
            assert scheduler.timesteps[-1] == (0 if sampler == "ddpm" else 1000 // number - 1)


def test_only_pixels_are_clipped():
    wide = {clip: draw({}, "ddim", 10, [0, 1], clip=clip, spread=5.0).abs().max() for clip in (True, False)}
    assert wide[True] <= 1 < 3 < wide[False]


def test_euler_alone_wants_scaled_noise():
    process = build_process()
    assert {name: begins_with_unit_noise(build_scheduler(process, name, True)) for name in ("ddpm", "dpm_solver")} == {
        "ddpm": True,
        "dpm_solver": True,
    }
    assert not begins_with_unit_noise(build_scheduler(process, "euler", True))
    assert begins_with_unit_noise(build_scheduler(build_process("flow_matching"), "euler", True))


def test_sampling_shifts_times_as_training_does():
    scheduler = build_scheduler(build_process("flow_matching", time_shift=3.0), "euler", True)
    scheduler.set_timesteps(4)
    plain = torch.linspace(1, 0, 4)
    torch.testing.assert_close(scheduler.sigmas[:4].cpu(), 3 * plain / (1 + 2 * plain), atol=0.02, rtol=0)


def test_guidance_goes_on_from_the_unconditional_prediction_through_the_conditional_one():
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    assert [float(guide(conditional, unconditional, scale)) for scale in (0, 1, 2.5)] == [1, 3, 6]


@pytest.mark.parametrize(
    ("arguments", "sampler", "steps", "words"),
    [
        ({}, "dim", 10, "no sampler 'dim'; did you mean 'ddim'?"),
        ({"process": "flow_matching"}, "ddim", 10, "no sampler 'ddim'; known: euler"),
        ({"prediction": "sample"}, "euler", 10, "set sampler to ddim"),
        ({}, "ddim", 0, "num_sampling_steps is 0; it must be 1 or more"),
        (
            {},
            "ddim",
            30,
            "num_sampling_steps is 30, and ddim takes equal steps through the 1000 of num_train_timesteps",
        ),
        ({}, "ddim", 30, "the next number that it can take is 40"),
        ({"num_train_timesteps": 20}, "ddim", 50, "num_sampling_steps is 50 and num_train_timesteps 20"),
    ],
)
def test_what_cannot_be_sampled_is_refused(arguments, sampler, steps, words):
    with pytest.raises(InputError) as error:
        check_sampler(build_process(**arguments), sampler, steps)
    assert words in str(error.value)
