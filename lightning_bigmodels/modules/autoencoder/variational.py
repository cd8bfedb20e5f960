"""Variational autoencoders: codes with a distribution, from which new pictures can be drawn."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, cast, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER, GenerationBatch, ImageBatch
from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.modules.autoencoder.architectures import Codebook, build_coder, kl_coder
from lightning_bigmodels.modules.autoencoder.coding import PictureCoding, Predicts, mean_metric
from lightning_bigmodels.modules.autoencoder.likelihoods import (
    NUMBERS,
    Likelihood,
    bits_per_dim,
    check_binary,
    gaussian_kl,
    log_likelihood,
    most_likely,
)
from lightning_bigmodels.networks.autoencoder import Coded, PictureCoder
from lightning_bigmodels.networks.codebook import Usage
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.png import Drawn
from lightning_bigmodels.strategies.collectives import concatenated, summed
from lightning_bigmodels.tasks.picture_generation import PictureGeneration
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from lightning_bigmodels.tasks.task import Phase


@final
class VariationalAutoencoder(PictureCoding, PictureGeneration):
    """A variational autoencoder of pictures: Gaussian codes, or places in a learned codebook (VQ-VAE).

    It learns by the evidence lower bound in nats of a picture: the log likelihood of its 8-bit pixels less the KL
    divergence of its code from the prior, each summed over its dimensions. `val_bits_per_dim` is the same bound in bits
    for each value of a pixel: what a file of the pictures, coded by this model, would take.

    Args:
        architecture: convolutional, dense, or autoencoder_kl (diffusers', the first stage of latent diffusion).
        image_size: Height and width of the pictures, or both as a list.
        channels: Channels of the pictures.
        latent_dim: Values of a code; with a codebook or autoencoder_kl, of each place of its map.
        config: For convolutional widths (features after each halving) and num_blocks; for dense widths; for
            autoencoder_kl values of its configuration, under diffusers' own names.
        pretrained: For autoencoder_kl a folder or hub name, whose weights to start from.
        likelihood: How pixels are distributed about what the decoder says: logistic (rounded to 8 bits, each pixel with
            a scale of its own; for autoencoder_kl each channel), or bernoulli, for pictures of black and white alone.
        beta: Factor on the KL divergence.
        free_bits: Nats of each latent dimension that cost nothing: below them, a smaller KL divergence wins nothing.
        kl_warmup: Optimizer steps in which beta rises from 0; below 1, the fraction of the run.
        codebook_size: Vectors in the codebook; null: codes are Gaussian.
        codebook_decay: What remains of a vector's moving average at each training batch.
        commitment: With a codebook, weight of the squared distance of codes from their vectors.
        noise_seed: Chooses all noise, in training and when pictures are made.
        predicts: What predict writes of given pictures: latents, as a Parquet file, or reconstructions, as PNG files.
        channels_last: Keep weights with their channels innermost, which convolutions are fastest with.
        optimizer: From parameter groups to an optimizer; None is AdamW with lr 1e-3 and weight decay 0.1.
        schedule: From optimizer and total steps to a scheduler, stepped after each optimizer step; None is constant.
        l1_penalty: Weight of the sum of absolute values of all decayed parameters, added to the training loss.
        compile: Run the network through torch.compile.

    Raises:
        InputError: a name is unknown, a value out of its range, or one has no effect beside another.

    Source:
        Kingma and Welling 2013, "Auto-Encoding Variational Bayes", equations 3 and 10; Higgins et al. 2017, "beta-VAE",
        equation 4; Kingma et al. 2016, "Improved Variational Inference with Inverse Autoregressive Flow", equation 15
        (free bits, of single dimensions); Sonderby et al. 2016, "Ladder Variational Autoencoders" (warm-up); van den
        Oord et al. 2017, "Neural Discrete Representation Learning", whose prior over places is uniform: its KL
        divergence is h w log K, whatever the picture.
    """

    def __init__(
        self,
        architecture: Literal["convolutional", "dense", "autoencoder_kl"] = "convolutional",
        image_size: int | list[int] = 32,
        channels: int = 3,
        latent_dim: int = 32,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        likelihood: Likelihood = "logistic",
        beta: float = 1.0,
        free_bits: float = 0.0,
        kl_warmup: float = 0.0,
        codebook_size: int | None = None,
        codebook_decay: float = 0.99,
        commitment: float = 0.25,
        noise_seed: int = 0,
        predicts: Predicts = "latents",
        channels_last: bool = False,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        l1_penalty: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__(
            architecture=architecture,
            config=config,
            latent_dim=latent_dim,
            predicts=predicts,
            pretrained=pretrained,
            channels_last=channels_last,
            image_size=image_size,
            channels=channels,
            noise_seed=noise_seed,
            optimizer=optimizer,
            schedule=schedule,
            l1_penalty=l1_penalty,
            compile=compile,
        )
        if likelihood not in NUMBERS:
            raise InputError(f"no likelihood is named {likelihood!r}{near(likelihood, NUMBERS)}")
        weights = {"beta": beta, "free_bits": free_bits, "kl_warmup": kl_warmup, "commitment": commitment}
        for name, value in weights.items():
            if value < 0:
                raise InputError(f"{name} is {value}; set it to 0 or more")
        if beta == 0:
            _refuse_idle({"free_bits": free_bits, "kl_warmup": kl_warmup}, "beta is 0: there is no KL divergence")
        if codebook_size is not None:
            constant = "codebook_size is set: the KL divergence is a constant"
            _refuse_idle({"free_bits": free_bits, "kl_warmup": kl_warmup}, constant)
            _refuse_idle({"beta": beta}, constant, neutral=1.0)
            if codebook_size < 2:
                raise InputError(f"codebook_size is {codebook_size}; set it to 2 or more")
            if architecture != "convolutional":
                raise InputError(
                    f"codebook_size rounds the places of a map, which {architecture} does not make; set "
                    f"model.architecture to convolutional, or codebook_size to null"
                )
        if not 0 <= codebook_decay < 1:
            raise InputError(f"codebook_decay is {codebook_decay}; set it from 0 to below 1")
        self.likelihood: Likelihood = likelihood
        self.beta = beta
        self.free_bits = free_bits
        self.kl_warmup = kl_warmup
        self.codebook = None if codebook_size is None else Codebook(codebook_size, codebook_decay)
        self.commitment = commitment
        self._warmup_steps: int | None = None
        names = ("loss", "elbo", "kl", "bits_per_dim")
        self.metrics = nn.ModuleDict({f"{phase}_{name}": mean_metric() for phase in ("val", "test") for name in names})
        if self.codebook is not None:
            self.usage = nn.ModuleDict({phase: _UsedCodes(self.codebook.size) for phase in ("val", "test")})
        self.save_hyperparameters()

    # ---- the network

    @override
    def new_coder(self, whole: Any | None) -> PictureCoder:
        numbers = NUMBERS[self.likelihood]
        if whole is not None:
            return kl_coder(whole, self.image_shape, numbers)
        return build_coder(
            self.architecture,
            self.config,
            self.image_shape,
            self.latent_dim,
            numbers,
            gaussian=self.codebook is None,
            codebook=self.codebook,
        )

    @property
    @override
    def to_pictures(self) -> Callable[[Tensor], Tensor]:
        return partial(most_likely, self.likelihood)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        precision = str(self.trainer.precision)
        if self.codebook is not None and precision in ("bf16-true", "16-true"):
            raise InputError(
                f"trainer.precision {precision} would round the moving averages of the codebook until they stand "
                f"still; set it to bf16-mixed or 32-true"
            )

    # ---- the bound

    @override
    def step(self, phase: Phase, batch: ImageBatch) -> Tensor:
        assert self.network is not None
        images, indices = batch["images"], batch["indices"]
        self.check_pictures(images)
        if self.likelihood == "bernoulli":
            check_binary(images)
        noise = self.noise(phase, indices)
        coded: Coded = self.network(images, noise.normal(*self.network.latent_shape) if self.network.gaussian else None)
        counted = (indices != FILLER).float()
        distortion = -log_likelihood(self.likelihood, coded.pixels, images)
        kl = self._kl(coded)
        if phase == "train":
            loss = _mean(distortion + self._commitment(coded), counted) + self._kl_loss(kl, counted)
            self._move_codes(coded, noise, counted)
            self.log("train_loss", loss.detach(), prog_bar=True)
            return loss
        loss = distortion + self.beta * kl.sum(1)
        bound = distortion + kl.sum(1)
        bits = bits_per_dim(bound, math.prod(self.image_shape))
        values = {"loss": loss, "elbo": -bound, "kl": kl.sum(1), "bits_per_dim": bits}
        self.log_means(self.metrics, phase, values, counted)
        if coded.chosen is not None:
            used = cast(_UsedCodes, self.usage[phase])
            used.update(coded.chosen, counted)
            self.log(f"{phase}_codebook_perplexity", used, on_step=False, on_epoch=True, batch_size=len(indices))
        return _mean(loss, counted)

    def _kl(self, coded: Coded) -> Tensor:
        """Return (B, number of latent dimensions) the KL divergence in nats of each from its prior."""
        if coded.log_variance is not None:
            return gaussian_kl(coded.code, coded.log_variance).flatten(1)
        assert coded.chosen is not None
        assert self.codebook is not None
        # all of the probability lies on one of K places, each of which has 1/K of the prior's
        return torch.full_like(coded.chosen, math.log(self.codebook.size), dtype=torch.float32).flatten(1)

    def _kl_loss(self, kl: Tensor, counted: Tensor) -> Tensor:
        """Return the part of the KL divergence in the loss: beta, warm-up and free bits applied."""
        total = kl.sum(1)
        loss = _mean(total, counted)
        self.log("train_kl", loss.detach())
        if self.free_bits:
            # the mean of all processes decides for each dimension whether it costs; a mean of their own on each of them
            # would give another loss for another number of processes
            sums = summed(torch.cat([(kl * counted[:, None]).sum(0), counted.sum()[None]]))
            costs = sums[:-1] / sums[-1].clamp(min=1) > self.free_bits
            loss = _mean(torch.where(costs, kl, self.free_bits).sum(1), counted)
        return self._beta() * loss

    def _beta(self) -> float:
        if not self.kl_warmup:
            return self.beta
        if self._warmup_steps is None:
            share = self.kl_warmup * self.total_steps() if self.kl_warmup < 1 else self.kl_warmup
            self._warmup_steps = max(1, round(share))
        return self.beta * min(1.0, self.trainer.global_step / self._warmup_steps)

    # ---- the codebook

    def _commitment(self, coded: Coded) -> Tensor:
        """Return (B,) how far codes lie from their vectors; 0 without a codebook (equation 3, the third term)."""
        if coded.unquantized is None:
            return coded.pixels.new_zeros(len(coded.pixels))
        return self.commitment * (coded.unquantized - coded.code.detach()).square().flatten(1).sum(1)

    def _move_codes(self, coded: Coded, noise: SampleNoise, counted: Tensor) -> None:
        """Let the codebook follow the codes of all processes; it moves alike whatever their number."""
        assert self.network is not None
        quantizer = self.network.quantizer
        if quantizer is None or coded.unquantized is None or coded.chosen is None:
            return
        counted = counted * float(self._batch_counts)
        own = quantizer.count(coded.unquantized, coded.chosen, counted)
        keys, vectors = quantizer.candidates(coded.unquantized, noise.uniform(*coded.chosen.shape[1:]), counted)
        usage = Usage(summed(own.counts), summed(own.sums))
        quantizer.update(usage, concatenated(keys), concatenated(vectors))

    # ---- pictures

    @override
    def generate_pictures(self, noise: SampleNoise, labels: Tensor | None = None) -> Tensor:
        """Return (B, C, H, W) uint8 pictures of codes drawn from the prior, without the noise of their pixels."""
        assert self.network is not None
        quantizer = self.network.quantizer
        if quantizer is None:
            return self.decode_latents(noise.normal(*self.network.latent_shape))
        chosen = noise.integers(len(quantizer.codes), *self.network.latent_shape[1:])
        return self.decode_latents(quantizer.vectors_of(chosen))

    @override
    def predict_step(self, batch: ImageBatch | GenerationBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return rows of the pictures that are given, or of those that `data.num_generated` asks for."""
        if "images" in batch:
            return PictureCoding.predict_step(self, cast(ImageBatch, batch), batch_idx)
        return PictureGeneration.predict_step(self, batch, batch_idx)

    @override
    def draw_predictions(
        self, batch: ImageBatch | GenerationBatch, rows: list[dict[str, Any]]
    ) -> Iterator[tuple[str, Drawn]]:
        if "images" in batch:
            return PictureCoding.draw_predictions(self, cast(ImageBatch, batch), rows)
        return PictureGeneration.draw_predictions(self, batch, rows)

    @override
    def tabulate_predictions(
        self, batch: ImageBatch | GenerationBatch, rows: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        return super().tabulate_predictions(cast(ImageBatch, batch), rows) if "images" in batch else {}


class _UsedCodes(Metric):
    """How many codes are in use: the exponential of the entropy of their shares, from 1 to K."""

    full_state_update = False
    counts: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.add_state("counts", default=torch.zeros(num_codes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, counted: Tensor) -> None:
        """Count places (B, h, w) of the pictures for which `counted` (B,) is 1."""
        self.counts += torch.bincount(chosen[counted > 0].flatten(), minlength=len(self.counts))

    def compute(self) -> Tensor:
        """Return the perplexity."""
        return torch.special.entr(self.counts / self.counts.sum()).sum().exp()


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return (values * counted).sum() / counted.sum().clamp(min=1)


def _refuse_idle(given: dict[str, float], why: str, neutral: float = 0.0) -> None:
    for name, value in given.items():
        if value != neutral:
            raise InputError(f"{name} is {value} and has no effect, since {why}; set it to {neutral:g}")
