"""What the model makes, as it learns."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.callbacks.animation import animate
from lightning_bigmodels.callbacks.report import report_picture, report_table, run_folder, show
from lightning_bigmodels.callbacks.validation_pictures import grid
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.pictures import as_rgb, captioned, wrapped
from lightning_bigmodels.tasks.exact_resume import get_random_state, set_random_state
from lightning_bigmodels.tasks.picture_generation import PictureGeneration
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from lightning_bigmodels.tasks.task import Phase

_NAME = "samples"
_COLUMNS, _CAPTIONED_COLUMNS = 8, 4
_TINY = 48  # pixels, below which a picture is shown twice as large


@runtime_checkable
class _MakesTexts(Protocol):
    def check_prompts(self, prompts: Sequence[str]) -> None: ...
    def generate(self, prompts: Sequence[str]) -> list[str]: ...


@runtime_checkable
class MakesPicturesOf(Protocol):
    """A model that makes pictures of texts."""

    def generate_pictures_of(self, prompts: Sequence[str], noise: SampleNoise) -> Tensor:
        """Return (B, C, H, W) uint8 of B prompts."""

    def noise(self, phase: Phase, indices: Tensor) -> SampleNoise:
        """Return the noise of pictures with these numbers (B,)."""


class Samples(Callback):
    """Let the model make the same samples in each validation: texts that go on from prompts, or pictures.

    They go to the loggers and to `samples/` in the run's folder. Texts are shown on the terminal too. Pictures come as
    a grid, always from the same noise, first before training; where the model makes them by class, each row is a class,
    and where it makes them of prompts, each stands above its own. `samples/samples.gif` shows all grids in turn.

    Args:
        prompts: What the model goes on from, or makes pictures of.
        every_n_validations: How often.
        shown: How many of the completions the terminal gets, each cut to one line.
        num_pictures: Pictures in a grid, about; those made of prompts are one for each.
    """

    def __init__(
        self,
        prompts: Sequence[str] = ("",),
        every_n_validations: int = 1,
        shown: int = 1,
        num_pictures: int = 64,
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise InputError(f"prompts is {prompts!r}; it must be a list of at least one text")
        for name, value in {"every_n_validations": every_n_validations, "num_pictures": num_pictures}.items():
            if value < 1:
                raise InputError(f"{name} is {value}; it must be 1 or more")
        self.prompts = list(prompts)
        self.every_n_validations = every_n_validations
        self.shown = shown
        self.num_pictures = num_pictures
        self._validations = 0
        self._steps: list[int] = []

    @property
    @override
    def state_key(self) -> str:
        # there may be several
        return self._generate_state_key(prompts=self.prompts, every_n_validations=self.every_n_validations)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, (_MakesTexts, PictureGeneration, MakesPicturesOf)):
            raise InputError(f"{type(pl_module).__name__} generates nothing that Samples could show; remove Samples")
        if not isinstance(pl_module, _MakesTexts):
            check_strategy(trainer, "Samples")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "steps": list(self._steps)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations, self._steps = state_dict["validations"], list(state_dict["steps"])

    # ---- when

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, _MakesTexts):
            # what the network cannot take is refused now, not at the first validation
            pl_module.check_prompts(self.prompts)
        elif trainer.global_step == 0:
            random_state, was_training = get_random_state(), pl_module.training
            pl_module.eval()
            self._sample(trainer, pl_module)
            pl_module.train(was_training)
            set_random_state(random_state)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # inside the epoch, whose weights are the average where there is one
        if batch_idx or dataloader_idx or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, module: LightningModule) -> None:
        # every process takes part, since a sharded network answers only to all of them
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            if isinstance(module, _MakesTexts):
                completions = module.generate(self.prompts)
            else:
                picture = self._picture(module)
        if isinstance(module, _MakesTexts):
            self._report_texts(trainer, completions)
            return
        path = report_picture(trainer, _NAME, picture)
        if trainer.global_step not in self._steps:
            self._steps.append(trainer.global_step)
        if trainer.is_global_zero:
            animate(path.with_name(f"{_NAME}.gif"), path.parent, self._steps)

    # ---- texts

    def _report_texts(self, trainer: Trainer, completions: list[str]) -> None:
        folder = run_folder(trainer) / _NAME
        if not trainer.is_global_zero:
            return
        pairs = list(zip(self.prompts, completions, strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(f"--- prompt: {prompt!r}\n{prompt}{completion}" for prompt, completion in pairs)
        (folder / f"step_{trainer.global_step:08d}.txt").write_text(text + "\n", encoding="utf-8")
        report_table(trainer, _NAME, ["prompt", "completion"], [list(pair) for pair in pairs])
        for prompt, completion in pairs[: self.shown]:
            line = " ".join((prompt + completion).split())
            show(trainer, f"step {trainer.global_step}: {line[:160]}")

    # ---- pictures

    def _picture(self, module: LightningModule) -> Tensor:
        """Return the grid (3, H, W) uint8."""
        if isinstance(module, MakesPicturesOf):
            indices = torch.arange(len(self.prompts), device=module.device)
            made = module.generate_pictures_of(self.prompts, module.noise("val", indices)).cpu()
            cells = [captioned(one, wrapped(prompt, one)) for one, prompt in zip(made, self.prompts, strict=True)]
            return grid(cells, _CAPTIONED_COLUMNS)
        assert isinstance(module, PictureGeneration)
        number, num_classes = self.num_pictures, module.num_classes
        columns, indices = _COLUMNS, torch.arange(number, device=module.device)
        if 0 < num_classes <= number:
            # a row of the pictures of each class, whose numbers come in turn
            columns = number // num_classes
            indices = indices[: columns * num_classes].view(columns, num_classes).T.flatten()
        made = module.generate_pictures(module.noise("val", indices), module.labels_in_turn(indices)).cpu()
        if made.shape[-1] < _TINY:
            made = made.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return grid([as_rgb(one) for one in made], columns)


def check_strategy(trainer: Trainer, name: str) -> None:
    """Refuse to make pictures where the network answers only inside of a step.

    Raises:
        InputError: the strategy is Lightning's fsdp.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise InputError(
            f"{name} cannot make pictures under the strategy fsdp, which gathers a network in its steps only; use fsdp2"
        )
