"""How well a diffusion model knows pictures: a bound on the bits that each pixel costs.

Source:
    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equations 5 and 13: L_T + sum of L_t + L_0, with the
    posterior's variance in each step and a discretized Gaussian for the pixels, of the first step's variance. Kingma et
    al. 2021, "Variational Diffusion Models", equations 13 and 14: L_t is half the fall of the signal-to-noise ratio
    times the squared error of the clean picture. Steps that are drawn at random, each counted by how seldom that is,
    give an unbiased sample of the sum (Nichol and Dhariwal 2021, "Improved DDPM", section 3.3; we draw by a guess of a
    step's term, and not by terms seen before).
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_bigmodels.modules.diffusion.processes import DiscreteProcess
from lightning_bigmodels.tasks.sample_noise import SampleNoise


def bits_per_dimension(
    process: DiscreteProcess,
    predict: Callable[[Tensor, Tensor], Tensor],
    pictures: Tensor,
    noise: SampleNoise,
    num_times: int,
) -> Tensor:
    """Return for each picture a bound (B,) on the bits for each of its values.

    Args:
        process: As the network was trained.
        predict: The network, from noisy pictures (B, C, H, W) and the steps (B,) to its prediction.
        pictures: (B, C, H, W) uint8.
        noise: Of the pictures.
        num_times: Steps that are drawn, besides the first one; all of them where there are no more.
    """
    clean = pictures.float() / 127.5 - 1

    def error(t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the clean pictures that the network has in mind at a step, and their squared error (B,)."""
        noisy = process.add_noise(clean, noise.normal(*clean.shape[1:]), t)
        found = process.parts(noisy, predict(noisy, process.network_times(t)).float(), t).clean.clamp(-1, 1)
        return found, (found - clean).square().flatten(1).mean(1)

    first = torch.zeros(len(pictures), dtype=torch.int64, device=pictures.device)
    spread = math.sqrt(1 - process.alpha_bars[0])
    nats = prior_nats(process, clean) - pixel_log_probabilities(clean, error(first)[0], spread).flatten(1).mean(1)
    for t, counts in _steps(process, noise, num_times):
        nats += 0.5 * counts * error(t)[1]
    return nats / math.log(2)


def snr_falls(process: DiscreteProcess) -> list[float]:
    """Return for each step but the first how much lower the signal-to-noise ratio is than one step before."""
    ratios = [share / (1 - share) for share in process.alpha_bars]
    return [before - after for before, after in itertools.pairwise(ratios)]


def prior_nats(process: DiscreteProcess, clean: Tensor) -> Tensor:
    """Return (B,) nats for each value, by which the end of the path tells of the picture: L_T."""
    share = process.alpha_bars[-1]
    terms = (1 - share) + share * clean.square() - 1 - math.log1p(-share)
    return 0.5 * terms.flatten(1).mean(1)


def pixel_log_probabilities(clean: Tensor, mean: Tensor, spread: float) -> Tensor:
    """Return the logarithm of what a Gaussian gives to the interval of each pixel; the outer ones have no end.

    Args:
        clean: (B, C, H, W) pixels, 0 to 255 as -1 to 1.
        mean: (B, C, H, W) means.
        spread: Standard deviation.
    """
    upper = torch.where(clean > 1 - 1 / 255, math.inf, (clean + 1 / 255 - mean) / spread)
    lower = torch.where(clean < -1 + 1 / 255, -math.inf, (clean - 1 / 255 - mean) / spread)
    # of the two tails the left one is exact, so intervals on the right are mirrored
    right = upper + lower > 0
    upper, lower = torch.where(right, -lower, upper), torch.where(right, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log1p(-(log_lower - log_upper).exp())


def _steps(process: DiscreteProcess, noise: SampleNoise, num_times: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield steps (B,) above the first with what their squared error counts: each once, or some drawn at random."""
    falls = torch.tensor(snr_falls(process), dtype=torch.float32, device=noise.device)
    if num_times >= len(falls):
        for step, fall in enumerate(falls, start=1):
            yield torch.full((len(noise),), step, device=noise.device), fall.expand(len(noise))
        return
    # a guess of a step's term: where the noise is small the error is about 1 over the signal-to-noise ratio
    guess = [fall * (1 - share) for fall, share in zip(snr_falls(process), process.alpha_bars[1:], strict=True)]
    chances = torch.tensor([term / sum(guess) for term in guess], dtype=torch.float32, device=noise.device)
    edges = chances.cumsum(0)
    for part in range(num_times):
        # one from each part of all terms, so that no draw gets all the great ones
        drawn = (part + noise.uniform()) / num_times * edges[-1]
        place = torch.searchsorted(edges, drawn, right=True).clamp(max=len(falls) - 1)
        yield place + 1, falls[place] / chances[place] / num_times
