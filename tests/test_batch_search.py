"""The sizes that the search tries, with made-up memory, and what it finds."""

import pytest

from lightning_bigmodels.batch_search import Room, Search, Usage
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.peak_memory import GIB


def search(need, limits, available=None, max_size=None, min_size=1):
    """Let the search run on `need(size) -> Usage` for each rank; return it and the sizes in the order tried."""
    available = available or [10**9] * len(limits)
    result = Search([Room(*pair) for pair in zip(limits, available, strict=True)], max_size, min_size)
    tried = []
    while (size := result.next_size()) is not None:
        assert size not in tried
        tried.append(size)
        result.add(size, need(size))
    return result, tried


def affine(held, fixed, row, update):
    return lambda size: [Usage(held, held + fixed + row * size, held + update)]


MEMORIES = {
    "rows alone": affine(100, 0, 7, 0),
    "much besides the rows": affine(100, 5000, 7, 0),
    "the update is the peak of small batches": affine(100, 10, 7, 3000),
    "logits in chunks": lambda n: [Usage(100, 100 + 7 * n + 50 * min(n, 20), 200)],
    "another peak from 100 rows on": lambda n: [Usage(100, max(2000 + 3 * n, 1000 + 13 * n), 200)],
    "in steps": lambda n: [Usage(100, 100 + 64 * (7 * n // 64), 200)],
}


@pytest.mark.parametrize("need", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("limit", [3200, 5200, 6789, 20_000])
def test_the_search_finds_the_largest_that_fits(need, limit):
    fitting = [size for size in range(1, 5000) if need(size)[0].peak <= limit]
    result, tried = search(need, [limit])
    assert (result.best or 0) == len(fitting)
    assert len(tried) <= 20
    if fitting:
        assert result.best + 1 in result.trials, "the next size was measured"


def test_where_memory_is_a_line_two_sizes_tell_the_rest():
    _, tried = search(affine(100, 0, 7, 0), [100 + 7 * 1000])
    assert tried == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1001]


@pytest.mark.parametrize("limit", [3200, 5200, 6789, 20_000])
@pytest.mark.parametrize("name", ["rows alone", "much besides the rows", "the update is the peak of small batches"])
def test_no_size_is_tried_that_exceeds_what_is_available(name, limit):
    need = MEMORIES[name]
    result, tried = search(need, [limit], available=[limit])
    assert all(need(size)[0].peak <= limit for size in tried if size > 1)
    if result.best is not None and result.best > 1:
        assert need(result.best + 1)[0].peak > limit, "found all the same, by prediction"
        assert f"batch_size {result.best + 1} was not tried: it may need" in str(result.result())


def test_without_a_second_size_to_draw_a_line_nothing_uncertain_is_tried():
    result, tried = search(affine(0, 50, 50, 0), [190], available=[190])
    assert (tried, result.best) == ([1], 1)
    assert search(affine(0, 50, 50, 0), [190], available=[200])[0].best == 2


def test_the_rank_with_the_least_room_decides():
    def both(n):
        return [Usage(0, 10 * n, 0), Usage(0, 10 * n, 0)]

    def uneven(n):
        return [Usage(0, 10 * n, 0), Usage(500, 500 + 10 * n, 0)]

    assert search(both, [1000, 405])[0].best == 40
    assert search(both, [405, 1000])[0].best == 40
    assert search(uneven, [1000, 1000])[0].best == 50


def test_the_largest_size_asked_for_is_the_end():
    result, tried = search(affine(100, 0, 7, 0), [10**6], max_size=48)
    assert tried == [1, 2, 4, 8, 16, 32, 48]
    assert "more than 48 was not asked for" in str(result.result())
    assert search(affine(100, 0, 7, 0), [10**6], max_size=1)[1] == [1]


def test_where_not_even_one_row_fits_the_error_says_what_to_do():
    result, tried = search(lambda n: [Usage(0, 2 * GIB, 0), Usage(0, 3 * GIB, 0)], [4 * GIB, GIB])
    assert tried == [1]
    with pytest.raises(InputError, match=r"batch_size 1 needs 3.000 GiB on rank 1, where the limit is 1.000 GiB; set "):
        result.result()


@pytest.mark.parametrize("need", MEMORIES.values(), ids=MEMORIES)
def test_where_one_row_is_too_few_the_search_begins_with_two_and_finds_the_same(need):
    result, tried = search(need, [5200], min_size=2)
    assert result.best == search(need, [5200])[0].best
    assert min(tried) == tried[0] == 2


def test_two_may_be_the_smallest_and_the_largest_or_too_many():
    need = affine(0, 0, GIB, 0)
    assert search(need, [2 * GIB], min_size=2)[0].result().batch_size == 2
    assert search(need, [9 * GIB], max_size=2, min_size=2)[1] == [2]
    with pytest.raises(InputError, match=r"batch_size 2 needs 2.000 GiB on rank 0, where the limit is 1.500 GiB; set "):
        search(need, [3 * GIB // 2], min_size=2)[0].result()
