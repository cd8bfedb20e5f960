"""Diffusion: pictures by taking noise out, step by step; DDPM, denoising score matching and flow matching."""

from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lightning_bigmodels.data.batches import FILLER, ImageBatch
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.exportable import LibraryFolder
from lightning_bigmodels.modules.diffusion.bound import bits_per_dimension
from lightning_bigmodels.modules.diffusion.denoisers import (
    blocks_of,
    build_denoiser,
    check_denoiser,
    config_of,
    denoise,
)
from lightning_bigmodels.modules.diffusion.denoising import Denoising, as_pixels
from lightning_bigmodels.modules.diffusion.pipelines import check_pipeline, write_pipeline
from lightning_bigmodels.modules.diffusion.processes import DiscreteProcess, build_process, denoising_losses
from lightning_bigmodels.modules.diffusion.samplers import DEFAULTS, Sampling, seeds_of
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.tasks.classification import MeanLoss
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from lightning_bigmodels.tasks.task import Phase


@final
class Diffusion(Denoising):
    """A network of diffusers that makes pictures, all on their own or by class, by taking noise out step by step.

    Validation and test report the loss as training has it, with noise that is always the same (`val_loss`), and by how
    noisy the pictures were, from least to most (`val_loss_t0` to `val_loss_t3`). `bigmodels export` writes a folder for
    `diffusers.DiffusionPipeline.from_pretrained`, which makes the same pictures of the same seeds.

    Args:
        architecture: UNet2DModel or DiTTransformer2DModel.
        config: Values of its configuration, under diffusers' own names, but for sizes, channels and classes.
        pretrained: Weights to start from: a folder of diffusers, of the network or of a pipeline with it, or a hub
            name; instead of config.
        image_size: Height and width of the pictures, or both as a list.
        channels: Channels of the pictures.
        num_classes: Classes that the pictures are made by; 0: none.
        process: ddpm, score_matching or flow_matching.
        prediction: What the network says, for ddpm: epsilon, sample or v_prediction; None: epsilon. The others have
            one of their own.
        noise_schedule: For ddpm linear, scaled_linear or cosine.
        num_train_timesteps: Steps of the noise; for flow matching what the network is told at the end of the path.
        beta_start: Variance of the first step's noise, for the linear schedules.
        beta_end: Variance of the last step's.
        sigma_min: Least noise of score matching, whose levels are a geometric row.
        sigma_max: Greatest noise of score matching, about the greatest distance of two pictures.
        time_sampling: For flow matching uniform, or logit_normal: the middle of the path more often.
        time_shift: For flow matching how far times move towards the noise, in training and sampling: above 1 more work
            goes into what lies where, and less into details; 1: not at all.
        min_snr_gamma: Where the weight of the loss stops growing with the signal-to-noise ratio (Hang et al. 2023 take
            5); None: weight 1.
        label_dropout: Part of the training pictures whose class is not told, so that guidance can do without it.
        guidance_scale: How far pictures go in the direction of their class: 1 as trained, more: clearer and less
            various.
        sampler: ddim, ddpm, dpm_solver, euler or euler_ancestral; for flow matching euler. None: ddim for ddpm, else
            euler.
        num_sampling_steps: How often the network is asked for a picture.
        bound_timesteps: Steps at which each test picture is looked at for `test_bits_per_dimension`, an upper bound on
            the bits that each value costs; as many as num_train_timesteps: exact; 0: it is not reported.
        channels_last: Whether pictures lie channel by channel in memory's last axis, which convolutions like.
        noise_seed: Chooses all noise, in training and when pictures are made.
        optimizer: From parameter groups to an optimizer; None is AdamW with lr 1e-3 and weight decay 0.1.
        schedule: From optimizer and total steps to a scheduler, stepped after each optimizer step; None is constant.
        l1_penalty: Weight of the sum of absolute values of all decayed parameters, added to the training loss.
        compile: Whether the network runs through torch.compile.

    Raises:
        InputError: a name or a key of the configuration is unknown, a value is out of its range, or the network cannot
            make pictures of this size.
    """

    def __init__(
        self,
        architecture: str = "UNet2DModel",
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        image_size: int | list[int] = 32,
        channels: int = 3,
        num_classes: int = 0,
        process: str = "ddpm",
        prediction: str | None = None,
        noise_schedule: str = "linear",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        time_sampling: str = "uniform",
        time_shift: float = 1.0,
        min_snr_gamma: float | None = None,
        label_dropout: float = 0.1,
        guidance_scale: float = 1.0,
        sampler: str | None = None,
        num_sampling_steps: int = 50,
        bound_timesteps: int = 0,
        channels_last: bool = False,
        noise_seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        l1_penalty: float = 0.0,
        compile: bool = False,
    ) -> None:
        noise = (noise_schedule, num_train_timesteps, beta_start, beta_end, sigma_min, sigma_max)
        rest = {"optimizer": optimizer, "schedule": schedule, "l1_penalty": l1_penalty, "compile": compile}
        super().__init__(
            build_process(process, prediction, *noise, time_sampling, min_snr_gamma, time_shift),
            Sampling(sampler or DEFAULTS[process], num_sampling_steps, guidance_scale),
            *(image_size, channels, num_classes, noise_seed),
            **rest,
        )
        if pretrained is None:
            check_denoiser(architecture, config or {}, self.image_shape)
        elif config:
            raise InputError("config is set, and pretrained brings its own; remove one of the two")
        if not 0 <= label_dropout < 1:
            raise InputError(f"label_dropout is {label_dropout}; it must be 0 or more and below 1")
        if guidance_scale != 1:
            if not num_classes:
                raise InputError(
                    f"guidance_scale is {guidance_scale} and the model has no classes to go in the direction of; set "
                    f"num_classes, or guidance_scale to 1"
                )
            if not label_dropout:
                raise InputError(
                    "guidance_scale needs a network that also learned to do without classes; set label_dropout above "
                    "0, such as 0.1, or guidance_scale to 1"
                )
            if guidance_scale < 0:
                raise InputError(f"guidance_scale is {guidance_scale}; it must be 0 or more")
        if bound_timesteps < 0:
            raise InputError(f"bound_timesteps is {bound_timesteps}; it must be 0 or more")
        if bound_timesteps and not isinstance(self.process, DiscreteProcess):
            raise InputError("bound_timesteps is for ddpm and score_matching; set it to 0 for flow matching")
        self.architecture = architecture
        self.config = dict(config or {})
        self.pretrained = pretrained
        self.label_dropout = label_dropout
        self.bound_timesteps = bound_timesteps
        self.channels_last = channels_last
        if bound_timesteps:
            self.metrics["test_bits_per_dimension"] = MeanLoss()
        self.save_hyperparameters()

    # ---- the network

    @override
    def build_network(self) -> nn.Module:
        network = build_denoiser(self.architecture, self.config, self.pretrained, self.image_shape, self.num_classes)
        return self.with_channels_last(network) if self.channels_last else network

    @override
    def configure_model(self) -> None:
        is_new = self.network is None
        super().configure_model()
        if is_new and self.compile_network:
            assert self.network is not None
            self.network.compile()

    @override
    def blocks(self) -> list[nn.Module]:
        assert self.network is not None
        return blocks_of(self.network)

    @override
    def lasting_hyper_parameters(self) -> dict[str, Any]:
        if self.pretrained is None:
            return {}
        assert self.network is not None
        return {"config": config_of(self.network), "pretrained": None}

    def predict_noise(self, noisy: Tensor, times: Tensor, labels: Tensor | None) -> Tensor:
        """Return the network's prediction (B, C, H, W), of whatever kind it is.

        Args:
            noisy: (B, C, H, W).
            times: (B,), as the process tells them.
            labels: (B,) int64 classes, `num_classes` for none in particular; None where the model has no classes.
        """
        assert self.network is not None
        if self.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        return denoise(self.network, noisy, times, labels)

    # ---- loss

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if self.num_classes and names is not None and not names and stage != "predict":
            raise InputError(
                f"the pictures have no class each, and model.num_classes is {self.num_classes}; set data.labelled to "
                f"true and give pictures with classes, or set model.num_classes to 0"
            )

    @override
    def step(self, phase: Phase, batch: ImageBatch) -> Tensor:
        self.check_pictures(batch["images"])
        noise = self.noise(phase, batch["indices"])
        labels = self._told(phase, batch, noise)
        clean = batch["images"].float() / 127.5 - 1
        losses, positions = denoising_losses(self.process, partial(self.predict_noise, labels=labels), clean, noise)
        loss = self.report_losses(phase, losses, positions, batch["indices"])
        if phase == "test" and self.bound_timesteps:
            assert isinstance(self.process, DiscreteProcess)
            predict = partial(self.predict_noise, labels=labels)
            bits = bits_per_dimension(self.process, predict, batch["images"], noise, self.bound_timesteps)
            self.report_mean("test_bits_per_dimension", bits, (batch["indices"] != FILLER).to(bits.dtype))
        return loss

    def _told(self, phase: Phase, batch: ImageBatch, noise: SampleNoise) -> Tensor | None:
        """Return the classes (B,) that the network is told: in training not all of them."""
        if not self.num_classes:
            return None
        labels = batch["labels"]
        if labels.ndim != 1:
            raise InputError("pictures have several classes each; give data with one, or set model.num_classes to 0")
        none = labels < 0
        if phase == "train":
            none = none | (noise.uniform() < self.label_dropout)
        return labels.masked_fill(none, self.num_classes)

    # ---- pictures

    @override
    def generate_pictures(self, noise: SampleNoise, labels: Tensor | None = None) -> Tensor:
        return self.make_pictures(seeds_of(noise), labels)

    def make_pictures(self, seeds: Sequence[int], labels: Tensor | None, num_steps: int | None = None) -> Tensor:
        """Return (B, C, H, W) uint8 pictures of seeds, as a pipeline makes them of generators with these.

        Args:
            seeds: B numbers, which fix all noise of a picture.
            labels: (B,) int64 classes; None where the model has none.
            num_steps: How often the network is asked; None: `num_sampling_steps`.
        """
        if not seeds:
            return torch.zeros(0, *self.image_shape, dtype=torch.uint8, device=self.device)
        predict = partial(self._predict_guided, labels=labels)
        return as_pixels(self.make_examples(predict, seeds, self.image_shape, num_steps, clip=True))

    def _predict_guided(self, noisy: Tensor, times: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None or self.sampling.guidance_scale == 1:
            return self.predict_noise(noisy, times, labels)
        both = torch.cat([torch.full_like(labels, self.num_classes), labels])
        return self.guided(partial(self.predict_noise, labels=both), noisy, times)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Return for each picture its number, class and file, and the seed of which a pipeline makes the same one."""
        rows = super().predict_step(batch, batch_idx)
        seeds = seeds_of(self.noise("test", batch["indices"]))
        return [{**row, "seed": seed} for row, seed in zip(rows, seeds, strict=True)]

    # ---- export

    @override
    def exportable(self) -> LibraryFolder:
        return LibraryFolder(partial(write_pipeline, self), partial(check_pipeline, self))
