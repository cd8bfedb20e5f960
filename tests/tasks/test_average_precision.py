"""COCO's average precision: pycocotools' own numbers, on any number of processes."""

import contextlib
import io

import pytest
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.data.vision.coco import encode_mask
from lightning_bigmodels.tasks.average_precision import AveragePrecision
from tests.workers import run_on

SIZE = 100


def pictures(number, masks=False):
    """Return true objects, and found ones near them, some of equal scores; in one picture nothing is found."""
    generator = torch.Generator().manual_seed(0)

    def random(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    targets, found = [], []
    for index in range(number):
        count = index % 4
        corners = random(0, 50, count, 2).float()
        boxes = torch.cat([corners, corners + random(8, 50, count, 2)], 1)
        labels = random(1, 4, count)
        moved = (boxes + random(-3, 4, count, 4)).clamp(0, SIZE)
        extra = torch.tensor([[5.0, 5.0, 30.0, 40.0]])
        target = {"boxes": boxes, "labels": labels, "iscrowd": (random(0, 6, count) == 0).long()}
        target["area"] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        row = {
            "boxes": torch.cat([moved, extra]),
            "labels": torch.cat([labels, torch.tensor([1])]),
            "scores": random(1, 5, count + 1) / 5,  # of few values
        }
        if index == 5:
            row = {name: value[:0] for name, value in row.items()}
        if masks:
            target["masks"], row["masks"] = painted(target["boxes"]), painted(row["boxes"])
        targets.append(target)
        found.append(row)
    return targets, found


def painted(boxes):
    masks = torch.zeros(len(boxes), SIZE, SIZE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left : (left + right) // 2 + 1] = True
    return masks


def judged(targets, found, kind):
    """Return the twelve numbers of pycocotools, called without us."""
    truth = {"info": {}, "images": [], "annotations": [], "categories": [{"id": n} for n in (1, 2, 3)]}
    results = []
    for image_id, (target, row) in enumerate(zip(targets, found, strict=True)):
        truth["images"].append({"id": image_id, "height": SIZE, "width": SIZE})
        for objects, into in ((target, truth["annotations"]), (row, results)):
            for n in range(len(objects["labels"])):
                left, top, right, bottom = objects["boxes"][n].tolist()
                entry = {"image_id": image_id, "category_id": int(objects["labels"][n])}
                entry |= {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
                entry |= {"id": len(into) + 1, "iscrowd": int(target["iscrowd"][n]) if objects is target else 0}
                if objects is row:
                    entry |= {"score": float(row["scores"][n])}
                if kind == "segm":
                    entry["segmentation"] = encode_mask(objects["masks"][n])
                into.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes([{k: v for k, v in r.items() if k != "id"} for r in results]), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats


def measured(processes, number, masks):
    """Return what each process computes of its share, dealt out as the loaders do, fillers included."""
    targets, found = pictures(number, masks)

    def work():
        rank = 0
        if processes > 1:
            dist.init_process_group("gloo")
            rank = dist.get_rank()
        metric = AveragePrecision(masks)
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
        empty["masks"] = torch.zeros(0, SIZE, SIZE, dtype=torch.bool)
        for index in range(rank, max(processes, -(-number // processes) * processes), processes):
            inside = index < number
            place = torch.tensor([index if inside else FILLER])
            metric.add(place, [found[index] if inside else empty], [targets[index] if inside else empty])
        return {name: value.reshape(-1).tolist() for name, value in metric.compute().items()}

    return run_on(processes, work)


@pytest.mark.parametrize("masks", [False, True])
def test_it_is_that_of_pycocotools_on_one_two_and_three_processes(masks):
    single, double, triple = (measured(processes, 13, masks) for processes in (1, 2, 3))
    for results in (double, triple):
        assert all(result == single[0] for result in results)
    targets, found = pictures(13, masks)
    for kind in ("bbox", "segm") if masks else ("bbox",):
        expected = judged(targets, found, kind)
        prefix = f"{kind}_" if masks else ""
        for name, value in {
            "map": expected[0],
            "map_50": expected[1],
            "map_75": expected[2],
            "mar_100": expected[8],
        }.items():
            assert single[0][f"{prefix}{name}"] == pytest.approx([value], abs=1e-6)
        assert 0.05 < expected[0] < 0.95


def test_a_process_without_any_picture_takes_part():
    assert measured(3, 2, False) == measured(1, 2, False) * 3
    assert measured(2, 0, False) == measured(1, 0, False) * 2
    assert measured(1, 0, False)[0]["map"] == [-1.0]
