"""Learning rules that families share: loss, metrics, decoding."""

from lightning_bigmodels.tasks.classification import Classification
from lightning_bigmodels.tasks.language_modeling import LanguageModeling
from lightning_bigmodels.tasks.task import Exportable, Task

__all__ = ["Classification", "Exportable", "LanguageModeling", "Task"]
