"""Two sets of features compared: closed forms, sets made by hand, and any number of processes."""

import pytest
import torch
import torch.distributed as dist

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.tasks.sample_comparison import (
    SampleComparison,
    frechet_distance,
    kernel_distance,
    mean_distance,
    precision_and_recall,
)
from tests.workers import run_on


def features(number, size=4, seed=0):
    return torch.randn(number, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def test_the_frechet_distance_of_two_normal_distributions_is_their_closed_form():
    sample = features(60) - features(60).mean(0)
    # of mean 0 and covariance 1, exactly
    white = sample @ torch.linalg.inv(torch.linalg.cholesky(sample.T @ sample / 59)).T
    turn = torch.linalg.qr(features(4, 4, seed=1)).Q
    a, b = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 2.0, 0.1, 1.0]).double()
    shift = torch.tensor([0.5, 0.0, -1.0, 2.0]).double()
    real, made = (white * a) @ turn, (white * b + shift) @ turn
    expected = shift.square().sum() + (a - b).square().sum()
    torch.testing.assert_close(frechet_distance(real, made), expected, rtol=1e-9, atol=0)
    # covariances with other axes: the trace of the root of their product, by way of a symmetric root
    skew = features(4, 4, seed=2)
    other = white @ skew.T
    root = torch.linalg.eigvalsh(torch.diag(a) @ skew @ skew.T @ torch.diag(a)).sqrt().sum()
    expected = a.square().sum() + skew.square().sum() - 2 * root
    torch.testing.assert_close(frechet_distance(white * a, other), expected, rtol=1e-9, atol=0)


def test_the_kernel_distance_is_its_formula_without_the_pairs_of_one():
    real, made = features(5), features(5, seed=1) + 1

    def kernel(x, y):
        return (x @ y.T / 4 + 1) ** 3

    def pairs(x):
        return (kernel(x, x).sum() - kernel(x, x).diag().sum()) / (5 * 4)

    expected = pairs(real) + pairs(made) - 2 * kernel(real, made).mean()
    torch.testing.assert_close(kernel_distance(real, made), expected)


def test_random_subsets_are_always_the_same_and_leave_the_global_stream_alone():
    real, made = features(1010), features(1010, seed=1)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(kernel_distance(real, made))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]
    assert abs(found[0]) < 0.05 < kernel_distance(real, made + 0.5)


def test_precision_and_recall_of_sets_made_by_hand():
    real = features(30)
    assert precision_and_recall(real, real) == (1, 1)
    assert precision_and_recall(real, real + 100) == (0, 0)
    # half of the real ones' clusters are made, and nothing else
    clusters = torch.cat([real * 0.01, real * 0.01 + 50])
    assert precision_and_recall(clusters, clusters[:30]) == (1, 0.5)
    assert precision_and_recall(clusters[:30], clusters) == (0.5, 1)


def test_precision_and_recall_worked_out_on_a_line():
    real, made = column(0, 1, 3, 7), column(2, 6, 20, 21)
    # distances to the second neighbour: real 3, 2, 3, 6; made 18, 14, 14, 15
    assert precision_and_recall(real, made, neighbours=2) == (0.5, 1)
    # to the first: real 1, 1, 2, 4; made 4, 4, 1, 1
    assert precision_and_recall(real, made, neighbours=1) == (0.5, 1)
    assert precision_and_recall(real, column(12, 20, 21, 22), neighbours=1) == (0, 0.25)
    # no more neighbours than there are
    assert precision_and_recall(real, made, neighbours=9) == precision_and_recall(real, made, neighbours=3)


def test_the_mean_distance_is_that_of_all_pairs_and_of_copies_it_is_zero():
    x = features(1500)  # several blocks of rows
    expected = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum() / (1500 * 1499)
    torch.testing.assert_close(mean_distance(x), expected)
    assert mean_distance(x[:1].expand(40, -1) * 1000) == 0


def test_diversity_is_the_ratio_of_mean_distances():
    metric = SampleComparison()
    metric.update(torch.arange(20), features(20), 0.3 * features(20))
    torch.testing.assert_close(metric.compute()["diversity"], torch.tensor(0.3).double())


def test_one_pair_is_too_little():
    metric = SampleComparison()
    metric.update(torch.arange(1), features(1), features(1))
    with pytest.raises(InputError, match="the number of pictures to compare is 1; give 2 or more for validation"):
        metric.compute()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_see_unequally_many_find_the_numbers_of_one(processes):
    real, made = features(11, 6).float(), features(11, 6, seed=1).float()
    alone = SampleComparison()
    alone.update(torch.arange(11), real, made)

    def work():
        dist.init_process_group("gloo")
        metric = SampleComparison()
        for start in range(dist.get_rank(), 12, 2 * processes):
            places = torch.arange(start, min(start + processes + 1, 11), processes)  # empty at the end, for some
            metric.update(places, real[places], made[places])
        return metric.compute()

    for found in run_on(processes, work):
        assert found == alone.compute()
