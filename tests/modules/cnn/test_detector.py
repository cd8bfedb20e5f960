"""ObjectDetector: every network of the registry, losses and answers, processes without boxes, names that travel."""

import json

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from lightning_bigmodels import DetectionImages, ObjectDetector
from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.cnn import detectors
from lightning_bigmodels.networks.detection import PictureSampler
from tests import boxes
from tests.workers import fit_on

SMALL = {"min_size": 48, "width": 8, "channels": 32}
OWN = tuple(detectors.OWN)


def detector(name="fcos_small", **arguments):
    torch.manual_seed(0)
    model = ObjectDetector(name, **{"num_classes": 10, "network_args": SMALL, **arguments})
    model.configure_model()
    return model


def objects(number=3, masks=False):
    """Return pictures and targets, the last one without objects."""
    examples = boxes.digits(number)
    targets = [dict(target) for _, target in examples]
    targets[-1] = {name: value[:0] for name, value in targets[-1].items()}
    for target in targets if masks else ():
        target["masks"] = torch.zeros(len(target["labels"]), 48, 48, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
    return [image for image, _ in examples], targets


# ---- networks


@pytest.mark.parametrize("name", detectors.detector_names())
def test_every_detector_builds_on_meta(name):
    model = ObjectDetector(name, num_classes=3)
    with torch.device("meta"):
        model.configure_model()
    assert all(p.is_meta for p in model.network.parameters())
    assert model.output_modules() or "ssd" in name
    known = {id(module) for module in model.network.modules()}
    assert all(id(block) in known for block in model.blocks())


def test_the_registry_holds_what_torchvision_has():
    known = set(torchvision.models.list_models(module=torchvision.models.detection))
    assert set(detectors.detector_names()) == {*OWN, *known} - {"keypointrcnn_resnet50_fpn"}


@pytest.mark.parametrize("name", OWN)
def test_every_parameter_of_a_small_one_gets_a_gradient(name):
    model = detector(name)
    images, targets = objects(masks=True)
    losses = model.network(images, targets, [0, 1, 2])
    assert tuple(sorted(n.removeprefix("loss_") for n in losses)) == tuple(sorted(detectors.loss_names(name)))
    sum(losses.values()).backward()
    assert [n for n, p in model.network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["fcos_small", "fasterrcnn_small"])
def test_losses_in_evaluation_are_those_of_training(name):
    # group norm and no dropout: the two modes differ in nothing but what they return
    model = detector(name)
    images, targets = objects()
    trained = model.network.train()(images, targets, [5, 6, 7])
    judged = model.network.eval()(images, targets, [5, 6, 7])
    assert all(torch.equal(trained[n], judged[n]) for n in trained)
    assert not any(module.training for module in model.network.modules())
    assert isinstance(model.network(images)[0], dict)


def test_what_is_drawn_for_a_picture_does_not_hang_on_its_neighbours():
    sampler = PictureSampler(8, 0.5)
    rows = [torch.randint(-1, 3, (60,), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    sampler.seeds = [1, 2, 3]
    whole = sampler(rows)
    sampler.seeds = [3]
    alone = sampler(rows[2:])
    for kind in (0, 1):
        assert torch.equal(whole[kind][2], alone[kind][0])
        assert whole[kind][2].sum() == 4
    assert (rows[2][whole[0][2].bool()] >= 1).all()
    assert (rows[2][whole[1][2].bool()] == 0).all()


def test_what_is_found_does_not_hang_on_the_neighbours_size():
    model = detector(network_args={**SMALL, "score_thresh": 0.0}).eval()
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((48, 48), (60, 90))]
    with torch.no_grad():
        both, alone = model.detect(images), model.detect(images[:1])
    assert all(torch.equal(both[0][name], alone[0][name]) for name in alone[0])
    assert len(both[0]["boxes"]) > 0


# ---- weights


def test_weights_of_another_number_of_classes_keep_all_but_the_head(tmp_path):
    torch.save(detector(num_classes=4).network.state_dict(), tmp_path / "w.pth")
    model = detector(weights=str(tmp_path / "w.pth"))
    old = torch.load(tmp_path / "w.pth")
    new = model.network.state_dict()
    changed = {key for key in new if old[key].shape != new[key].shape or not torch.equal(old[key], new[key])}
    assert changed == {f"body.head.classification_head.cls_logits.{kind}" for kind in ("weight", "bias")}
    with pytest.raises(InputError, match=r"w\.pth has no weights of the right shape for .* of fcos_small, the first"):
        detector(weights=str(tmp_path / "w.pth"), network_args={**SMALL, "width": 16})


@pytest.mark.parametrize(
    ("name", "classifier"),
    [("fasterrcnn_mobilenet_v3_large_320_fpn", "mobilenet_v3_large"), ("fcos_resnet50_fpn", "resnet50")],
)
def test_a_classifiers_weights_fill_the_backbone_which_is_frozen_as_in_torchvision(tmp_path, name, classifier):
    torch.save(torchvision.models.get_model(classifier).state_dict(), tmp_path / "c.pth")
    model = ObjectDetector(name, num_classes=2, backbone_weights=str(tmp_path / "c.pth"))
    model.configure_model()
    body = model.network.body.backbone.body
    given = {key.removeprefix("features."): value for key, value in torch.load(tmp_path / "c.pth").items()}
    for key, value in body.state_dict().items():
        assert torch.equal(value, given[key]), key
    assert any(isinstance(module, FrozenBatchNorm2d) for module in body.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    frozen = [key for key, p in body.named_parameters() if not p.requires_grad]
    first = ("conv1", "layer1.") if classifier == "resnet50" else ("0.", "1.", "2.", "3.", "4.", "5.", "6.")
    assert frozen == [key for key, _ in body.named_parameters() if key.startswith(first)]


def test_a_backbones_weights_are_refused_where_they_are_anothers(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "c.pth")
    with torch.device("meta"):
        body = detectors.build_body("fasterrcnn_resnet50_fpn", 2, {})
    with pytest.raises(InputError, match="name weights of resnet50, the backbone of fasterrcnn_resnet50_fpn"):
        detectors.load_backbone(body, "fasterrcnn_resnet50_fpn", str(tmp_path / "c.pth"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "fcos_smal"}, "no detection network is named 'fcos_smal'; did you mean 'fcos_small'"),
        ({"network": "keypointrcnn_resnet50_fpn"}, "finds keypoints, which neither .* name one of fcos_small"),
        ({"network_args": {"minsize": 3}}, "no argument 'minsize' in network_args; did you mean 'min_size'"),
        ({"num_classes": 0}, "num_classes is 0; set it to 1 or more"),
        ({"num_classes": None}, "num_classes is not known; set model.num_classes"),
        ({"drawn_score": 2.0}, "drawn_score is 2.0"),
        ({"weights": "a.pth", "backbone_weights": "b.pth"}, "set either weights or backbone_weights"),
        ({"weights": "DEFAULT"}, "no weights 'DEFAULT' for fcos_small; name a file"),
        ({"weights": "gone.pth"}, "gone.pth: no such file of weights"),
        ({"network": "ssd300_vgg16", "weights": "COCO_V2", "network_args": {}}, "no weights 'COCO_V2'"),
        ({"backbone_weights": "DEFAULT"}, "no classifiers like the backbone of fcos_small"),
        ({"trainable_backbone_layers": 2}, "fcos_small has no stages to freeze"),
        (
            {"network": "retinanet_resnet50_fpn", "trainable_backbone_layers": 6, "network_args": {}},
            "trainable_backbone_layers is 6; retinanet_resnet50_fpn takes 0 to 5",
        ),
        (
            {"network": "ssdlite320_mobilenet_v3_large", "backbone_weights": "DEFAULT", "network_args": {}},
            "no classifier has the backbone of ssdlite320_mobilenet_v3_large; set weights",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        detector(**{"name": arguments.pop("network", "fcos_small"), **arguments})


# ---- training


class Uneven(DetectionImages):
    """Batches of which one process's hold no box, or count for nothing."""

    def __init__(self, empty):
        super().__init__("digits", num_pictures=40, picture_size=48, batch_size=2)
        self.empty = empty

    def on_before_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if self.trainer.global_rank == 1:
            batch["targets"] = [{name: value[:0] for name, value in t.items()} for t in batch["targets"]]
            if self.empty == "pictures":
                batch["indices"] = torch.full_like(batch["indices"], FILLER)
        return batch


@pytest.mark.parametrize("empty", ["boxes", "pictures"])
@pytest.mark.parametrize("name", ["fcos_small", "maskrcnn_small"])
def test_a_process_without_boxes_or_pictures_does_not_hang_the_others(name, empty):
    def data():
        module = Uneven(empty)
        if name == "maskrcnn_small":
            before = module.on_before_batch_transfer

            def masked(batch, dataloader_idx):
                batch = before(batch, dataloader_idx)
                for target in batch["targets"]:
                    target["masks"] = torch.ones(len(target["labels"]), 48, 48, dtype=torch.uint8)
                return batch

            module.on_before_batch_transfer = masked
            module.masks = True
        return module

    def build():
        return ObjectDetector(name, num_classes=10, network_args=SMALL)

    first, second = fit_on(2, "ddp", build, data, max_steps=2, timeout=60)
    assert all(torch.equal(value, second.weights[key]) for key, value in first.weights.items())
    assert all(torch.isfinite(value).all() for value in first.weights.values())


# ---- names, predictions, pictures


def batch_of(images, targets):
    number = len(images)
    batch = {"images": images, "targets": targets, "indices": torch.arange(number)}
    return {**batch, "files": [f"{n}.png" for n in range(number)], "image_ids": list(range(7, 7 + number))}


@pytest.mark.parametrize("name", ["fcos_small", "maskrcnn_small"])
def test_predictions_become_rows_coco_results_and_pictures(name):
    score = "box_score_thresh" if "rcnn" in name else "score_thresh"
    model = detector(name, network_args={**SMALL, score: 0.0}, drawn_score=0.0).eval()
    model.class_names, model.category_ids = [f"kind {n}" for n in range(10)], list(range(20, 30))
    images, targets = objects(masks=True)
    batch = batch_of(images, targets)
    batch["indices"][1] = FILLER
    with torch.no_grad():
        rows = model.predict_step(batch, 0)
    assert [row["index"] for row in rows] == [0, 2]
    assert rows[0]["names"][0] == f"kind {rows[0]['labels'][0] - 1}"
    rows = json.loads(json.dumps(rows))
    (result, *_) = results = model.collect_predictions(iter(rows))["predictions.json"]
    assert len(results) == sum(len(row["boxes"]) for row in rows) > 0
    left, top, right, bottom = rows[0]["boxes"][0]
    assert result["bbox"] == [left, top, right - left, bottom - top]
    assert (result["image_id"], result["category_id"]) == (7, 19 + rows[0]["labels"][0])
    assert ("segmentation" in result) == (name == "maskrcnn_small")
    drawn = dict(model.draw_predictions(batch, rows))
    assert list(drawn) == ["000000_0", "000002_2"]
    assert all(p.dtype == torch.uint8 and tuple(p.shape) == (3, 288, 288) for p in drawn.values())
    with torch.no_grad():
        pictures = model.draw(batch)
    assert [tuple(p.shape) for p in pictures] == [(3, 288, 580)] * 2


def test_a_boxs_edges_are_drawn_where_it_is():
    model = detector()
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    found = {"boxes": torch.tensor([[8.0, 20, 40, 60]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    drawn = model._draw_found(image, found).any(dim=0)
    rows, columns = (drawn.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    assert abs(int(columns[0]) - 4 * 8) <= 2
    assert abs(int(columns[-1]) - 4 * 40) <= 2
    assert abs(int(rows[-1]) - 4 * 60) <= 2


def test_names_and_numbers_travel_in_the_checkpoint(tmp_path, trainer):
    data = DetectionImages("digits", num_pictures=40, picture_size=48, batch_size=4)
    model = ObjectDetector("fcos_small", network_args=SMALL)
    run = trainer(max_steps=1, limit_val_batches=1)
    run.fit(model, data)
    assert model.num_classes == 10
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = ObjectDetector.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.class_names == [str(digit) for digit in range(10)]
    assert loaded.category_ids == list(range(1, 11))
    assert loaded.name_of(1) == "0"
    other = DetectionImages("digits", class_names=[str(9 - digit) for digit in range(10)], num_pictures=40)
    with pytest.raises(InputError, match="class 0 is '9' in the data and '0' in the checkpoint"):
        trainer().validate(loaded, other)
    with pytest.raises(InputError, match=r"the data have 10 classes \(0, 1, 2, ...\) and model.num_classes is 3; set"):
        trainer().fit(ObjectDetector("fcos_small", num_classes=3, network_args=SMALL), data)
    with pytest.raises(InputError, match="learns from masks, and the data have none; set data.masks to true"):
        trainer().fit(ObjectDetector("maskrcnn_small", network_args=SMALL), data)
    with pytest.raises(InputError, match="precision bf16-true would round the boxes that fasterrcnn_small learns from"):
        trainer(precision="bf16-true").fit(ObjectDetector("fasterrcnn_small", network_args=SMALL), data)
