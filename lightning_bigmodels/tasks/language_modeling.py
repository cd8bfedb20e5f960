"""Next-token prediction: loss in nats per token, perplexity, bits per byte."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_bigmodels.data.prompts import Prompts
from lightning_bigmodels.tasks.chunked_loss import IGNORED
from lightning_bigmodels.tasks.task import Phase, Task

_ANY_PROMPT = "a"


class _TextMetric(Metric):
    """Sums over all tokens counted, so that neither batch size nor number of processes moves the value."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens", "num_bytes"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor, num_bytes: Tensor) -> None:
        """Add a batch: summed loss in nats, number of tokens counted, UTF-8 bytes that they spell."""
        self.nats += nats.detach().to(self.nats.dtype)
        self.tokens += tokens
        self.num_bytes += num_bytes


class Loss(_TextMetric):
    """Mean cross entropy in nats per token."""

    def compute(self) -> Tensor:
        """Return nats / tokens."""
        return self.nats / self.tokens


class Perplexity(_TextMetric):
    """Exponential of the mean cross entropy per token; depends on the tokenizer."""

    def compute(self) -> Tensor:
        """Return exp(nats / tokens)."""
        return torch.exp(self.nats / self.tokens)


class BitsPerByte(_TextMetric):
    """Cross entropy in bits per UTF-8 byte of text: the same measure for every tokenizer, and a compressor's."""

    def compute(self) -> Tensor:
        """Return nats / (ln 2 * bytes)."""
        return self.nats / (math.log(2) * self.num_bytes)


class LanguageModeling(Task):
    """A Task that predicts the next token of `TokenBatch`es and reports loss, perplexity and bits per byte.

    Args:
        kwargs: The arguments of `Task`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metrics = nn.ModuleDict({phase: _metrics(phase) for phase in ("val", "test")})

    @abstractmethod
    def summed_loss(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed cross entropy in nats over the labels that count, and an extra loss per batch.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64, the token that follows each; -100 does not count.
        """

    @abstractmethod
    def generate(self, prompts: Sequence[str], indices: Sequence[int] | None = None) -> list[str]:
        """Return what follows each prompt; `indices` choose each prompt's random stream, its place by default.

        All processes of a sharded network call it together, each with prompts of its own, and end together.
        """

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise an InputError for prompts that `generate` would refuse; a rule of the family's own."""
        return

    @override
    def step(self, phase: Phase, batch: Any) -> Tensor:
        nats, extra = self.summed_loss(batch["input_ids"], batch["labels"])
        tokens = (batch["labels"] != IGNORED).sum()
        loss = nats / tokens.clamp(min=1)
        if phase == "train":
            self.log("train_loss", loss.detach(), prog_bar=True)
        else:
            metrics = self.metrics[phase]
            assert isinstance(metrics, MetricCollection)
            metrics.update(nats, tokens, batch["num_bytes"].sum())
            self.log_dict(metrics, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(batch["labels"]))
        return loss + extra

    @override
    def on_predict_start(self) -> None:
        # Each process checks the prompts of all: if one alone refused its own, the others would wait for it.
        prompts = getattr(self.trainer.predict_dataloaders, "dataset", None)
        if isinstance(prompts, Prompts):
            self.check_prompts(prompts.prompts)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        if not batch["prompts"]:
            if self.device_mesh is not None:
                self.generate([_ANY_PROMPT])  # a sharded network answers the others only if this process asks too
            return []
        indices = batch["indices"].tolist()
        completions = self.generate(batch["prompts"], indices)
        return [
            {"index": index, "prompt": prompt, "completion": completion}
            for index, prompt, completion in zip(indices, batch["prompts"], completions, strict=True)
        ]


def _metrics(phase: str) -> MetricCollection:
    return MetricCollection(
        {"loss": Loss(), "perplexity": Perplexity(), "bits_per_byte": BitsPerByte()},
        prefix=f"{phase}_",
        compute_groups=[["loss", "perplexity", "bits_per_byte"]],
    )
