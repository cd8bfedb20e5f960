"""An optimizer of 8 bits in place of a model's AdamW, with the same rate, decay rates and weight decay."""

import inspect
import shlex
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.optim import HIDDEN, AdamW8bit
from lightning_bigmodels.tasks import Task

SAVED = 0.74
"""Share of a moment's bytes that are saved: a byte and, for 256 elements, a scale take the place of four."""
_NAME = f"lightning_bigmodels.optim.{AdamW8bit.__name__}"


def arguments_8bit(model: Any) -> dict[str, Any] | None:
    """Return the arguments of an AdamW8bit that learns as a model's optimizer does; None where there is none."""
    if not isinstance(model, Task) or not model.automatic_optimization:
        return None
    made = model.optimizer([{"params": [nn.Parameter(torch.zeros(2, 2))], "name": HIDDEN}])
    given = made.defaults
    if type(made) not in (Adam, AdamW) or given["amsgrad"] or given["maximize"]:
        return None
    if given["weight_decay"] and not given["decoupled_weight_decay"]:
        return None
    return {name: given[name] for name in ("lr", "betas", "eps", "weight_decay")}


def use_8bit(model: Any) -> None:
    """Give a model the optimizer of 8 bits.

    Raises:
        InputError: its own is another than AdamW.
    """
    arguments = arguments_8bit(model)
    if arguments is None:
        raise InputError(
            f"the optimizer of {type(model).__name__} is none that AdamW8bit can take the place of; plan with "
            f"optimizer_8bit=False, or give the model torch.optim.AdamW"
        )
    model.optimizer = partial(AdamW8bit, **arguments)


def flags_8bit(model: Any) -> list[str]:
    """Return what to add to the command line for it; what is AdamW8bit's default need not be said."""
    own = {name: p.default for name, p in inspect.signature(AdamW8bit).parameters.items()}
    flags = [f"--model.optimizer {_NAME}"]
    for name, value in (arguments_8bit(model) or {}).items():
        if value != own[name]:
            text = str(list(value)) if name == "betas" else str(value)
            flags.append(f"--model.optimizer.{name} {shlex.quote(text)}")
    return flags
