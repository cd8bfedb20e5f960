"""Samples reach the terminal, the run's folder and the loggers, and cost the training nothing but time."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_bigmodels import CausalLanguageModel
from lightning_bigmodels.callbacks import Samples
from lightning_bigmodels.callbacks.report import report_table
from lightning_bigmodels.errors import InputError
from tests.conftest import TINY_LLAMA
from tests.toys import ToyModel
from tests.workers import fit_on

PROMPTS = ["The class", "If"]


def fit(trainer, text, folder, callbacks):
    torch.manual_seed(0)
    model = CausalLanguageModel(architecture="llama", config=TINY_LLAMA, max_new_tokens=6)
    run = trainer(
        max_steps=6, val_check_interval=2, callbacks=callbacks, logger=CSVLogger(folder, name="fit", version=0)
    )
    run.fit(model, text())
    return model


def test_each_validation_writes_a_file_and_shows_the_first(trainer, text, tmp_path, capsys):
    model = fit(trainer, text, tmp_path, [Samples(PROMPTS, every_n_validations=2)])
    (path,) = (tmp_path / "fit" / "version_0" / "samples").iterdir()
    assert path.name == "step_00000004.txt"
    content = path.read_text(encoding="utf-8")
    assert content.startswith("--- prompt: 'The class'\nThe class")
    assert "--- prompt: 'If'\nIf" in content
    assert capsys.readouterr().out.startswith("step 4: The class")
    assert model.training


def test_training_goes_on_as_if_there_were_none(trainer, text, tmp_path):
    with_samples = fit(trainer, text, tmp_path / "a", [Samples(PROMPTS)])
    without = fit(trainer, text, tmp_path / "b", [])
    for a, b in zip(with_samples.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_prompts_beyond_the_positions_are_refused_before_the_first_step(trainer, text, tmp_path):
    with pytest.raises(InputError, match="exceed the network's 128 positions"):
        fit(trainer, text, tmp_path, [Samples(["The class " * 60])])


def test_what_cannot_be_shown_is_refused(trainer):
    with pytest.raises(InputError, match="prompts is 'The'; it must be a list"):
        Samples("The")
    with pytest.raises(InputError, match="every_n_validations is 0; it must be 1 or more"):
        Samples(every_n_validations=0)
    with pytest.raises(InputError, match="ToyModel generates nothing that Samples could show; remove Samples"):
        Samples().setup(trainer(), ToyModel(), "fit")


class _Recorder:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


class _Run:
    global_step = 7

    def __init__(self, *loggers):
        self.loggers = loggers


def test_a_table_reaches_each_logger_in_its_own_way(monkeypatch):
    recorder = _Recorder()
    wandb, board = WandbLogger.__new__(WandbLogger), TensorBoardLogger.__new__(TensorBoardLogger)
    monkeypatch.setattr(WandbLogger, "log_text", lambda self, **kwargs: recorder.calls.append(("wandb", kwargs)))
    monkeypatch.setattr(TensorBoardLogger, "experiment", property(lambda self: recorder))
    report_table(_Run(wandb, board), "samples", ["prompt", "completion"], [["a", "b\nc"]])
    assert recorder.calls == [
        ("wandb", {"key": "samples", "columns": ["prompt", "completion"], "data": [["a", "b\nc"]]}),
        ("add_text", ("samples", "| prompt | completion |\n| --- | --- |\n| a | b<br>c |", 7), {}),
    ]


@pytest.mark.parametrize(("processes", "strategy"), [(2, "ddp"), (2, "fsdp2"), (2, "tp")])
def test_processes_make_the_samples_of_one_together(processes, strategy, text, tmp_path):
    def fit(processes, strategy, folder):
        fit_on(
            processes,
            strategy,
            # no step of the optimizer, so no rounding of its own either
            lambda: CausalLanguageModel(
                architecture="llama",
                config=TINY_LLAMA,
                max_new_tokens=6,
                optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
            ),
            lambda: text(batch_size=8 // processes),
            limit_val_batches=1,
            val_check_interval=2,
            max_steps=2,
            callbacks=[Samples(PROMPTS)],
            default_root_dir=folder,
        )
        (path,) = (folder / "samples").iterdir()
        return path.name, path.read_text(encoding="utf-8")

    assert fit(processes, strategy, tmp_path / strategy) == fit(1, "auto", tmp_path / "alone")
