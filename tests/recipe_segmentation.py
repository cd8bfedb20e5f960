"""What the family contract needs to know of recipes on `SegmentationImages`: a tiny version, what can break."""

import json

import numpy as np
import torch
from PIL import Image

from lightning_bigmodels import ImageSegmenter, SegmentationImages
from tests import contract

SIZE = 32


class Contract(contract.Contract):
    metric = "val_mean_iou"
    steps = 100
    short_steps = 6
    uneven_batch_size = 3

    def tiny(self, recipe, folder):
        model, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
        unet = {"network": "unet", "network_args": {"depth": 2, "width": 16, "norm": "group"}}
        changes = {
            "image_size": SIZE,
            "eval_size": None,
            "batch_size": 4,
            "eval_batch_size": None,
            "num_workers": 0,
            "test_fraction": 0.2,
        }
        if data["source"] == "digits":
            changes["source"] = "digits:80"
            # so few steps end at the ground alone otherwise
            unet["class_weights"] = [0.2] + [1.0] * 10
        else:
            changes |= {"source": str(street_scenes(folder / "streets")), "val_fraction": 0.0}
        options = {"lr": 0.01}
        schedule = {"class_path": "lightning_bigmodels.optim.WarmupCosine", "init_args": {"warmup": 2}}
        return {
            "trainer": {**self.lengths(), "precision": "32-true", "sync_batchnorm": False},
            "model": {
                "init_args": {
                    **unet,
                    "num_classes": model["num_classes"],
                    "backbone_weights": None,
                    "compile": False,
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": options},
                    "schedule": schedule,
                }
            },
            "data": {"init_args": changes},
        }

    def baseline(self, data_args):
        return all_of_the_commonest_class(SegmentationImages(**data_args))

    def better(self, found, baseline):
        return max(found) > 1.05 * baseline

    def predictions(self, folder, scratch):
        (scratch / "new" / "town").mkdir(parents=True)
        sizes = {"a.png": (40, 30), "town/b.jpg": (20, 50)}
        for name, (height, width) in sizes.items():
            Image.fromarray(np.full((height, width, 3), 128, dtype=np.uint8)).save(scratch / "new" / name)

        def ours(rows, run):
            assert {row["file"]: (row["height"], row["width"]) for row in rows} == sizes
            for name, (height, width) in sizes.items():
                with Image.open((run / "predictions" / name).with_suffix(".png")) as mask:
                    assert (mask.mode, mask.size) == ("P", (width, height))

        def of_the_test_part(rows, run):
            assert len(rows) >= 2
            assert all(abs(sum(row["shares"].values()) - 1) < 1e-5 for row in rows)

        return [([], of_the_test_part), (["--data.predict_source", str(scratch / "new")], ours)]

    def answers(self, model):
        images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
        probabilities = model.eval().logits({"images": images}).softmax(1)
        return probabilities.shape[1:] == (model.num_classes, SIZE, SIZE) and model.class_names is not None

    def check_export(self, folder, checkpoint):
        model = ImageSegmenter.load_from_checkpoint(checkpoint, weights_only=True).eval()
        images = torch.randint(256, (3, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model.logits({"images": images}).softmax(1)
            found = torch.export.load(folder / "model.pt2").module()(images)
        assert torch.allclose(found[0], expected, atol=1e-5)
        description = json.loads((folder / "description.json").read_text(encoding="utf-8"))
        assert model.class_names == description["class_names"]

    def broken(self, folder):
        return broken_masks(folder)


def street_scenes(folder):
    """Write Cityscapes' layout: sky, a building, a road, a car, each a colour; one picture per line of the list."""
    ids = {"sky": 23, "building": 11, "road": 7, "car": 26, "out of roi": 3}
    colors = {23: (200, 220, 255), 11: (150, 100, 80), 7: (90, 90, 95), 26: (200, 20, 20), 3: (0, 0, 0)}
    generator = np.random.default_rng(0)
    for number in range(28):
        mask = np.full((SIZE, 2 * SIZE), ids["sky"], dtype=np.uint8)
        mask[generator.integers(8, 16) :, generator.integers(0, 20) : generator.integers(30, 60)] = ids["building"]
        mask[22:] = ids["road"]
        left = generator.integers(0, 44)
        mask[20:28, left : left + 16] = ids["car"]
        mask[-2:] = ids["out of roi"]
        pixels = np.array([colors.get(i, (0, 0, 0)) for i in range(34)])[mask]
        pixels = (pixels + generator.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        part, name = "train" if number < 21 else "val", f"town/town_{number:06d}_000019"
        for path, array in {
            f"leftImg8bit/{part}/{name}_leftImg8bit.png": pixels,
            f"gtFine/{part}/{name}_gtFine_labelIds.png": mask,
        }.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / path)
    return folder


def all_of_the_commonest_class(data):
    """Return the mean IoU on the validation part of an answer that is one class, the commonest, for every pixel."""
    data.setup("fit")
    part = data.parts["val"]
    masks = part.__getitems__(list(range(len(part))))["masks"]
    counts = torch.bincount(masks[masks >= 0], minlength=len(data.class_names)).double()
    return float(counts.max() / counts.sum() / (counts > 0).sum())


def broken_masks(folder):
    """Return what can be wrong with masks: overrides, and what the one line must say."""
    for name, mask in {
        "right": np.zeros((20, 30), dtype=np.uint8),
        "value": np.full((20, 30), 99, dtype=np.uint8),
        "size": np.zeros((21, 30), dtype=np.uint8),
        "colour": np.zeros((20, 30, 3), dtype=np.uint8),
        "missing": None,
    }.items():
        for number in range(8):
            (folder / "pictures").mkdir(exist_ok=True)
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(folder / "pictures" / f"{number}.png")
            if mask is not None or number != 5:
                Image.fromarray(np.zeros((20, 30), dtype=np.uint8) if mask is None else mask).save(
                    folder / name / f"{number}.png"
                )
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.png").write_text("no picture")
    (folder / "bad.json").write_text('{"images": [')

    def data(masks, *more, pictures="pictures"):
        names = "[background, " + ", ".join(f"c{i}" for i in range(10)) + "]"
        flags = ["--data.source", str(folder / pictures), "--data.masks", str(folder / masks)]
        flags += ["--data.class_names", names, "--model.num_classes", "11", "--data.val_fraction", "0.2", *more]
        return flags

    return [
        (data("value"), [".png", "the value 99", "data.ignored_value"]),
        (data("size"), [".png", "21 x 30", "20 x 30"]),
        (data("colour"), [".png", "3 channels", "data.class_colors"]),
        (data("missing"), ["5.png", "no mask of their name"]),
        (data("gone"), ["gone", "no such folder"]),
        (data("text", pictures="text"), ["text/", ".png", "no picture"]),
        (data("bad.json"), ["bad.json", "line 1", "no JSON"]),
        (
            data("right", "--model.num_classes", "5", "--model.class_weights", "null"),
            ["11 classes", "set model.num_classes to 11"],
        ),
    ]
