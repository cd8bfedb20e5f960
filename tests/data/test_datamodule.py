"""What all data types share: the number of batches on any number of processes, and where a run goes on."""

import pytest

from lightning_bigmodels.data import DataModule
from lightning_bigmodels.errors import InputError


class Fifty(DataModule):
    """Fifty samples on as many processes as told."""

    def __init__(self, processes=1, batch_size=4, **options):
        values = {"eval_batch_size": None, "num_workers": 0, "seed": 0}
        super().__init__(batch_size=batch_size, **{**values, **options})
        self.processes = processes

    def example_batch(self, batch_size):
        return {}

    @property
    def num_train_samples(self):
        return 50

    def shard(self):
        return self.processes, 0


def test_batches_of_an_epoch():
    assert (Fifty().num_train_batches, Fifty(3).num_train_batches) == (12, 4)
    assert (Fifty().global_batch_size, Fifty(3).global_batch_size) == (4, 12)
    with pytest.raises(
        InputError, match="50 training samples do not fill one batch of 20 on each of 3 processes; set a"
    ):
        Fifty(3, batch_size=20).num_train_batches  # noqa: B018


@pytest.mark.parametrize(
    ("processes", "samples", "num_batches", "behind"),
    [
        pytest.param(1, 20, 12, 5, id="a whole number of batches"),
        pytest.param(2, 24, 6, 3, id="on other processes"),
        pytest.param(2, 20, 6, 3, id="between two batches, of which three more are to come"),
        pytest.param(2, 17, 6, 2, id="between two batches, and four"),
        pytest.param(2, 2, 6, 0, id="in the first batch, with a rest at the end that makes up for it"),
        pytest.param(2, 43, 6, 6, id="too near the end for a batch"),
        pytest.param(2, 48, 6, 6, id="at the end"),
        pytest.param(2, 8, 3, 1, id="in an epoch that is cut short"),
        pytest.param(2, 12, 3, 2, id="between two batches of an epoch that is cut short"),
        pytest.param(2, 40, 3, 3, id="behind the end of an epoch that is cut short"),
    ],
)
def test_batches_behind_a_place(processes, samples, num_batches, behind):
    data = Fifty(processes)
    assert data.num_batches_behind(samples, num_batches) == behind
    end = 50 if num_batches == data.num_train_batches else num_batches * data.global_batch_size
    left = end - samples - (num_batches - behind) * data.global_batch_size
    assert behind == num_batches or 0 <= left < data.global_batch_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; set it to 1 or more"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0; set it to 1 or more"),
        ({"num_workers": -1}, "num_workers is -1; set it to 0 or more"),
        ({"seed": -1}, "seed is -1; set it to 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Fifty(**options)
