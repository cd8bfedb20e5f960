"""The lines that close a run: what was reached, where it lies, what to do next."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from lightning_bigmodels.callbacks.prediction_table import TABLE_NAME


class RunSummary(Callback):
    """Prints the result of a fit and where the files of a run lie, once, after the progress bar.

    Args:
        configs: What followed `--config`; the summary names the command that uses the trained model.
        predict_help: What that command does.
    """

    def __init__(self, configs: Sequence[str] = (), predict_help: str = "predict") -> None:
        self.configs = list(configs)
        self.predict_help = predict_help
        self._started = 0.0
        self._lines: list[tuple[str, str]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compose the summary of a fit that came to its end."""
        folder = trainer.log_dir  # on every process: it is a broadcast
        if not trainer.is_global_zero or vars(trainer).get("fast_dev_run"):
            return
        checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        lines = _results(trainer, checkpoint)
        lines.append(("training time", _duration(time.monotonic() - self._started)))
        if checkpoint is not None and checkpoint.best_model_path and checkpoint.monitor:
            lines.append(("best checkpoint", _short(checkpoint.best_model_path)))
        if checkpoint is not None and checkpoint.last_model_path:
            lines.append(("last checkpoint", _short(checkpoint.last_model_path)))
        if trainer.loggers and folder:
            lines += [(label, _short(Path(folder, name))) for label, name in _FILES if Path(folder, name).exists()]
        lines += [line for logger in trainer.loggers if isinstance(logger, WandbLogger) for line in _wandb(logger)]
        best = checkpoint and (checkpoint.best_model_path or checkpoint.last_model_path)
        if best:
            configs = self.configs or ([str(Path(folder, "config.yaml"))] if trainer.loggers and folder else [])
            command = " ".join(["bigmodels predict", *(f"--config {_short(name)}" for name in configs)])
            lines.append((f"to {self.predict_help}", f"{command} --ckpt_path {_short(best)}"))
        self._lines = lines

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the predictions lie."""
        folder = trainer.log_dir
        if trainer.is_global_zero and folder:
            named = [("predictions", "predictions.jsonl"), ("numbers", TABLE_NAME), ("pictures", "predictions")]
            self._lines = [(label, _short(Path(folder, name))) for label, name in named if Path(folder, name).exists()]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print what there is to say; an interrupted run has nothing."""
        lines, self._lines = self._lines, []
        if lines:
            _print(lines)


# what callbacks and data leave in a run's folder, and what the summary calls it
_FILES = [
    ("samples", "samples"),
    ("pictures", "validation_pictures"),
    ("map of codes", "latent_map"),
    ("walks through codes", "latent_walk"),
    ("confusion matrix", "confusion_matrix"),
    ("worst mistakes", "confident_mistakes"),
    ("classes", "val_classes"),
    ("explanations", "explanations"),
    ("fairness", "fairness"),
    ("files left out", "skipped_files.txt"),
    ("metrics", "metrics.csv"),
]


def _results(trainer: Trainer, checkpoint: ModelCheckpoint | None) -> list[tuple[str, str]]:
    lines = []
    if checkpoint is not None and checkpoint.monitor and checkpoint.best_model_score is not None:
        lines.append((f"best {checkpoint.monitor}", f"{checkpoint.best_model_score.item():.4f}"))
    for name, value in sorted(trainer.callback_metrics.items()):
        if name.startswith("val_"):
            lines.append((f"last {name}", f"{value.item():.4f}"))
    return lines


def _wandb(logger: WandbLogger) -> list[tuple[str, str]]:
    run: Any = logger.experiment
    if not getattr(run, "offline", False):
        return [("W&B", url)] if (url := getattr(run, "url", None)) else []
    # one folder for each start of the run; wandb joins them
    folder = Path(str(logger.save_dir), "wandb", f"offline-run-*-{run.id}")
    return [("W&B, offline", f"wandb sync {_short(folder)}")]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _short(path: str | Path) -> str:
    """Return a path as the user would type it here."""
    path = Path(path)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(path)


def _print(lines: list[tuple[str, str]]) -> None:
    width = max((len(label) for label, _ in lines), default=0)
    # a progress bar may have left the cursor in its line
    print("\n" + "\n".join(f"{label:<{width}}  {text}" for label, text in lines), flush=True)
