"""What the family contract needs to know of recipes on `Images`: a tiny version, a baseline, and what can be broken."""

import json
import math

import onnxruntime
import torch

from lightning_bigmodels import ImageClassifier, Images
from tests import contract
from tests.toy_pictures import write, write_folders, write_truncated

CLASSES = {"bird": 40, "cat": 40, "dog": 40, "fox": 40}
SIZE = 16


class Contract(contract.Contract):
    metric = "val_loss"

    def tiny(self, recipe, folder):
        write_classes(folder / "classes")
        # an average over thousands of steps would be one of the beginning
        callbacks = [
            {**one, "init_args": {"decay": 0.9, "warm_up": True}} if one["class_path"] == "WeightAverage" else one
            for one in recipe["trainer"]["callbacks"]
        ]
        return {
            "trainer": {**self.lengths(), "sync_batchnorm": True, "callbacks": callbacks},
            "model": {"init_args": tiny_model(recipe["model"]["init_args"])},
            "data": {
                "init_args": {
                    "source": str(folder / "classes"),
                    "val_source": None,
                    "test_source": None,
                    "predict_source": None,
                    "root": None,
                    "val_fraction": 0.2,
                    "test_fraction": 0.2,
                    "image_size": SIZE,
                    "eval_resize": None,
                    "progressive_sizes": None,
                    "horizontal_flip": 0.0,  # the class is a place
                    "crop_scale": None,
                    "augmentations": None,
                    "crop_padding": 1,
                    "batch_size": 16,
                    "eval_batch_size": None,
                    "num_workers": 0,
                }
            },
        }

    def baseline(self, data_args):
        data = Images(**data_args)
        data.setup("validate")
        counts = torch.tensor([0.0] * len(data.class_names))
        for batch in data.val_dataloader():
            counts += torch.bincount(batch["labels"], minlength=len(counts))
        shares = counts / counts.sum()
        return -float((shares * shares.log()).sum())

    def better(self, found, baseline):
        return min(found) < 0.7 * baseline

    def predictions(self, folder, scratch):
        for number in range(8):
            write(scratch / "new" / f"{number}.png", number % 4, 100 + number)

        def held_out(rows, folder):
            assert len(rows) == 32
            assert sum(f"/{row['label']}/" in row["file"] for row in rows) > 16

        def ours(rows, folder):
            assert [row["file"] for row in rows] == [str(scratch / "new" / f"{number}.png") for number in range(8)]
            for row in rows:
                assert list(row["probabilities"]) == list(CLASSES)
                assert math.isclose(sum(row["probabilities"].values()), 1, rel_tol=1e-3)
                assert row["probability"] == max(row["probabilities"].values())
            assert sum(row["label"] == list(CLASSES)[index % 4] for index, row in enumerate(rows)) > 4

        # a bare folder: the training pictures are gone
        bare = ["--data.predict_source", str(scratch / "new"), "--data.source", str(scratch / "gone")]
        return [([], held_out), (bare, ours)]

    def answers(self, model):
        images = torch.zeros(2, model.channels, SIZE, SIZE, dtype=torch.uint8)
        with torch.no_grad():
            probabilities = model.eval().probabilities(model.logits({"images": images}))
        return model.class_names == list(CLASSES) and bool((probabilities.sum(1) - 1).abs().max() < 1e-3)

    def check_export(self, folder, checkpoint):
        model = ImageClassifier.load_from_checkpoint(checkpoint, weights_only=True, map_location="cpu").eval()
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(256, (3, model.channels, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            expected = model.probabilities(model.logits({"images": images}))
            (found,) = torch.export.load(folder / "model.pt2").module()(images)
        assert torch.allclose(found, expected, atol=1e-5)
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        (found,) = session.run(None, {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)
        assert list(CLASSES)[2] in json.dumps(json.loads((folder / "description.json").read_text(encoding="utf-8")))

    def broken(self, folder):
        return broken_pictures(folder)

    def without_randomness(self, recipe):
        # crops and augmentations belong to the sample: they may stay
        return ["--model.mixup_alpha=0", "--model.cutmix_alpha=0"]


def write_classes(folder):
    """Write the tiny pictures, every tenth in a wrong folder: nothing that learns them reaches a loss of zero."""
    write_folders(folder, CLASSES)
    for label, (name, count) in enumerate(CLASSES.items()):
        for number in range(0, count, 10):
            write(folder / name / f"{number:03}.png", (label + 1) % len(CLASSES), number)


def tiny_model(own):
    """Return overrides: the small CNN as it is, and in place of any other network a small one with batch norm."""
    args = {"num_classes": len(CLASSES), "image_size": SIZE, "weights": None, "unfreeze_after": 0.0, "compile": False}
    if own["network"] != "small_cnn":
        args |= {"network": "small_resnet", "network_args": {"widths": [8, 16], "num_blocks": 1}}
    # a little of them is enough to see that a resume draws alike
    args |= {name: 0.1 for name in ("mixup_alpha", "cutmix_alpha") if own.get(name)}
    if "layer_decay" in own:
        args["layer_decay"] = 0.95
    if "optimizer" in own:
        # Adam would make steps of gradients that are rounding alone, which differ between strategies
        sgd = own["optimizer"]["class_path"].endswith("SGD")
        args["optimizer"] = {"init_args": {"lr": 0.05} if sgd else {"lr": 0.003, "eps": 1e-4}}
    return args


def broken_pictures(folder):
    """Return what can be wrong with labelled pictures: overrides, and what the one line must say."""
    few = dict.fromkeys(CLASSES, 5)
    cut = write_truncated(write_folders(folder / "cut", few) / "cat" / "broken.jpg")
    text = write_folders(folder / "text", few) / "dog" / "text.png"
    text.write_text("no picture")
    (write_folders(folder / "empty", few) / "eel").mkdir()
    write_folders(folder / "val", {"cat": 1, "wolf": 1})
    write_folders(folder / "three", {"bird": 8, "cat": 8, "dog": 8})
    write_folders(folder / "fine", few)
    (folder / "line.csv").write_text("path,label\nfine/cat/000.png,cat\nfine/dog/000.png\n")
    (folder / "gone.csv").write_text("path,label\nfine/cat/000.png,cat\nfine/cat/999.png,cat\n")
    (folder / "column.csv").write_text("file,label\nfine/cat/000.png,cat\n")

    def source(name, *more):
        return ["--data.source", str(folder / name), *more]

    everything = ["--data.val_fraction=0", "--data.test_fraction=0"]
    return [
        (source("nowhere"), ["nowhere", "name a folder"]),
        (source("cut", *everything), [cut.name, "cut off", "replace or remove"]),
        (source("text", *everything), [text.name, "no picture", "replace or remove"]),
        (source("empty"), ["eel", "no picture", "add some"]),
        (source("fine", "--data.val_source", str(folder / "val")), ["wolf", "no training example"]),
        (source("three"), ["3 classes", "num_classes"]),
        (source("line.csv"), ["line.csv, line 3", "1 values"]),
        (source("gone.csv"), ["gone.csv, line 3", "999.png"]),
        (source("column.csv"), ["no column 'path'", "data.path_column"]),
        (source("fine", "--data.batch_size=99"), ["99", "batch_size"]),
        (source("fine", "--data.channels=2"), ["channels"]),
    ]
