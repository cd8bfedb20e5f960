"""Autoencoders: a code of each picture from which it can be made again, also when it was disturbed."""

from collections.abc import Callable
from typing import Any, Literal, final

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER, ImageBatch
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.autoencoder.architectures import AUTOENCODER_KL, build_coder, picture_shape
from lightning_bigmodels.modules.autoencoder.coding import PictureCoding, Predicts, mean_metric, side_by_side
from lightning_bigmodels.networks.autoencoder import PictureCoder, as_pixels, scaled
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.tasks.sample_noise import EVALUATION, SampleNoise
from lightning_bigmodels.tasks.task import Phase


@final
class Autoencoder(PictureCoding):
    """Makes a code of each picture and the picture of its code: plain, denoising or sparse.

    It learns by the mean squared error of pixels in [0, 1]. With noise the network sees disturbed pictures, in training
    and evaluation, and is to make the clean ones; predict takes pictures as they are.

    Args:
        architecture: convolutional or dense.
        image_size: Height and width of the pictures, or both as a list.
        channels: Channels of the pictures.
        latent_dim: Values of a code.
        config: For convolutional widths (features after each halving) and num_blocks; for dense widths.
        gaussian_noise: Standard deviation of what is added to each value, of pixels in [0, 1].
        masking_noise: Probability with which a pixel is made black, in all its channels.
        sparsity: Weight of the sum of absolute values of a code, the mean over pictures, in the loss.
        noise_seed: Chooses all noise.
        predicts: What predict writes: latents, as a Parquet file, or reconstructions, as PNG files.
        channels_last: Keep weights with their channels innermost, which convolutions are fastest with.
        optimizer: From parameter groups to an optimizer; None is AdamW with lr 1e-3 and weight decay 0.1.
        schedule: From optimizer and total steps to a scheduler, stepped after each optimizer step; None is constant.
        l1_penalty: Weight of the sum of absolute values of all decayed parameters, added to the training loss.
        compile: Run the network through torch.compile.

    Raises:
        InputError: a name is unknown, or a value out of its range.

    Source:
        Vincent et al. 2008, "Extracting and Composing Robust Features with Denoising Autoencoders", section 2.3
        (masking); Vincent et al. 2010, "Stacked Denoising Autoencoders", section 3.3 (Gaussian).
    """

    def __init__(
        self,
        architecture: Literal["convolutional", "dense"] = "convolutional",
        image_size: int | list[int] = 32,
        channels: int = 3,
        latent_dim: int = 32,
        config: dict[str, Any] | None = None,
        gaussian_noise: float = 0.0,
        masking_noise: float = 0.0,
        sparsity: float = 0.0,
        noise_seed: int = 0,
        predicts: Predicts = "latents",
        channels_last: bool = False,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        l1_penalty: float = 0.0,
        compile: bool = False,
    ) -> None:
        self.image_shape = picture_shape(image_size, channels)
        super().__init__(
            architecture=architecture,
            config=config,
            latent_dim=latent_dim,
            predicts=predicts,
            channels_last=channels_last,
            optimizer=optimizer,
            schedule=schedule,
            l1_penalty=l1_penalty,
            compile=compile,
        )
        if architecture == AUTOENCODER_KL:
            raise InputError("autoencoder_kl has codes with a variance; train it as VariationalAutoencoder")
        for name, value in {"gaussian_noise": gaussian_noise, "sparsity": sparsity}.items():
            if value < 0:
                raise InputError(f"{name} is {value}; set it to 0 or more")
        if not 0 <= masking_noise < 1:
            raise InputError(f"masking_noise is {masking_noise}; it is a probability: set it from 0 to below 1")
        self.gaussian_noise = gaussian_noise
        self.masking_noise = masking_noise
        self.sparsity = sparsity
        self.noise_seed = noise_seed
        names = ["loss", "mse"] + (["noisy_mse"] if self.denoises else []) + (["sparsity"] if sparsity else [])
        self.metrics = nn.ModuleDict({f"{phase}_{name}": mean_metric() for phase in ("val", "test") for name in names})
        self.save_hyperparameters()

    @property
    def denoises(self) -> bool:
        """Whether the network sees disturbed pictures in training and evaluation."""
        return self.gaussian_noise > 0 or self.masking_noise > 0

    @override
    def new_coder(self, whole: Any | None) -> PictureCoder:
        return build_coder(self.architecture, self.config, self.image_shape, self.latent_dim)

    @property
    @override
    def to_pictures(self) -> Callable[[Tensor], Tensor]:
        return as_pixels

    def disturbed(self, images: Tensor, noise: SampleNoise) -> Tensor:
        """Return pictures (B, C, H, W) uint8 with noise, in [-1, 1] but for what it adds."""
        values = scaled(images)
        if self.gaussian_noise > 0:
            values = values + 2 * self.gaussian_noise * noise.normal(*images.shape[1:])
        if self.masking_noise > 0:
            black = noise.uniform(1, *images.shape[2:]) < self.masking_noise
            values = values.masked_fill(black, -1.0)
        return values

    def _noise(self, phase: Phase, indices: Tensor) -> SampleNoise:
        return SampleNoise(indices, self.noise_seed, self.current_epoch if phase == "train" else EVALUATION)

    @override
    def step(self, phase: Phase, batch: ImageBatch) -> Tensor:
        assert self.network is not None
        images, indices = batch["images"], batch["indices"]
        self.check_pictures(images)
        given = self.disturbed(images, self._noise(phase, indices)) if self.denoises else images
        coded = self.network(given)
        values = {"mse": _squared_error(coded.pixels, scaled(images))}
        loss = values["mse"]
        if self.sparsity:
            values["sparsity"] = coded.code.abs().flatten(1).sum(1)
            loss = loss + self.sparsity * values["sparsity"]
        counted = (indices != FILLER).to(loss.dtype)
        mean = (loss * counted).sum() / counted.sum().clamp(min=1)
        if phase == "train":
            self.log("train_loss", mean.detach(), prog_bar=True)
            return mean
        if self.denoises:
            values["noisy_mse"] = _squared_error(given, scaled(images))
        self.log_means(self.metrics, phase, {"loss": loss, **values}, counted)
        return mean

    @override
    def draw(self, batch: ImageBatch) -> list[Tensor]:
        """Return each picture, what the network sees of it where that is disturbed, and what it makes of it."""
        assert self.network is not None
        images = batch["images"]
        if not self.denoises:
            return super().draw(batch)
        given = self.disturbed(images, self._noise("val", batch["indices"]))
        return side_by_side(images, as_pixels(given), as_pixels(self.network(given).pixels))


def _squared_error(found: Tensor, expected: Tensor) -> Tensor:
    """Return (B,) the mean squared error of values in [-1, 1], in units of pixels in [0, 1]."""
    return (found - expected).square().flatten(1).mean(1) / 4
