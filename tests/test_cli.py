import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

from lightning_bigmodels import recipe_files, trainer
from lightning_bigmodels.__main__ import main
from tests import toys

TOYS = ["--model=ToyModel", "--data=ToyData"]
QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
]
SHORT = [*QUIET, "--trainer.max_epochs=1"]


@pytest.fixture(autouse=True)
def clean_process(tmp_path, monkeypatch):
    """An empty folder, no W&B, and afterwards the environment and the signals of before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def written(monkeypatch):
    """Stand-in for the export of a known family: records the model that it was given."""
    models = []
    monkeypatch.setattr(trainer, "export", lambda module, folder, formats: models.append(module) or Path(folder))
    return models


def error_of(capsys, *arguments):
    """Return the one line of a user's error, without its beginning."""
    assert main(list(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if "Seed set to" not in line]
    assert len(lines) == 1, output.err
    return lines[0].removeprefix("bigmodels: error: ")


def config_of(capsys, *arguments):
    """Return the resolved configuration."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


OPTIMIZER = "{model: {class_path: ToyModel, init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {%s}}}}}"
FILES = [
    ("{trainer: {max_stepz: 3}}", "trainer.max_stepz is not an argument of trainer; did you mean 'max_steps'?"),
    ("{modle: ToyModel}", "modle is not an argument of bigmodels fit; did you mean 'model'?"),
    (
        "{model: {class_path: ToyModel, init_args: {widht: 3}}}",
        "model.init_args.widht is not an argument of tests.toys.ToyModel; did you mean 'width'?",
    ),
    (
        "{data: {class_path: ToyData, init_args: {bath_size: 3}}}",
        "data.init_args.bath_size is not an argument of tests.toys.ToyData; did you mean 'batch_size'?",
    ),
    (
        "{model: {class_path: ToyModel, init_argz: {width: 3}}}",
        "model.init_argz is not a key of a class; did you mean 'init_args'?",
    ),
    ("{model: {class_path: ToyModl}}", "model: no class is named 'ToyModl'; did you mean 'ToyModel'?"),
    (
        "{model: {class_path: nowhere.ToyModel}}",
        "model: cannot import nowhere.ToyModel: No module named 'nowhere'; "
        "correct the path or put its folder on PYTHONPATH",
    ),
    (
        "{data: {class_path: tests.toys.ToyDat}}",
        "data: cannot import tests.toys.ToyDat: module 'tests.toys' has no attribute 'ToyDat'; did you mean 'ToyData'?",
    ),
    (
        "{model: {class_path: tests.toys.ToyData}}",
        "model: tests.toys.ToyData is not a LightningModule; name a subclass of it",
    ),
    (
        "{model: {class_path: ToyModel, init_args: {width: wide}}}",
        "model.init_args.width: expected int, got 'wide'",
    ),
    (
        "{model: NeedsWidth}",
        "model.init_args.size is missing: a required argument of tests.toys.NeedsWidth without a default",
    ),
    (
        OPTIMIZER % "lrr: 1",
        "model.init_args.optimizer.init_args.lrr is not an argument of torch.optim.AdamW; did you mean 'lr'?",
    ),
    (OPTIMIZER % "lr: fast", "model.init_args.optimizer.init_args.lr: expected float or Tensor, got 'fast'"),
    (
        "{trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {monitr: val_loss}}]}}",
        "trainer.callbacks.init_args.monitr is not an argument of lightning.pytorch.callbacks.ModelCheckpoint; "
        "did you mean 'monitor'?",
    ),
    (
        "model:\n  class_path: ToyModel\n - width: 3\n",
        "wrong.yaml, line 3: not valid YAML: expected <block end>, but found '<block sequence start>'; "
        "correct the line or its indentation",
    ),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[message.split()[0] for _, message in FILES])
def test_an_error_in_a_file_is_one_line(text, message, capsys):
    Path("wrong.yaml").write_text(text)
    arguments = [] if "model" in text else ["--model=ToyModel"]
    assert error_of(capsys, "fit", *arguments, "--config", "wrong.yaml") == message


FLAGS = [
    (["--trainer.max_stepz=3"], "--trainer.max_stepz is not an argument of trainer; did you mean 'max_steps'?"),
    (["--trainer.max_stepz", "3"], "--trainer.max_stepz is not an argument of trainer; did you mean 'max_steps'?"),
    # an abbreviation is a misspelling, too
    (["--trainer.max_step=3"], "--trainer.max_step is not an argument of trainer; did you mean 'max_steps'?"),
    (["--modle.width=3"], "--modle is not an argument of bigmodels fit; did you mean 'model'?"),
    (
        ["--model.widht=3"],
        "model.init_args.widht is not an argument of tests.toys.ToyModel; did you mean 'width'?",
    ),
    (
        ["--data.bath_size=3"],
        "data.init_args.bath_size is not an argument of tests.toys.ToyData; did you mean 'batch_size'?",
    ),
    (["--model.width=wide"], "model.init_args.width: expected int, got 'wide'"),
    (["--trainer.max_steps=many"], "trainer.max_steps: expected int, got 'many'"),
    (["--trainer.max_epochs=many"], "trainer.max_epochs: expected int or null, got 'many'"),
    (["--seed_everything=abc"], "seed_everything: expected bool or int, got 'abc'"),
    (["--model=ToyModl"], "model: no class is named 'ToyModl'; did you mean 'ToyModel'?"),
    (
        ["--model.optimizer=AdamQ"],
        "model.init_args.optimizer: no class is named 'AdamQ'; did you mean 'Adam'?",
    ),
    (
        ["--model.optimizer.lr=1"],
        "model.init_args.optimizer.lr belongs to no class; name the class first: --model.optimizer CLASS",
    ),
    (
        ["--model.optimizer=AdamW", "--model.optimizer.lrr=1"],
        "model.init_args.optimizer.init_args.lrr is not an argument of torch.optim.AdamW; did you mean 'lr'?",
    ),
    (
        ["--trainer.callbacks+=ModelCheckpoitn"],
        "trainer.callbacks: no class is named 'ModelCheckpoitn'; did you mean 'ModelCheckpoint'?",
    ),
    (
        ["--trainer.precision=bf16-mixd"],
        "trainer.precision: expected one of 'transformer-engine', 'transformer-engine-float16', '16-true', "
        "'16-mixed', 'bf16-true', 'bf16-mixed', '32-true', '64-true', got 'bf16-mixd'; did you mean 'bf16-mixed'?",
    ),
    (["extra"], "'extra' stands alone; an argument is written --NAME VALUE"),
    (["--trainer.max_steps"], "argument --trainer.max_steps: expected one argument"),
    (["--config=nowhere.yaml"], "--config nowhere.yaml: no such file, and no recipe of this name"),
    (["--ckpt_path=nowhere.ckpt"], "--ckpt_path nowhere.ckpt: no such file; name a checkpoint, or: best, last"),
    (
        ["--ckpt_path=best"],
        "--ckpt_path best: there is no checkpoint under runs/fit; train first with: bigmodels fit, "
        "or name the folder of its runs with --trainer.default_root_dir",
    ),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=[" ".join(flags) for flags, _ in FLAGS])
def test_an_error_on_the_command_line_is_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(recipe_files, "list_recipes", list)
    assert error_of(capsys, "fit", *TOYS, *flags) == message


def test_a_model_is_needed(capsys):
    message = "no model is named; name a recipe with --config (see: bigmodels recipes) or --model CLASS"
    assert error_of(capsys, "fit", "--data=ToyData") == message


def test_an_unknown_sentence_of_jsonargparse_is_passed_on(capsys):
    message = "trainer.logger: Expected an instantiatable class, but lightning.pytorch.loggers.Logger is abstract"
    assert error_of(capsys, "fit", *TOYS, "--trainer.logger.save_dir=1") == message


def test_a_setting_that_the_trainer_refuses_is_one_line_and_leaves_no_folder(capsys):
    message = error_of(capsys, "fit", *TOYS, "--trainer.strategy=ddq")
    assert message.startswith("trainer: You selected an invalid strategy name: `strategy='ddq'`.")
    assert not list(Path("runs").glob("fit/*"))


def test_a_users_error_inside_fit_is_one_line(capsys):
    assert error_of(capsys, "fit", *TOYS, *SHORT, "--data.broken=notes.txt") == (
        "notes.txt, line 3: not UTF-8; convert the file first"
    )
    stop = ["--trainer.callbacks+=tests.toys.Stop", "--trainer.callbacks.step=1", "--trainer.callbacks.how=input"]
    assert error_of(capsys, "fit", *TOYS, *SHORT, *stop) == "notes.txt, line 3: not UTF-8; convert it"


def test_configs_merge_in_order_and_flags_win(capsys):
    Path("a.yaml").write_text(
        "trainer: {max_steps: 1, max_epochs: 7}\nmodel: {class_path: ToyModel, init_args: {width: 2, dropout: 0.5}}\n"
    )
    Path("b.yaml").write_text("trainer: {max_steps: 2}\nmodel: {init_args: {width: 3}}\n")
    config = config_of(capsys, "fit", "--config", "a.yaml", "-c", "b.yaml", "--model.init_args.width=4")
    assert (config["trainer"]["max_steps"], config["trainer"]["max_epochs"]) == (2, 7)
    assert config["model"]["init_args"] == {"width": 4, "dropout": 0.5, "optimizer": None}
    assert config["seed_everything"] == 0


def test_a_recipe_is_named_without_a_path(capsys, monkeypatch, tmp_path):
    (tmp_path / "recipes" / "text").mkdir(parents=True)
    (tmp_path / "recipes" / "text" / "toy.yaml").write_text("# Toy.\nmodel: ToyModel\ntrainer: {max_steps: 5}\n")
    monkeypatch.setattr(recipe_files, "recipes_folder", lambda: tmp_path / "recipes")
    for option in (["--config", "text/toy"], ["--config=text/toy"], ["-c", "text/toy"]):
        assert config_of(capsys, "fit", *option)["trainer"]["max_steps"] == 5
    monkeypatch.setenv("PL_FIT__CONFIG", "text/toy")
    assert config_of(capsys, "fit")["trainer"]["max_steps"] == 5
    assert "did you mean 'text/toy'?" in error_of(capsys, "fit", "--config=text/tou")


def test_environment_variables_are_arguments(capsys, monkeypatch):
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEPS", "11")
    assert config_of(capsys, "fit", *TOYS)["trainer"]["max_steps"] == 11
    assert config_of(capsys, "fit", *TOYS, "--trainer.max_steps=12")["trainer"]["max_steps"] == 12


def test_callbacks_are_appended(capsys):
    Path("a.yaml").write_text("model: ToyModel\ntrainer: {callbacks: [{class_path: ModelCheckpoint}]}\n")
    config = config_of(capsys, "fit", "--config=a.yaml", "--trainer.callbacks+=LearningRateMonitor")
    names = [callback["class_path"].split(".")[-1] for callback in config["trainer"]["callbacks"]]
    assert names == ["ModelCheckpoint", "LearningRateMonitor"]


def test_print_config_round_trips(capsys):
    config = config_of(capsys, "fit", *TOYS, "--model.optimizer=AdamW", "--model.optimizer.lr=0.5")
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5
    Path("all.yaml").write_text(yaml.safe_dump(config))
    assert config_of(capsys, "fit", "--config=all.yaml") == config


def test_a_users_own_class(capsys, monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_models.py").write_text(
        "from tests.toys import ToyModel\n\n\nclass Mine(ToyModel):\n"
        "    def __init__(self, depth: int = 2):\n        super().__init__()\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "mine")
    assert main(["fit", "--model=my_models.Mine", "--model.depth=3", "--data=ToyData", *SHORT]) == 0
    assert "last val_loss" in capsys.readouterr().out
    sys.modules.pop("my_models")


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "export"])
def test_help_of_a_verb(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: bigmodels {verb} [--config RECIPE_OR_FILE ...]")
    assert "ENV:" not in text
    assert "--ckpt_path" in text


def test_help_of_a_class_shows_its_docstring(capsys):
    for option, words in [("--model.help=CausalLanguageModel", "--model."), ("--data.help=Text", "--data.")]:
        with pytest.raises(SystemExit):
            main(["fit", option])
        assert words in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "ToyModel"])
    text = capsys.readouterr().out
    assert "Fits y = x w with one linear layer" in text
    assert "Number of inputs. (type: int, default: 4)" in text


@pytest.fixture
def trained():
    """A run of fit with a best and a last checkpoint, of a model that is not the default one."""
    checkpoint = "{class_path: ModelCheckpoint, init_args: {filename: best, monitor: val_loss, save_last: true}}"
    options = ["--model.width=3", "--data.width=3", f"--trainer.callbacks={checkpoint}"]
    assert main(["fit", *TOYS, *SHORT, *options]) == 0
    return Path("runs/fit/version_0/checkpoints")


def test_checkpoints_are_plain_and_say_what_they_hold(trained):
    checkpoint = torch.load(trained / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["_class_path"] == "tests.toys.ToyModel"
    model = toys.ToyModel.load_from_checkpoint(trained / "best.ckpt", weights_only=True)
    assert model.width == 3
    assert LightningModule.load_from_checkpoint(trained / "best.ckpt", weights_only=True).width == 3


@pytest.mark.parametrize("path", ["best", "last", "runs/fit/version_0/checkpoints/best.ckpt"])
def test_a_command_without_a_model_takes_it_from_the_checkpoint(path, trained, written):
    for verb in ("validate", "test", "predict"):
        assert main([verb, "--ckpt_path", path, "--data=ToyData", "--data.width=3", *QUIET]) == 0
    assert main(["export", "--ckpt_path", path, "--model.dropout", "0.5", "--output=out"]) == 0
    model = written.pop()
    assert (model.width, model.hparams.dropout) == (3, 0.5)
    weight = torch.load(trained / "best.ckpt", weights_only=True)["state_dict"]["layer.weight"]
    assert torch.equal(model.layer.weight, weight)


def test_a_command_with_a_model_takes_nothing_from_the_checkpoint(trained, written, capsys):
    Path("mine.yaml").write_text("model: {class_path: ToyModel, init_args: {width: 3, dropout: 0.25}}\n")
    assert main(["export", "--config=mine.yaml", "--ckpt_path=best", "--model.dropout=0"]) == 0
    assert written.pop().hparams.dropout == 0
    assert main(["export", "--config=mine.yaml", "--ckpt_path=best"]) == 0
    assert written.pop().hparams.dropout == 0.25
    assert main(["export", "--model=ToyModel", "--model.width=3", "--ckpt_path=best"]) == 0
    assert written.pop().hparams.dropout == 0.0


def test_export_needs_no_data_and_refuses_untrained_weights(trained, written, capsys):
    assert main(["export", "--ckpt_path=last", "--data=ToyData", "--data.broken=x"]) == 0
    assert "exported to export" in capsys.readouterr().out
    assert not Path("runs/export").exists()
    assert error_of(capsys, "export", "--model=ToyModel") == (
        "export would write untrained weights; name a checkpoint: --ckpt_path best, last or a file"
    )


def test_a_checkpoint_that_names_no_model(capsys):
    torch.save({"state_dict": {}}, "bare.ckpt")
    assert error_of(capsys, "export", "--ckpt_path=bare.ckpt") == (
        "bare.ckpt does not say which model it holds; name it with --model CLASS or --config"
    )


def test_ctrl_c_ends_with_130_and_no_summary(capsys):
    stop = ["--trainer.callbacks+=tests.toys.Stop", "--trainer.callbacks.step=2", "--trainer.callbacks.how=ctrl-c"]
    assert main(["fit", *TOYS, *SHORT, *stop]) == 130
    assert "training time" not in capsys.readouterr().out


def test_lightnings_advertisements_are_silent_and_its_news_are_not(caplog):
    assert main(["fit", *TOYS, *SHORT]) == 0
    assert any("`max_epochs=1` reached" in message for message in caplog.messages)
    assert not [message for message in caplog.messages if "Tip" in message or "TPU" in message]
