"""What the tests of strategies rest on: workers that return, fail and hang, and a test that hears of it."""

import os
import signal
import time

import pytest
import torch
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from tests.toys import ToyData, ToyModel
from tests.workers import fit_on, run_on


def test_each_worker_returns_to_the_test():
    def work(scale):
        distributed.init_process_group("gloo")
        total = torch.tensor([scale * (distributed.get_rank() + 1)])
        distributed.all_reduce(total)
        return int(os.environ["GROUP_RANK"]), int(os.environ["LOCAL_RANK"]), int(total)

    assert run_on(4, work, 10, num_nodes=2) == [(0, 0, 100), (0, 1, 100), (1, 0, 100), (1, 1, 100)]
    assert not distributed.is_initialized()


def test_an_error_in_one_worker_ends_the_others_and_reaches_the_test():
    def work():
        distributed.init_process_group("gloo")
        if distributed.get_rank() == 1:
            raise ArithmeticError("the second one's trouble")
        distributed.barrier()

    start = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="ArithmeticError: the second one's trouble"):
        run_on(2, work)
    assert time.monotonic() - start < 30


def test_a_killed_worker_is_noticed():
    with pytest.raises(ProcessExitedException, match="process 0 terminated with signal SIGKILL"):
        run_on(1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_worker_that_hangs_is_killed():
    with pytest.raises(TimeoutError, match="2 workers did not end in 1 s"):
        run_on(2, time.sleep, 60, timeout=1)


def test_a_fit_under_a_strategy_by_name_equals_the_plain_one():
    # a batch holds all the data, so that the order in which Lightning's own sampler deals it out does not matter
    (alone,) = fit_on(1, "auto", ToyModel, lambda: ToyData(length=8, batch_size=8), report=lambda run: run.world_size)
    both = fit_on(2, "ddp", ToyModel, lambda: ToyData(length=8, batch_size=4), report=lambda run: run.world_size)
    assert [alone.report, *(fit.report for fit in both)] == [1, 2, 2]
    assert both[0].global_step == len(alone.losses) == 4
    for fit in both:
        torch.testing.assert_close(fit.weights, alone.weights)
    means = [sum(losses) / 2 for losses in zip(both[0].losses, both[1].losses, strict=True)]
    assert means == pytest.approx(alone.losses, rel=1e-5)
