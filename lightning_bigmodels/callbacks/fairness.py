"""Whether a classifier treats groups alike: counts, rates and ratios per group."""

import csv
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_bigmodels.callbacks.report import report_table, run_folder
from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.errors import InputError, near

NAME = "fairness"
_COLUMNS = (
    "group", "class", "examples", "positives", "accuracy", "positive_rate", "true_positive_rate", "false_positive_rate"
)  # fmt: skip
_PARITY, _OPPORTUNITY = "demographic_parity", "equal_opportunity"


class GroupCounts(Metric):
    """Right and wrong decisions of each group on each class, over batches and processes.

    torchmetrics' own `BinaryFairness` (1.9) numbers the groups of each batch anew, so that one which a batch lacks
    moves all behind it, and takes a group without positives for one in which none is found.

    Args:
        num_groups: G.
        num_classes: K.
    """

    full_state_update = False
    examples: Tensor
    right: Tensor
    stats: Tensor

    def __init__(self, num_groups: int, num_classes: int) -> None:
        super().__init__()
        self.add_state("examples", torch.zeros(num_groups, dtype=torch.int64), dist_reduce_fx="sum")
        # in doubles, which are whole here up to 2**53 except where an example's share of right labels is added
        self.add_state("right", torch.zeros(num_groups, dtype=torch.float64), dist_reduce_fx="sum")
        # true positives, false positives, false negatives
        self.add_state("stats", torch.zeros(3, num_groups, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor, groups: Tensor, right: Tensor) -> None:
        """Add examples.

        Args:
            predicted: (B, K) bool, whether an example is said to be of a class.
            labels: (B, K) bool, whether it is.
            groups: (B,) int64.
            right: (B,) the share of an example's decisions that is right.
        """
        self.examples.index_add_(0, groups, torch.ones_like(groups))
        self.right.index_add_(0, groups, right.double())
        for row, hits in enumerate((predicted & labels, predicted & ~labels, ~predicted & labels)):
            self.stats[row].index_add_(0, groups, hits.long())

    def compute(self) -> "Counts":
        """Return the counts."""
        return Counts(self.examples.cpu(), self.right.cpu(), *self.stats.cpu())


class Counts(NamedTuple):
    """What G groups had on K classes.

    Attributes:
        examples: (G,).
        right: (G,) decisions, as a sum of examples' shares.
        true_positives: (G, K).
        false_positives: (G, K).
        false_negatives: (G, K).
    """

    examples: Tensor
    right: Tensor
    true_positives: Tensor
    false_positives: Tensor
    false_negatives: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Share of right decisions (G,)."""
        return self.right / self.examples

    @property
    def positive_rate(self) -> Tensor:
        """Share of a group's examples that are said to be of a class (G, K)."""
        return (self.true_positives + self.false_positives).double() / self.examples[:, None]

    @property
    def positives(self) -> Tensor:
        """Examples of a group that are of a class (G, K)."""
        return self.true_positives + self.false_negatives

    @property
    def true_positive_rate(self) -> Tensor:
        """Share of a group's examples of a class that are said to be (G, K); not a number where there is none."""
        return self.true_positives.double() / self.positives

    @property
    def false_positive_rate(self) -> Tensor:
        """Share of a group's other examples that are said to be (G, K); not a number where there is none."""
        return self.false_positives.double() / (self.examples[:, None] - self.positives)


def worst_ratio(rates: Tensor) -> Tensor:
    """Return for each class the lowest rate of a group over the highest: 1 is fair.

    Groups that have no rate are left out. Where fewer than two have one, or all rates are 0, there is no ratio.

    Args:
        rates: (G, K), not a number where a group has none.

    Returns:
        (K,), not a number where there is none.
    """
    known = ~rates.isnan()
    lowest = rates.masked_fill(~known, torch.inf).amin(0)
    highest = rates.masked_fill(~known, -torch.inf).amax(0)
    return torch.where((known.sum(0) >= 2) & (highest > 0), lowest / highest, torch.nan)


class Fairness(Callback):
    """Judge a classifier for each group of examples, in each validation and test.

    The data bring the groups (`batch["groups"]`, `group_names`). What is logged, such as `val_demographic_parity`:

    - `demographic_parity`: the lowest share of a group that is said to be of the class, over the highest;
    - `equal_opportunity`: the same of the true positive rate, the share of those of the class that are said to be;
    - `accuracy_GROUP`, and where one class is judged `positive_rate_GROUP`, `true_positive_rate_GROUP` and
      `false_positive_rate_GROUP`.

    1 is fair; below 0.8 of the first, authorities in the USA see a sign of discrimination (the four-fifths rule). With
    more than two classes each one is judged against the others, and the worst ratio is logged. The whole table goes to
    the loggers and to `fairness/` in the run's folder.

    Args:
        positive_class: Name of the one class that is judged; None: of two classes the second, of more all. An example
            with several labels has a decision for each, at probability one half.
        min_examples: Groups that have fewer examples are warned of.

    Source: Hardt et al. 2016, "Equality of Opportunity in Supervised Learning"; 29 CFR 1607.4 D.
    """

    def __init__(self, positive_class: str | None = None, min_examples: int = 100) -> None:
        if min_examples < 0:
            raise InputError(f"min_examples is {min_examples}; set it to 0 or more")
        self.positive_class = positive_class
        self.min_examples = min_examples
        self._metric: GroupCounts | None = None
        self._groups: list[str] = []
        self._classes: list[str] = []
        self._judged: list[int] = []
        self._warned: set[str] = set()

    # ---- counting

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        groups = getattr(data, "group_names", None)
        if groups is None:
            raise InputError(
                f"Fairness judges groups, and {type(data).__name__} has none; name a column of groups in the data, or "
                f"remove the callback"
            )
        if len(groups) < 2:
            raise InputError(f"Fairness compares groups, and there is one only, {groups[0]!r}; remove the callback")
        self._groups = list(groups)
        self._classes = list(getattr(module, "class_names", None) or ())
        self._metric = None  # known with the first batch: how many classes there are

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self._count(trainer, pl_module, outputs, batch)

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self._count(trainer, pl_module, outputs, batch)

    def _count(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, dict) or "probabilities" not in outputs:
            raise InputError(
                f"{type(module).__name__} gives no probabilities of classes, by which groups are judged; leave out "
                f"data.group_column, or the callback Fairness"
            )
        probabilities, labels, groups = outputs["probabilities"], batch["labels"], batch["groups"]
        num_classes = probabilities.shape[1]
        if self._metric is None:
            self._prepare(num_classes, several=labels.ndim == 2)
            self._metric = GroupCounts(len(self._groups), num_classes).to(probabilities.device)
        mesh = module.device_mesh
        # the processes that split the layers of one copy of the network see the same examples
        mine = mesh is None or mesh["tensor_parallel"].get_local_rank() == 0
        known = labels if labels.ndim == 1 else labels[:, 0]
        counted = (batch["indices"] != FILLER) & (known != IGNORED) & (groups != IGNORED) & mine
        probabilities, labels, groups = probabilities[counted], labels[counted], groups[counted]
        if labels.ndim == 2:
            predicted, actual = probabilities >= 0.5, labels >= 0.5
            right = (predicted == actual).double().mean(1)
        else:
            best = probabilities.argmax(1)
            right = best == labels
            classes = torch.arange(num_classes, device=labels.device)
            predicted, actual = best[:, None] == classes, labels[:, None] == classes
        self._metric.update(predicted, actual, groups, right)

    def _prepare(self, num_classes: int, several: bool) -> None:
        self._classes = self._classes or [str(number) for number in range(num_classes)]
        if self.positive_class is not None:
            if self.positive_class not in self._classes:
                raise InputError(
                    f"positive_class is {self.positive_class!r}, which is no class"
                    f"{near(self.positive_class, self._classes)}"
                )
            self._judged = [self._classes.index(self.positive_class)]
        else:
            self._judged = [1] if num_classes == 2 and not several else list(range(num_classes))

    # ---- reporting

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, module: LightningModule, phase: str) -> None:
        metric, self._metric = self._metric, None
        if metric is None or trainer.sanity_checking:
            return
        counts: Counts = metric.compute()
        values = self._values(counts)
        for name, value in values.items():
            # alike on all processes already, which a maximum leaves as it is
            logged = torch.tensor(value, device=module.device)
            module.log(f"{phase}_{name}", logged, on_epoch=True, sync_dist=True, reduce_fx="max", batch_size=1)
        self._warn(phase, counts, values)
        self._write(trainer, phase, _rows(counts, self._groups, self._classes, self._judged))

    def _values(self, counts: Counts) -> dict[str, float]:
        """Return what is logged, by name; what cannot be told is left out."""
        values = {}
        for name, rate in {_PARITY: counts.positive_rate, _OPPORTUNITY: counts.true_positive_rate}.items():
            ratios = worst_ratio(rate[:, self._judged])
            if not bool(ratios.isnan().all()):
                values[name] = float(ratios[~ratios.isnan()].min())
        rates = {"accuracy": counts.accuracy}
        if len(self._judged) == 1:
            for name in ("positive_rate", "true_positive_rate", "false_positive_rate"):
                rates[name] = getattr(counts, name)[:, self._judged[0]]
        for name, column in rates.items():
            for group, value in zip(self._groups, column.tolist(), strict=True):
                if value == value:
                    values[f"{name}_{_plain(group)}"] = value
        return values

    def _warn(self, phase: str, counts: Counts, values: dict[str, float]) -> None:
        pairs = list(zip(self._groups, counts.examples.tolist(), strict=True))
        few = [f"{group!r} {number}" for group, number in pairs if number < self.min_examples]
        if few:
            self._warn_once(
                f"{phase}: fewer than {self.min_examples} examples in {len(few)} of {len(pairs)} groups "
                f"({_first(few)}): their rates are guesses; give more data"
            )
        bare = [
            f"group {group!r} has no example of class {self._classes[k]!r}"
            for k in self._judged
            for group, number in zip(self._groups, counts.positives[:, k].tolist(), strict=True)
            if not number
        ]
        if bare:
            self._warn_once(
                f"{phase}: {_first(bare)}: no true positive rate, and left out of {_OPPORTUNITY}; give more data"
            )
        missing = [name for name in (_PARITY, _OPPORTUNITY) if name not in values]
        if missing:
            self._warn_once(
                f"{phase}: no {' and no '.join(missing)}, since fewer than two groups have a rate, or all rates are 0; "
                f"see the table"
            )

    def _warn_once(self, text: str) -> None:
        # of the same words in each epoch
        if text not in self._warned:
            self._warned.add(text)
            rank_zero_warn(f"fairness in {text}")

    def _write(self, trainer: Trainer, phase: str, rows: Sequence[Sequence[str]]) -> None:
        folder = run_folder(trainer) / NAME  # on every process: it is a broadcast
        if not trainer.is_global_zero:
            return
        report_table(trainer, f"{phase}_{NAME}", _COLUMNS, rows)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{phase}_step_{trainer.global_step:08d}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(rows)


def _rows(counts: Counts, groups: Sequence[str], classes: Sequence[str], judged: Sequence[int]) -> list[list[str]]:
    """Return the table, class by class: the groups, then the ratio of each rate's lowest to its highest."""
    rates = [counts.positive_rate, counts.true_positive_rate, counts.false_positive_rate]
    ratios = [worst_ratio(rate).tolist() for rate in rates]
    rows = []
    for k in judged:
        for g, group in enumerate(groups):
            numbers = [str(int(counts.examples[g])), str(int(counts.positives[g, k]))]
            rows.append(
                [group, classes[k], *numbers, _cell(float(counts.accuracy[g])), *(_cell(float(r[g, k])) for r in rates)]
            )
        accuracy = float(worst_ratio(counts.accuracy[:, None])[0])
        whole = [str(int(counts.examples.sum())), str(int(counts.positives[:, k].sum()))]
        rows.append(["lowest / highest", classes[k], *whole, _cell(accuracy), *(_cell(ratio[k]) for ratio in ratios)])
    return rows


def _cell(value: float) -> str:
    return f"{value:.4f}" if value == value else ""


def _plain(group: str) -> str:
    """Return a group's name as a part of a metric's, which becomes part of a file's."""
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in group)


def _first(texts: Sequence[str], most: int = 5) -> str:
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
