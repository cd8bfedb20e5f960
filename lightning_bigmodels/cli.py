"""The verbs that run: LightningCLI with recipes by name, one-line errors, and a folder for every run."""

import logging
import os
import warnings
from argparse import SUPPRESS
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ActionConfigFile, ArgumentError  # type: ignore[attr-defined]  # re-exported without a mark
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from typing_extensions import override

from lightning_bigmodels import data, modules, runs
from lightning_bigmodels.callbacks import (
    BadNumbers,
    Fairness,
    PlanCheck,
    PredictionWriter,
    Preemption,
    ProcessWatch,
    RunSummary,
)
from lightning_bigmodels.callbacks.bad_numbers import BadNumbersError
from lightning_bigmodels.callbacks.preemption import PreemptedError, own_exit_code
from lightning_bigmodels.cli_checkpoints import find_checkpoint, is_option, model_of, names_model, without_model_options
from lightning_bigmodels.cli_errors import explain
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.lazy import import_named
from lightning_bigmodels.planner.flags import setting_from_lines
from lightning_bigmodels.recipe_files import display_name, find_config, settles_model
from lightning_bigmodels.strategies.batch_norm import one_value_explained
from lightning_bigmodels.strategies.checkpoint_io import WholeCheckpointIO
from lightning_bigmodels.strategies.precision import with_true_precision
from lightning_bigmodels.trainer import Trainer

# a class is known by its short name (`--model CausalLanguageModel`) once it is imported, which costs seconds: of these
# packages what is named is imported
_PACKAGES = (modules, data)
_NOISE = ("💡 Tip", "GPU available: False", "TPU available: False", "HPU available: False")
# on in every fit, unless the user's configuration has its own
_GUARDS: tuple[type[Callback], ...] = (BadNumbers, PlanCheck, Preemption, ProcessWatch)
_CHECKPOINT_HELP = "Checkpoint to load: a path, or best or last of the latest run of fit."
_FIT_CHECKPOINT_HELP = (
    "Go on from a checkpoint: last continues the latest run in its folder; best or a path starts a new run from there."
)
_UNTRAINED = ("check", "export", "plan", "prepare")
_WITHOUT_MODEL = ("check", "prepare")
_ONE_DEVICE: dict[str, Any] = {"plugins": None, "strategy": "auto", "devices": 1, "num_nodes": 1}
_PLAIN_TRAINER: dict[str, Any] = {**_ONE_DEVICE, "logger": False, "accelerator": "auto", "precision": None}


class ConfigAction(ActionConfigFile):
    """`--config`: a file or a recipe's name; says file and line where the YAML is broken."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = find_config(values)
        _check_yaml(path)
        _import_named_in(path)
        super().__call__(parser, cfg, path, option_string)


class CLI(LightningCLI):
    """LightningCLI for the classes of this package and the user's own.

    Args:
        args: The command line, verb first.
    """

    def __init__(self, args: list[str]) -> None:
        self._verb = args[0]
        super().__init__(
            trainer_class=Trainer,
            trainer_defaults={"default_root_dir": runs.DEFAULT_ROOT},
            seed_everything_default=0,
            save_config_callback=runs.RunRecorder,
            # environment variables lengthen the help by a line each: they are read, and shown, where one is set
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "default_env": _prepare_environment()},
            auto_configure_optimizers=False,
            args=args,
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method in Lightning
        own = {verb: {"model", "datamodule"} for verb in ("check", "explain", "export", "prepare", "batch_size")}
        own["plan"] = {"model", "datamodule", "setting"}
        verbs = {**LightningCLI.subcommands(), **own}
        # each verb costs a parser of 50 arguments, and the command has named the one that it needs
        return {self._verb: verbs[self._verb]}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(dump_header=[f"lightning=={version('lightning')}"], **kwargs)
        parser.add_argument("-c", "--config", action=ConfigAction, help="Recipe or YAML file; later ones win.")
        return parser

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # Lightning's Trainer alone has 40 arguments: their list is below, and not in the usage too
        usage = f"bigmodels {subcommand.replace('_', '-')} [--config RECIPE_OR_FILE ...] [--KEY VALUE ...]"
        parser = super()._prepare_subcommand_parser(klass, subcommand, usage=usage, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = _FIT_CHECKPOINT_HELP if subcommand == "fit" else _CHECKPOINT_HELP
            if subcommand in _WITHOUT_MODEL and action.dest.split(".")[0] in ("trainer", "model"):
                # a recipe holds them, and they do nothing here
                action.help = SUPPRESS
        if subcommand == "predict":
            # nobody receives them, and they may not fit into memory
            parser.set_defaults({"return_predictions": False})
        return parser

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=self.seed_everything_default,
            help="Seed of all random numbers; true draws one, false sets none.",
        )

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        # a checkpoint may name the model, and a model may bring its own data
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        for package in _PACKAGES:
            import_named(package, " ".join(args))
        try:
            if any(is_option(arg, "ckpt_path") for arg in args) and not (
                any(names_model(arg) for arg in args) or settles_model(args)
            ):
                self._take_model_from_checkpoint(args)
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            _import_all()  # the near match may be any of them
            raise InputError(explain(error, self._subcommand_parsers[args[0]])) from error

    def _take_model_from_checkpoint(self, args: list[str]) -> None:
        """Make the checkpoint's model the default one, for a command line that has a checkpoint and no model."""
        verb = args[0]
        config = self.parser.parse_args(without_model_options(args))[verb]
        if config.get("model") is None and config.get("ckpt_path"):
            path = find_checkpoint(str(config["ckpt_path"]), config["trainer"]["default_root_dir"])
            self._subcommand_parsers[verb].set_defaults({"model": model_of(Path(path))})

    @override
    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint. Lightning lets its hyper-parameters overrule the user's; here the user's stand."""
        verb = self.config["subcommand"]
        config = self.config[verb]
        if verb in _WITHOUT_MODEL:
            config["model"] = None
        elif config.get("model") is None:
            raise InputError("no model is named; name a recipe with --config (see: bigmodels recipes) or --model CLASS")
        checkpoint = config.get("ckpt_path")
        if checkpoint and (verb, checkpoint) != ("fit", "last"):
            config["ckpt_path"] = find_checkpoint(str(checkpoint), config["trainer"]["default_root_dir"])

    @override
    def _dump_config(self) -> None:
        if not hasattr(self, "config_dump"):
            # as Lightning does it, but for a check of what was checked when it was parsed
            text = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, skip_validation=True)
            self.config_dump = yaml.safe_load(text)[str(self.subcommand)]

    @override
    def instantiate_classes(self) -> None:
        given = self.config
        if self._verb in _UNTRAINED:
            # what the recipe's strategy wants, a package or a GPU, need not be here
            self.config = given.clone()
            trainer = self.config[self._verb]["trainer"]
            trainer["strategy"], trainer["plugins"] = "auto", None
        super().instantiate_classes()
        self.config = given

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        verb = str(self.subcommand)
        config = self.config[verb]
        loggers: list[Logger] = []
        if verb == "explain":
            # what a recipe's callbacks watch and write is not asked for
            kwargs |= {**_ONE_DEVICE, "callbacks": []}
        if verb in _UNTRAINED:
            # nothing is trained: no folder, and none of the recipe's devices
            kwargs |= {**_PLAIN_TRAINER, "callbacks": []}
            if verb == "plan":
                kwargs["accelerator"] = "cpu"  # whatever there is, it may be at work
        elif verb == "batch_size":
            kwargs["logger"] = False
        elif config["trainer"]["logger"] in (None, True):
            root = config["trainer"]["default_root_dir"] or runs.DEFAULT_ROOT
            if config["trainer"]["fast_dev_run"]:
                # Lightning puts a dummy in its place, which writes nothing
                kwargs["logger"] = runs.RunLogger(root, verb, version=None)
            else:
                resume = verb == "fit" and config.get("ckpt_path") == "last"
                kwargs["logger"] = loggers = runs.make_loggers(root, verb, title=self._title(), resume=resume)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            # Trainer's constructor does nothing but judge its arguments
            if loggers:
                runs.discard(loggers)
            if "requires a GPU accelerator" in str(error):
                raise InputError(
                    "trainer.strategy: fsdp runs on GPUs only; use fsdp2, which runs on CPUs too"
                ) from error
            raise InputError(f"trainer: {error}") from error
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        # Lightning appends the progress bar; the summary is printed after it
        callbacks: list[Callback] = vars(trainer)["callbacks"]
        callbacks.sort(key=lambda callback: isinstance(callback, RunSummary))
        return trainer

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> pl.Trainer:
        if self.subcommand not in _UNTRAINED:
            summary = RunSummary(
                configs=self._config_names(), predict_help=getattr(self.model, "predict_help", "predict")
            )
            callbacks = [*callbacks, summary]
            if config["num_nodes"] == 1:
                # torchrun may start again with fewer or more hosts, and with the same arguments
                config["num_nodes"] = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        if self.subcommand == "fit":
            callbacks = [*(kind() for kind in _GUARDS if not _holds(kind, config["callbacks"])), *callbacks]
        if self.subcommand == "predict":
            callbacks = [PredictionWriter(), *callbacks]
        judges = self.subcommand in ("fit", "validate", "test") and self._data_argument("group_column")
        if judges and not _holds(Fairness, config["callbacks"]):
            callbacks = [Fairness(), *callbacks]
        if config["enable_progress_bar"] is not False and not _holds(ProgressBar, config["callbacks"]):
            # Lightning's choice, rich, redraws ten times a second: 10 % of a small network's time on two cores
            callbacks = [*callbacks, TQDMProgressBar(refresh_rate=5)]
        return super()._instantiate_trainer(with_true_precision(config), callbacks)

    def before_fit(self) -> None:
        """Plan the run while there is no other process; Lightning calls it."""
        for callback in vars(self.trainer)["callbacks"]:
            if isinstance(callback, PlanCheck):
                callback.plan(self.trainer, self.model, self.datamodule)

    def _data_argument(self, name: str) -> Any:
        data = self.config[str(self.subcommand)].get("data") or {}
        return (data.get("init_args") or {}).get(name)

    def _config_names(self) -> list[str]:
        return [display_name(str(path)) for path in self.config[str(self.subcommand)].get("config") or [] if path]

    def _title(self) -> str:
        names = self._config_names()
        return names[0].removesuffix(".yaml") if names else type(self.model).__name__

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit" and kwargs.get("ckpt_path") == "last":
            # Lightning looks in the logger's folder, which rank zero alone knows: the other processes would start anew
            root = self.config[subcommand]["trainer"]["default_root_dir"] or runs.DEFAULT_ROOT
            folders = [run / "checkpoints" for run in runs.versions(root, "fit")[-1:]]
            named = [getattr(callback, "dirpath", None) for callback in self.trainer.checkpoint_callbacks]
            folders = [Path(folder) for folder in named if folder] or folders
            found = [path for folder in folders if (path := runs.newest_checkpoint(folder, "last"))]
            # where there is none, Lightning warns that it starts anew
            kwargs["ckpt_path"] = str(max(found, key=runs.wholeness_and_age)) if found else "last"
        if subcommand == "plan" and self.datamodule is not None:
            kwargs["setting"] = setting_from_lines(self.config[subcommand]["trainer"].as_dict(), self.datamodule)
        return kwargs

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with one_value_explained():
                super()._run_subcommand(subcommand)
        except BadNumbersError:
            # all processes raise it, and the first one says it for all
            if not self.trainer.is_global_zero:
                raise SystemExit(own_exit_code(self.trainer, 1)) from None
            raise
        except PreemptedError:
            raise
        except SystemExit:
            # Lightning's fit leaves Ctrl-C as exit code 1
            if self.trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
        finally:
            runs.close(self.trainer)


def run(argv: Sequence[str]) -> None:
    """Run one verb of the command line.

    Raises:
        InputError: the command line, a file or a setting is wrong.
    """
    _quieten(resumes=argv[0] == "fit")
    # the verbs that run are methods of the Trainer
    CLI(args=[argv[0].replace("-", "_"), *_with_values(argv[1:])])


def _with_values(args: Sequence[str]) -> list[str]:
    """Return a command line whose `--json` has the value that jsonargparse wants (4.53)."""
    valued = zip_longest(args, args[1:])
    return ["--json=true" if arg == "--json" and after not in ("true", "false") else arg for arg, after in valued]


def _quieten(resumes: bool) -> None:
    """Silence what Lightning says at every start and about itself; what is left is about this run."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_informs)
    # Lightning 2.6 calls what jsonargparse 4.53 and torch 2.14 deprecate
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    # a run that goes on finds its own folder, a branch has one of its own
    warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", r"The dirpath has changed from")
    if not resumes:
        # only fit needs the state of callbacks
        warnings.filterwarnings("ignore", r"Be aware that when using `ckpt_path`, callbacks used to create")


def _informs(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE)


def _prepare_environment() -> bool:
    """Return whether an argument is given as an environment variable; recipe names among them become files."""
    ours = [name for name in os.environ if name.startswith("PL_") and "__" in name]
    for name in ours:
        for package in _PACKAGES:
            import_named(package, os.environ[name])
        if name.endswith("__CONFIG"):
            os.environ[name] = find_config(os.environ[name])
            _import_named_in(os.environ[name])
    return bool(ours)


def _import_named_in(path: str) -> None:
    if "://" not in path:
        for package in _PACKAGES:
            import_named(package, Path(path).read_text(encoding="utf-8"))


def _import_all() -> None:
    for package in _PACKAGES:
        for name in package.__all__:
            with suppress(InputError):  # its extra is not installed
                getattr(package, name)


def _check_yaml(path: str) -> None:
    if "://" in path:
        return
    with Path(path).open(encoding="utf-8") as file:
        try:
            yaml.compose(file, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{path}, line {mark.line + 1}" if mark else path
            raise InputError(
                f"{place}: not valid YAML: {error.problem}; correct the line or its indentation"
            ) from error


def _holds(kind: type[Callback], callbacks: Callback | list[Callback] | None) -> bool:
    given = callbacks if isinstance(callbacks, list) else [callbacks]
    return any(isinstance(callback, kind) for callback in given)
