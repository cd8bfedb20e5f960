"""Parts by fraction are exact, stratified and seeded; parts that do not fit together are refused."""

import numpy as np
import pytest

from lightning_bigmodels.data.vision.labelled import (
    Labelled,
    check_classes,
    labelled,
    sorted_names,
    with_classes_of,
    with_common_groups,
)
from lightning_bigmodels.data.vision.pictures import FilePictures
from lightning_bigmodels.data.vision.splits import check_fractions, split_off
from lightning_bigmodels.errors import InputError


def part_of(names):
    return labelled(FilePictures([f"{number}.png" for number in range(len(names))]), names)


def multi(rows, names="abc"):
    labels = np.array([[name in row for name in names] for row in rows])
    return Labelled(FilePictures([f"{n}.png" for n in range(len(rows))]), np.arange(len(rows)), list(names), labels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("counts", [[50, 50], [7, 31, 2, 1], [5] * 20, [1, 1, 98], [333, 3]])
def test_fractions_are_exact_and_stratified(counts, seed):
    part = part_of([str(label) for label, count in enumerate(counts) for _ in range(count)])
    fractions = {"test": 0.2, "val": 0.15}
    found = split_off(part, fractions, seed)
    assert list(found) == ["train", "test", "val"]
    rows = np.concatenate([one.rows for one in found.values()])
    assert sorted(rows) == list(range(len(part)))
    assert found["train"].counts().min() >= 1
    for name, fraction in fractions.items():
        assert len(found[name]) == round(len(part) * fraction)
        assert np.all(np.diff(found[name].rows) > 0)
        # largest remainders: of no class one more or one fewer than its share, unless another has nothing left to give
        slack = sum(count * sum(fractions.values()) > count - 1 for count in counts)
        assert np.all(np.abs(found[name].counts() - np.array(counts) * fraction) < 1 + slack)


def test_the_seed_alone_chooses():
    part = part_of(["a", "b"] * 50)
    first, again, other = (split_off(part, {"val": 0.2}, seed)["val"].rows.tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert split_off(part, {}, 0)["train"].rows.tolist() == list(range(100))


def test_classes_of_one_example_stay_in_training():
    found = split_off(part_of(list("abcdef")), {"val": 0.5}, 0)
    assert (len(found["train"]), len(found["val"])) == (6, 0)


def test_several_labels_are_stratified_by_their_combination():
    rows = ["a", "ab", "", "c"] * 25
    found = split_off(multi(rows), {"val": 0.2}, 3)
    assert len(found["val"]) == 20
    assert sorted("".join(found["val"].names_of(index)) for index in range(20)) == sorted(["a", "ab", "", "c"] * 5)
    everything_different = multi(["a", "b", "c", "ab", "ac", "bc", "abc", ""])
    assert len(split_off(everything_different, {"val": 0.25}, 0)["val"]) == 2


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"val": 1.0}, "val_fraction is 1.0; set it from 0 to below 1"),
        ({"test": -0.1}, "test_fraction is -0.1; set it from 0 to below 1"),
        ({"test": 0.5, "val": 0.5}, r"test_fraction \+ val_fraction is 1.0; leave something to train on"),
    ],
)
def test_impossible_fractions_are_refused(fractions, message):
    with pytest.raises(InputError, match=message):
        check_fractions(fractions)


def test_groups_go_with_their_examples():
    part = part_of(["a", "b"] * 10).with_groups([str(number % 5) for number in range(20)])
    for one in split_off(part, {"val": 0.3}, 0).values():
        assert one.groups.tolist() == [row % 5 for row in one.rows]


def test_numbers_and_names_are_sorted():
    assert sorted_names({"10", "9", "01"}) == ["01", "9", "10"]
    assert sorted_names({"10", "9", "a"}) == ["10", "9", "a"]


def test_a_part_takes_the_numbers_of_training():
    train, val = part_of(["a", "b", "c"]), part_of(["c", "a", "c"])
    assert val.labels.tolist() == [1, 0, 1]
    assert with_classes_of(train, val, "val").labels.tolist() == [2, 0, 2]
    mixed = with_classes_of(multi(["a", "b", "c"]), multi(["ac", "c"], "ca"), "val")
    assert mixed.labels.tolist() == [[True, False, True], [False, False, True]]
    # a class that no example has need not be known
    assert with_classes_of(multi(["a", "b", "c"]), multi(["a"], "ax"), "val").counts().tolist() == [1, 0, 0]


def test_classes_that_do_not_fit_are_refused():
    train = part_of(["cat", "dog"])
    with pytest.raises(
        InputError,
        match=r"1\.png of the val part has the class 'dig', which no training example has; did you mean 'dog'",
    ):
        with_classes_of(train, part_of(["cat", "dig"]), "val")
    with pytest.raises(
        InputError, match=r"0\.png of the test part has the class 'x', which no .*; correct the label or"
    ):
        with_classes_of(multi(["a", "b", "c"]), multi(["x"], "x"), "test")
    with pytest.raises(
        InputError, match=r"the val examples have several classes each and those of training one; label"
    ):
        with_classes_of(train, multi(["a"]), "val")
    with pytest.raises(InputError, match=r"data: no training example of class 'b', 'c'; add some, or remove the class"):
        check_classes(multi(["a", ""]), "data")
    with pytest.raises(InputError, match=r"data holds one class only, 'a'; a classifier needs two or more"):
        check_classes(part_of(["a", "a"]), "data")


def test_groups_are_numbered_alike_in_all_parts():
    train, val = part_of(["a", "b"]).with_groups(["y", "x"]), part_of(["a"]).with_groups(["w"])
    parts = with_common_groups({"train": train, "val": val})
    assert parts["val"].group_names == parts["train"].group_names == ["w", "x", "y"]
    assert (parts["train"].groups.tolist(), parts["val"].groups.tolist()) == ([2, 1], [0])
    with pytest.raises(
        InputError, match="the val examples have no group and others have; give all parts a group column"
    ):
        with_common_groups({"train": train, "val": part_of(["a"])})
