"""What a recipe is for, as its own file says it: task, data, network, devices, length, what was measured."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import yaml

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.recipe_files import Recipe, list_recipes

Task = Literal[
    "classify",
    "detect",
    "segment",
    "enlarge",
    "generate",
    "denoise",
    "text to image",
    "language model",
]

TASKS: dict[Task, str] = {
    "classify": "tell classes apart",
    "detect": "find objects and name them",
    "segment": "name the class of each pixel",
    "enlarge": "enlarge photos",
    "generate": "make more pictures like these",
    "denoise": "clean disturbed pictures, and find codes for them",
    "text to image": "make pictures of what a text says",
    "language model": "go on with a text",
}

_OF_MODELS: dict[str, Task] = {
    "ImageClassifier": "classify",
    "ObjectDetector": "detect",
    "ImageSegmenter": "segment",
    "SuperResolver": "enlarge",
    "GAN": "generate",
    "VariationalAutoencoder": "generate",
    "Diffusion": "generate",
    "Autoencoder": "denoise",
    "TextToImage": "text to image",
    "CausalLanguageModel": "language model",
}
_WEIGHTS = ("weights", "backbone_weights", "pretrained", "autoencoder", "text_encoder")


@dataclass(frozen=True)
class RecipeFacts:
    """A recipe's file.

    Attributes:
        name: As for `--config`.
        summary: The first line of its header.
        header: What the header says under `Source`, `Hardware`, `Result`, `Not run` and so on.
        model_class: Short name of the model's class.
        data_class: Short name of the data module's.
        model: Arguments of the model.
        data: Arguments of the data module.
        trainer: Arguments of the Trainer.
    """

    name: str
    summary: str
    header: Mapping[str, str]
    model_class: str
    data_class: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    trainer: Mapping[str, Any]

    @property
    def task(self) -> Task:
        """What its model is for."""
        return _OF_MODELS[self.model_class]

    @property
    def pretrained(self) -> str | None:
        """The weights that it starts from; None: from random ones."""
        return next((str(self.model[name]) for name in _WEIGHTS if self.model.get(name)), None)

    @property
    def side(self) -> int:
        """Height of the pictures in a training batch; 0: no pictures, or of any size."""
        size = self.data.get("image_size") or self.data.get("picture_size") or 0
        return int(size[0] if isinstance(size, list) else size)

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return int(self.data.get("channels", 3))

    @property
    def conditional(self) -> bool:
        """Whether a model that makes pictures is told the class of each."""
        return self.task == "generate" and bool(self.model.get("num_classes"))

    @property
    def num_devices(self) -> int:
        """Devices of all nodes."""
        devices = self.trainer.get("devices", 1)
        return (devices if isinstance(devices, int) else 1) * int(self.trainer.get("num_nodes", 1))

    @property
    def accumulated(self) -> int:
        """Batches of an optimizer step."""
        return int(self.trainer.get("accumulate_grad_batches", 1))

    @property
    def batch_size(self) -> int:
        """Rows of a batch, on each device."""
        return int(self.data.get("batch_size", 1))

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run; 0: it is counted in epochs."""
        return max(0, int(self.trainer.get("max_steps") or 0))

    @property
    def max_epochs(self) -> int:
        """Epochs of the run; 0: it is counted in steps."""
        return max(0, int(self.trainer.get("max_epochs") or 0))

    @cached_property
    def untried(self) -> bool:
        """Whether its header says that it was not run."""
        return "Not run" in self.header


def read_recipes() -> list[RecipeFacts]:
    """Return all recipes of this package.

    Raises:
        InputError: there is none.
    """
    recipes = [read_recipe(recipe) for recipe in list_recipes()]
    if not recipes:
        raise InputError("this installation holds no recipes; install lightning-bigmodels again")
    return recipes


def read_recipe(recipe: Recipe) -> RecipeFacts:
    """Return what a recipe's file says."""
    text = recipe.path.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    model, data = content["model"], content["data"]
    return RecipeFacts(
        recipe.name,
        recipe.summary,
        _header(text),
        model["class_path"].rpartition(".")[2],
        data["class_path"].rpartition(".")[2],
        model.get("init_args", {}),
        data.get("init_args", {}),
        content.get("trainer", {}),
    )


def _header(text: str) -> dict[str, str]:
    """Return the paragraphs of the comment that a recipe begins with, by their names."""
    comment = re.match(r"(?:#[^\n]*\n)*", text)
    assert comment is not None  # it may be empty
    found: dict[str, str] = {}
    name = ""
    # the first line is the summary
    for line in comment[0].replace("#", "").splitlines()[1:]:
        start = re.match(r" (\w[\w ]*):\s+(.*)", line)
        if start:
            name = start[1]
            found[name] = start[2].strip()
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found
