"""A pipeline from noise to pictures, by class where the network knows classes; it needs torch and diffusers alone.

pipeline = DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER/pipeline.py", trust_remote_code=True)
pictures = pipeline(class_labels=[3, 7], generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)]).images
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class NoiseToPicturesPipeline(DiffusionPipeline):
    """A network of diffusers that takes noise out of pictures, with its scheduler.

    Args:
        network: A UNet2DModel or DiTTransformer2DModel.
        scheduler: Any of diffusers' that goes with it.
        num_classes: Classes that the network knows, besides that of no class; 0: none.
        class_names: Their names.
        num_inference_steps: How often the network is asked, where a call does not say.
        guidance_scale: How far pictures go in the direction of their class, where a call does not say; 1: as trained.
    """

    model_cpu_offload_seq = "network"

    def __init__(
        self,
        network: Any,
        scheduler: Any,
        num_classes: int = 0,
        class_names: list[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)
        self.register_to_config(
            num_classes=num_classes,
            class_names=class_names,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Return pictures.

        Args:
            batch_size: How many, where there are no class_labels.
            class_labels: The class of each.
            generator: One for all pictures, or one for each.
            latents: (B, C, H, W) noise of unit variance to begin with; None: from the generator.
            num_inference_steps: How often the network is asked; None: as the pipeline was made.
            guidance_scale: How far they go in the direction of their class; None: as the pipeline was made.
            output_type: pil, np or pt.
            return_dict: False: a tuple.

        Raises:
            ValueError: class_labels are missing, or the network knows no classes.
        """
        num_classes = self.config.num_classes
        if (class_labels is not None) != bool(num_classes):
            raise ValueError(f"the network knows {num_classes} classes; give class_labels if and only if it knows some")
        config, device = self.network.config, self._execution_device
        count = batch_size if class_labels is None else len(class_labels)
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if latents is None:
            shape = (count, config.in_channels, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.network.dtype)
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        self.scheduler.set_timesteps(num_inference_steps or self.config.num_inference_steps)
        scaled = hasattr(self.scheduler, "is_scale_input_called")
        pictures = latents.to(device) * self.scheduler.init_noise_sigma if scaled else latents.to(device)
        for time in self.progress_bar(self.scheduler.timesteps):
            given = self.scheduler.scale_model_input(pictures, time) if scaled else pictures
            made = self._predict(given, time.expand(count).to(device), class_labels, guidance)
            pictures = self.scheduler.step(made, time, pictures, generator=generator).prev_sample
        pictures = (pictures / 2 + 0.5).clamp(0, 1)
        images: Any = pictures
        if output_type != "pt":
            images = pictures.cpu().permute(0, 2, 3, 1).float().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(
        self, noisy: torch.Tensor, times: torch.Tensor, class_labels: Sequence[int] | None, guidance: float
    ) -> torch.Tensor:
        none = self.config.num_classes
        if class_labels is None:
            # a DiT is always told a class, of which one without classes knows a single one
            is_dit = hasattr(self.network, "transformer_blocks")
            labels = torch.zeros(len(noisy), dtype=torch.int64, device=noisy.device) if is_dit else None
            return self._ask(noisy, times, labels)
        labels = torch.tensor(list(class_labels), device=noisy.device)
        if guidance == 1:
            return self._ask(noisy, times, labels)
        both = torch.cat([labels, torch.full_like(labels, none)])
        with_class, without = self._ask(noisy.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        return without + guidance * (with_class - without)

    def _ask(self, noisy: torch.Tensor, times: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        made: torch.Tensor = self.network(noisy, timestep=times, class_labels=labels, return_dict=False)[0]
        return made[:, : noisy.shape[1]]
