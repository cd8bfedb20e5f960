"""What a data type brings to the family contract (tests/test_recipes.py)."""

import importlib
from abc import ABC, abstractmethod


class Contract(ABC):
    """How recipes on one data type are made tiny, judged and broken.

    `tests/recipe_<type>.py` holds a subclass of this name for the recipes in `recipes/<type>/`.
    """

    metric: str
    """Name of a validation metric, by which learning is judged and processes are compared."""
    steps = 100
    """Optimizer steps of the tiny fit, which validates and writes a checkpoint at half of them and at the end."""
    short_steps = 12
    """Optimizer steps of the fits that are compared between one process and two."""
    uneven_batch_size = 7
    """Evaluation batch that does not divide the validation part."""

    @abstractmethod
    def tiny(self, recipe, folder):
        """Return overrides with which the recipe trains within seconds; its data go to `folder`.

        Its `trainer` holds `lengths()`, its `data` an even batch_size. `folder`/text.txt holds English.
        """

    def lengths(self):
        """Return the lines of the tiny version's `trainer` that say when it validates and ends."""
        half = self.steps // 2
        return {"val_check_interval": half, "check_val_every_n_epoch": None, "max_steps": self.steps, "max_epochs": -1}

    @abstractmethod
    def baseline(self, data_args):
        """Return what the metric is of a model that has learned nothing, on the tiny data."""

    @abstractmethod
    def better(self, found, baseline):
        """Return whether the metric's values after each validation say that the model learned."""

    @abstractmethod
    def predictions(self, folder, scratch):
        """Return a list of (flags of predict, check(rows, run's folder)); tiny data lie in `folder`."""

    @abstractmethod
    def answers(self, model):
        """Return whether a loaded model, that no Trainer holds, gives a sound answer."""

    @abstractmethod
    def check_export(self, folder, checkpoint):
        """Assert that what was exported gives what the checkpoint's network gives."""

    @abstractmethod
    def broken(self, folder):
        """Return what can be wrong with the input: a list of (flags of fit, words that the one line must hold)."""

    def without_randomness(self, recipe):
        """Return flags that switch off what is drawn at random in training: masks, mixing, augmentation."""
        return []


def contract_of(recipe_name):
    """Return the contract of a recipe's data type."""
    return importlib.import_module(f"tests.recipe_{recipe_name.partition('/')[0]}").Contract()
