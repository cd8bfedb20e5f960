"""How devices and hours change a run: what is divided, what is accumulated, how many epochs there is time for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_bigmodels.advice.options import Options
from lightning_bigmodels.advice.recipe_facts import RecipeFacts

_MARGIN = 0.9
"""Part of the hours that training may take; validation, checkpoints and the start have the rest."""


_POWERS = {"torch.optim.SGD": 1.0, "torch.optim.Adam": 0.5, "torch.optim.AdamW": 0.5}
"""How the learning rate goes with the rows of a step."""


@dataclass(frozen=True)
class Length:
    """How long a run is, and how long it could be.

    Attributes:
        steps_per_epoch: Optimizer steps of an epoch; 0: the data do not fill a batch.
        seconds_per_step: What the plan says.
        steps: Of the recipe.
        hours: Of the user.
    """

    steps_per_epoch: int
    seconds_per_step: float
    steps: int
    hours: float

    @property
    def epochs(self) -> float:
        """Epochs of the recipe on these data."""
        return self.steps / max(1, self.steps_per_epoch)

    @property
    def own_hours(self) -> float:
        """Hours that the recipe takes as it is."""
        return self.steps * self.seconds_per_step / 3600

    @property
    def possible_steps(self) -> int:
        """Steps that the hours allow."""
        return round(self.hours * 3600 * _MARGIN / self.seconds_per_step)

    @property
    def possible_epochs(self) -> float:
        """Epochs that the hours allow."""
        return self.possible_steps / max(1, self.steps_per_epoch)

    @property
    def share(self) -> float:
        """The part of the recipe's length that the hours allow, 1 where there is time for all of it."""
        return min(1.0, self.possible_steps / max(1, self.steps))


def device_options(recipe: RecipeFacts, options: Mapping[str, Any], devices: int, on_cpu: bool, rows: int) -> Options:
    """Return the options that run a recipe on other devices than it was written for, with its rows in a step.

    Args:
        recipe: The recipe.
        options: Its options for the data, which may have lowered the batch size.
        devices: Devices of one machine.
        on_cpu: Whether they are none.
        rows: Rows of an epoch.
    """
    found: Options = {}
    if recipe.num_devices != devices:
        found["trainer.devices"] = devices
        if int(recipe.trainer.get("num_nodes", 1)) > 1:
            found["trainer.num_nodes"] = 1
        strategy = recipe.trainer.get("strategy")
        if devices == 1 and strategy not in (None, "auto"):
            found["trainer.strategy"] = "auto"
        elif devices > 1 and strategy in (None, "auto"):
            found["trainer.strategy"] = "ddp"
    if on_cpu and recipe.trainer.get("accelerator", "auto") not in ("auto", "cpu"):
        found["trainer.accelerator"] = "cpu"
    batch = int(options.get("data.batch_size", recipe.batch_size))
    wanted = recipe.batch_size * recipe.num_devices * recipe.accumulated
    if devices > recipe.num_devices and batch % devices == 0:
        # as many rows in a step as the learning rate was chosen for
        found["data.batch_size"] = batch = batch // devices
    most = max(1, rows // (4 * batch * devices))
    accumulated = max(1, min(most, round(wanted / (batch * devices))))
    if "data.batch_size" in options:
        # the data are few, and so are the rows of a step
        accumulated = 1
    if accumulated != recipe.accumulated:
        found["trainer.accumulate_grad_batches"] = accumulated
    return found


def rate_options(recipe: RecipeFacts, options: Mapping[str, Any], devices: int) -> Options:
    """Return the option for the learning rate of a step that sees fewer rows than the recipe's.

    In proportion to the rows for SGD, to their root for Adam and AdamW; others are left as they are.

    Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.1; Malladi et al. 2022, "On the SDEs and
    Scaling Rules for Adaptive Gradient Algorithms".

    Args:
        recipe: The recipe.
        options: All its options but this.
        devices: Devices of the run.
    """
    rows = int(options.get("data.batch_size", recipe.batch_size)) * devices
    rows *= int(options.get("trainer.accumulate_grad_batches", recipe.accumulated))
    factor = rows / (recipe.batch_size * recipe.num_devices * recipe.accumulated)
    found: Options = {}
    for name in ("optimizer", "discriminator_optimizer"):
        optimizer = recipe.model.get(name) or {}
        power = _POWERS.get(str(optimizer.get("class_path", "")))
        rate = (optimizer.get("init_args") or {}).get("lr")
        if factor < 1 and power and rate:
            found[f"model.{name}.init_args.lr"] = float(f"{float(rate) * factor**power:.2g}")
    return found


def length_of(
    recipe: RecipeFacts, options: Mapping[str, Any], devices: int, rows: int, seconds: float, hours: float
) -> Length:
    """Return how long a run is.

    Args:
        recipe: The recipe.
        options: All its options.
        devices: Devices of the run.
        rows: Rows of an epoch.
        seconds: Of an optimizer step.
        hours: That there are.
    """
    batches = rows // (int(options.get("data.batch_size", recipe.batch_size)) * devices)
    accumulated = int(options.get("trainer.accumulate_grad_batches", recipe.accumulated))
    steps_per_epoch = math.ceil(batches / accumulated)
    by_epochs = recipe.max_epochs * steps_per_epoch
    steps = min(each for each in (recipe.max_steps, by_epochs) if each) if recipe.max_steps or by_epochs else 0
    return Length(steps_per_epoch, seconds, steps, hours)


def length_options(recipe: RecipeFacts, length: Length, accumulated: int) -> Options:
    """Return the options that end a run, and its schedule, within the hours, with a validation before the end.

    Args:
        recipe: The recipe.
        length: Of the run.
        accumulated: Batches of an optimizer step.
    """
    if length.share >= 1 or not length.possible_steps:
        return {}
    options: Options = {}
    every = int(recipe.trainer.get("check_val_every_n_epoch") or 1)
    interval = recipe.trainer.get("val_check_interval")
    epochs = int(length.possible_epochs)
    if recipe.max_steps or not epochs:
        options["trainer.max_steps"] = length.possible_steps
        batches = length.possible_steps * accumulated
        if epochs == 0 or (isinstance(interval, int) and interval > batches):
            options["trainer.val_check_interval"] = batches
        if epochs == 0 and recipe.trainer.get("check_val_every_n_epoch", 1) is not None:
            options["trainer.check_val_every_n_epoch"] = None
        return options
    options["trainer.max_epochs"] = epochs
    if every > epochs:
        options["trainer.check_val_every_n_epoch"] = epochs
    return options
