"""Pictures per second; tokens per second stand with the language models."""

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_bigmodels.callbacks import Throughput
from lightning_bigmodels.tasks import Task


class Pictures(Task):
    """Learns from batches like ImageBatch, and counts no operations."""

    validation_step = None

    def build_network(self):
        return nn.Linear(4, 1)

    def step(self, phase, batch):
        return self.network(batch["images"].flatten(1).float()).square().mean()


def test_pictures_per_second_are_reported_also_where_nobody_counts_operations(trainer):
    rows = [{"images": torch.zeros(1, 2, 2, dtype=torch.uint8)}] * 16
    run = trainer(callbacks=[Throughput(window_size=2)], log_every_n_steps=2)
    run.fit(Pictures(), DataLoader(rows, batch_size=4))
    assert run.callback_metrics["images_per_s"] > 0
    assert "tokens_per_s" not in run.callback_metrics
