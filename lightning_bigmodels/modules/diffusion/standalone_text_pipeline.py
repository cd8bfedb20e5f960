"""A pipeline from prompts to pictures; it needs torch, diffusers and transformers alone.

pipeline = DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER/pipeline.py", trust_remote_code=True)
pictures = pipeline(["a red circle"], generator=[torch.Generator().manual_seed(1)]).images
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class PromptsToPicturesPipeline(DiffusionPipeline):
    """A network of diffusers that takes noise out of pictures as prompts say.

    Args:
        network: A UNet2DConditionModel or PixArtTransformer2DModel.
        text_encoder: Of transformers.
        tokenizer: Its tokenizer; `model_max_length` is the length of a row.
        scheduler: Any of diffusers' that goes with the network.
        vae: An AutoencoderKL, in whose latents the network works; None: it works on pixels.
        height: Of a picture, in pixels.
        width: Of a picture.
        fold: Side of the squares of pixels that are channels of one.
        num_inference_steps: How often the network is asked, where a call does not say.
        guidance_scale: How far pictures go in the direction of their prompt, where a call does not say.
    """

    model_cpu_offload_seq = "text_encoder->network->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        network: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        vae: Any = None,
        height: int = 512,
        width: int = 512,
        fold: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
    ) -> None:
        super().__init__()
        self.register_modules(
            network=network, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler, vae=vae
        )
        self.register_to_config(
            height=height,
            width=width,
            fold=fold,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Return a picture of each prompt.

        Args:
            prompt: One or several.
            generator: One for all pictures, or one for each.
            num_inference_steps: How often the network is asked; None: as the pipeline was made.
            guidance_scale: How far pictures go in the direction of their prompt; None: as the pipeline was made.
            output_type: pil, np or pt.
            return_dict: False: a tuple.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        device, guided = self._execution_device, scale > 1
        texts = [*[""] * len(prompts), *prompts] if guided else prompts
        length = self.tokenizer.model_max_length
        rows = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        mask = rows["attention_mask"].to(device)
        # a transformer does not look at what fills a caption up
        told = {"attention_mask": mask} if self._masks else {}
        states = self.text_encoder(input_ids=rows["input_ids"].to(device), **told)[0]
        factor = self.config.fold if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        config = self.network.config
        shape = (len(prompts), config.in_channels, self.config.height // factor, self.config.width // factor)
        examples = randn_tensor(shape, generator=generator, device=device, dtype=states.dtype)
        self.scheduler.set_timesteps(num_inference_steps or self.config.num_inference_steps)
        scaled = hasattr(self.scheduler, "is_scale_input_called")
        examples = examples * self.scheduler.init_noise_sigma if scaled else examples
        for time in self.progress_bar(self.scheduler.timesteps):
            given = self.scheduler.scale_model_input(examples, time) if scaled else examples
            times = time.expand(len(texts)).to(device)
            made = self._ask(given.repeat(2, 1, 1, 1) if guided else given, times, states, mask)
            if guided:
                without, with_prompt = made.chunk(2)
                made = without + scale * (with_prompt - without)
            examples = self.scheduler.step(made, time, examples, generator=generator).prev_sample
        if self.vae is None:
            examples = torch.nn.functional.pixel_shuffle(examples, factor)
        else:
            shift = self.vae.config.shift_factor or 0.0
            examples = self.vae.decode(examples / self.vae.config.scaling_factor + shift, return_dict=False)[0]
        images: Any = (examples / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _masks(self) -> bool:
        return hasattr(self.network, "adaln_single")

    def _ask(self, noisy: Any, times: Any, states: Any, mask: Any) -> Any:
        told: dict[str, Any] = {}
        if self._masks:
            told = {
                "encoder_attention_mask": mask,
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            }
        made = self.network(noisy, timestep=times, encoder_hidden_states=states, return_dict=False, **told)[0]
        return made[:, : noisy.shape[1]]
