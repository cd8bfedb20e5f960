"""Pictures per second; tokens per second stand with the language models."""

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_bigmodels.callbacks import Throughput, throughput
from lightning_bigmodels.tasks import Task


class Pictures(Task):
    """Learns from batches like ImageBatch, and counts no operations."""

    validation_step = None

    def build_network(self):
        return nn.Linear(4, 1)

    def step(self, phase, batch):
        return self.network(batch["images"].flatten(1).float()).square().mean()


class Answering(Pictures):
    """Also answers."""

    def predict_step(self, batch):
        return self.network(batch["images"].flatten(1).float())


def test_pictures_per_second_are_reported_also_where_nobody_counts_operations(trainer):
    rows = [{"images": torch.zeros(1, 2, 2, dtype=torch.uint8)}] * 16
    run = trainer(callbacks=[Throughput(window_size=2)], log_every_n_steps=2)
    run.fit(Pictures(), DataLoader(rows, batch_size=4))
    assert run.callback_metrics["images_per_s"] > 0
    assert "tokens_per_s" not in run.callback_metrics


def test_the_processor_is_measured_once_a_process_and_only_where_it_trains(trainer):
    throughput.measure_matmul_flops.cache_clear()
    data = DataLoader([{"images": torch.zeros(1, 2, 2, dtype=torch.uint8)}] * 8, batch_size=4)
    trainer(callbacks=[Throughput()]).predict(Answering(), data)
    assert throughput.measure_matmul_flops.cache_info().misses == 0
    for _ in range(2):
        callback = Throughput()
        trainer(callbacks=[callback], max_steps=1).fit(Answering(), data)
        assert callback.available_flops > 1e6
    assert throughput.measure_matmul_flops.cache_info().misses == 1
