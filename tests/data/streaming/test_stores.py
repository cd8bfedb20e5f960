"""Object stores: harm on the way is mended, a refusal is an error at once, preparing goes on there too."""

import logging

import boto3
import numpy as np
import pytest

from lightning_bigmodels.data import Text, preparation, shard_cache, stores
from lightning_bigmodels.data.shards import Preparation
from lightning_bigmodels.data.stores import open_store
from lightning_bigmodels.errors import InputError, RunError
from tests.object_store import ADDRESS


@pytest.mark.parametrize("harm", ["flip", "cut", "busy"])
def test_a_shard_harmed_on_the_way_is_fetched_again(make, proxy, harm, caplog):
    cache = shard_cache.ShardCache(make(ADDRESS)._opened, 10**6)
    proxy.requests.clear()
    proxy.harm = harm
    tokens = cache.open(0)
    assert len(proxy.requests) == 2
    assert np.array_equal(tokens, shard_cache.ShardCache(make()._opened, 0).open(0))
    assert caplog.records[0].levelno == logging.WARNING


def test_what_the_store_refuses_is_an_error_at_once(make, proxy, server, monkeypatch):
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server[0]}")
    cache = shard_cache.ShardCache(make(ADDRESS, shard_timeout=60.0)._opened, 10**6)
    key = {"Bucket": "bucket", "Key": "some/prefix/shards/000000-00001.bin"}
    whole = client.get_object(**key)["Body"].read()
    client.put_object(**key, Body=whole[:-1] + b"?")
    proxy.requests.clear()
    with pytest.raises(RunError, match=r"00001\.bin is damaged: CRC-32 \w+ where CRC-32 \w+ were written; put it back"):
        cache.open(1)
    assert len(proxy.requests) == 3
    client.delete_object(**key)
    with pytest.raises(InputError, match=r"prefix/shards/000000-00001\.bin is missing; put it back from a copy"):
        cache.open(1)
    client.put_object(**key, Body=whole)
    proxy.harm = "forbid"
    with pytest.raises(
        InputError, match=r"the store refuses \(AccessDenied: .*check the credentials and their right to"
    ):
        cache.open(1)
    with pytest.raises(InputError, match=r"s3://nothing/here: there is no bucket nothing; check the address, or make"):
        make("s3://nothing/here")
    with pytest.raises(InputError, match=r"s3://bucket/else holds no prepared text; write it with `bigmodels prepare"):
        make("s3://bucket/else")
    with pytest.raises(InputError, match=r"s3://Not\*a\*bucket/x: .*Invalid bucket name"):
        make("s3://Not*a*bucket/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(InputError, match=r"no credentials for s3://bucket/some/prefix; set AWS_ACCESS_KEY_ID and"):
        make(ADDRESS)


def test_preparing_goes_on_in_the_object_store(text_file, tmp_path, proxy, server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server[0]}")
    address, put = "s3://bucket/interrupted", stores.S3.put
    (tmp_path / "more.txt").write_text(text_file.read_text()[:20_000])
    monkeypatch.setattr(preparation, "UNIT_BYTES", 1)
    text = Text([str(text_file), str(tmp_path / "more.txt")], vocab_size=300, cache_dir=str(tmp_path / "cache"))

    def interrupted(self, path, name):
        if name == "shards/000001-00001.bin":
            raise KeyboardInterrupt
        put(self, path, name)

    monkeypatch.setattr(stores.S3, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text.write_shards(address, 8000, 0)
    with pytest.raises(InputError, match=r"s3://bucket/interrupted holds an unfinished preparation; start the same"):
        Preparation(open_store(address, 1.0), tmp_path)
    written = []
    monkeypatch.setattr(stores.S3, "put", lambda self, path, name: (written.append(name), put(self, path, name)))
    text.write_shards(address, 8000, 0)
    assert "shards/000001-00001.bin" in written
    assert "shards/000000-00000.bin" not in written
    text.write_shards(str(tmp_path / "whole"), 8000, 0)
    store = open_store(address, 1.0)
    assert {name: store.read(name) for name in store.names("")} == {
        str(path.relative_to(tmp_path / "whole")): path.read_bytes()
        for path in (tmp_path / "whole").rglob("*")
        if path.is_file()
    }
    with pytest.raises(
        InputError, match=r"interrupted holds prepared text already; give another --output, or delete it"
    ):
        text.write_shards(address, 8000, 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    proxy.refuse()
    with pytest.raises(
        RunError, match=r"x has not answered .*; when the store is back, start the same command again: it"
    ):
        open_store(address, 0.2).write("x", b"")
