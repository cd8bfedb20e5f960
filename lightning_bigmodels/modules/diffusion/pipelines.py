"""A trained model as a folder that diffusers loads and samples from, compared before it counts as done.

A U-Net without classes, with noise of unit variance, is a DDPMPipeline of diffusers' own:

    pipeline = DiffusionPipeline.from_pretrained("FOLDER")
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    pictures = pipeline(batch_size=2, generator=generators, num_inference_steps=50).images

For all others diffusers has none, and the folder holds `pipeline.py`, which it runs where it is told to trust it:

    pipeline = DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER/pipeline.py", trust_remote_code=True)
    pictures = pipeline(class_labels=[3, 7], generator=generators).images
"""

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_bigmodels.errors import RunError, require
from lightning_bigmodels.modules.diffusion.processes import Process
from lightning_bigmodels.modules.diffusion.samplers import (
    Sampling,
    begins_with_unit_noise,
    build_scheduler,
    old_numpy_calls,
)

PIPELINE_FILE = "pipeline.py"
_INDEX = "model_index.json"
_DESCRIPTION = "description.json"
_COMPARED, _STEPS = 2, 4
_ALLOWED = 1  # of 255: where rounding falls on the other side


class Model(Protocol):
    """What a model that becomes a folder has; `Diffusion` says what each is."""

    architecture: str
    network: nn.Module | None
    process: Process
    sampling: Sampling
    num_classes: int
    class_names: list[str] | None

    def make_pictures(self, seeds: Sequence[int], labels: Tensor | None, num_steps: int | None = None) -> Tensor:
        """Return uint8 pictures of seeds."""
        ...


def write_pipeline(model: Model, folder: Path) -> None:
    """Fill an empty folder with a pipeline of diffusers, and `description.json`, which says how it is called."""
    diffusers = require("diffusers", extra="generative")
    scheduler = build_scheduler(model.process, model.sampling.sampler, clip=True)
    # a copy: the module stays where it is, and in training if it was; files hold contiguous tensors alone
    network: Any = copy.deepcopy(model.network)
    stock = model.architecture == "UNet2DModel" and not model.num_classes and begins_with_unit_noise(scheduler)
    with quiet():
        network = network.cpu().eval().to(torch.float32, memory_format=torch.contiguous_format)
        if stock:
            diffusers.DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(folder)
        else:
            _write_own(model, network, scheduler, folder)
    steps, names = model.sampling.num_steps, model.class_names
    generators = "generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)]"
    given = f"batch_size=2, {generators}, num_inference_steps={steps}" if stock else generators
    if model.num_classes:
        given = f"class_labels=[0, 1], {given}"
    elif not stock:
        given = f"batch_size=2, {given}"
    trust = "" if stock else f', custom_pipeline="FOLDER/{PIPELINE_FILE}", trust_remote_code=True'
    description = {
        "model": "Diffusion",
        "load": f'pipeline = diffusers.DiffusionPipeline.from_pretrained("FOLDER"{trust})',
        "call": f"pictures = pipeline({given}).images",
        "sampler": model.sampling.sampler,
        "num_inference_steps": steps,
        "guidance_scale": model.sampling.guidance_scale,
        "class_names": names or [str(number) for number in range(model.num_classes)],
        "unsupported": {},
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_pipeline(folder: Path) -> Any:
    """Return the pipeline of a folder that `write_pipeline` filled, which is trusted."""
    diffusers = require("diffusers", extra="generative")
    own = folder / PIPELINE_FILE
    more = {"custom_pipeline": str(own), "trust_remote_code": True} if own.is_file() else {}
    with quiet():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_pipeline(model: Model, folder: Path) -> None:
    """Load the folder back, and compare a few pictures, of few steps.

    Raises:
        RunError: they are not the model's.
    """
    pipeline = load_pipeline(folder)
    module: Any = model
    seeds = list(range(_COMPARED))
    labels = torch.arange(_COMPARED, device=module.device) % model.num_classes if model.num_classes else None
    was_training = module.training
    module.eval()
    # ddim takes but divisors
    steps = _STEPS if model.process.num_train_timesteps % _STEPS == 0 else model.sampling.num_steps
    with torch.no_grad():
        expected = model.make_pictures(seeds, labels, steps).cpu()
    module.train(was_training)
    more: dict[str, Any] = {"batch_size": _COMPARED} if labels is None else {"class_labels": labels.tolist()}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with quiet():
        found = pipeline(generator=generators, num_inference_steps=steps, output_type="np", **more).images
    pixels = (torch.from_numpy(found).permute(0, 3, 1, 2) * 255).round()
    difference = (pixels - expected).abs().max().item()
    if not difference <= _ALLOWED:
        raise RunError(
            f"the exported pipeline's pictures differ from the model's by up to {difference:.0f} of 255, where "
            f"{_ALLOWED} is allowed; is another version of diffusers installed than the model was trained with?"
        )


def _write_own(model: Model, network: Any, scheduler: Any, folder: Path) -> None:
    from lightning_bigmodels.modules.diffusion import standalone_pipeline

    cls = standalone_pipeline.NoiseToPicturesPipeline
    pipeline = cls(
        network,
        scheduler,
        num_classes=model.num_classes,
        class_names=model.class_names,
        num_inference_steps=model.sampling.num_steps,
        guidance_scale=model.sampling.guidance_scale,
    )
    pipeline.save_pretrained(folder)
    shutil.copyfile(standalone_pipeline.__file__, folder / PIPELINE_FILE)
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    index["_class_name"] = [Path(PIPELINE_FILE).stem, cls.__name__]
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence diffusers' bars, and its words on schedulers that a DDPMPipeline does not expect."""
    logging = require("diffusers.utils.logging", extra="generative")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with old_numpy_calls():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
