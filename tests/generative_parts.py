"""What contracts of recipes that make pictures share: tiny digits, callbacks that do less, pictures by number."""

from PIL import Image


def digits(size, **changes):
    """Return `data` of a recipe as the digits of scikit-learn, with `changes`."""
    values = {
        "source": "sklearn-digits",
        "val_fraction": 0.05,
        "test_fraction": 0.05,
        "image_size": size,
        "batch_size": 16,
        "eval_batch_size": None,
        "num_workers": 0,
    }
    return {"init_args": {**values, **changes}}


def callbacks_of(recipe, changes):
    """Return the callbacks of a recipe, with `changes` of the arguments by class."""
    return [
        {**one, "init_args": {**one.get("init_args", {}), **changes.get(one["class_path"], {})}}
        for one in recipe["trainer"]["callbacks"]
    ]


def made_of_noise(scratch, size, num_classes, seed=None):
    """Return what predict makes of nothing: of each class in turn, and of the classes that are asked for.

    Args:
        scratch: A folder, in which there are no training pictures.
        size: Height and width of a picture.
        num_classes: Of the model.
        seed: Of every picture; None: each has one of its own.
    """

    def in_turn(rows, folder):
        assert len(rows) == 7
        seeds = {row["seed"] for row in rows}
        assert len(seeds) == 7 if seed is None else seeds == {seed}
        for row in rows:
            with Image.open(folder / row["picture"]) as image:
                assert image.size == (size, size)
        assert len({(folder / row["picture"]).read_bytes() for row in rows}) == 7
        if num_classes:
            assert [row["class"] for row in rows] == list("0123456")

    def asked(rows, folder):
        assert [row["class"] for row in rows] == ["3", "1", "3", "1"]

    bare = ["--data.source", str(scratch / "gone"), "--data.batch_size=3"]
    runs = [(["--data.num_generated=7", *bare], in_turn)]
    if num_classes:
        runs.append((["--data.num_generated=4", '--data.generated_classes=["3","1"]', *bare], asked))
    return runs
