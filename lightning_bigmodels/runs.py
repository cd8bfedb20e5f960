"""A run's folder, `<root>/<verb>/version_N`, and what is logged into it: metrics.csv, config.yaml, a W&B run."""

import csv
import os
import re
import secrets
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_bigmodels.errors import InputError

DEFAULT_ROOT = "runs"
WANDB_PROJECT = "lightning-bigmodels"


def versions(root: str | Path, verb: str) -> list[Path]:
    """Return the folders of the runs of one verb, oldest first."""
    numbered = [(int(path.name[8:]), path) for path in Path(root, verb).glob("version_*") if path.name[8:].isdigit()]
    return [path for _, path in sorted(numbered)]


def new_version(root: str | Path, verb: str) -> int:
    """Create the next run's folder and return its number; two runs that start at once get different folders."""
    existing = versions(root, verb)
    number = int(existing[-1].name[8:]) + 1 if existing else 0
    while True:
        try:
            Path(root, verb, f"version_{number}").mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return number


def newest_checkpoint(folder: Path, kind: str) -> Path | None:
    """Return the newest `best` or `last` checkpoint in a folder, if there is one."""
    # Lightning writes last-v1.ckpt where a last.ckpt of a former start lies in the way
    named = [path for path in folder.glob(f"{kind}*.ckpt") if re.fullmatch(rf"{kind}(-v\d+)?", path.stem)]
    return max(named, key=wholeness_and_age, default=None)


def wholeness_and_age(path: Path) -> tuple[bool, float]:
    """Return by which checkpoints are preferred: whole before broken, younger before older.

    Where none is whole, the one that is taken is loaded and says what it lacks; no run starts anew without a word.
    """
    marks = [path / ".metadata", path / "meta.pt"]
    return path.is_file() or all(mark.is_file() for mark in marks), path.lstat().st_mtime


def find_checkpoint(root: str | Path, kind: str) -> Path:
    """Return the `best` or `last` checkpoint of the latest run of `fit` that has checkpoints.

    Raises:
        InputError: no run has any, or the latest that has some lacks this kind.
    """
    for run in reversed(versions(root, "fit")):
        folder = run / "checkpoints"
        named = newest_checkpoint(folder, kind)
        if named is not None:
            return named
        found = sorted(folder.glob("*.ckpt"))
        if found:
            names = ", ".join(path.name for path in found)
            raise InputError(f"{folder} has no {kind}.ckpt; name one of its files with --ckpt_path: {names}")
    raise InputError(
        f"--ckpt_path {kind}: there is no checkpoint under {Path(root, 'fit')}; train first with: bigmodels fit, "
        "or name the folder of its runs with --trainer.default_root_dir"
    )


class RunLogger(CSVLogger):
    """Writes metrics.csv row by row, and goes on with the file of the run that it continues.

    Args:
        root: Folder of all runs.
        verb: Folder in `root`.
        version: Number of the run; None on processes that are not rank zero, which are told by `trainer.log_dir`.
    """

    def __init__(self, root: str | Path, verb: str, version: int | None) -> None:
        super().__init__(save_dir=root, name=verb, version=version)

    @property
    @override
    def experiment(self) -> Any:
        # Lightning's own writer deletes the metrics of a folder that it finds
        if self._experiment is None and _rank() == 0:
            self._experiment = _MetricsFile(self.log_dir)
        return super().experiment

    def go_on_from(self, step: int) -> None:
        """Drop the rows of `step` and later ones: training is about to do these steps again."""
        if _rank() == 0:
            self.experiment.drop_rows(step)


class _MetricsFile(ExperimentWriter):
    """Lightning's writer, except that the file outlives a resume and a kill at any moment."""

    @override
    def _check_log_dir_exists(self) -> None:
        if Path(self.metrics_file_path).is_file():
            self.metrics_keys = self._read()[0]

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(fieldnames, self._read()[1])

    def drop_rows(self, first_step: int) -> None:
        if Path(self.metrics_file_path).is_file():
            fieldnames, rows = self._read()
            self._write(fieldnames, [row for row in rows if int(row["step"]) < first_step])

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        text = Path(self.metrics_file_path).read_text(encoding="utf-8")
        # a row without its end was being written when the run was killed
        reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        return list(reader.fieldnames or []), list(reader)

    def _write(self, fieldnames: list[str], rows: list[dict[str, str]]) -> None:
        temporary = Path(f"{self.metrics_file_path}.tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.metrics_file_path)


def make_loggers(root: str | Path, verb: str, *, title: str, resume: bool = False) -> list[Logger]:
    """Create the run's folder and return its loggers: metrics.csv first (it names the folder), then W&B for `fit`.

    Args:
        root: Folder of all runs.
        verb: What runs.
        title: What is run; the name of the W&B run.
        resume: Go on in the latest folder of this verb, where there is one.
    """
    if not _is_first_process():
        # the folder's name comes from rank zero, which also logs for all
        return [RunLogger(root, verb, None)]
    existing = versions(root, verb)
    version = int(existing[-1].name[8:]) if resume and existing else new_version(root, verb)
    csv_logger = RunLogger(root, verb, version)
    if verb != "fit":
        return [csv_logger]
    wandb_logger = _wandb_logger(Path(csv_logger.log_dir), f"{title} version_{version}")
    return [csv_logger] if wandb_logger is None else [csv_logger, wandb_logger]


def discard(loggers: list[Logger]) -> None:
    """Take back the folder of a run that did not come into being."""
    folder = Path(str(loggers[0].log_dir))
    if _is_first_process() and folder.is_dir() and {path.name for path in folder.iterdir()} <= {"wandb_id.txt"}:
        (folder / "wandb_id.txt").unlink(missing_ok=True)
        folder.rmdir()


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def _is_first_process() -> bool:
    # before a launcher has run, Lightning knows the rank from the environment but not that of a node
    return _rank() == 0 and int(os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or 0) == 0


def _wandb_logger(folder: Path, name: str) -> WandbLogger | None:
    """Return a logger that writes below `folder`, online only if an API key is configured; None if W&B is disabled."""
    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return None
    import wandb

    mode = mode or ("online" if _has_wandb_key() else "offline")
    id_file = folder / "wandb_id.txt"
    if not id_file.is_file():
        id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    logger = WandbLogger(
        # W&B's own process, which outlives a run, was perhaps started in another folder
        save_dir=folder.absolute(),
        id=id_file.read_text(encoding="utf-8").strip(),
        name=name,
        project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
        mode=mode,
        # an offline run cannot be resumed and warns; `wandb sync` joins the parts by their common id
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(silent=mode != "online"),
    )
    # Lightning 2.6 always passes `anonymous`, and wandb 0.31 warns that it has no effect
    logger._wandb_init.pop("anonymous", None)
    return logger


def _has_wandb_key() -> bool:
    """Look for credentials in the environment, .netrc and wandb's settings: no network, no question, no message."""
    import wandb
    from wandb.errors import UsageError

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:
        # wandb before 0.31 has no `prompt`
        return bool(wandb.api.api_key)
    except UsageError:
        return False


class RunRecorder(SaveConfigCallback):
    """Keeps the resolved configuration in the run's folder and with the run's loggers; rewinds metrics.csv on resume.

    A run that goes on with another configuration keeps both: config.yaml, config_1.yaml, ...
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved or not trainer.loggers:
            return
        self.already_saved = True
        folder = trainer.log_dir  # on every process: it is a broadcast
        if folder is None or not trainer.is_global_zero:
            return
        config = self.config.clone()
        if config.get("ckpt_path") == "last":
            config["ckpt_path"] = None  # to go on with a run is not part of its configuration
        # it was checked when it was parsed
        text = self.parser.dump(config, skip_none=False, skip_validation=True)
        _keep(Path(folder), text)
        plain = config_values(text)
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams(plain)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the rows that a resumed run is going to write again."""
        # `_batches_that_stepped`, the step of a row, is the last one done here, or (saved at an epoch's end) the next
        step = min(trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped + 1)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.go_on_from(step)


def config_values(text: str) -> dict[str, Any]:
    """Return a dumped configuration as plain values, for `log_hyperparams`."""
    import yaml

    return {key: value for key, value in yaml.safe_load(text).items() if value is not None}


def _keep(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while (path := folder / (f"config_{number}.yaml" if number else "config.yaml")).exists():
        if path.read_text(encoding="utf-8") == text:
            return
        number += 1
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def close(trainer: Trainer) -> None:
    """End the W&B run: the process may go on to another."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger.experiment.finish(exit_code=int(trainer.interrupted))
