"""What models that make pictures by taking noise out share: process and sampler, losses by noise, guidance."""

from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.modules.diffusion.processes import Process
from lightning_bigmodels.modules.diffusion.samplers import Sampling, build_scheduler, check_sampler, guide, sample
from lightning_bigmodels.tasks.classification import MeanLoss
from lightning_bigmodels.tasks.picture_generation import PictureGeneration
from lightning_bigmodels.tasks.task import Phase

_BINS = 4


class Denoising(PictureGeneration, ABC):
    """A model of pictures that was trained to take noise out.

    Args:
        process: How noise is added, and what the network says.
        sampling: How pictures are made.
        args: The arguments of `PictureGeneration`.
        kwargs: The arguments of `Task`.

    Raises:
        InputError: the process has no such sampler, or a value is out of its range.
    """

    def __init__(self, process: Process, sampling: Sampling, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_sampler(process, sampling.sampler, sampling.num_steps)
        self.process = process
        self.sampling = sampling
        names = ["loss", *(f"loss_t{number}" for number in range(_BINS))]
        self.metrics = nn.ModuleDict({f"{phase}_{name}": MeanLoss() for phase in ("val", "test") for name in names})

    def report_losses(self, phase: Phase, losses: Tensor, positions: Tensor, indices: Tensor) -> Tensor:
        """Return the mean loss of a batch; in an evaluation report it, and by how noisy its examples were.

        Args:
            phase: train, val or test.
            losses: (B,).
            positions: (B,) from 0, without noise, to 1.
            indices: (B,) the examples' places; fillers count for nothing.
        """
        counted = (indices != FILLER).to(losses.dtype)
        loss = (losses * counted).sum() / counted.sum().clamp(min=1)
        if phase == "train":
            self.log("train_loss", loss.detach(), prog_bar=True)
            return loss
        self.report_mean(f"{phase}_loss", losses, counted)
        bins = (positions * _BINS).long().clamp(max=_BINS - 1)
        for number in range(_BINS):
            self.report_mean(f"{phase}_loss_t{number}", losses, counted * (bins == number))
        return loss

    def report_mean(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Report a mean over an evaluation, of values (B,) with weights (B,)."""
        metric = self.metrics[name]
        assert isinstance(metric, MeanLoss)
        metric.update(values * weights, weights)
        self.log(name, metric, on_step=False, on_epoch=True, prog_bar=name == "val_loss", batch_size=len(values))

    def guided(self, predict: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, times: Tensor) -> Tensor:
        """Return what a network says (B, C, h, w) that is asked twice, and then guided.

        Args:
            predict: The network, of 2 B examples and times, of which the first B are told no condition.
            noisy: (B, C, h, w).
            times: (B,), as the process tells them.
        """
        unconditional, conditional = predict(noisy.repeat(2, 1, 1, 1), times.repeat(2)).float().chunk(2)
        return guide(conditional, unconditional, self.sampling.guidance_scale)

    def make_examples(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        seeds: Sequence[int],
        shape: tuple[int, ...],
        num_steps: int | None,
        clip: bool,
    ) -> Tensor:
        """Return float32 examples (B, *shape) of seeds, by this model's sampler.

        Args:
            predict: The network, from noisy examples and what it is told of their times to its prediction.
            seeds: B numbers.
            shape: Of one example.
            num_steps: How often the network is asked; None: as the model says.
            clip: Whether examples are pixels, in [-1, 1].
        """
        scheduler = build_scheduler(self.process, self.sampling.sampler, clip=clip)
        steps = self.sampling.num_steps if num_steps is None else num_steps
        return sample(scheduler, predict, seeds, shape, steps, self.device)


def as_pixels(examples: Tensor) -> Tensor:
    """Return uint8 of pixels in [-1, 1], as a pipeline of diffusers rounds them."""
    return ((examples / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
