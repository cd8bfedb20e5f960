"""Sampling with a random stream per prompt, on top of transformers' generation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class GumbelNoise(LogitsProcessor):
    """Add Gumbel noise, so that the largest score is a draw from the softmax (Gumbel 1954; the Gumbel-max trick).

    Greedy search over the result samples, and each row draws from a generator of its own: what a prompt gets depends on
    neither its neighbours in the batch nor the training run's random stream.

    Args:
        generators: One for each row of the batch.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) plus noise."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))
        return scores + noise.to(scores)


def sampler(seeds: Sequence[int], temperature: float, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    """Return the processors that turn greedy search into sampling; none for temperature 0.

    Args:
        seeds: One for each row of the batch.
        temperature: Divides the logits; 0 leaves the search greedy.
        top_k: Keep the k largest logits; None keeps all.
        top_p: Keep the smallest set of tokens whose probabilities reach p; None keeps all.
    """
    processors = LogitsProcessorList()
    if temperature == 0:
        return processors
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(GumbelNoise([torch.Generator().manual_seed(seed) for seed in seeds]))
    return processors
