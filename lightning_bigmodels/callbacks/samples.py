"""What the model makes, as it learns."""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_bigmodels.callbacks.report import report_table, run_folder, show
from lightning_bigmodels.errors import InputError


class _Generates(Protocol):
    def check_prompts(self, prompts: Sequence[str]) -> None: ...
    def generate(self, prompts: Sequence[str]) -> list[str]: ...


class Samples(Callback):
    """Complete the same prompts after each validation.

    The completions go to the terminal, the loggers and `samples/` in the run's folder.

    Args:
        prompts: What the model goes on from.
        every_n_validations: How often.
        shown: How many of the completions the terminal gets, each cut to one line.
    """

    def __init__(self, prompts: Sequence[str] = ("",), every_n_validations: int = 1, shown: int = 1) -> None:
        if isinstance(prompts, str) or not prompts:
            raise InputError(f"prompts is {prompts!r}; it must be a list of at least one text")
        if every_n_validations < 1:
            raise InputError(f"every_n_validations is {every_n_validations}; it must be 1 or more")
        self.prompts = list(prompts)
        self.every_n_validations = every_n_validations
        self.shown = shown
        self._validations = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "generate"):
            raise InputError(f"{type(pl_module).__name__} generates nothing that Samples could show; remove Samples")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # what the network cannot take is refused now, not at the first validation
        cast(_Generates, pl_module).check_prompts(self.prompts)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        # every process takes part, since a sharded network answers only to all of them
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            completions = cast(_Generates, pl_module).generate(self.prompts)
        folder = run_folder(trainer) / "samples"
        if not trainer.is_global_zero:
            return
        pairs = list(zip(self.prompts, completions, strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(f"--- prompt: {prompt!r}\n{prompt}{completion}" for prompt, completion in pairs)
        (folder / f"step_{trainer.global_step:08d}.txt").write_text(text + "\n", encoding="utf-8")
        report_table(trainer, "samples", ["prompt", "completion"], [list(pair) for pair in pairs])
        for prompt, completion in pairs[: self.shown]:
            line = " ".join((prompt + completion).split())
            show(trainer, f"step {trainer.global_step}: {line[:160]}")
