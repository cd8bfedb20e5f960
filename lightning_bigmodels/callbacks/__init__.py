"""What watches a run; Lightning's own callbacks come first."""

from lightning_bigmodels.callbacks.bad_numbers import BadNumbers
from lightning_bigmodels.callbacks.class_table import ClassTable
from lightning_bigmodels.callbacks.confident_mistakes import ConfidentMistakes
from lightning_bigmodels.callbacks.confusion_matrix import ConfusionMatrix
from lightning_bigmodels.callbacks.explain import Explain
from lightning_bigmodels.callbacks.fairness import Fairness
from lightning_bigmodels.callbacks.latents import Latents
from lightning_bigmodels.callbacks.plan_check import PlanCheck
from lightning_bigmodels.callbacks.predictions import PredictionWriter
from lightning_bigmodels.callbacks.preemption import Preemption
from lightning_bigmodels.callbacks.process_watch import ProcessWatch
from lightning_bigmodels.callbacks.run_summary import RunSummary
from lightning_bigmodels.callbacks.sample_quality import SampleQuality
from lightning_bigmodels.callbacks.samples import Samples
from lightning_bigmodels.callbacks.throughput import Throughput
from lightning_bigmodels.callbacks.validation_pictures import ValidationPictures
from lightning_bigmodels.callbacks.weight_average import WeightAverage

__all__ = [
    "BadNumbers",
    "ClassTable",
    "ConfidentMistakes",
    "ConfusionMatrix",
    "Explain",
    "Fairness",
    "Latents",
    "PlanCheck",
    "PredictionWriter",
    "Preemption",
    "ProcessWatch",
    "RunSummary",
    "SampleQuality",
    "Samples",
    "Throughput",
    "ValidationPictures",
    "WeightAverage",
]
