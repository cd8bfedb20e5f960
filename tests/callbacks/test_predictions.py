"""Predictions: one JSON line each, in order, on disk as soon as their batch is done."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.multiprocessing import ProcessRaisedException

from lightning_bigmodels import CausalLanguageModel
from lightning_bigmodels.callbacks import PredictionWriter
from lightning_bigmodels.data import Text
from lightning_bigmodels.errors import InputError
from tests.conftest import TINY_LLAMA
from tests.workers import run_on


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_predict_writes_while_it_runs(trainer, text, tmp_path):
    seen = []

    class Watch(PredictionWriter):
        def on_predict_batch_end(self, *args):
            super().on_predict_batch_end(*args)
            seen.append(len(lines(path)))

    path = tmp_path / "predict" / "version_0" / "predictions.jsonl"
    model = CausalLanguageModel(architecture="llama", config=TINY_LLAMA, max_new_tokens=4)
    run = trainer(callbacks=[Watch()], logger=CSVLogger(tmp_path, name="predict", version=0))
    run.predict(model, text(num_prompts=5, eval_batch_size=2), return_predictions=False)
    assert seen == [2, 4, 5]
    assert [row["index"] for row in lines(path)] == list(range(5))
    assert all(set(row) == {"index", "prompt", "completion"} for row in lines(path))


def predict(processes, strategy, folder, text, *, num_prompts=7, callbacks=(), **data):
    """Predict on one of the processes; completions end by chance, after 1 to 16 tokens."""
    torch.manual_seed(0)
    model = CausalLanguageModel(
        architecture="llama", config=TINY_LLAMA, max_new_tokens=16, temperature=20.0, generation_seed=11
    )
    opened = text()
    opened.prepare_data()
    opened.setup()
    model.tokenizer = opened.tokenizer
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        default_root_dir=folder,
        logger=False,
        callbacks=[PredictionWriter(), *callbacks],
        enable_progress_bar=False,
    )
    trainer.predict(model, text(num_prompts=num_prompts, **data), return_predictions=False)


def predict_on(processes, strategy, folder, text, **options):
    """Return the lines of the one file that the processes leave."""
    run_on(processes, lambda: predict(processes, strategy, folder, text, **options))
    (path,) = folder.glob("predictions*")
    assert path.name == "predictions.jsonl"
    return lines(path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text_file, cache_dir):
    def text(**changes):
        return Text(str(text_file), vocab_size=300, block_size=32, cache_dir=cache_dir, **changes)

    return predict_on(1, "auto", tmp_path_factory.mktemp("alone"), text, eval_batch_size=7)


@pytest.mark.parametrize(
    ("processes", "strategy", "batch_size"),
    [(2, "ddp", 2), (3, "ddp", 1), (2, "fsdp2", 1), (2, "fsdp2", 2), (2, "tp", 2), (4, "fsdp2_tp2", 2)],
)
def test_any_number_of_processes_writes_the_file_of_one(processes, strategy, batch_size, alone, text, tmp_path):
    assert [row["index"] for row in alone] == list(range(7))
    # the first process ends its first prompt early, and must go on answering the second
    lengths = [len(row["completion"]) for row in alone]
    assert lengths[0] < lengths[1] / 2
    assert predict_on(processes, strategy, tmp_path, text, eval_batch_size=batch_size) == alone


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_more_processes_than_prompts(strategy, alone, text, tmp_path):
    (row,) = predict_on(3, strategy, tmp_path, text, num_prompts=1)
    assert row == alone[0]


def test_what_a_killed_run_has_left_does_not_get_in(alone, text, tmp_path):
    for name in ("predictions.part1.jsonl", "predictions.part5.jsonl", "predictions.jsonl"):
        (tmp_path / name).write_text('{"index": 0, "prompt": "old", "completion": "old"}\n', encoding="utf-8")
    assert predict_on(2, "ddp", tmp_path, text, eval_batch_size=2) == alone


class OwnDisk(Callback):
    """Lets the second process write where the first does not see it, like a node with a disk of its own."""

    def on_predict_batch_start(self, trainer, *args):
        (writer,) = [callback for callback in trainer.callbacks if isinstance(callback, PredictionWriter)]
        if trainer.global_rank == 1:
            writer._path = writer._path.parent / "elsewhere.jsonl"


def test_predictions_on_another_nodes_disk_are_missed(text, tmp_path):
    with pytest.raises(
        ProcessRaisedException,
        match=r"InputError: 3 of 7 predictions are not in .* of the first process.*set trainer.default_root_dir",
    ):
        predict_on(2, "ddp", tmp_path, text, callbacks=[OwnDisk()])
    assert not (tmp_path / "predictions.jsonl").exists()
    assert len(lines(tmp_path / "predictions.part0.jsonl")) == 4


def test_a_prompt_that_is_too_long_is_refused_on_all_processes(text, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("If", "The class " * 60)))

    def refusal():
        with pytest.raises(InputError, match="exceed the network's 128 positions"):
            predict(2, "fsdp2", tmp_path, text, prompts=str(prompts), eval_batch_size=1)
        return True

    # the process of the first prompt refuses too, and does not wait for the other
    assert run_on(2, refusal) == [True, True]


def test_validation_text_without_a_word_is_refused(trainer, text, tmp_path):
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n" * 500)
    model = CausalLanguageModel(architecture="llama", config=TINY_LLAMA)
    with pytest.raises(InputError, match="the validation text has no words to take prompts from; set `prompts` to a"):
        trainer().predict(model, text(val_sources=str(blank)))


def test_what_is_no_list_of_rows_is_refused(tmp_path):
    with pytest.raises(TypeError, match="SimpleNamespace.predict_step returned dict; PredictionWriter writes a list"):
        PredictionWriter().write_on_batch_end(None, SimpleNamespace(), {}, None, None, 0, 0)


def test_a_row_without_its_place_is_refused_where_processes_merge(tmp_path):
    trainer = SimpleNamespace(world_size=2)
    with pytest.raises(TypeError, match="SimpleNamespace.predict_step returned a row without `index`"):
        PredictionWriter().write_on_batch_end(trainer, SimpleNamespace(), [{"value": 1}], None, None, 0, 0)
