"""Data whose best network is known: values drawn from one Gaussian."""

import torch


def exact_network(process, spread, mean=0.0):
    """Return what predicts best where each value of the clean examples is drawn from N(mean, spread^2).

    The clean value's mean, given the noisy one, is that of two Gaussians: signal * x + noise's own spread.
    """

    def predict(noisy, times):
        t = times / process.num_train_timesteps if process.prediction == "velocity" else times.round().long()
        signal, noise_spread = (value.reshape(-1, *[1] * (noisy.ndim - 1)) for value in process.scales(t))
        variance = (signal * spread) ** 2 + noise_spread**2
        clean = mean + signal * spread**2 / variance * (noisy - signal * mean)
        noise = noise_spread / variance * (noisy - signal * mean)
        return process.target(clean, noise, t)

    return predict


def pixels_of(count, size, spread, mean=0.0, seed=0):
    """Return (count, 1, size, size) uint8 of such values, 0 to 255 as -1 to 1."""
    values = mean + spread * torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
