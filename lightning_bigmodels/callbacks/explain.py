"""What made a classifier say so, in pictures, as it learns and once it has learned."""

import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.attribution import Explains, attribute, check_method, explaining
from lightning_bigmodels.callbacks.report import run_folder, send_picture, write_picture
from lightning_bigmodels.callbacks.validation_pictures import grid
from lightning_bigmodels.callbacks.validation_view import ValidationView
from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.data.datamodule import DataModule
from lightning_bigmodels.errors import InputError, near

NAME = "explanations"
PREDICTED, TRUE = "predicted", "true"
_AT_ONCE = 8  # examples whose gradients are held at a time
_SHOWN = 16  # in the overview of a run of the verb


class Explanation(NamedTuple):
    """One example explained.

    Attributes:
        place: In its part, from 0.
        file: Where it comes from, where that is known.
        picture: (3, H, W) uint8.
    """

    place: int
    file: str | None
    picture: Tensor


class Explainer:
    """Explains batches by one method.

    Args:
        method: grad_cam, integrated_gradients or occlusion.
        target: The class that is asked for: predicted, true, or the name of one.
        layer: Name of the layer for Grad-CAM; None: found by the family's rule.
        baseline: What stands for an input that says nothing; None: the family's.
        window: Length of what occlusion hides at a time; None: the family's.
        num_examples: How many are explained.
    """

    def __init__(
        self,
        method: str,
        target: str,
        layer: str | None,
        baseline: float | None,
        window: int | None,
        num_examples: int,
    ) -> None:
        check_method(method)
        if num_examples < 1:
            raise InputError(f"num_examples is {num_examples}; set it to 1 or more")
        if layer is not None and method != "grad_cam":
            raise InputError(f"layer is {layer!r} and {method} looks at none; choose grad_cam, or leave layer out")
        if window is not None and method != "occlusion":
            raise InputError(f"window is {window} and {method} has none; choose occlusion, or leave window out")
        if baseline is not None and method == "grad_cam":
            raise InputError(f"baseline is {baseline} and grad_cam has none; choose another method, or leave it out")
        self.method = method
        self.target = target
        self.layer = layer
        self.baseline = baseline
        self.window = window
        self.num_examples = num_examples

    def check(self, module: LightningModule) -> Explains:
        """Return the module, if it is one that can be asked for the target.

        Raises:
            InputError: it cannot.
        """
        if not isinstance(module, Explains):
            raise InputError(f"{type(module).__name__} is no classifier that can be explained; choose another model")
        names = module.class_names
        if names is not None and self.target not in (PREDICTED, TRUE, *names):
            raise InputError(
                f"no class is named {self.target!r}{near(self.target, names)}; set target to a class, {PREDICTED} or "
                f"{TRUE}"
            )
        return module

    def explain(self, trainer: Trainer, module: Explains, batch: Any, num_examples: int) -> list[Explanation]:
        """Return what made the module say so for the first examples of a batch, less those that count for nothing.

        All processes must ask, since a sharded network answers only to all of them.
        """
        found = []
        stop = min(num_examples, len(batch["indices"]))
        with trainer.precision_plugin.forward_context():
            for start in range(0, stop, _AT_ONCE):
                rows = slice(start, min(start + _AT_ONCE, stop))
                found += self._explain({key: value[rows] for key, value in batch.items()}, module)
        return found

    def _explain(self, batch: dict[str, Any], module: Explains) -> list[Explanation]:
        explainable = module.explainable(batch, self.layer, self.baseline, self.window)
        with explaining(explainable.network), torch.no_grad():
            probabilities = module.probabilities(explainable.forward(explainable.inputs.clone())).float()
        predicted = probabilities.argmax(1)
        labels = _one_label(batch["labels"])
        asked = self._asked(module.class_names, probabilities.shape[1], predicted, labels, batch["indices"])
        heat = attribute(explainable, self.method, asked)
        captions = []
        for row, (mine, best, label) in enumerate(
            zip(asked.tolist(), predicted.tolist(), labels.tolist(), strict=True)
        ):
            name, chance = _name(module.class_names, mine), float(probabilities[row, mine])
            other = "" if mine == best else f", predicted: {_name(module.class_names, best)}"
            truth = "" if label == IGNORED else f", true: {_name(module.class_names, label)}"
            captions.append([f"{name}: {100 * chance:.1f} %", (other + truth).removeprefix(", ")])
        pictures = module.draw_explanations(batch, heat, captions)
        files = batch.get("files") or [None] * len(pictures)
        return [
            Explanation(place, file, picture)
            for place, file, picture in zip(batch["indices"].tolist(), files, pictures, strict=True)
            if place != FILLER
        ]

    def _asked(
        self, names: list[str] | None, num_classes: int, predicted: Tensor, labels: Tensor, indices: Tensor
    ) -> Tensor:
        if self.target == TRUE:
            if bool(((labels == IGNORED) & (indices != FILLER)).any()):
                raise InputError(f"the examples have no labels; set target to {PREDICTED} or to a class")
            return labels.clamp(min=0)
        if self.target == PREDICTED:
            return predicted
        place = names.index(self.target) if names is not None else _number(self.target, num_classes)
        return torch.full_like(predicted, place)


class Explain(ValidationView):
    """Show what made a classifier say so for the first validation examples, after each validation.

    Pictures with a heat map over each go to the loggers and to `explanations/` in the run's folder. What can be wrong
    with the arguments is found in the sanity check before training.

    Args:
        method: grad_cam, integrated_gradients or occlusion.
        target: The class that is asked for: predicted, true, or the name of one.
        layer: Name of the layer for Grad-CAM; None: the last with maps of the size of the last convolution's, or a
            Transformer's last norm.
        baseline: Gray level in [0, 1] that stands for nothing, for the other two; None: the mean that the network
            normalizes with.
        window: Side in pixels of the square that occlusion hides at a time; None: a seventh of the picture's.
        num_examples: How many, at most one batch.
        every_n_validations: How often.
    """

    def __init__(
        self,
        method: str = "grad_cam",
        target: str = PREDICTED,
        layer: str | None = None,
        baseline: float | None = None,
        window: int | None = None,
        num_examples: int = 8,
        every_n_validations: int = 1,
    ) -> None:
        super().__init__(every_n_validations)
        self.explainer = Explainer(method, target, layer, baseline, window, num_examples)
        self._pictures: list[Tensor] = []

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.explainer.check(pl_module)

    @override
    def look(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            return
        number = 1 if trainer.sanity_checking else self.explainer.num_examples
        found = self.explainer.explain(trainer, self.explainer.check(module), batch, number)
        self._pictures = [one.picture for one in found]

    @override
    def show(self, trainer: Trainer, module: LightningModule) -> None:
        _show(trainer, self.explainer.method, self._pictures)
        self._pictures = []


class _Predicted(Callback):
    """Explains the first examples that are predicted: a PNG file for each in `explanations/`, and an overview."""

    def __init__(self, explainer: Explainer) -> None:
        self.explainer = explainer
        self.number = 0
        self._shown: list[Tensor] = []

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.explainer.check(pl_module)

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        left = self.explainer.num_examples - self.number
        if not left:
            return
        found = self.explainer.explain(trainer, self.explainer.check(pl_module), batch, left)
        self.number += len(found)
        for place, file, picture in found:
            stem = "" if file is None else re.sub(r"[^\w.-]+", "_", f"_{Path(file).stem}")
            write_picture(run_folder(trainer) / NAME / f"{place:06d}{stem}.png", picture)
        self._shown += [one.picture for one in found][: _SHOWN - len(self._shown)]

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _show(trainer, self.explainer.method, self._shown)


def explain_predictions(
    trainer: Trainer,
    explainer: Explainer,
    model: LightningModule,
    datamodule: LightningDataModule,
    part: Literal["predict", "val"],
    ckpt_path: str | None,
) -> tuple[Path, int]:
    """Predict no more batches than hold the examples that are to be explained, and explain these.

    Args:
        trainer: Predicts, on one device.
        explainer: How.
        model: A classifier.
        datamodule: The data.
        part: The examples that `predict` answers for, or those of validation.
        ckpt_path: Checkpoint to load.

    Returns:
        The folder of pictures, and how many there are.
    """
    if part == "val":
        _predict_validation(datamodule)
    if isinstance(datamodule, DataModule):
        # a batch holds no more than is explained of it
        datamodule.eval_batch_size = min(datamodule.eval_batch_size, explainer.num_examples)
        if trainer.limit_predict_batches == 1.0:
            trainer.limit_predict_batches = math.ceil(explainer.num_examples / datamodule.eval_batch_size)
    callback = _Predicted(explainer)
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    callbacks.append(callback)
    trainer.predict(model, datamodule=datamodule, return_predictions=False, ckpt_path=ckpt_path)
    return run_folder(trainer) / NAME, callback.number


def _predict_validation(datamodule: LightningDataModule) -> None:
    """Let `predict` read the validation examples: `validate` would log metrics of the few that are explained."""
    setup, loader = datamodule.setup, datamodule.val_dataloader
    vars(datamodule).update({"setup": lambda stage: setup("validate"), "predict_dataloader": loader})


def _show(trainer: Trainer, method: str, pictures: list[Tensor]) -> None:
    """Write one picture of all, of this method and step, and send it to the loggers."""
    folder = run_folder(trainer) / NAME  # on every process: it is a broadcast
    if trainer.is_global_zero and pictures:
        picture = grid(pictures, columns=2)
        write_picture(folder / f"{method}_step_{trainer.global_step:08d}.png", picture)
        send_picture(trainer, f"{NAME}_{method}", picture)


def _one_label(labels: Tensor) -> Tensor:
    """Return (B,) the label of each example; where it has several the first of them."""
    if labels.ndim == 1:
        return labels
    first = labels.argmax(1)
    return torch.where((labels > 0).any(1), first, torch.full_like(first, IGNORED))


def _name(names: list[str] | None, number: int) -> str:
    return str(number) if names is None else names[number]


def _number(target: str, num_classes: int) -> int:
    if not target.isdecimal() or int(target) >= num_classes:
        raise InputError(
            f"target is {target!r} and the model knows no names of classes; set it to a class's number, from 0 to "
            f"{num_classes - 1}"
        )
    return int(target)
