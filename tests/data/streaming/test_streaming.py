"""Streaming shards: every block once, few shards for each process, exact resume, and a store that goes away."""

import os
import signal
import threading
from itertools import chain

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bigmodels import __main__ as command
from lightning_bigmodels.data import Text, stores, streaming
from lightning_bigmodels.data.shards import Preparation
from lightning_bigmodels.data.stores import open_store
from lightning_bigmodels.data.streaming import ShardOrder
from lightning_bigmodels.errors import InputError, RunError
from tests.object_store import ADDRESS, shards_in


def epoch(loader, number=0):
    loader.sampler.set_epoch(number)
    return [batch["input_ids"] for batch in loader]


@pytest.fixture
def num_blocks():
    return np.array([5, 0, 17, 1, 9] * 41)


def test_an_epoch_has_every_block_once(num_blocks):
    order = ShardOrder(3, 0, num_blocks)
    places = [order.locate(position)[1:] for position in range(num_blocks.sum())]
    assert sorted(places) == [(shard, block) for shard, count in enumerate(num_blocks) for block in range(count)]
    again, other, later = (ShardOrder(seed, epoch, num_blocks) for seed, epoch in ((3, 0), (4, 0), (3, 1)))
    assert [again.locate(position)[1:] for position in range(500)] == places[:500]
    for different in (other, later):
        assert [different.locate(position)[1:] for position in range(500)] != places[:500]
    few = ShardOrder(0, 0, np.array([3, 2]))  # fewer blocks than lanes
    assert sorted(few.locate(position)[1:] for position in range(5)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


@pytest.mark.parametrize("world", [1, 2, 8, 64])
def test_processes_share_few_shards(num_blocks, world):
    order, total = ShardOrder(0, 0, num_blocks), int(num_blocks.sum())
    shards = [{order.locate(position)[1] for position in range(rank, total, world)} for rank in range(world)]
    assert sum(map(len, shards)) <= (num_blocks > 0).sum() + world
    assert max(map(len, shards)) <= (num_blocks > 0).sum() // world + 6


@pytest.mark.parametrize(("position", "stride"), [(0, 1), (77, 2), (1000, 3), (64, 64), (1310, 1)])
def test_what_comes_next_is_known(num_blocks, position, stride):
    order = ShardOrder(0, 2, num_blocks)
    known = list(order.upcoming(position, stride))
    assert known == sorted(known)
    first_needs = {}
    for place in range(position, int(num_blocks.sum()), stride):
        first_needs.setdefault(order.locate(place)[1], place)
    assert set(first_needs) <= {shard for _, shard in known}
    earliest = {shard: begin for begin, shard in reversed(known)}
    assert all(earliest[shard] <= place for shard, place in first_needs.items())
    if stride != 3:  # divides the number of lanes
        assert earliest == first_needs


def test_rows_are_the_blocks_of_the_shards(make, folder):
    text = make()
    found = Preparation(open_store(str(folder), 1.0), folder.parent)
    blocks = []
    for shard in found.shards:
        with found.store.check(shard).open("rb") as file:
            blocks.append(np.array(found.shard_tokens(file)))
    windows = {tuple(tokens[i : i + 9]) for tokens in blocks for i in range(len(tokens) - 8)}
    loader = text.train_dataloader()
    for number in range(2):
        loader.sampler.set_epoch(number)
        for batch in loader:
            assert batch["input_ids"].shape == batch["labels"].shape == (8, 8)
            assert batch["input_ids"].dtype == torch.int64
            assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
            rows = torch.cat([batch["input_ids"], batch["labels"][:, -1:]], dim=1)
            assert all(tuple(row) in windows for row in rows.tolist())
    per_shard = [(len(tokens) - 8) // 8 for tokens in blocks]
    assert text.num_train_samples == sum(
        max(1, count) for count, tokens in zip(per_shard, blocks, strict=True) if len(tokens) > 8
    )
    assert text.splits["train"] == sum(map(len, blocks))


@pytest.mark.parametrize("place", [None, ADDRESS])
def test_evaluation_and_prompts_are_those_of_the_local_text(proxy, folder, text_file, tmp_path, place):
    options = {"vocab_size": 300, "block_size": 8, "batch_size": 8}
    local = Text(str(text_file), **options, test_fraction=0.1, cache_dir=str(tmp_path))
    local.prepare_data()
    local.setup()
    streamed = Text(shards=place or str(folder), **options, cache_dir=str(tmp_path / "streamed"))
    streamed.setup()
    for ours, theirs in [
        (streamed.val_dataloader(), local.val_dataloader()),
        (streamed.test_dataloader(), local.test_dataloader()),
    ]:
        for one, two in zip(ours, theirs, strict=True):
            assert all(torch.equal(one[key], two[key]) for key in two)
    assert next(iter(streamed.predict_dataloader()))["prompts"] == next(iter(local.predict_dataloader()))["prompts"]
    assert {key: value.shape for key, value in streamed.example_batch(3).items()} == {
        key: value.shape for key, value in local.example_batch(3).items()
    }


def test_the_object_store_gives_what_the_folder_gives(make, tmp_path):
    ours, theirs = make(ADDRESS).train_dataloader(), make().train_dataloader()
    for number in (0, 1):
        assert all(torch.equal(one, two) for one, two in zip(epoch(ours, number), epoch(theirs, number), strict=True))
    assert not [path for path in shards_in(tmp_path) if path.suffix != ".bin"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12 on forked workers
def test_workers_give_the_same_batches(make):
    alone, helped = make(num_workers=0).train_dataloader(), make(ADDRESS, num_workers=2).train_dataloader()
    for number in range(2):
        assert all(torch.equal(one, two) for one, two in zip(epoch(alone, number), epoch(helped, number), strict=True))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (1, 3)])
def test_another_number_of_processes_goes_on_exactly(make, before, after):
    """Positions are the order's own, so that rows may repeat in the text without harm."""

    def positions(world, state=None, batches=None):
        parts, states = [], []
        for rank in range(world):
            loader = make(process=(world, rank), batch_size=4).train_dataloader()
            loader.sampler.set_epoch(1)
            if state:
                loader.load_state_dict(state)
            iterator, found = iter(loader), []
            for _ in zip(range(batches or len(loader)), iterator, strict=False):
                found += loader.place()["indices"]
            parts.append(found)
            states.append(loader.state_dict())
        assert all(other == states[0] for other in states)
        return list(chain.from_iterable(parts)), states[0]

    length = make().num_train_samples
    first, state = positions(before, batches=10)
    assert (state["epoch"], state["samples"]) == (1, 40 * before)
    rest, _ = positions(after, state)
    assert len({*first, *rest}) == len(first) + len(rest) > length - 4 * after
    assert {*first, *rest} <= set(range(length, 2 * length))


def test_each_process_fetches_its_own_shards(make, proxy, tmp_path):
    counts = []
    for rank in range(4):
        text = make(ADDRESS, (4, rank), batch_size=2, cache_dir=str(tmp_path / f"cache {rank}"))
        proxy.requests.clear()
        epoch(text.train_dataloader())
        counts.append(len([name for name in proxy.requests if "/shards/" in name]))
    total = len(text._opened.shards)
    assert total <= sum(counts) <= total + 4
    assert max(counts) < total / 3


def test_what_does_not_fit_is_refused(make, text_file, tmp_path):
    with pytest.raises(
        InputError, match=r"have at most 594 tokens, fewer than one block of 594 .*; set a smaller block"
    ):
        make(block_size=594).train_dataloader()
    with pytest.raises(
        InputError, match=r"prepared with a tokenizer of 300 tokens and vocab_size is 299; set vocab_size"
    ):
        make(vocab_size=299)
    own = Text(str(text_file), vocab_size=280, cache_dir=str(tmp_path))
    own.prepare_data()
    own.setup()
    own.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(
        InputError, match=r"was prepared with another tokenizer than .*; leave tokenizer out, or prepare"
    ):
        make(tokenizer=str(tmp_path / "tokenizer"))
    without = Text(str(text_file), vocab_size=280, val_fraction=0.0, cache_dir=str(tmp_path))
    without.write_shards(str(tmp_path / "no val"), 1000, 0)
    assert make(tmp_path / "no val").val_dataloader() == []
    with pytest.raises(
        InputError, match=r"no val has no val part; set val_fraction above 0, or val_sources when you prep"
    ):
        make(tmp_path / "no val", stage="validate")
    for options, message in [
        ({"shard_cache_gb": 0.0}, "set it above 0"),
        ({"shard_timeout": -1.0}, "set it to 0 or more"),
    ]:
        with pytest.raises(InputError, match=message):
            make(stage=None, **options)


class Recorder(LightningModule):
    """Learns a little, and remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shown = []

    def training_step(self, batch, index):
        self.shown.append(batch["input_ids"].tolist())
        return (self.weight * batch["labels"].float().mean() / 300 - 1) ** 2

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class At(Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            self.action()


@pytest.fixture
def fit(trainer, tmp_path):
    def run(text, *callbacks, saved="saved", **options):
        module = Recorder()
        saver = ModelCheckpoint(tmp_path / saved, every_n_train_steps=4, save_last=True)
        settings = {"max_epochs": 1, "max_steps": -1, "enable_checkpointing": True}
        trainer(**settings, callbacks=[saver, *callbacks]).fit(module, text, **options)
        return module

    return run


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_the_run_goes_on_when_the_store_is_back(make, proxy, server, fit, monkeypatch, caplog, how):
    monkeypatch.setattr(streaming, "NUM_AHEAD", 1)
    monkeypatch.setattr(stores, "READ_SECONDS", 0.3)

    def away():
        if how == "refuses":
            proxy.refuse()
            threading.Timer(1.0, proxy.accept).start()
        else:
            os.kill(server[1].pid, signal.SIGSTOP)
            threading.Timer(1.0, os.kill, (server[1].pid, signal.SIGCONT)).start()

    whole = fit(make(stage=None, block_size=32))
    ours = fit(make(ADDRESS, stage=None, block_size=32), At(5, away), saved="ours")
    assert ours.shown == whole.shown
    assert torch.equal(ours.weight, whole.weight)
    assert f"{ADDRESS} does not answer; trying for up to 600 s" in caplog.text


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty", "ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_store_that_stays_away_ends_the_run_and_loses_nothing(make, proxy, fit, monkeypatch, tmp_path, num_workers):
    monkeypatch.setattr(streaming, "NUM_AHEAD", 1)
    options = {"stage": None, "block_size": 32, "num_workers": num_workers, "shard_timeout": 0.3}
    whole = fit(make(stage=None, block_size=32))
    with pytest.raises(RunError) as error:
        fit(make(ADDRESS, **options), At(5, proxy.refuse), saved="ours")
    message = command._one_line(error.value)
    assert message.startswith(f"{ADDRESS}/shards/000000-")
    assert f"tries at http://127.0.0.1:{proxy.port} (the last: Could not connect to the endpoint" in message
    assert message.endswith("when the store is back, go on with --ckpt_path last")
    proxy.accept()
    rest = fit(make(ADDRESS, **options), saved="ours", ckpt_path=str(tmp_path / "ours/last.ckpt"))
    assert rest.shown == whole.shown[-len(rest.shown) :]
    assert 4 <= len(whole.shown) - len(rest.shown) < len(whole.shown) - 10
    assert torch.equal(rest.weight, whole.weight)
