"""The pictures that a classifier is most wrong about: hard ones, and often mislabelled ones."""

from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.callbacks.evaluated import EvaluatedClasses
from lightning_bigmodels.callbacks.report import report_picture
from lightning_bigmodels.callbacks.validation_pictures import grid
from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.pictures import captioned
from lightning_bigmodels.strategies.collectives import gather
from lightning_bigmodels.tasks import Classification


class _Mistake(NamedTuple):
    probability: float
    place: int
    picture: Tensor
    label: int
    found: int


class ConfidentMistakes(EvaluatedClasses):
    """Show after each validation and test the pictures whose wrong class got the highest probability.

    They are found over all processes. Below each stand its true class, what it was taken for, the probability and its
    place in the data. The grid goes to the loggers and to `confident_mistakes/` in the run's folder.

    Args:
        num_pictures: How many.
    """

    def __init__(self, num_pictures: int = 16) -> None:
        if num_pictures < 1:
            raise InputError(f"num_pictures is {num_pictures}; it must be 1 or more")
        self.num_pictures = num_pictures
        self._mistakes: list[_Mistake] = []

    @override
    def start(self, module: Classification) -> None:
        self._mistakes = []

    @override
    def add(self, probabilities: Tensor, batch: Any) -> None:
        sure, found = probabilities.max(1)
        labels = batch["labels"]
        wrong = ((found != labels) & (labels != IGNORED)).nonzero().flatten()
        wrong = wrong[sure[wrong].argsort(descending=True, stable=True)][: self.num_pictures]
        for row in wrong.tolist():
            self._mistakes.append(
                _Mistake(
                    float(sure[row]),
                    int(batch["indices"][row]),
                    batch["images"][row].cpu().clone(),
                    int(labels[row]),
                    int(found[row]),
                )
            )
        self._mistakes = _worst(self._mistakes, self.num_pictures)

    @override
    def report(self, trainer: Trainer, module: Classification) -> None:
        everyones = gather(self._mistakes)
        worst = _worst([mistake for own in everyones for mistake in own], self.num_pictures)
        if not worst:
            return
        pictures = [
            captioned(
                mistake.picture,
                [
                    f"is {module.class_name(mistake.label)}",
                    f"seen {module.class_name(mistake.found)}",
                    f"{mistake.probability:.3f}, no. {mistake.place}",
                ],
            )
            for mistake in worst
        ]
        report_picture(trainer, "confident_mistakes", grid(pictures))


def _worst(mistakes: list[_Mistake], most: int) -> list[_Mistake]:
    return sorted(mistakes, key=lambda mistake: (-mistake.probability, mistake.place))[:most]
