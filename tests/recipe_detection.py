"""What the family contract needs to know of recipes on `DetectionImages`: tiny versions and what can be broken."""

import contextlib
import io
import json

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file

from lightning_bigmodels import DetectionImages, ObjectDetector
from lightning_bigmodels.export import load_exported
from lightning_bigmodels.networks.fixed_detection_check import check_found
from tests import boxes, contract

SIZE = 48
PICTURES = 200
SMALL = {"min_size": SIZE, "width": 16, "channels": 32}
# so few of the first stage's boxes are looked at by the second
FEW = {f"rpn_{kind}_nms_top_n_{part}": n for kind, n in (("pre", 200), ("post", 64)) for part in ("train", "test")}


class Contract(contract.Contract):
    metric = "val_loss"
    steps = 60
    short_steps = 6

    def tiny(self, recipe, folder):
        full = recipe["model"]["init_args"]["network"]
        data = {"num_pictures": PICTURES, "picture_size": SIZE, "batch_size": 8, "num_workers": 0}
        data |= {"val_fraction": 0.1, "test_fraction": 0.1}
        model = {"network": full, "network_args": {**SMALL, "num_convs": 1, "score_thresh": 0.05}}
        model |= {"num_classes": 10, "optimizer": {"init_args": {"lr": 0.01}}}
        if full.startswith("fasterrcnn"):
            path = folder / "coco" / "boxes.json"
            if not path.exists():
                path = boxes.write_coco(folder / "coco", boxes.digits(PICTURES, SIZE))
            data |= {"source": str(path), "images": str(folder / "coco" / "pictures")}
            data |= {"val_source": None, "val_images": None, "augmentations": None, "bad_boxes": "error"}
            # as many proposals of each picture as there are for certain: the loss is a mean over those drawn
            model |= {"network": "fasterrcnn_small", "network_args": {**SMALL, **FEW, "box_batch_size_per_image": 16}}
            model |= {"backbone_weights": None, "trainable_backbone_layers": None, "frozen_batch_norm": None}
            model |= {"optimizer": {"init_args": {"lr": 0.05}}}
            model |= {"schedule": {"init_args": {"warmup": 5}}}
        return {"trainer": self.lengths(), "model": {"init_args": model}, "data": {"init_args": data}}

    def baseline(self, data_args):
        """Return the loss of a network that has just been drawn."""
        data = DetectionImages(**{**data_args, "augmentations": None, "source": data_args.get("source", "digits")})
        data.setup("validate")
        torch.manual_seed(0)
        two_stages = data.source != "digits"
        model = ObjectDetector("fasterrcnn_small" if two_stages else "fcos_small", num_classes=10, network_args=SMALL)
        model.configure_model()
        network, examples = model.network.eval(), data.parts["val"]
        losses = []
        with torch.no_grad():
            for index in range(len(examples)):
                image, target = examples.read(index)
                losses.append(float(sum(network([image], [target], [index]).values())))
        return sum(losses) / len(losses)

    def better(self, found, baseline):
        return min(found) < 0.75 * baseline

    def predictions(self, folder, scratch):
        for number, (image, _) in enumerate(boxes.digits(3, SIZE, "test")):
            boxes.save(scratch / "bare" / f"{number}.png", image)

        def judged(rows, folder):
            assert len(rows) == PICTURES // 10
            results = json.loads((folder / "predictions.json").read_text())
            assert len(results) == sum(len(row["boxes"]) for row in rows) > 0
            assert len(list((folder / "predictions").glob("*.png"))) == len(rows)
            if "digits" in rows[0]["file"]:
                assert precision(results) > 0.05
            else:
                assert all(result["category_id"] in range(3, 13) for result in results)
                assert all(row["image_id"] == 10 + int(row["file"][-7:-4]) for row in rows)

        def bare(rows, folder):
            assert [row["image_id"] for row in rows] == [0, 1, 2]
            assert all(set(row["names"]) <= set("0123456789") for row in rows)

        return [([], judged), (["--data.predict_source", str(scratch / "bare")], bare)]

    def answers(self, model):
        image = boxes.digits(1, SIZE)[0].image
        with torch.no_grad():
            (found,) = model.eval().detect([image])
        return model.class_names == list("0123456789") and len(found["boxes"]) == len(found["scores"]) > 0

    def check_export(self, folder, checkpoint):
        model = ObjectDetector.load_from_checkpoint(checkpoint, weights_only=True).eval()
        for name, value in load_file(folder / "weights.safetensors").items():
            assert torch.equal(value, model.network.state_dict()[name]), name
        description = json.loads((folder / "description.json").read_text())
        assert description["class_names"] == list("0123456789")
        assert description["unsupported"] == {}
        fixed = model.exportable().network
        for kind in ("torch", "onnx"):
            run = load_exported(folder, kind)
            for image, _ in boxes.digits(2, SIZE, "test"):
                with torch.no_grad():
                    (expected,) = model.detect([image])
                assert len(expected["labels"]) > 0
                found = run(image)
                # of scores that differ by rounding alone either may be the better one
                for answer in (found, boxes.padded(expected, len(found["labels"]))):
                    check_found(fixed, image, tuple(answer.values()), 1e-4)
                assert boxes.share_found(expected, found) > 0.9

    def without_randomness(self, recipe):
        # in the first steps many proposals score nearly the same, and rounding decides which of them survive
        return ["--trainer.precision=64-true"]

    def broken(self, folder):
        return broken_boxes(folder)


def precision(results):
    """Return COCO's average precision at an overlap of one half, by pycocotools alone, of predictions on digits."""
    examples = boxes.digits(PICTURES // 10, SIZE, "test")
    truth = {"info": {}, "images": [{"id": i} for i in range(len(examples))], "categories": [], "annotations": []}
    truth["categories"] = [{"id": label} for label in range(1, 11)]
    for image_id, (_, target) in enumerate(examples):
        for (left, top, right, bottom), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            size = (right - left, bottom - top)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [left, top, *size],
                    "area": size[0] * size[1],
                    "iscrowd": 0,
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats[1]


def broken_boxes(folder):
    """Return what can be wrong with boxes: flags, and what the one line must say."""
    good = boxes.write_coco(folder, boxes.digits(30, SIZE))
    content = json.loads(good.read_text())

    def changed(name, change):
        other = json.loads(good.read_text())
        change(other)
        (folder / name).write_text(json.dumps(other))
        return coco(name)

    def coco(name):
        return ["--data.source", str(folder / name), "--data.images", str(folder / "pictures")]

    def box(*corners):
        return lambda other: other["annotations"][0].update(bbox=list(corners))

    def cut_off(other):
        data = (folder / "pictures" / "000.png").read_bytes()
        for image in other["images"]:
            (folder / "pictures" / f"cut_{image['file_name']}").write_bytes(data[: len(data) // 2])
            image["file_name"] = f"cut_{image['file_name']}"

    (folder / "half.json").write_text('{"images": [],\n"annotations": [\n')
    csv = boxes.write_csv(folder, [["pictures/000.png", 1, 1, 9, 9, "3"], ["pictures/001.png", 9, 1, 2, 9, "3"]])
    voc = boxes.write_voc(folder / "voc", "one", [("cat", (1, 1, 20, 20)), ("cat", (1, 1, 20, 200))])
    first = content["annotations"][0]["id"]
    return [
        (["--data.source", str(folder / "gone.json")], ["gone.json", "no such file"]),
        (coco("half.json"), ["half.json, line 3", "no JSON"]),
        (changed("outside.json", box(40, 2, 20, 4)), [f"annotation {first}", "[40, 2, 60, 6]", "outside", "48 x 48"]),
        (changed("empty.json", box(4, 2, 0, 4)), ["empty.json", f"annotation {first}", "is empty"]),
        (changed("inverted.json", box(4, 2, -2, 4)), [f"annotation {first}", "inverted"]),
        (changed("nan.json", box(4, 2, float("nan"), 4)), [f"annotation {first}", "finite"]),
        (
            changed("class.json", lambda other: other["annotations"][0].update(category_id=99)),
            [f"annotation {first}", "unknown class '99'"],
        ),
        (
            changed("twice.json", lambda other: other["annotations"][1].update(id=first)),
            [f"annotation {first}", "occurs twice"],
        ),
        (
            changed("missing.json", lambda other: other["images"][1].update(file_name="gone.png")),
            ["missing.json, image 11", "gone.png"],
        ),
        (changed("cut.json", cut_off), ["cut_0", "damaged or cut off", "replace or remove"]),
        (["--data.source", str(csv), "--data.images", str(folder)], ["boxes.csv, line 3", "inverted"]),
        (["--data.source", str(voc), "--data.images", "null"], ["one.xml, line 7", "outside"]),
        (["--model.num_classes", "7"], ["10 classes", "num_classes is 7"]),
    ]
