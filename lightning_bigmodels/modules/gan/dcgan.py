"""Generative adversarial networks: DCGANs with the losses and the penalties of the years since."""

from typing import Any, cast, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER, ImageBatch
from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.modules.gan.alternation import Alternation
from lightning_bigmodels.modules.gan.augmentation import Alteration, alter
from lightning_bigmodels.modules.gan.losses import LOSSES, LossName, gradient_penalty, r1_penalty, slopes
from lightning_bigmodels.networks.gan import (
    Conditioning,
    Discriminator,
    Generator,
    Norm,
    is_possible_size,
    next_size,
)
from lightning_bigmodels.networks.pixels import as_weights
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.tasks.picture_generation import PictureGeneration
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from lightning_bigmodels.tasks.task import Exportable, Phase

_ALTERATIONS = ("color", "translation", "cutout")
_NORMS = ("batch", "layer", "instance", "none")


@final
class GAN(Alternation, PictureGeneration):
    """A DCGAN: a generator of pictures and a discriminator that learns to tell them from real ones, in turns.

    A step of the Trainer is one of the discriminator. It logs `train_generator_loss`, `train_discriminator_loss`, and
    for held-out pictures and fixed noise the same with `val_`. What the pictures are worth says `SampleQuality`; an
    average of the weights (`WeightAverage`) makes better ones than the last weights.

    Args:
        image_size: Side of the pictures: a power of two from 8 on.
        channels: Channels of the pictures.
        num_classes: Classes that the pictures are made by; 0: none, and the data's classes play no part.
        latent_dim: Normal numbers that a picture is made of.
        generator_features: Channels of the generator's last hidden layer; the first has up to eight times as many.
        discriminator_features: Channels of the discriminator's first layer; the last has up to eight times as many.
        conditioning: How the class enters the generator: batch_norm, as gain and bias of each norm, or embedding, as
            numbers beside the latent ones. The discriminator judges by projection.
        discriminator_norm: batch, layer, instance or none.
        spectral_norm: Whether the discriminator's weights are divided by their spectral norm.
        loss: non_saturating, hinge, least_squares or wasserstein.
        gradient_penalty: Weight of the discriminator's slope's distance from 1 between real and made pictures;
            WGAN-GP has 10.
        r1_weight: Weight (gamma) of half the squared slope at real pictures.
        r1_interval: Steps from one R1 penalty to the next, which then counts as many times.
        augmentation: What is done at random to all pictures that the discriminator sees: some of color, translation,
            cutout; null: nothing.
        discriminator_steps: Steps of the discriminator for each of the generator.
        optimizer: From the generator's parameter groups to an optimizer; None is Adam with lr 2e-4 and betas 0.5 and
            0.999.
        schedule: From optimizer and total steps to a scheduler, stepped after each step of the generator; None is
            constant.
        discriminator_optimizer: The discriminator's, as `optimizer`.
        discriminator_schedule: The discriminator's, as `schedule`.
        noise_seed: Chooses all noise, in training and when pictures are made.
        channels_last: Keep pictures and weights with their channels innermost, which convolutions are fastest with.

    Raises:
        InputError: a name is unknown, a value is out of its range, or two do not go together.
    """

    network: Generator | None
    discriminator: Discriminator | None

    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        num_classes: int = 0,
        latent_dim: int = 128,
        generator_features: int = 64,
        discriminator_features: int = 64,
        conditioning: Conditioning = "batch_norm",
        discriminator_norm: Norm = "batch",
        spectral_norm: bool = False,
        loss: LossName = "non_saturating",
        gradient_penalty: float = 0.0,
        r1_weight: float = 0.0,
        r1_interval: int = 1,
        augmentation: list[Alteration] | None = None,
        discriminator_steps: int = 1,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        discriminator_optimizer: OptimizerCallable | None = None,
        discriminator_schedule: ScheduleCallable | None = None,
        noise_seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            image_size=image_size,
            channels=channels,
            num_classes=num_classes,
            noise_seed=noise_seed,
            optimizer=optimizer,
            schedule=schedule,
            discriminator_optimizer=discriminator_optimizer,
            discriminator_schedule=discriminator_schedule,
            discriminator_steps=discriminator_steps,
        )
        if not is_possible_size(image_size):
            raise InputError(
                f"image_size is {image_size}, and a DCGAN doubles it with each layer from 4 on; set model.image_size "
                f"and data.image_size to {next_size(image_size)}, the next power of two"
            )
        at_least = {"latent_dim": latent_dim, "r1_interval": r1_interval}
        at_least |= {"generator_features": generator_features, "discriminator_features": discriminator_features}
        for name, number in at_least.items():
            if number < 1:
                raise InputError(f"{name} is {number}; set it to 1 or more")
        for name, weight in {"gradient_penalty": gradient_penalty, "r1_weight": r1_weight}.items():
            if weight < 0:
                raise InputError(f"{name} is {weight}; it must be 0 or more")
            if weight > 0 and discriminator_norm == "batch":
                raise InputError(
                    f"{name} is of each picture's own slope, which batch norm mixes with the others'; set "
                    f"discriminator_norm to layer, instance or none"
                )
        _check_name("loss", loss, LOSSES)
        _check_name("discriminator_norm", discriminator_norm, _NORMS)
        _check_name("conditioning", conditioning, ("batch_norm", "embedding"))
        for name in augmentation or ():
            _check_name("augmentation", name, _ALTERATIONS)
        self.latent_dim = latent_dim
        self.generator_features = generator_features
        self.discriminator_features = discriminator_features
        self.conditioning = conditioning
        self.discriminator_norm = discriminator_norm
        self.spectral_norm = spectral_norm
        self.loss = LOSSES[loss]
        self.gradient_penalty = gradient_penalty
        self.r1_weight = r1_weight
        self.r1_interval = r1_interval
        self.augmentation = tuple(augmentation or ())
        self.channels_last = channels_last
        names = [f"{phase}_{network}_loss" for phase in ("val", "test") for network in ("generator", "discriminator")]
        self.metrics = nn.ModuleDict({name: MeanMetric() for name in names})
        self.save_hyperparameters()

    # ---- data

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if self.num_classes and names is not None and not names and stage != "predict":
            self._refuse_without_classes()

    def _refuse_without_classes(self) -> None:
        raise InputError(
            f"the pictures have no class each, and model.num_classes is {self.num_classes}; set data.labelled to true "
            f"and give a source with one class for each picture, or set model.num_classes to 0"
        )

    # ---- the networks

    @override
    def build_network(self) -> Generator:
        channels, size, _ = self.image_shape
        network = Generator(
            size, channels, self.latent_dim, self.generator_features, self.num_classes, cast(Any, self.conditioning)
        )
        return self.with_channels_last(network) if self.channels_last else network

    @override
    def build_discriminator(self) -> Discriminator:
        channels, size, _ = self.image_shape
        network = Discriminator(
            size,
            channels,
            self.discriminator_features,
            self.num_classes,
            cast(Any, self.discriminator_norm),
            self.spectral_norm,
        )
        return self.with_channels_last(network) if self.channels_last else network

    # ---- losses

    @override
    def make(self, batch: Any) -> Tensor:
        return self._make(self.noise("train", batch["indices"]), self._labels(batch))

    @override
    def discriminator_loss(self, batch: ImageBatch, made: Tensor) -> Tensor:
        self.check_pictures(batch["images"])
        labels, noise = self._labels(batch), self._noise_beside("train", batch["indices"])
        real = alter(batch["images"].float() / 127.5 - 1, self.augmentation, noise)
        made = alter(made.float(), self.augmentation, noise)
        # before the logits: sharded weights are gathered by a forward pass, and leave with the slopes
        penalties = self._penalties(batch, real, made, noise.uniform())
        of_real, of_made = self._judge_both(real, made, labels)
        loss = _mean(self.loss.real(of_real) + self.loss.made(of_made), batch)
        self.log("train_discriminator_loss", loss.detach(), prog_bar=True)
        return sum(penalties, loss)

    def _penalties(self, batch: ImageBatch, real: Tensor, made: Tensor, share: Tensor) -> list[Tensor]:
        """Return the weighted means of the penalties that this step has, from one pass through the discriminator."""
        kinds: list[tuple[str, float, Any]] = []
        points = []
        if self.gradient_penalty:
            kinds.append(("gradient_penalty", self.gradient_penalty, gradient_penalty))
            points.append(torch.lerp(made, real, share[:, None, None, None]))
        if self.r1_weight and self.trainer.global_step % self.r1_interval == 0:
            kinds.append(("r1_penalty", self.r1_weight * self.r1_interval, r1_penalty))
            points.append(real)
        if not kinds:
            return []
        labels = self._labels(batch)
        repeated = None if labels is None else labels.repeat(len(points))
        found = slopes(lambda pictures: self._judge(pictures, repeated), torch.cat(points))
        penalties = []
        for (name, weight, penalty), part in zip(kinds, found.chunk(len(kinds)), strict=True):
            mean = _mean(penalty(part), batch)
            self.log(f"train_{name}", mean.detach())
            penalties.append(weight * mean)
        return penalties

    @override
    def generator_loss(self, batch: Any, made: Tensor) -> Tensor:
        noise = self._noise_beside("train", batch["indices"])
        logits = self._judge(alter(made.float(), self.augmentation, noise), self._labels(batch))
        loss = _mean(self.loss.generator(logits), batch)
        self.log("train_generator_loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def step(self, phase: Phase, batch: ImageBatch) -> Tensor:
        """Measure both losses on pictures as they are, without penalties."""
        self.check_pictures(batch["images"])
        labels = self._labels(batch)
        made = self._make(self.noise(phase, batch["indices"]), labels).float()
        of_real, of_made = self._judge_both(batch["images"].float() / 127.5 - 1, made, labels)
        losses = {
            "generator": self.loss.generator(of_made),
            "discriminator": self.loss.real(of_real) + self.loss.made(of_made),
        }
        counted = batch["indices"] != FILLER
        for network, values in losses.items():
            name = f"{phase}_{network}_loss"
            metric = cast(MeanMetric, self.metrics[name])
            metric.update(values, counted.to(values.dtype))
            self.log(name, metric, on_step=False, on_epoch=True, batch_size=len(counted))
        return _mean(losses["generator"], batch)

    def _make(self, noise: SampleNoise, labels: Tensor | None) -> Tensor:
        assert self.network is not None
        return self.network(as_weights(noise.normal(self.latent_dim), self.network), labels)

    def _judge(self, pictures: Tensor, labels: Tensor | None) -> Tensor:
        assert self.discriminator is not None
        if self.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        return self.discriminator(as_weights(pictures, self.discriminator), labels).float()

    def _judge_both(self, real: Tensor, made: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return logits of real and made pictures, which share no batch norm: Salimans et al. 2016, section 3.2."""
        if self.discriminator_norm == "batch":
            return self._judge(real, labels), self._judge(made, labels)
        both = None if labels is None else torch.cat([labels, labels])
        of_real, of_made = self._judge(torch.cat([real, made]), both).chunk(2)
        return of_real, of_made

    def _noise_beside(self, phase: Phase, indices: Tensor) -> SampleNoise:
        """Return the noise of a batch behind what its pictures are made of."""
        noise = self.noise(phase, indices)
        noise.normal(self.latent_dim)
        return noise

    def _labels(self, batch: Any) -> Tensor | None:
        if not self.num_classes:
            return None
        labels = batch.get("labels")
        if labels is None or labels.ndim != 1:
            self._refuse_without_classes()
        return cast(Tensor, labels).clamp(min=0)

    # ---- pictures

    @override
    def generate_pictures(self, noise: SampleNoise, labels: Tensor | None = None) -> Tensor:
        return _as_pixels(self._make(noise, labels))

    @override
    def exportable(self) -> Exportable:
        assert self.network is not None
        inputs = [torch.randn(2, self.latent_dim, generator=torch.Generator().manual_seed(0))]
        if self.num_classes:
            inputs.append(torch.arange(2) % self.num_classes)
        return Exportable(
            network=_Pictures(self.network),
            inputs=tuple(inputs),
            input_names=("latents", "labels")[: len(inputs)],
            output_names=("pictures",),
            dynamic=({0: "batch"},) * len(inputs),
            description={
                "latents": "numbers of a normal distribution with mean 0 and variance 1",
                "pictures": "uint8 (B, C, H, W)",
                **({"class_names": self.class_names} if self.num_classes else {}),
            },
        )


class _Pictures(nn.Module):
    """A generator whose pictures are pixels."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> tuple[Tensor]:
        return (_as_pixels(self.generator(latents, labels)),)


def _as_pixels(pictures: Tensor) -> Tensor:
    """Return uint8 of pictures in [-1, 1]."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _mean(losses: Tensor, batch: Any) -> Tensor:
    """Return the mean over the pictures of a batch that count."""
    counted = (batch["indices"] != FILLER).to(losses.dtype)
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def _check_name(argument: str, value: str, known: Any) -> None:
    if value not in known:
        raise InputError(f"{argument} names {value!r}; it is one of {', '.join(known)}{near(value, known)}")
