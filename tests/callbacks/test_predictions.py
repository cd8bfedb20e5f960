"""Predictions: one JSON line each, in order, on disk as soon as their batch is done."""

import json
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_bigmodels import CausalLanguageModel
from lightning_bigmodels.callbacks import PredictionWriter
from tests.conftest import TINY_LLAMA


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


def test_the_parts_of_several_processes_become_one_file_in_order(tmp_path):
    def process(rank):
        return SimpleNamespace(
            log_dir=str(tmp_path),
            world_size=2,
            global_rank=rank,
            is_global_zero=rank == 0,
            strategy=SimpleNamespace(barrier=lambda name: None),
        )

    writer = PredictionWriter()
    for rank in (1, 0):
        for number, index in enumerate(range(rank, 5, 2)):
            writer.write_on_batch_end(process(rank), None, [{"index": index}], None, None, number, 0)
    writer.on_predict_end(process(1), None)
    writer.on_predict_end(process(0), None)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
    assert lines(tmp_path / "predictions.jsonl") == [{"index": i} for i in range(5)]


def test_what_is_no_list_of_rows_is_refused(tmp_path):
    with pytest.raises(TypeError, match="SimpleNamespace.predict_step returned dict; PredictionWriter writes a list"):
        PredictionWriter().write_on_batch_end(None, SimpleNamespace(), {}, None, None, 0, 0)
