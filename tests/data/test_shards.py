"""Preparing shards: the tokens of the token cache, whatever the processes and interruptions; errors in one line."""

import json
import multiprocessing
import os
import sys
import time
from itertools import chain
from pathlib import Path

import litdata
import numpy as np
import pytest

from lightning_bigmodels.__main__ import main
from lightning_bigmodels.data import Text, preparation, worker_pool
from lightning_bigmodels.data.preparation import MeasuredText, prepare_shards
from lightning_bigmodels.data.shards import MARKER, PLAN, Preparation
from lightning_bigmodels.data.sources import Corpus, TextParts, num_utf8_bytes
from lightning_bigmodels.data.stores import Folder, open_store
from lightning_bigmodels.data.token_cache import prepare
from lightning_bigmodels.data.tokenizer import tokenizer_rules, train_tokenizer
from lightning_bigmodels.data.worker_pool import Stopped, WorkerPool, advance
from lightning_bigmodels.errors import InputError, RunError

TEXTS = [
    "One text.\nIts end.",
    "Zwei Wörter, 日本語 👩‍👩‍👧.\n" * 40,
    "Three.\n\nAnd more of it.\n" * 90,
    "4",
    "Five.\n" * 200,
    "The sixth.\n" * 100,
]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "texts"
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_text(text, encoding="utf-8")
    rows = (json.dumps({"text": f"row {number} of many"}) for number in range(50))
    (path / "rows.jsonl").write_text("\n".join(rows))
    return path


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(preparation, "UNIT_BYTES", 1000)


def silent(message):
    pass


def write(text, output, cache, shard_bytes=300, num_workers=0, report=silent, tokenizer=None, vocab_size=300):
    prepare_shards(text, tokenizer, vocab_size, str(output), cache, shard_bytes, num_workers, report)
    return output


def opened(output, cache):
    return Preparation(open_store(str(output), 1.0), cache)


def tokens_of(found):
    arrays = []
    for shard in found.shards:
        with found.store.check(shard).open("rb") as file:
            arrays.append(np.array(found.shard_tokens(file)))
    return np.concatenate(arrays)


def content(output):
    return {str(path.relative_to(output)): path.read_bytes() for path in Path(output).rglob("*") if path.is_file()}


@pytest.mark.parametrize("test_fraction", [0.0, 0.2])
def test_shards_hold_what_the_token_cache_holds(folder, tmp_path, small_units, test_fraction):
    text = TextParts(Corpus(str(folder)), val_fraction=0.15, test_fraction=test_fraction)
    local = prepare(tmp_path / "local", text, None, 300, silent)
    found = opened(write(text, tmp_path / "out", tmp_path / "cache"), tmp_path / "cache")
    assert len(found.shards) > 5
    assert np.array_equal(tokens_of(found), local.tokens("train").array)
    assert found.num_tokens == local.num_tokens
    assert tokenizer_rules(found.tokenizer) == tokenizer_rules(local.tokenizer)
    for part in set(text.names()) - {"train"}:
        assert np.array_equal(found.tokens(part).array, local.tokens(part).array)
        assert np.array_equal(found.num_bytes(part).array, local.num_bytes(part).array)
    assert found.meta["train"] == local.meta["parts"]["train"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MARKER, "shards", "evaluation"}
    assert not list((tmp_path / "cache").glob("preparing-*"))


def test_litdata_reads_the_shards(folder, tmp_path):
    found = opened(write(TextParts(Corpus(str(folder))), tmp_path / "out", tmp_path / "cache"), tmp_path)
    data = litdata.StreamingDataset(str(tmp_path / "out/shards"), item_loader=litdata.TokensLoader(block_size=16))
    tokens, lengths = tokens_of(found), found.num_shard_tokens
    assert len(data) == sum(lengths // 16)
    assert np.array_equal(data[1], tokens[16:32])
    assert np.array_equal(data[int(lengths[0]) // 16], tokens[lengths[0] :][:16])


def test_sources_of_every_kind(folder, tmp_path):
    sources = [str(folder / "rows.jsonl"), "python-docs", str(folder / "4.txt")]
    text = TextParts(Corpus(sources), val=Corpus(str(folder / "5.txt")))
    tokenizer = train_tokenizer(Corpus(str(folder)).documents(), 300)
    local = prepare(tmp_path / "local", text, tokenizer, 300, silent)
    found = opened(write(text, tmp_path / "out", tmp_path, 1 << 20, tokenizer=tokenizer), tmp_path)
    assert np.array_equal(tokens_of(found), local.tokens("train").array)
    assert np.array_equal(found.tokens("val").array, local.tokens("val").array)
    assert len(found.shards) == 3  # each source is a unit


def test_without_evaluation_parts(folder, tmp_path):
    found = opened(write(TextParts(Corpus(str(folder)), val_fraction=0.0), tmp_path / "out", tmp_path), tmp_path)
    assert list(found.num_tokens) == ["train"]


def test_a_long_text_lends_the_beginnings_of_its_units_to_the_tokenizer(folder, small_units):
    corpus = Corpus(str(folder))
    units = [unit._replace(end=sum(map(num_utf8_bytes, unit.documents()))) for unit in preparation._units(corpus)]
    assert len(units) > 3
    parts = MeasuredText(corpus, val_fraction=0.0, units=tuple(units))
    assert "".join(parts.beginnings(1 << 30)) == "".join(corpus.documents())
    some = "".join(parts.beginnings(1500))
    assert abs(len(some.encode()) - 1500) < 10 * len(units)
    assert some.startswith("One text.")
    assert "row 0 of many" in some


def test_processes_write_the_same_and_report(folder, tmp_path, small_units, monkeypatch):
    monkeypatch.setattr(worker_pool, "REPORT_SECONDS", 0.0)
    text, said = TextParts(Corpus(str(folder))), []
    write(text, tmp_path / "alone", tmp_path / "cache")
    write(text, tmp_path / "together", tmp_path / "cache", num_workers=2, report=said.append)
    assert content(tmp_path / "together") == content(tmp_path / "alone")
    assert any("measured" in sentence and sentence.endswith("MB/s") for sentence in said)
    assert said[-1].startswith(f"prepared {tmp_path / 'together'}: train ")


def test_killed_anywhere_it_goes_on(folder, tmp_path, small_units):
    text = TextParts(Corpus(str(folder)))
    write(text, tmp_path / "whole", tmp_path / "cache")
    output = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(text, output, tmp_path / "cache"))
    process.start()
    _wait_for(lambda: len(list(output.glob("units/0*.json"))) >= 2)
    process.kill()
    process.join()
    with pytest.raises(
        InputError, match=r"killed holds an unfinished preparation; start the same .* again: it goes on"
    ):
        opened(output, tmp_path)
    with pytest.raises(InputError, match=r"unfinished preparation of other text or with other settings; give another"):
        write(text, output, tmp_path / "cache", shard_bytes=400)
    before = {path: path.stat().st_mtime_ns for path in output.glob("shards/*.bin")}
    recorded = [json.loads(path.read_text())["shards"] for path in output.glob("units/0*.json")]
    said = []
    write(text, output, tmp_path / "other cache", report=said.append)
    assert said[0] == f"going on with the preparation in {output}"
    assert content(output) == content(tmp_path / "whole")
    for name, *_ in chain.from_iterable(recorded):  # nothing is done twice
        assert (output / name).stat().st_mtime_ns == before[output / name]


def _write_slowly(text, output, cache):
    put = Folder.put

    def slowly(self, path, name):
        time.sleep(0.05)
        put(self, path, name)

    Folder.put = slowly
    write(text, output, cache)


def _wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_worker_is_an_error():
    with (
        pytest.raises(
            RunError, match=r"worker process was killed, perhaps .* start the same command again: it goes on"
        ),
        WorkerPool(1, silent) as pool,
    ):
        pool.run(os._exit, [1], "")


def _work_without_end(job):
    while True:
        advance(1)
        time.sleep(0.001)


def test_an_interrupted_pool_stops_its_workers(monkeypatch):
    class Interrupted(BaseException):
        pass

    def interrupt(message):
        raise Interrupted

    monkeypatch.setattr(worker_pool, "REPORT_SECONDS", 0.05)
    begin = time.monotonic()
    with pytest.raises(Interrupted), WorkerPool(0, interrupt) as pool:
        pool.run(_work_without_end, [None, None], "")
    assert time.monotonic() - begin < 5
    with pytest.raises(Stopped):
        advance(1)


def test_workers_end_with_the_process_that_started_them():
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    parent = fork.Process(target=_start_a_worker, args=(fork, sender))
    parent.start()
    worker = receiver.recv()
    assert _runs(worker)
    parent.kill()
    parent.join()
    _wait_for(lambda: not _runs(worker))


def _start_a_worker(fork, sender):
    worker = fork.Process(target=_work, args=(fork, sender))
    worker.start()
    time.sleep(60)


def _work(fork, sender):
    worker_pool._begin_process(fork.Value("q", 0), fork.Event())
    sender.send(os.getpid())
    time.sleep(60)


def _runs(process):
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_an_error_in_the_text_is_the_users(folder, tmp_path):
    (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: column 'text' holds 3, not a string"):
        write(TextParts(Corpus(str(folder))), tmp_path / "out", tmp_path)


def test_an_output_that_holds_something_is_refused(folder, tmp_path):
    text, output = TextParts(Corpus(str(folder))), tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out is not empty and holds no preparation; give an empty place as --output"):
        write(text, output, tmp_path)
    (output / "notes.txt").unlink()
    write(text, output, tmp_path)
    before = content(output)
    with pytest.raises(InputError, match=r"out holds prepared text already; give another --output, or delete it first"):
        write(text, output, tmp_path)
    assert content(output) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/plan\.json cannot be written: .*; make room or mend its rights"):
        write(text, tmp_path / "file", tmp_path)


def test_what_is_no_preparation_is_refused(folder, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(
        InputError, match=r"out holds no prepared text; write it with `bigmodels prepare --output .*out"
    ):
        opened(output, tmp_path)
    write(TextParts(Corpus(str(folder))), output, tmp_path)
    marker = output / MARKER
    meta = json.loads(marker.read_text())
    marker.write_text(json.dumps({**meta, "format": 9}))
    with pytest.raises(
        InputError, match=r"out was prepared in format 9, this version reads format 1; prepare it again"
    ):
        opened(output, tmp_path)
    marker.write_text("{")
    with pytest.raises(InputError, match=r"preparation\.json is not valid JSON .*; prepare the text again"):
        opened(output, tmp_path)
    marker.rename(output / PLAN)
    with pytest.raises(InputError, match=r"unfinished preparation"):
        opened(output, tmp_path)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_noticed(folder, tmp_path, harm):
    output = write(TextParts(Corpus(str(folder))), tmp_path / "out", tmp_path)
    kind = RunError if harm != "remove" else InputError
    wanted = {"flip": r"CRC-32 \w{8} where CRC-32", "cut": r"\d+ bytes where \d+ bytes", "remove": "is missing; put it"}
    for name in ("shards/000000-00001.bin", "evaluation/val.bin"):
        path, cache = output / name, tmp_path / f"cache of {name[:4]}"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + (bytes([whole[-1] ^ 1]) if harm == "flip" else b""))
        if harm == "remove":
            path.unlink()
        text = Text(shards=str(output), cache_dir=str(cache), vocab_size=300, block_size=8, batch_size=4)
        with pytest.raises(kind, match=rf"{name}.*{wanted[harm]}.*prepare the data again"):
            _read(text)
        path.write_bytes(whole)


def _read(text):
    text.setup()
    return list(text.train_dataloader())


def test_a_missing_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(InputError, match=r"litdata is not installed; .*lightning-bigmodels\[streaming\]"):
        write(TextParts(Corpus(str(folder))), tmp_path / "out", tmp_path)
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(InputError, match=r"boto3 is not installed; .*lightning-bigmodels\[streaming\]"):
        opened("s3://bucket/prefix", tmp_path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://", r"s3:// names no bucket; write s3://BUCKET/PREFIX"),
        ("gs://bucket/prefix", r"gs://bucket/prefix is neither a folder nor s3://BUCKET/PREFIX"),
    ],
)
def test_an_odd_address_is_refused(address, message):
    with pytest.raises(InputError, match=message):
        open_store(address, 1.0)


def test_the_command_prepares_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    command = ["prepare", "--config", "text/quickstart", "--num_workers", "0", "--output", "out"]
    assert main([*command, "--data.vocab_size", "300", "--shard_bytes", "100000"]) == 0
    assert len(opened("out", tmp_path / "cache").shards) > 3
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "out"}  # no run's folder
    assert main(command) == 2
    assert "out holds prepared text already" in capsys.readouterr().err
    for arguments, message in [
        (["--output", "new"], "no data is given, and prepare knows Text; name a recipe with --config, or --data Text"),
        (["--data", "Text"], "output is missing"),
        (["--data", "Text", "--output", "new", "--num_workers=-1"], "num_workers is -1; set it to 0 or more"),
        (["--data", "Text", "--output", "new", "--shard_bytes=9"], "shard_bytes is 9; set it to 64 or more"),
        (
            ["--data", "Text", "--output", "new", "--data.shards=out"],
            "data.shards is set, and prepare reads data.sources",
        ),
    ]:
        assert main(["prepare", *arguments]) == 2
        assert message in capsys.readouterr().err
