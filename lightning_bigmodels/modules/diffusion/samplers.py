"""From noise to pictures: diffusers' schedulers on our processes, and guidance.

    scheduler = build_scheduler(process, "ddim", clip=True)
    seeds = seeds_of(noise)  # noise: SampleNoise of the pictures
    made = sample(scheduler, predict, seeds, shape=(1, 28, 28), num_steps=50, device=device)

A pipeline of diffusers with this scheduler makes the same of `generator=[torch.Generator().manual_seed(s) for s in
seeds]`: a picture's noise, the first and that of each step, comes from a generator of its own, on the CPU.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bigmodels.errors import InputError, near, require
from lightning_bigmodels.modules.diffusion.processes import DiscreteProcess, FlowMatching, Process
from lightning_bigmodels.tasks.sample_noise import SampleNoise

DEFAULTS = {"ddpm": "ddim", "score_matching": "euler", "flow_matching": "euler"}
"""For each process the sampler where none is named."""

_OF_STEPS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
}
_OF_FLOWS = {"euler": "FlowMatchEulerDiscreteScheduler"}

# below this logarithm of signal over spread a step of DPM-Solver is unstable; the cosine schedule goes there
_LEAST_LOG_RATIO = -5.1


class Sampling(NamedTuple):
    """How pictures are made.

    Attributes:
        sampler: Its name.
        num_steps: How often the network is asked.
        guidance_scale: How far they go in the direction of their class; 1: as the network says.
    """

    sampler: str
    num_steps: int
    guidance_scale: float = 1.0


def check_sampler(process: Process, sampler: str, num_steps: int) -> None:
    """Refuse a sampler that the process does not have, or a number of steps that it cannot take.

    Raises:
        InputError: the message names what it has.
    """
    known = _OF_STEPS if isinstance(process, DiscreteProcess) else _OF_FLOWS
    if sampler not in known:
        raise InputError(f"this process has no sampler {sampler!r}{near(sampler, known)}")
    if sampler.startswith("euler") and process.prediction == "sample":
        raise InputError(f"{sampler} samples from epsilon and v_prediction, not from sample; set sampler to ddim")
    if num_steps < 1:
        raise InputError(f"num_sampling_steps is {num_steps}; it must be 1 or more")
    if num_steps > process.num_train_timesteps:
        raise InputError(
            f"num_sampling_steps is {num_steps} and num_train_timesteps {process.num_train_timesteps}; the noise has "
            f"no more steps than those: lower num_sampling_steps"
        )
    if sampler == "ddim" and process.num_train_timesteps % num_steps:
        # diffusers 0.42 takes equal steps of whole numbers, and would leave the noise that is between them
        larger = range(num_steps, process.num_train_timesteps + 1)
        following = next(number for number in larger if process.num_train_timesteps % number == 0)
        raise InputError(
            f"num_sampling_steps is {num_steps}, and ddim takes equal steps through the {process.num_train_timesteps} "
            f"of num_train_timesteps; the next number that it can take is {following}"
        )


def build_scheduler(process: Process, sampler: str, clip: bool) -> Any:
    """Return a scheduler of diffusers that samples from a process.

    Args:
        process: As the network was trained.
        sampler: `ddim`, `ddpm`, `dpm_solver`, `euler`, `euler_ancestral`; for flow matching `euler`.
        clip: Whether ddim and ddpm keep the clean example that a step has in mind in [-1, 1], as pixels are and latents
            are not.
    """
    diffusers = require("diffusers", extra="generative")
    values: dict[str, Any]
    if not isinstance(process, DiscreteProcess):
        assert isinstance(process, FlowMatching)
        values = {"num_train_timesteps": process.num_train_timesteps, "shift": process.time_shift}
        return getattr(diffusers, _OF_FLOWS[sampler])(**values)
    values = {
        "num_train_timesteps": process.num_train_timesteps,
        "trained_betas": process.betas(),
        "prediction_type": process.prediction,
    }
    if sampler in ("ddim", "ddpm"):
        # the first step begins at all noise, as what it begins with is (Lin et al. 2023, section 3.3)
        values |= {"clip_sample": clip, "timestep_spacing": "trailing" if sampler == "ddim" else "linspace"}
    if sampler == "dpm_solver":
        values["lambda_min_clipped"] = _LEAST_LOG_RATIO
    with old_numpy_calls():
        return getattr(diffusers, _OF_STEPS[sampler])(**values)


def begins_with_unit_noise(scheduler: Any) -> bool:
    """Return whether a scheduler takes noise of unit variance and examples as they are, as DDPMPipeline gives them."""
    return not hasattr(scheduler, "is_scale_input_called")


def seeds_of(noise: SampleNoise) -> list[int]:
    """Return a seed for each picture, of a generator that draws all its noise."""
    return noise.integers(2**31).tolist()


def sample(
    scheduler: Any,
    predict: Callable[[Tensor, Tensor], Tensor],
    seeds: Sequence[int],
    shape: tuple[int, ...],
    num_steps: int,
    device: torch.device,
) -> Tensor:
    """Return float32 examples (B, *shape) made of noise.

    Args:
        scheduler: What `build_scheduler` returned.
        predict: The network, from noisy examples (B, *shape) and what it is told of their times (B,) to its prediction.
        seeds: B numbers from which each example's noise follows.
        shape: Of one example.
        num_steps: How often the network is asked.
        device: Where the network is.
    """
    randn_tensor = require("diffusers.utils.torch_utils", extra="generative").randn_tensor
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with old_numpy_calls():
        scheduler.set_timesteps(num_steps)
    noise = randn_tensor((len(seeds), *shape), generator=generators, device=device, dtype=torch.float32)
    scaled = not begins_with_unit_noise(scheduler)
    examples: Tensor = noise * scheduler.init_noise_sigma if scaled else noise
    for time in scheduler.timesteps:
        given = scheduler.scale_model_input(examples, time) if scaled else examples
        made = predict(given, time.expand(len(seeds)).to(device)).float()
        examples = scheduler.step(made, time, examples, generator=generators).prev_sample
    return examples


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return a prediction that a condition moves further than it would by itself.

    Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", equation 6, with w = scale - 1, as diffusers
    counts: 1 is the conditional prediction, 0 the unconditional one.
    """
    return unconditional + scale * (conditional - unconditional)


@contextmanager
def old_numpy_calls() -> Iterator[None]:
    """Let diffusers 0.42 make arrays of tensors in a way of which NumPy 2 warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        yield
