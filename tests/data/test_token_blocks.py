"""Rows: blocks that move from epoch to epoch, windows that count every token once."""

import pickle

import numpy as np
import pytest
import torch

from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.data.loading import EvaluationSampler
from lightning_bigmodels.data.token_blocks import BlockSampler, EvaluationWindows, TrainBlocks


@pytest.mark.parametrize(
    ("length", "size", "stride"),
    [
        (2, 8, 8),
        (8, 8, 8),
        (9, 8, 8),
        (10, 8, 8),
        (17, 8, 8),
        (40, 8, 8),
        (41, 8, 3),
        (100, 8, 1),
        (57, 7, 5),
        (9, 1, 1),
    ],
)
def test_every_token_is_predicted_once_with_its_bytes(array_file, length, size, stride):
    values = np.arange(100, 100 + length)
    num_bytes = np.arange(length) % 5
    num_bytes[0] = 0
    windows = EvaluationWindows(array_file(values), array_file(num_bytes), size, stride)
    batch = windows.__getitems__(list(range(len(windows))))
    inputs, labels = batch["input_ids"], batch["labels"]
    assert inputs.shape == labels.shape == (len(windows), size)
    assert inputs.dtype == labels.dtype == batch["num_bytes"].dtype == torch.int64
    counted = labels != IGNORED
    assert sorted(labels[counted].tolist()) == list(range(101, 100 + length))
    assert torch.equal(inputs[counted] + 1, labels[counted])
    assert batch["num_bytes"].sum() == num_bytes.sum()
    assert counted.any(dim=1).all()
    context = (torch.arange(size) + 1).expand_as(labels)[1:][counted[1:]]
    assert (context > size - stride).all()


def test_a_label_counts_the_bytes_of_its_own_row(array_file):
    windows = EvaluationWindows(array_file([9, 1, 2, 3, 4]), array_file([0, 10, 20, 30, 40]), 2, 2)
    assert windows.__getitems__([0, 1])["num_bytes"].tolist() == [30, 70]


def test_the_index_behind_the_last_counts_for_nothing(array_file):
    windows = EvaluationWindows(array_file([9, 1, 2, 3]), array_file([0, 1, 1, 1]), 2, 2)
    row = windows[len(windows)]
    assert (row["labels"] == IGNORED).all()
    assert row["num_bytes"].tolist() == [0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_an_evaluation_sum_to_the_whole(array_file, world):
    windows = EvaluationWindows(array_file(np.arange(50)), array_file(np.ones(50)), 4, 3)
    shares = [windows.__getitems__(list(EvaluationSampler(windows, world, rank))) for rank in range(world)]
    labels = torch.cat([share["labels"].flatten() for share in shares])
    assert sorted(labels[labels != IGNORED].tolist()) == list(range(1, 50))
    assert len({share["labels"].shape for share in shares}) == 1


@pytest.mark.parametrize(("length", "size"), [(5, 4), (8, 4), (9, 4), (12, 4), (13, 4), (50, 4), (50, 1), (1000, 7)])
def test_blocks_are_neighbours_and_move(array_file, length, size):
    blocks = TrainBlocks(array_file(np.arange(length), "uint16"), size)
    starts = set()
    for epoch in range(60):
        sampler = BlockSampler(blocks, seed=1)
        sampler.set_epoch(epoch)
        batch = blocks.__getitems__(list(sampler))
        assert batch["input_ids"].shape == (len(blocks), size)
        assert batch["input_ids"].dtype == torch.int64
        assert batch["input_ids"].is_contiguous()
        assert torch.equal(batch["input_ids"] + 1, batch["labels"])
        first = batch["input_ids"][:, 0].sort().values
        assert (first.diff() == size).all()
        starts.add(int(first[0]))
    assert starts == set(range(blocks.num_shifts))
    assert blocks.num_shifts == (size if length >= 2 * size else length - size)


def test_plain_indices_are_the_blocks_themselves(array_file):
    blocks = TrainBlocks(array_file(np.arange(20)), 4)
    assert [int(blocks[index]["input_ids"][0, 0]) for index in range(len(blocks))] == [0, 4, 8, 12]


def test_workers_are_sent_the_path_and_not_the_tokens(array_file):
    blocks = TrainBlocks(array_file(np.arange(100_000)), 4)
    row = blocks[0]["input_ids"]
    sent = pickle.dumps(blocks)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[0]["input_ids"], row)
