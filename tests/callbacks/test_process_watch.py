"""Who is lost is said by name; what it is like on two hosts stands in tests/test_hosts.py."""

import time

import pytest
import torch.distributed as dist

from lightning_bigmodels.callbacks import ProcessWatch, process_watch
from lightning_bigmodels.callbacks.process_watch import _Watch
from lightning_bigmodels.errors import InputError

INTERVAL = 0.15


@pytest.fixture
def exits(monkeypatch):
    """Return the codes with which watches ended their process, which lives on here."""
    codes = []
    monkeypatch.setattr(process_watch.os, "_exit", codes.append)
    return codes


@pytest.fixture
def watches(exits):
    """Return three watches on one store, as three processes would hold them."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    made = [_Watch(dist.TCPStore("127.0.0.1", server.port), rank, 3, 6 * INTERVAL, INTERVAL) for rank in range(3)]
    for watch in made:
        watch.start()
    yield made
    for watch in made:
        watch.silence()
    time.sleep(2 * INTERVAL)


def wait_for(watch):
    assert watch._decided.wait(40 * INTERVAL)
    return watch._verdict


def test_all_others_name_the_process_that_went_silent_and_end(watches, exits, capsys):
    time.sleep(4 * INTERVAL)
    assert not any(watch._decided.is_set() for watch in watches)
    watches[1].silence()
    for rank in (0, 2):
        assert "rank 1 (process" in wait_for(watches[rank])
        assert "--ckpt_path last" in wait_for(watches[rank])
    time.sleep(4 * INTERVAL)
    assert exits == [1, 1]
    assert capsys.readouterr().err.count("bigmodels: error: rank") == 2


def test_the_first_process_is_missed_too(watches):
    watches[0].silence()
    assert wait_for(watches[2]).startswith("rank 0 (process")


def test_who_says_farewell_is_not_missed(watches):
    for watch in watches[1:]:
        watch.stop()
    time.sleep(10 * INTERVAL)
    assert not watches[0]._decided.is_set()


def test_a_failed_collective_shortens_the_wait(watches):
    for watch in watches:
        watch._patience = 1000.0
    watches[1].silence()
    started = time.monotonic()
    assert "rank 1 (process" in watches[2].verdict()
    assert time.monotonic() - started < 20 * INTERVAL


def test_no_verdict_when_all_are_there(watches):
    assert watches[2].verdict() is None


def test_a_timeout_below_three_intervals_is_refused():
    with pytest.raises(InputError, match="timeout is 1 s; set it to three intervals of 0.5 s"):
        ProcessWatch(timeout=1, interval=0.5)
