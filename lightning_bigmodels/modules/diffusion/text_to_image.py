"""Text to image: pictures of what prompts say, by taking noise out step by step."""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lightning_bigmodels.data.batches import CaptionBatch, PromptBatch
from lightning_bigmodels.data.captioned_images import CaptionedImages
from lightning_bigmodels.data.tokenizer import CHECKPOINT_KEY, tokenizer_from_files, tokenizer_to_files
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.exportable import LibraryFolder
from lightning_bigmodels.modules.diffusion.denoising import Denoising, as_pixels
from lightning_bigmodels.modules.diffusion.latent_cache import LatentCache, MadeUpLatents
from lightning_bigmodels.modules.diffusion.processes import build_process, denoising_losses
from lightning_bigmodels.modules.diffusion.samplers import DEFAULTS, Sampling, seeds_of
from lightning_bigmodels.modules.diffusion.text_denoisers import TextPictureNetwork, draw_latents, plain_config, scaling
from lightning_bigmodels.modules.diffusion.text_encoders import CaptionTokenizer, config_values, describe_cut
from lightning_bigmodels.modules.diffusion.text_parts import TextParts
from lightning_bigmodels.modules.diffusion.text_pipelines import check_text_pipeline, write_text_pipeline
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.png import Drawn, PictureWithText
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from lightning_bigmodels.tasks.task import Phase


@final
class TextToImage(Denoising):
    """A network of diffusers that makes pictures of prompts, on pixels or in the latents of an AutoencoderKL.

    `bigmodels predict --data.predict_prompts FILE` makes a picture of each line, whose PNG file says prompt and seed.
    `bigmodels export` writes a folder for `diffusers.DiffusionPipeline.from_pretrained`, which makes the same pictures
    of the same prompts and seeds. Validation reports the loss with noise that is always the same (`val_loss`), and by
    how noisy the pictures were, from least to most (`val_loss_t0` to `val_loss_t3`).

    Args:
        architecture: UNet2DConditionModel or PixArtTransformer2DModel.
        config: Values of its configuration, under diffusers' own names, but for sizes, channels and the texts' width.
        pretrained: A pipeline to start from, as StableDiffusionPipeline lies in its folder, or a hub name: denoiser,
            text encoder, tokenizer and autoencoder come from there, instead of config.
        image_size: Height and width of the pictures, or both as a list; that of predict, where data have several.
        channels: Channels of the pictures.
        fold: Side of the squares of pixels that become channels of one, so that a network on pixels works on 1/2 or 1/4
            of the height and width; 1: none.
        text_encoder: A folder or hub name of a text encoder of transformers, with its tokenizer.
        text_encoder_config: Its configuration, with transformers' `model_type`, such as clip_text_model or t5, for one
            from scratch, or to know it where its weights need not be read.
        train_text_encoder: Whether the text encoder learns too; None: one from scratch does.
        tokenizer: A tokenizer.json, folder or hub name; None: that of the text encoder, or else one that is trained on
            the captions.
        max_caption_tokens: Tokens of a caption that count, longer ones are cut; None: the text encoder's positions.
        autoencoder: A folder or hub name of an AutoencoderKL, in whose latents pictures are made; None: in pixels.
        autoencoder_config: Its configuration, to know it where its weights need not be read.
        latent_cache: A folder in which the latents of all pictures are kept, so that they are made once and not in each
            epoch; None: they are not kept.
        lora: Learn low-rank changes of the pretrained denoiser alone: `rank` (8), `alpha` (as rank), `target_modules`.
        process: ddpm, score_matching or flow_matching.
        prediction: What the network says, for ddpm: epsilon, sample or v_prediction; None: epsilon. The others have
            one of their own.
        noise_schedule: For ddpm linear, scaled_linear or cosine.
        num_train_timesteps: Steps of the noise; for flow matching what the network is told at the end of the path.
        beta_start: Variance of the first step's noise, for the linear schedules.
        beta_end: Variance of the last step's.
        sigma_min: Least noise of score matching, whose levels are a geometric row.
        sigma_max: Greatest noise of score matching.
        time_sampling: For flow matching uniform, or logit_normal: the middle of the path more often.
        time_shift: For flow matching how far times move towards the noise, which decides what lies where; 1: not.
        min_snr_gamma: Where the weight of the loss stops growing with the signal-to-noise ratio; None: weight 1.
        caption_dropout: Part of the training pictures whose caption is not told, so that guidance can do without it.
        guidance_scale: How far pictures go in the direction of their prompt; 1: as trained; more: clearer, less varied.
        sampler: ddim, ddpm, dpm_solver, euler or euler_ancestral; for flow matching euler. None: ddim for ddpm, else
            euler.
        num_sampling_steps: How often the network is asked for a picture.
        channels_last: Whether pictures lie channel by channel in memory's last axis, which convolutions like.
        noise_seed: Chooses all noise, in training and when pictures are made.
        optimizer: From parameter groups to an optimizer; None is AdamW with lr 1e-3 and weight decay 0.1.
        schedule: From optimizer and total steps to a scheduler, stepped after each optimizer step; None is constant.
        l1_penalty: Weight of the sum of absolute values of all decayed parameters, added to the training loss.
        compile: Whether the network runs through torch.compile.

    Raises:
        InputError: a name or a key of a configuration is unknown, a value is out of its range, or the network cannot
            make pictures of this size.
    """

    network: TextPictureNetwork | None

    def __init__(
        self,
        architecture: str = "UNet2DConditionModel",
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        image_size: int | list[int] = 512,
        channels: int = 3,
        fold: int = 1,
        text_encoder: str | None = None,
        text_encoder_config: dict[str, Any] | None = None,
        train_text_encoder: bool | None = None,
        tokenizer: str | None = None,
        max_caption_tokens: int | None = None,
        autoencoder: str | None = None,
        autoencoder_config: dict[str, Any] | None = None,
        latent_cache: str | None = None,
        lora: dict[str, Any] | None = None,
        process: str = "ddpm",
        prediction: str | None = None,
        noise_schedule: str = "scaled_linear",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        time_sampling: str = "uniform",
        time_shift: float = 1.0,
        min_snr_gamma: float | None = None,
        caption_dropout: float = 0.1,
        guidance_scale: float = 7.5,
        sampler: str | None = None,
        num_sampling_steps: int = 50,
        channels_last: bool = False,
        noise_seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        l1_penalty: float = 0.0,
        compile: bool = False,
    ) -> None:
        rest = {"optimizer": optimizer, "schedule": schedule, "l1_penalty": l1_penalty, "compile": compile}
        noise = (noise_schedule, num_train_timesteps, beta_start, beta_end, sigma_min, sigma_max)
        super().__init__(
            build_process(process, prediction, *noise, time_sampling, min_snr_gamma, time_shift),
            Sampling(sampler or DEFAULTS[process], num_sampling_steps, guidance_scale),
            *(image_size, channels, 0, noise_seed),
            **rest,
        )
        self.parts = TextParts(
            architecture=architecture,
            config=dict(config or {}),
            pretrained=pretrained,
            text_encoder=text_encoder,
            text_encoder_config=dict(text_encoder_config or {}),
            train_text_encoder=train_text_encoder,
            autoencoder=autoencoder,
            autoencoder_config=dict(autoencoder_config or {}),
            lora=None if lora is None else dict(lora),
            channels_last=channels_last,
            fold=fold,
        )
        self.parts.check()
        if not 0 <= caption_dropout < 1:
            raise InputError(f"caption_dropout is {caption_dropout}; it must be 0 or more and below 1")
        if guidance_scale < 1:
            raise InputError(f"guidance_scale is {guidance_scale}; it must be 1 or more")
        self.tokenizer_source = tokenizer
        self.max_caption_tokens = max_caption_tokens
        self.latent_cache = latent_cache
        self.caption_dropout = caption_dropout
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._latents: dict[str, LatentCache | MadeUpLatents] = {}
        self._told_of_cut = False
        self.save_hyperparameters()

    # ---- the network

    @override
    def build_network(self) -> TextPictureNetwork:
        return self.parts.build(self.image_shape, self.process, contiguous=self.device_mesh is not None)

    @override
    def configure_model(self) -> None:
        is_new = self.network is None
        super().configure_model()
        if is_new and self.compile_network and self.network is not None:
            self.network.denoiser.compile()

    @override
    def blocks(self) -> list[nn.Module]:
        assert self.network is not None
        return self.network.blocks()

    # ---- data, tokenizer, checkpoints

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, CaptionedImages) and stage != "predict":
            self.parts.check_data(data, self.image_shape)
        if stage != "fit":
            return
        self.parts.check_weights()
        if self.sampling.guidance_scale > 1 and not self.caption_dropout and self.parts.pretrained is None:
            raise InputError(
                "guidance_scale needs a network that also learned to do without captions; set caption_dropout above 0, "
                "such as 0.1, or guidance_scale to 1"
            )
        if self.tokenizer is None and self.uses_no_data:
            self.tokenizer = self.parts.made_up_tokenizer(self.max_caption_tokens)
        elif self.tokenizer is None:
            captions = data.captions if isinstance(data, CaptionedImages) else []
            self.tokenizer = self.parts.find_tokenizer(self.tokenizer_source, self.max_caption_tokens, captions)

    def caption_tokenizer(self) -> CaptionTokenizer:
        """Return what turns captions into rows of tokens.

        Raises:
            InputError: the model has no tokenizer yet.
        """
        if self.tokenizer is None:
            if self.tokenizer_source is None and self.parts.encoder_source()[0] is None:
                raise InputError(
                    "the model has no tokenizer; load one of its checkpoints (--ckpt_path), or fit it on captions first"
                )
            self.tokenizer = self.parts.find_tokenizer(self.tokenizer_source, self.max_caption_tokens, [])
        return CaptionTokenizer(self.tokenizer, self.tokenizer.model_max_length)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.tokenizer is not None:
            checkpoint[CHECKPOINT_KEY] = tokenizer_to_files(self.tokenizer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        files = checkpoint.get(CHECKPOINT_KEY)
        if files is not None:
            self.tokenizer = tokenizer_from_files(files)

    @override
    def lasting_hyper_parameters(self) -> dict[str, Any]:
        if self.network is None:
            return {}
        autoencoder = self.network.autoencoder
        return {
            "config": plain_config(self.network.denoiser),
            "text_encoder_config": config_values(self.network.text_encoder),
            "autoencoder_config": None if autoencoder is None else plain_config(autoencoder, said=False),
            "train_text_encoder": self.network.train_text_encoder,
            **dict.fromkeys(("pretrained", "text_encoder", "tokenizer", "autoencoder")),
        }

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        # frozen parts stay as they are, which Lightning takes for an oversight
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        data = getattr(self.trainer, "datamodule", None)
        if self.latent_cache is None:
            return
        if self.uses_no_data:
            self._latents["train"] = MadeUpLatents(self.parts, self.image_shape, self.network)
            return
        if not isinstance(data, CaptionedImages):
            raise InputError("latent_cache keeps latents of CaptionedImages; set it to null for other data")
        autoencoder = self.parts.cached_autoencoder().to(self.device)
        for phase in ("train", "val"):
            if phase in data.parts:
                cache = LatentCache(self.latent_cache, data.captioned(phase), autoencoder)
                cache.fill(data, self.device)
                self._latents[phase] = cache
                data.captioned(phase).with_pictures = False

    # ---- loss

    @override
    def step(self, phase: Phase, batch: CaptionBatch) -> Tensor:
        assert self.network is not None
        noise = self.noise(phase, batch["indices"])
        ids, mask, cut = self.caption_tokenizer()(batch["captions"], self.device)
        if phase == "train":
            self._count_cut(batch["captions"], cut)
            if self.caption_dropout:
                empty = self.caption_tokenizer()([""], self.device)
                untold = (noise.uniform() < self.caption_dropout)[:, None]
                ids, mask = torch.where(untold, empty.ids, ids), torch.where(untold, empty.mask, mask)
        clean = self._clean(phase, batch, noise)
        ask = partial(self.network, "told")
        losses, positions = denoising_losses(self.process, lambda x, t: ask(x, t, ids, mask), clean, noise)
        return self.report_losses(phase, losses, positions, batch["indices"])

    def _clean(self, phase: Phase, batch: CaptionBatch, noise: SampleNoise) -> Tensor:
        """Return examples (B, C, h, w): pixels in [-1, 1], or latents drawn from their distribution."""
        assert self.network is not None
        autoencoder = self.network.autoencoder
        if phase in self._latents:
            found = self._latents[phase].moments(batch["indices"].cpu()).to(self.device)
        else:
            pixels = batch["images"].float() / 127.5 - 1
            if autoencoder is None:
                return F.pixel_unshuffle(pixels, self.parts.fold)
            found = self.network("encode", pixels)
        assert autoencoder is not None
        drawn = noise.normal(found.shape[1] // 2, *found.shape[2:])
        return draw_latents(found, drawn, *scaling(autoencoder))

    def _count_cut(self, captions: Sequence[str], cut: Sequence[int]) -> None:
        self.log("train_cut_captions", float(len(cut)), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        if cut and not self._told_of_cut:
            self._told_of_cut = True
            rank_zero_warn(describe_cut(captions[cut[0]], self.caption_tokenizer().length))

    # ---- pictures

    @override
    def generate_pictures(self, noise: SampleNoise, labels: Tensor | None = None) -> Tensor:
        """Return (B, C, H, W) uint8 pictures of nothing in particular."""
        return self.generate_pictures_of([""] * len(noise), noise)

    def generate_pictures_of(self, prompts: Sequence[str], noise: SampleNoise) -> Tensor:
        """Return (B, C, H, W) uint8 pictures of B prompts, made of noise."""
        return self.make_pictures(prompts, seeds_of(noise))

    def make_pictures(self, prompts: Sequence[str], seeds: Sequence[int], num_steps: int | None = None) -> Tensor:
        """Return (B, C, H, W) uint8 pictures, as a pipeline makes them of the same prompts and generators of the seeds.

        Args:
            prompts: B texts.
            seeds: B numbers, which fix all noise of a picture.
            num_steps: How often the network is asked; None: `num_sampling_steps`.
        """
        assert self.network is not None
        if not (count := len(prompts)):
            # a sharded network answers only to all processes
            prompts, seeds = [""], [0]
        guided = self.sampling.guidance_scale > 1
        tokens = self.caption_tokenizer()([*([""] * len(prompts) if guided else []), *prompts], self.device)
        states = self.network("states", tokens.ids, tokens.mask)

        def predict(noisy: Tensor, times: Tensor) -> Tensor:
            assert self.network is not None
            return self.network("denoise", noisy, times, states, tokens.mask)

        autoencoder = self.network.autoencoder
        shape = self.parts.example_shape(self.image_shape, autoencoder)
        ask = partial(self.guided, predict) if guided else predict
        made = self.make_examples(ask, seeds, shape, num_steps, clip=autoencoder is None)
        made = F.pixel_shuffle(made, self.parts.fold) if autoencoder is None else self.network("decode", made)
        return as_pixels(made)[:count]

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Return for each prompt its number, its seed and its picture's file; `draw_predictions` has the pictures."""
        prompts: PromptBatch = batch
        seeds = seeds_of(self.noise("test", prompts["indices"]))
        pictures = self.make_pictures(prompts["prompts"], seeds)
        self._made = dict(zip(prompts["indices"].tolist(), pictures, strict=True))
        return [
            {"index": index, "prompt": prompt, "seed": seed, "picture": f"predictions/{index:06d}.png"}
            for index, prompt, seed in zip(self._made, prompts["prompts"], seeds, strict=True)
        ]

    @override
    def draw_predictions(self, batch: Any, rows: list[dict[str, Any]]) -> Iterator[tuple[str, Drawn]]:
        for row in rows:
            texts = {"prompt": row["prompt"], "seed": str(row["seed"])}
            yield f"{row['index']:06d}", PictureWithText(self._made[row["index"]], texts)

    # ---- export

    @override
    def exportable(self) -> LibraryFolder:
        return LibraryFolder(partial(write_text_pipeline, self), partial(check_text_pipeline, self))
