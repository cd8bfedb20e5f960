"""Exported detectors: pixels go in, objects with masks come out, and what is wrong is refused."""

import json

import pytest
import torch

from lightning_bigmodels import ObjectDetector
from lightning_bigmodels.errors import RunError
from lightning_bigmodels.export import export, load_exported
from lightning_bigmodels.export_comparison import compare, trials
from lightning_bigmodels.modules.cnn import detectors
from lightning_bigmodels.networks.fixed_detection_check import check_found
from tests import boxes

SMALL = {"min_size": 48, "width": 8, "channels": 32, "box_score_thresh": 0.205, "box_detections_per_img": 10}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ObjectDetector("maskrcnn_small", num_classes=7, network_args=SMALL)
    model.class_names = [f"kind {number}" for number in range(7)]
    model.configure_model()
    return model.eval()


def test_mask_rcnn_leaves_with_its_masks(model, tmp_path):
    folder = export(model, tmp_path / "out")
    described = json.loads((folder / "description.json").read_text(encoding="utf-8"))
    assert described["unsupported"] == {}
    assert described["inputs"] == [{"name": "image", "dtype": "uint8", "shape": [3, 48, 48]}]
    assert described["outputs"] == [
        {"name": "boxes", "dtype": "float32", "shape": [10, 4]},
        {"name": "labels", "dtype": "int64", "shape": [10]},
        {"name": "scores", "dtype": "float32", "shape": [10]},
        {"name": "masks", "dtype": "uint8", "shape": [10, 48, 48]},
    ]
    assert "128 and more" in described["masks"]
    assert described["packages"] == ["torch", "torchvision"]
    image = boxes.digits(1, 48)[0].image
    with torch.no_grad():
        (expected,) = model.detect([image])
    number = len(expected["labels"])
    assert 3 < number < 10
    for kind in ("torch", "onnx"):
        run = load_exported(folder, kind)
        found = run(image)
        check_found(model.exportable().network, image, tuple(found.values()), 1e-4)
        assert boxes.share_found(expected, found) > 0.8
        assert (found["masks"] > 0).flatten(1).any(dim=1).tolist() == [True] * number + [False] * (10 - number)
        assert not any(value.any() for value in run(torch.zeros_like(image)).values())  # nothing is to be found


def test_a_wrong_detection_is_refused_with_its_file(model):
    exportable = model.exportable()
    tried = trials(exportable)
    assert compare("torch", lambda inputs: tried[0].outputs, tried, exportable) <= 1

    def moved(inputs):
        return (tried[0].outputs[0] + 1, *tried[0].outputs[1:])

    with pytest.raises(RunError) as refused:
        compare("onnx", moved, tried, exportable)
    assert str(refused.value).startswith(
        "model.onnx, loaded back, differs from the network for inputs (3, 48, 48): row"
    )
    assert str(refused.value).endswith("do without onnx: --formats [torch,weights]")


@pytest.mark.parametrize("name", detectors.detector_names())
def test_every_detector_has_an_export(name):
    model = ObjectDetector(name, num_classes=3)
    with torch.device("meta"):
        model.configure_model()
    exportable = model.exportable()
    assert exportable.unsupported == {}
    assert exportable.output_names[3:] == (("masks",) if name.startswith("maskrcnn") else ())
