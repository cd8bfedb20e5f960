"""Detectors of fixed shape: they find what torchvision finds, step by step, and wrong answers are told from right."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import batched_nms

from lightning_bigmodels import ObjectDetector
from lightning_bigmodels.errors import RunError
from lightning_bigmodels.modules.cnn import detectors
from lightning_bigmodels.networks.fixed_detection import best
from lightning_bigmodels.networks.fixed_detection_check import check_found
from lightning_bigmodels.networks.fixed_two_stages import levels_of, paste, pool_boxes
from tests import boxes

SMALL = {"min_size": 48, "width": 8, "channels": 32}
FEW = {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30, "box_detections_per_img": 20}
ONE_STAGE = ["fcos_small", "retinanet_small", "ssdlite320_mobilenet_v3_large"]
TWO_STAGES = ["fasterrcnn_small", "maskrcnn_small"]
THEIRS = [name for name in detectors.detector_names() if "rcnn" in name and name not in TWO_STAGES]


def fixed(name, **arguments):
    """Return a detector with random weights that finds whatever it looks at, as a module that is exported."""
    torch.manual_seed(0)
    size = SMALL if name in detectors.OWN else {}
    all_scores = {**FEW, "box_score_thresh": 0.0} if "rcnn" in name else {"score_thresh": 0.0}
    model = ObjectDetector(name, num_classes=4, network_args={**size, **all_scores, **arguments})
    model.configure_model()
    return model.eval().exportable().network


@torch.no_grad()
def spread(detector, image):
    """Draw weights with which the scores are apart from one another."""
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of real activations, which would vanish or explode otherwise
            module.train()
    body = detector.network.body
    body.backbone(body.transform([image / 255, image.flip(2) / 255])[0].tensors)
    detector.eval()
    last = ("cls_logits", "bbox_pred", "cls_score", "mask_fcn_logits", "classification_head.module_list")
    for name, parameter in detector.named_parameters():
        if any(part in name for part in last):
            parameter.normal_(std=0.05 if parameter.ndim > 1 else 0.3)
        if name.endswith("classification_head.cls_logits.bias"):
            parameter.view(-1, 5)[:, 0] = -20.0  # what some heads have for the background is never learned
    return detector


@pytest.fixture(scope="module")
def picture():
    return torch.cat([picture.image for picture in boxes.digits(2)], dim=2)[:, :, :60]  # (3, 48, 60)


@torch.no_grad()
def answers(detector, image):
    """Return what torchvision finds and what the fixed detector finds."""
    (expected,) = detector.network([image])
    return tuple(boxes.padded(expected, detector.limits[1]).values()), detector(image)


@pytest.mark.parametrize("name", [*ONE_STAGE, *TWO_STAGES, *THEIRS])
def test_it_finds_what_torchvision_finds(name, picture):
    arguments = {"min_size": 64, "max_size": 128} if name in THEIRS else {}
    detector = spread(fixed(name, **arguments), picture)
    expected, found = answers(detector, picture)
    assert (expected[1] > 0).sum() >= 20
    assert len({round(score, 6) for score in found[2].tolist()}) > 10
    torch.testing.assert_close(found[2], expected[2])
    rows = [dict(zip(("boxes", "labels"), answer, strict=False)) for answer in (expected, found)]
    assert boxes.share_found(*rows) > 0.95  # of equal scores either may be the better one
    if detector.finds_masks:
        assert found[3].shape == (20, 48, 60)
        assert (found[3].short() - expected[3].short()).abs().max() <= 1
        assert (found[3] > 127).any()
    for answer in (expected, found):
        assert check_found(detector, picture, answer, 1e-5) <= (1 if detector.finds_masks else 1e-3)


@pytest.mark.parametrize("name", [*ONE_STAGE, *TWO_STAGES])
def test_another_arithmetic_chooses_otherwise_and_is_right(name, picture):
    # as drawn, many scores are equal but for rounding
    detector = fixed(name)
    with torch.no_grad():
        found = fixed(name).double()(picture)
    found = (found[0].float(), found[1], found[2].float(), *found[3:])
    assert (found[1] > 0).sum() >= 20
    assert check_found(detector, picture, found, 1e-4) <= 1


def test_where_the_first_stage_finds_nothing_nothing_is_found(picture):
    detector = fixed("maskrcnn_small", rpn_score_thresh=0.9999)
    expected, found = answers(detector, picture)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.any()
    assert check_found(detector, picture, found, 1e-5) == 0


def test_scores_below_the_threshold_are_none(picture):
    detector = spread(fixed("fasterrcnn_small"), picture)
    scores = detector(picture)[2].detach()
    detector.heads.score_thresh = float(scores[4:6].mean())
    expected, found = answers(detector, picture)
    assert (found[1] > 0).tolist() == [True] * 5 + [False] * 15
    assert torch.equal(found[0], expected[0])


# ---- its steps


def test_masks_are_pasted_as_torchvision_pastes_them():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, 2, generator=generator) * torch.tensor([70.0, 50.0])
    places = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    edges = torch.tensor([[0, 0, 70, 50], [3, 3, 3, 3], [3, 3, 3.4, 40], [0, 10, 30, 50], [60, 0, 70, 0.5]])
    places = torch.cat([places, edges])
    masks = torch.rand(len(places), 28, 28, generator=generator)
    expected = paste_masks_in_image(masks[:, None], places, (50, 70))[:, 0]
    assert (expected.flatten(1).amax(dim=1) > 0).sum() > 60
    torch.testing.assert_close(paste(masks, places, (50, 70)), expected, atol=2e-5, rtol=0)


def test_boxes_are_cut_from_the_levels_that_torchvision_takes(picture):
    detector = fixed("fasterrcnn_small", min_size=480, max_size=600)
    pool = detector.heads.box_roi_pool
    sides = torch.tensor([0.0, 3, 60, 111.9, 112, 112.1, 200, 224, 225, 448, 470])
    places = torch.stack([sides * 0, sides * 0 + 2, sides, sides + 2], dim=1)
    with torch.no_grad():
        seen = detector.see(picture)
        levels = levels_of(pool, seen, places)
        expected = pool(seen.features, [places], [seen.size])
        found = pool_boxes(pool, seen, places, levels)
    assert levels.tolist() == pool.map_levels([places]).tolist()
    assert levels.unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(found, expected)
    assert (
        levels_of(pool, seen, places, -1e-3).tolist() != levels.tolist() != levels_of(pool, seen, places, 1e-3).tolist()
    )


def test_boxes_of_several_classes_do_not_hide_one_another():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(400, 2, 2, generator=generator) * 90
    places = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    scores, labels = torch.rand(400, generator=generator), torch.randint(91, (400,), generator=generator)
    expected = batched_nms(places, scores, labels, 0.3)
    found = best(places, scores, labels, 0.3, 420, 90)
    assert 100 < len(expected) < 400
    assert found[: len(expected)].tolist() == expected.tolist()
    assert set(found[len(expected) :].tolist()) == {400}


# ---- what is wrong


def test_a_wrong_answer_is_refused_with_what_is_wrong(picture):
    detector = spread(fixed("maskrcnn_small"), picture)
    with torch.no_grad():
        right = detector(picture)

    def refused(message, change):
        wrong = [value.clone() for value in right]
        change(*wrong)
        with pytest.raises(RunError, match=message):
            check_found(detector, picture, tuple(wrong), 1e-4)

    def without_the_first(*values):
        for value in values:
            value[:-1] = value[1:].clone()
            value[-1] = 0

    def twice_the_first(*values):
        for value in values:
            value[1] = value[0]

    def hole(*values):
        for value in values:
            value[3] = 0

    refused(r"row 0, label \d with score 0\.\d+ at \(.+\), is nothing", lambda found, *_: found[0].add_(0.1))
    refused(r"row 2, label \d .* is nothing that the network finds", lambda found, labels, *_: labels[2].add_(1))
    refused("row 0, .* is nothing that the network finds", lambda found, labels, scores, *_: scores[0].add_(0.01))
    refused(r"an object of label \d with score 0\.\d+ at \(.+\) is missing", without_the_first)
    refused(r"two boxes of label \d overlap by more than 0.5", twice_the_first)
    refused("rows of label 0 are not the last ones, or not zero", hole)
    refused("scores are not in descending order", lambda found, labels, scores, *_: scores[0].sub_(0.05))
    refused("masks differ by up to [2-4] of 255, where 1 is allowed", lambda *values: values[3].add_(3))
