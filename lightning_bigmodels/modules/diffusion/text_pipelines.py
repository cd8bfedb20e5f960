"""A model that makes pictures of texts as a folder that diffusers loads, compared before it counts as done.

A U-Net in latents, with noise added in steps and a text encoder of CLIP, is diffusers' own StableDiffusionPipeline:

    pipeline = DiffusionPipeline.from_pretrained("FOLDER")
    pictures = pipeline(["a red circle"], generator=[torch.Generator().manual_seed(1)]).images

For all others the folder holds `pipeline.py`, which diffusers runs where it is told to trust it
(`custom_pipeline="FOLDER/pipeline.py", trust_remote_code=True`). Low-rank changes are in the pipeline's weights, and by
themselves in `lora/`, which `load_lora_weights` of the pipeline that they were learned on takes.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from lightning_bigmodels.errors import RunError, require
from lightning_bigmodels.modules.diffusion.pipelines import PIPELINE_FILE, load_pipeline, quiet
from lightning_bigmodels.modules.diffusion.processes import DiscreteProcess, Process
from lightning_bigmodels.modules.diffusion.samplers import Sampling, build_scheduler
from lightning_bigmodels.modules.diffusion.text_denoisers import TextPictureNetwork
from lightning_bigmodels.modules.diffusion.text_encoders import CaptionTokenizer
from lightning_bigmodels.modules.diffusion.text_parts import TextParts

LORA_FOLDER = "lora"
_INDEX = "model_index.json"
_DESCRIPTION = "description.json"
_PROMPTS, _STEPS = ("", "a red circle"), 4
_ALLOWED = 1  # of 255: where rounding falls on the other side


class TextModel(Protocol):
    """What a model that becomes a folder has; `TextToImage` says what each is."""

    network: TextPictureNetwork | None
    process: Process
    sampling: Sampling
    image_shape: tuple[int, int, int]
    parts: TextParts

    def caption_tokenizer(self) -> CaptionTokenizer:
        """Return what turns captions into tokens."""
        ...


def write_text_pipeline(model: TextModel, folder: Path) -> None:
    """Fill an empty folder with a pipeline of diffusers, and `description.json`, which says how it is called."""
    diffusers = require("diffusers", extra="generative")
    network = model.network
    assert network is not None
    # copies: the module stays where it is, and in training if it was
    denoiser, encoder, autoencoder = (
        copy.deepcopy(part) for part in (network.denoiser, network.text_encoder, network.autoencoder)
    )
    parts: list[Any] = [part.cpu().eval().float() for part in (denoiser, encoder, autoencoder) if part is not None]
    parts[0] = parts[0].to(memory_format=torch.contiguous_format)
    scheduler = build_scheduler(model.process, model.sampling.sampler, clip=autoencoder is None)
    tokenizer = model.caption_tokenizer().tokenizer
    with _no_bars():
        if hasattr(parts[0], "peft_config"):
            _write_lora(parts[0], folder / LORA_FOLDER)
        if is_stock(model):
            # of a spacing of steps that ours have not; without it a StableDiffusionPipeline warns
            scheduler.register_to_config(steps_offset=1)
            pipeline = diffusers.StableDiffusionPipeline(
                vae=parts[2],
                text_encoder=parts[1],
                tokenizer=tokenizer,
                unet=parts[0],
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            pipeline.save_pretrained(folder)
        else:
            _write_own(model, parts, tokenizer, scheduler, folder)
    _describe(model, folder)


def is_stock(model: TextModel) -> bool:
    """Return whether diffusers has a pipeline of its own for a model: StableDiffusionPipeline."""
    network = model.network
    assert network is not None
    return (
        network.autoencoder is not None
        and isinstance(model.process, DiscreteProcess)
        and type(network.denoiser).__name__ == "UNet2DConditionModel"
        and type(network.text_encoder).__name__ == "CLIPTextModel"
        and not getattr(network.autoencoder.config, "shift_factor", None)
    )


def check_text_pipeline(model: TextModel, folder: Path) -> None:
    """Load the folder back, and compare a few pictures, of few steps.

    Raises:
        RunError: they are not the model's.
    """
    module: Any = model
    with _no_bars():
        pipeline = load_pipeline(folder)
    seeds = list(range(len(_PROMPTS)))
    was_training = module.training
    module.eval()
    steps = min(_STEPS, model.process.num_train_timesteps)
    with torch.no_grad():
        expected = module.make_pictures(_PROMPTS, seeds, steps).cpu()
    module.train(was_training)
    with _no_bars():
        found = pipeline(output_type="np", **call_of(model, _PROMPTS, seeds, steps)).images
    pixels = (torch.from_numpy(found).permute(0, 3, 1, 2) * 255).round()
    difference = (pixels - expected).abs().max().item()
    if not difference <= _ALLOWED:
        raise RunError(
            f"the exported pipeline's pictures differ from the model's by up to {difference:.0f} of 255, where "
            f"{_ALLOWED} is allowed; is another version of diffusers installed than the model was trained with?"
        )


def call_of(model: TextModel, prompts: tuple[str, ...], seeds: list[int], steps: int) -> dict[str, Any]:
    """Return what an exported pipeline is called with, to make a model's own pictures of prompts and seeds."""
    given: dict[str, Any] = {
        "prompt": list(prompts),
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "num_inference_steps": steps,
    }
    if is_stock(model):
        _, given["height"], given["width"] = model.image_shape
        given["guidance_scale"] = model.sampling.guidance_scale
    return given


def _write_own(model: TextModel, parts: list[Any], tokenizer: Any, scheduler: Any, folder: Path) -> None:
    from lightning_bigmodels.modules.diffusion import standalone_text_pipeline

    cls = standalone_text_pipeline.PromptsToPicturesPipeline
    _, height, width = model.image_shape
    pipeline = cls(
        parts[0],
        parts[1],
        tokenizer,
        scheduler,
        parts[2] if len(parts) > 2 else None,
        height=height,
        width=width,
        fold=model.parts.fold,
        num_inference_steps=model.sampling.num_steps,
        guidance_scale=model.sampling.guidance_scale,
    )
    pipeline.save_pretrained(folder)
    shutil.copyfile(standalone_text_pipeline.__file__, folder / PIPELINE_FILE)
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    index["_class_name"] = [Path(PIPELINE_FILE).stem, cls.__name__]
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_lora(denoiser: Any, folder: Path) -> None:
    """Write low-rank changes by themselves, and put them into a denoiser's weights."""
    peft = require("peft", extra="peft")
    diffusers = require("diffusers", extra="generative")
    convert = require("diffusers.utils", extra="generative").convert_state_dict_to_diffusers
    layers = convert(peft.get_peft_model_state_dict(denoiser))
    (config,) = denoiser.peft_config.values()
    metadata = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
    )
    denoiser.fuse_lora()
    denoiser.unload_lora()


def _describe(model: TextModel, folder: Path) -> None:
    diffusers = require("diffusers", extra="generative")
    stock, steps, scale = is_stock(model), model.sampling.num_steps, model.sampling.guidance_scale
    trust = "" if stock else f', custom_pipeline="FOLDER/{PIPELINE_FILE}", trust_remote_code=True'
    _, height, width = model.image_shape
    more = f", height={height}, width={width}, num_inference_steps={steps}, guidance_scale={scale}" if stock else ""
    description = {
        "model": "TextToImage",
        "load": f'pipeline = diffusers.DiffusionPipeline.from_pretrained("FOLDER"{trust})',
        "call": f'pictures = pipeline(["PROMPT"], generator=[torch.Generator().manual_seed(1)]{more}).images',
        "sampler": model.sampling.sampler,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "unsupported": {},
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence the bars of diffusers and transformers."""
    logging = require("transformers.utils.logging", extra="generative")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
