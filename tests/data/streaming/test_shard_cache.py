"""Shards on the local disk: within the limit, there before they are needed, fetched once."""

import time

import pytest
import torch

from lightning_bigmodels.data import shard_cache, streaming
from lightning_bigmodels.errors import InputError, RunError
from tests.object_store import ADDRESS, SHARD_BYTES, shards_in


def test_the_cache_keeps_its_limit_and_what_is_open(make, proxy, tmp_path):
    opened = make(ADDRESS)._opened
    cache, other = (shard_cache.ShardCache(opened, 3 * SHARD_BYTES) for _ in range(2))  # as of two processes
    shards = [cache.open(0), other.open(1), cache.open(2)]
    assert [len(tokens) for tokens in shards] == opened.num_shard_tokens[:3].tolist()
    assert cache.fetch(3) is None
    with pytest.raises(InputError, match=r"shards in use fill the 3\.6e-06 GB of shard_cache_gb; set it higher"):
        other.open(3)
    del shards[1]
    assert cache.fetch(3) is not None
    assert {path.name for path in shards_in(tmp_path)} == {f"000000-{number:05d}.bin" for number in (0, 2, 3)}
    del shards
    left = opened.folder / "shards/000000-00009.bin.1.partial"
    left.write_bytes(bytes(SHARD_BYTES))  # by a process that was killed
    time.sleep(0.02)  # the clock of files ticks every 4 ms
    cache.open(0)  # the shard used last is not the first to go
    assert cache.fetch(4) is not None
    assert cache.fetch(5) is not None
    assert {path.name for path in shards_in(tmp_path)} == {f"000000-{number:05d}.bin" for number in (0, 4, 5)}
    other.fetch(5)
    assert [name for name in proxy.requests if "00005" in name] == ["/bucket/some/prefix/shards/000000-00005.bin"]


def test_a_disk_that_cannot_be_written_is_named(make, tmp_path):
    opened = make(ADDRESS)._opened
    (opened.folder / "shards").write_text("in the way")
    with pytest.raises(
        RunError, match=r"shards/000000-00000\.bin cannot be written: File exists; make room for shard_ca"
    ):
        shard_cache.ShardCache(opened, 10**6).open(0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache_dir .*file cannot be written .*; set another one"):
        make(cache_dir=str(tmp_path / "file"))


def test_an_epoch_within_the_limit(make, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "NUM_LANES", 4)
    monkeypatch.setattr(streaming, "NUM_AHEAD", 2)
    limit = 12 * SHARD_BYTES
    with pytest.raises(InputError, match=r"shard_cache_gb is 1e-06.* lanes; set it to .* or more, or prepare smaller"):
        make(ADDRESS, shard_cache_gb=1e-6).train_dataloader()
    loader = make(ADDRESS, shard_cache_gb=limit / 1e9).train_dataloader()
    used = []
    for batch, expected in zip(loader, make().train_dataloader(), strict=True):
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        sizes = [path.stat().st_size for path in shards_in(tmp_path) if path.suffix == ".bin" and path.exists()]
        used.append(sum(sizes))
    assert limit - 2 * SHARD_BYTES <= max(used) <= limit
    assert len({name for name in proxy.requests if "/shards/" in name}) == len(loader.dataset._cache.preparation.shards)


def test_shards_are_there_before_they_are_needed(make, proxy):
    opened = make(ADDRESS, shard_timeout=0.0)._opened
    fetcher = shard_cache.ShardFetcher(shard_cache.ShardCache(opened, 10**6))
    for shard in range(6):
        fetcher.request(shard)
    while len(proxy.requests) < 6 or not all(future.done() for future in fetcher._futures.values()):
        time.sleep(0.01)
    proxy.requests.clear()
    for shard in range(6):
        fetcher.open(shard)
    assert proxy.requests == []
    proxy.refuse()
    fetcher.request(7)
    while not fetcher._futures[7].done():
        time.sleep(0.01)
    proxy.accept()
    fetcher.open(7)  # that it was away does not matter to who did not need it
    assert len(proxy.requests) == 1
