"""Samplers and loaders: the order is f(seed, epoch), a resumed run sees the rest, evaluation sees everything once."""

from itertools import chain

import pytest
import torch
from torch.utils.data import Dataset

from lightning_bigmodels.data.loading import (
    EpochSampler,
    EvaluationSampler,
    ResumableDataLoader,
    ResumableSampler,
    identity,
    sample_randomness,
)


class Numbers(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitems__(self, indices):
        return list(indices)


def flat(lists):
    return list(chain.from_iterable(lists))


def loader(length=50, batch_size=4, world=1, rank=0, seed=3, num_workers=0, sampler=ResumableSampler):
    dataset = Numbers(length)
    return ResumableDataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler(dataset, world, rank, seed),
        drop_last=True,
        collate_fn=identity,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def epoch(data, number):
    data.sampler.set_epoch(number)  # as Lightning does, between the loader's making and the first batch
    return list(data)


def take(data, number, count):
    iterator = iter(data)
    data.sampler.set_epoch(number)
    return [next(iterator) for _ in range(count)]


def test_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    first, second = epoch(loader(), 0), epoch(loader(), 1)
    torch.manual_seed(2)
    assert epoch(loader(), 0) == first
    assert first != second
    assert epoch(loader(seed=4), 0) != first
    assert sorted(flat(first)) != flat(first)
    assert len(set(flat(first))) == 48  # 50 less the batch that is not full


def test_making_an_iterator_leaves_the_training_stream_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch(loader(), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_order_of_one(world):
    parts = [epoch(loader(batch_size=2, world=world, rank=rank), 5) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    together = [row for batches in zip(*parts, strict=True) for rows in zip(*batches, strict=True) for row in rows]
    alone = flat(epoch(loader(batch_size=2 * world), 5))
    assert together[: len(alone)] == alone


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12 on forked workers
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumes_with_the_very_next_batch(num_workers):
    whole = loader()
    expected = epoch(whole, 0), epoch(whole, 1), epoch(whole, 2)
    first = loader(num_workers=num_workers)
    epoch(first, 0)
    taken = take(first, 1, 5)
    state = first.state_dict()  # workers have fetched further ahead by now
    assert all(type(value) is int for value in state.values())
    second = loader(num_workers=num_workers)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert len(second) == 12
    assert taken + epoch(second, 1) == expected[1]
    assert epoch(second, 2) == expected[2]


def test_a_checkpoint_of_the_last_batch_begins_the_next_epoch():
    first = loader()
    epoch(first, 0)
    state = first.state_dict()
    first.sampler.set_epoch(1)  # a checkpoint at the next epoch's start is still that of the last batch
    assert first.state_dict() == state
    second = loader()
    second.load_state_dict(state)
    assert second.state_dict() == {"epoch": 1, "samples": 0, "global_batch_size": 4}
    assert list(second) == epoch(loader(), 1)


def test_an_epoch_cut_short_is_not_continued_in_the_next():
    first = loader()
    take(first, 0, 3)  # limit_train_batches=3, checkpoint, then Lightning goes on with epoch 1
    second = loader()
    second.load_state_dict(first.state_dict())
    assert epoch(second, 1) == epoch(loader(), 1)


def test_two_processes_are_continued_by_one():
    expected = epoch(loader(length=64, batch_size=8), 0)
    pair = [loader(length=64, batch_size=4, world=2, rank=rank) for rank in range(2)]
    taken = [take(each, 0, 3) for each in pair]
    assert pair[0].state_dict() == pair[1].state_dict()
    one = loader(length=64, batch_size=8)
    one.load_state_dict(pair[0].state_dict())
    rest = epoch(one, 0)
    assert rest == expected[3:]
    assert sorted(flat(taken[0] + taken[1] + rest)) == list(range(64))


@pytest.mark.parametrize(("world", "batch_size", "start"), [(4, 4, 20), (3, 2, 10), (2, 3, 7), (2, 5, 41), (4, 4, 40)])
def test_any_place_is_continued_by_any_number_of_processes(world, batch_size, start):
    order = flat(epoch(loader(batch_size=1), 2))
    parts = []
    for rank in range(world):
        data = loader(batch_size=batch_size, world=world, rank=rank)
        data.load_state_dict({"epoch": 2, "samples": start, "global_batch_size": 1})
        parts.append(list(data))
    together = [row for batches in zip(*parts, strict=True) for rows in zip(*batches, strict=True) for row in rows]
    size = world * batch_size
    # where nothing whole remains, the next epoch begins
    expected = order[start:] if 50 - start >= size else flat(epoch(loader(batch_size=1), 3))
    assert together == expected[: len(expected) // size * size]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12 on forked workers
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_place_names_the_samples_of_the_last_batch(num_workers):
    data = loader(length=50, batch_size=4, world=2, rank=1, num_workers=num_workers)
    assert data.place() == {"epoch": 0, "samples": (0, 0), "indices": []}
    data.load_state_dict({"epoch": 3, "samples": 5, "global_batch_size": 8})
    assert data.place() == {"epoch": 3, "samples": (5, 5), "indices": []}
    data.sampler.set_epoch(3)
    places = []
    for batch in data:
        places.append(data.place())
        assert places[-1]["indices"] == batch
    assert [place["samples"] for place in places] == [(start, start + 8) for start in (5, 13, 21, 29, 37)]
    assert all(place["epoch"] == 3 for place in places)
    assert [len(batch) for batch in epoch(data, 4)] == [4] * 6
    assert data.place()["samples"] == (40, 48)


def test_works_with_the_sampler_that_overfit_batches_puts_in():
    dataset = Numbers(8)
    data = ResumableDataLoader(dataset, batch_size=4, sampler=torch.utils.data.SequentialSampler(dataset))
    data.collate_fn = identity
    assert list(data) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert data.state_dict() == {}
    data.load_state_dict({})
    assert data.place() == {"epoch": 0, "samples": (0, 0), "indices": []}
    resumable = loader()
    resumable.load_state_dict({})
    assert resumable.state_dict()["samples"] == 0


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 7, 9])
def test_evaluation_counts_each_example_once_in_equal_shares(length, world):
    shares = [list(EvaluationSampler(Numbers(length), world, rank)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert [len(EvaluationSampler(Numbers(length), world, rank)) for rank in range(world)] == list(map(len, shares))
    assert sorted(index for index in flat(shares) if index < length) == list(range(length))
    assert {index for index in flat(shares) if index >= length} <= {length}


def test_an_epoch_sampler_tells_the_epoch_of_each_sample_also_to_workers_and_after_a_resume():
    plain = [epoch(loader(), number) for number in (0, 1)]
    data = loader(sampler=EpochSampler, num_workers=1)
    told = [epoch(data, number) for number in (0, 1)]
    assert told == [[[(number, index) for index in batch] for batch in plain[number]] for number in (0, 1)]
    stopped = loader(sampler=EpochSampler)
    first = take(stopped, 1, 3)
    resumed = loader(sampler=EpochSampler)
    resumed.load_state_dict(stopped.state_dict())
    assert first + list(resumed) == told[1]
    assert resumed.place()["indices"] == plain[1][-1]


def test_what_is_drawn_for_a_sample_belongs_to_seed_epoch_and_index_alone():
    def draw(*place):
        with sample_randomness(*place):
            return torch.rand(4).tolist()

    torch.manual_seed(7)
    before = torch.get_rng_state()
    drawn = {place: draw(*place) for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (11, 0, 0), (1, 1, 0)]}
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert all(draw(*place) == values for place, values in drawn.items())
    assert len({tuple(values) for values in drawn.values()}) == len(drawn)
