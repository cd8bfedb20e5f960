"""How pictures turn into noise, what a network learns to undo, and how that is weighed: rules, no networks.

A process mixes a clean example with Gaussian noise, `noisy = signal(t) * clean + spread(t) * noise`, at a time t from
little noise to much. It is plain values; its tensors are made where the times lie. A loss takes four lines:

    t = process.draw_times(noise)  # noise: SampleNoise of the batch
    eps = noise.normal(*clean.shape[1:])
    made = network(process.add_noise(clean, eps, t), process.network_times(t))
    loss = process.weight(t) * (made - process.target(clean, eps, t)).square().flatten(1).mean(1)

`denoising_losses` is these lines, and `build_process` makes a process of what a user writes. Sampling is in
`samplers.py`, the bound on the likelihood in `bound.py`.

Legend: B examples, t (B,) their times, alpha-bar the share of the signal in the variance.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.tasks.sample_noise import SampleNoise

PROCESSES = ("ddpm", "score_matching", "flow_matching")
SCHEDULES = ("linear", "scaled_linear", "cosine")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
VELOCITY = "velocity"

_GREATEST_BETA = 0.999  # what Nichol and Dhariwal 2021 clip to, near the end of the cosine schedule


class Parts(NamedTuple):
    """What a noisy example is made of, as a network says: `clean` and `noise`, both of the example's shape."""

    clean: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Process(ABC):
    """A path from examples to Gaussian noise, and what is learned along it.

    Attributes:
        prediction: What the network makes of a noisy example: `epsilon`, `sample`, `v_prediction`, or `velocity`.
        min_snr_gamma: Where the weight of the loss stops growing with the signal-to-noise ratio; None: weight 1.
        num_train_timesteps: What the network is told at the end of the path, as a number of steps.
    """

    prediction: str
    min_snr_gamma: float | None
    num_train_timesteps: int

    @abstractmethod
    def draw_times(self, noise: SampleNoise) -> Tensor:
        """Return a time (B,) for each example, all times being equally likely."""

    @abstractmethod
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return what clean example and noise are multiplied with at times (B,): signal and spread, each (B,)."""

    @abstractmethod
    def network_times(self, t: Tensor) -> Tensor:
        """Return what the network is told of times (B,): from 0 to below `num_train_timesteps`, or up to it."""

    def position(self, t: Tensor) -> Tensor:
        """Return how far along the path times (B,) are, from 0 to 1."""
        return self.network_times(t) / self.num_train_timesteps

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noisy examples of clean ones and noise (B, ...) at times (B,)."""
        signal, spread = self._broadcast(t, clean)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network is to make of the noisy examples, (B, ...); the inverse of `parts`."""
        signal, spread = self._broadcast(t, clean)
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        if self.prediction == "v_prediction":
            return signal * noise - spread * clean
        return noise - clean

    def parts(self, noisy: Tensor, made: Tensor, t: Tensor) -> Parts:
        """Return the clean example and the noise that a network's prediction (B, ...) stands for."""
        signal, spread = self._broadcast(t, noisy)
        if self.prediction == "epsilon":
            return Parts((noisy - spread * made) / signal, made)
        if self.prediction == "sample":
            return Parts(made, (noisy - signal * made) / spread)
        if self.prediction == "v_prediction":
            return Parts(signal * noisy - spread * made, spread * noisy + signal * made)
        return Parts(noisy - spread * made, noisy + signal * made)

    def weight(self, t: Tensor) -> Tensor:
        """Return the weight (B,) of the squared error of the prediction at times (B,).

        Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4: the error
        of the clean example weighs min(SNR, gamma). That of a prediction is this error over the square of what an error
        of the prediction does to the clean example: spread / signal for epsilon, 1 for the sample, spread for v and for
        the velocity. So epsilon weighs min(SNR, gamma) / SNR, and v min(SNR, gamma) / (SNR + 1).
        """
        if self.min_snr_gamma is None:
            return torch.ones(len(t), device=t.device)
        signal, spread = self.scales(t)
        ratio = (signal / spread).square()
        capped = ratio.clamp(max=self.min_snr_gamma)
        if self.prediction == "epsilon":
            return capped / ratio
        return capped if self.prediction == "sample" else capped * spread.square()

    def _broadcast(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        signal, spread = self.scales(t)
        shape = (-1,) + (1,) * (like.ndim - 1)
        return signal.reshape(shape), spread.reshape(shape)


@dataclass(frozen=True)
class DiscreteProcess(Process):
    """Noise that is added in steps and keeps the variance: t is the number of a step, int64, 0 with the least noise.

    Source:
        Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 4; Salimans and Ho 2022, "Progressive
        Distillation", for v. Denoising score matching of Song and Ermon 2019 is the same process in other coordinates:
        its noisy example, of noise sigma, divided by sqrt(1 + sigma^2), with alpha-bar 1 / (1 + sigma^2); its network
        says -sigma times the score, which is epsilon, and its weight of sigma^2 makes that error a plain square.

    Attributes:
        alpha_bars: For each step the share of the signal in the variance, falling.
    """

    alpha_bars: tuple[float, ...] = field(repr=False)

    @override
    def draw_times(self, noise: SampleNoise) -> Tensor:
        return noise.integers(self.num_train_timesteps)

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # square roots in double precision: 1 - alpha-bar of the first steps is lost to rounding otherwise
        signal = self.look_up([math.sqrt(share) for share in self.alpha_bars], t)
        return signal, self.look_up([math.sqrt(1 - share) for share in self.alpha_bars], t)

    @override
    def network_times(self, t: Tensor) -> Tensor:
        return t

    @override
    def position(self, t: Tensor) -> Tensor:
        return t / self.num_train_timesteps

    def betas(self) -> list[float]:
        """Return the variance that each step adds, of which diffusers' schedulers make alpha-bar again."""
        previous = (1.0, *self.alpha_bars[:-1])
        return [1 - now / before for now, before in zip(self.alpha_bars, previous, strict=True)]

    @staticmethod
    def look_up(values: Sequence[float], t: Tensor) -> Tensor:
        """Return float32 values (B,) of steps (B,)."""
        # made anew where the steps are: a tensor kept from before would be another device's, or no fake one
        return torch.tensor(values, dtype=torch.float32, device=t.device)[t]


@dataclass(frozen=True)
class FlowMatching(Process):
    """A straight line from example to noise: t is float32 from 0, the example, to 1, the noise.

    The network says the velocity along it, noise less example, and is told `num_train_timesteps` times t.

    Source:
        Lipman et al. 2022, "Flow Matching for Generative Modeling", section 4, optimal transport with least spread 0;
        Liu et al. 2022, "Flow Straight and Fast". Where we differ: time runs from example to noise, as in diffusers.

    Attributes:
        time_sampling: `uniform`, or `logit_normal`, which draws the middle of the path more often (Esser et al. 2024,
            "Scaling Rectified Flow Transformers", section 3.1).
        time_shift: How far times move towards the noise, where it is decided what lies where: t becomes
            `time_shift t / (1 + (time_shift - 1) t)` (the same, equation 23), in training and in sampling.
    """

    time_sampling: str = "uniform"
    time_shift: float = 1.0

    @override
    def draw_times(self, noise: SampleNoise) -> Tensor:
        t = noise.normal().sigmoid() if self.time_sampling == "logit_normal" else noise.uniform()
        return self.time_shift * t / (1 + (self.time_shift - 1) * t)

    @override
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    @override
    def network_times(self, t: Tensor) -> Tensor:
        return t * self.num_train_timesteps

    @override
    def position(self, t: Tensor) -> Tensor:
        return t


class Losses(NamedTuple):
    """What `denoising_losses` returns.

    Attributes:
        losses: (B,) weighted squared error of each example's prediction.
        positions: (B,) how far along the path each example was taken, from 0 to 1.
    """

    losses: Tensor
    positions: Tensor


def denoising_losses(
    process: Process, predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, noise: SampleNoise
) -> Losses:
    """Return the loss of each example, at a time and with noise of its own.

    Args:
        process: What turns examples into noise.
        predict: The network, from noisy examples (B, ...) and what it is told of their times (B,) to its prediction.
        clean: (B, ...) float32 examples, of about unit variance or in [-1, 1].
        noise: Draws times and noise, in this order.
    """
    t = process.draw_times(noise)
    added = noise.normal(*clean.shape[1:])
    made = predict(process.add_noise(clean, added, t), process.network_times(t)).float()
    errors = (made - process.target(clean, added, t)).square().flatten(1).mean(1)
    return Losses(process.weight(t) * errors, process.position(t))


def geometric_sigmas(sigma_min: float, sigma_max: float, num_steps: int) -> list[float]:
    """Return standard deviations from least to greatest, each the same factor above the one before.

    Source: Song and Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution", section 4.2.
    """
    return [sigma_min * (sigma_max / sigma_min) ** (i / max(1, num_steps - 1)) for i in range(num_steps)]


def noise_betas(schedule: str, num_steps: int, beta_start: float, beta_end: float) -> list[float]:
    """Return the variance that each step adds.

    Source: linear is that of Ho et al. 2020, scaled_linear that of Rombach et al. 2022 ("High-Resolution Image
    Synthesis with Latent Diffusion Models"), cosine equation 17 of Nichol and Dhariwal 2021 ("Improved DDPM"), which
    has no `beta_start` and `beta_end`. They are diffusers' own to rounding.
    """

    def cosine(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    if schedule == "cosine":
        return [min(1 - cosine((i + 1) / num_steps) / cosine(i / num_steps), _GREATEST_BETA) for i in range(num_steps)]
    power = 2.0 if schedule == "scaled_linear" else 1.0
    start, end = beta_start ** (1 / power), beta_end ** (1 / power)
    return [(start + (end - start) * i / max(1, num_steps - 1)) ** power for i in range(num_steps)]


def build_process(
    process: str = "ddpm",
    prediction: str | None = None,
    noise_schedule: str = "linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    sigma_min: float = 0.01,
    sigma_max: float = 50.0,
    time_sampling: str = "uniform",
    min_snr_gamma: float | None = None,
    time_shift: float = 1.0,
) -> Process:
    """Return a process as a user describes it.

    Args:
        process: `ddpm`, `score_matching` or `flow_matching`.
        prediction: For ddpm `epsilon`, `sample` or `v_prediction`; None: epsilon. The others have one of their own.
        noise_schedule: For ddpm `linear`, `scaled_linear` or `cosine`.
        num_train_timesteps: Steps of the noise; for flow matching what the network is told at the end.
        beta_start: Variance of the first step's noise, for linear schedules.
        beta_end: Variance of the last step's.
        sigma_min: Least noise of score matching, whose levels are a geometric row.
        sigma_max: Greatest noise of score matching.
        time_sampling: For flow matching `uniform` or `logit_normal`.
        min_snr_gamma: Where the weight of the loss stops growing with the signal-to-noise ratio; None: weight 1.
        time_shift: For flow matching how far times move towards the noise; 1: not at all.

    Raises:
        InputError: a name is unknown, or a value out of its range.
    """
    _check_name("process", process, PROCESSES)
    _check_name("noise_schedule", noise_schedule, SCHEDULES)
    _check_name("time_sampling", time_sampling, ("uniform", "logit_normal"))
    if num_train_timesteps < 2:
        raise InputError(f"num_train_timesteps is {num_train_timesteps}; it must be 2 or more")
    if min_snr_gamma is not None and min_snr_gamma <= 0:
        raise InputError(f"min_snr_gamma is {min_snr_gamma}; set it above 0, or to null for weight 1")
    if time_shift <= 0:
        raise InputError(f"time_shift is {time_shift}; set it to 1 for none, or above for more noise")
    if not 0 < beta_start <= beta_end < 1:
        raise InputError(f"beta_start is {beta_start} and beta_end {beta_end}; let them rise from above 0 to below 1")
    if not 0 < sigma_min < sigma_max:
        raise InputError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}; let them rise from above 0")
    if process == "ddpm":
        _check_name("prediction", prediction or "epsilon", PREDICTIONS)
        shares, share = [], 1.0
        for beta in noise_betas(noise_schedule, num_train_timesteps, beta_start, beta_end):
            share *= 1 - beta
            shares.append(share)
        return DiscreteProcess(prediction or "epsilon", min_snr_gamma, num_train_timesteps, tuple(shares))
    own = VELOCITY if process == "flow_matching" else "epsilon"
    if prediction not in (None, own):
        raise InputError(f"prediction is {prediction!r}, and {process} predicts {own}; set prediction to null")
    if process == "flow_matching":
        return FlowMatching(VELOCITY, min_snr_gamma, num_train_timesteps, time_sampling, time_shift)
    sigmas = geometric_sigmas(sigma_min, sigma_max, num_train_timesteps)
    shares = [1 / (1 + sigma**2) for sigma in sigmas]
    return DiscreteProcess("epsilon", min_snr_gamma, num_train_timesteps, tuple(shares))


def _check_name(argument: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(f"there is no {argument} {name!r}{near(name, known)}")
