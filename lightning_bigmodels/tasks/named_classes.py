"""Names of classes: the data bring them, checkpoints carry them, and the two must agree."""

from abc import ABC
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.tasks.task import Task

_KEY = "class_names"


class NamedClasses(Task, ABC):
    """A Task with a fixed number of classes, which the data name.

    Args:
        num_classes: Classes, as many as the data have; 0: none, and those of the data are left alone.
        kwargs: The arguments of `Task`.

    Attributes:
        class_names: The data's names of the classes; they travel in checkpoints.
    """

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.class_names: list[str] | None = None

    @override
    def setup(self, stage: str) -> None:
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if not names or stage == "predict" or self.num_classes == 0:
            return  # a bare folder to predict says nothing of classes
        if len(names) != self.num_classes:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(
                f"the data have {len(names)} classes ({some}) and model.num_classes is {self.num_classes}; set "
                f"model.num_classes to {len(names)}"
            )
        if self.class_names is not None:
            _check_same(names, self.class_names)
        self.class_names = list(names)

    def class_name(self, index: int) -> str:
        """Return the name of a class, its number where no data have named it."""
        return str(index) if self.class_names is None else self.class_names[index]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.class_names is not None:
            checkpoint[_KEY] = list(self.class_names)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        names = checkpoint.get(_KEY)
        if names is None:
            return
        # a checkpoint of another number of classes fails on its weights, with the words for that
        if self.class_names is not None and len(names) == self.num_classes:
            _check_same(self.class_names, names)
        self.class_names = list(names)


def _check_same(data: Sequence[str], own: Sequence[str]) -> None:
    for place, (given, known) in enumerate(zip(data, own, strict=True)):
        if given != known:
            raise InputError(
                f"class {place} is {given!r} in the data and {known!r} in the checkpoint; give the data that the model "
                f"was trained on (data.class_names, where there is such, in its order), or train a new model"
            )
