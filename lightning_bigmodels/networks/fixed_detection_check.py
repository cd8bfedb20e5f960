"""Whether what an exported detector found is right, where rounding decides which of two boxes is the better one.

A detector chooses: the best candidates, the better of two boxes that overlap. Candidates whose scores differ by less
than arithmetic elsewhere rounds (many do, where a network has learned little) may be chosen either way, and each choice
leads to other boxes. So the numbers are not compared in their order. Every row must be an object that the network
finds, up to rounding; no two rows may overlap; and no candidate may be missing that no choice leaves out.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from lightning_bigmodels.errors import RunError
from lightning_bigmodels.networks.fixed_detection import FixedDetector, OneStage, Seen, at_least
from lightning_bigmodels.networks.fixed_two_stages import SMALLEST, TwoStages, levels_of

_OVERLAP = 1e-3
"""By how much overlaps may differ: of boxes that are shifted to planes of their own, a few digits are lost."""
_PIXELS = 1e-5
"""By what share of the picture's side edges may differ, which counts where a box is hardly longer."""
_ROWS = 1000
"""Of proposals that are classified at a time."""


class Candidates(NamedTuple):
    """What may be chosen: boxes (N, 4), labels (N,), scores (N,), and which of them are for certain, (N,)."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    certain: Tensor


@torch.no_grad()
def check_found(detector: FixedDetector, image: Tensor, found: tuple[Tensor, ...], rounding: float) -> float:
    """Return by how much the numbers found differ at most from the nearest ones that the detector computes here.

    Args:
        detector: It computes all candidates, and what it chooses does not matter.
        image: A picture (3, H, W) uint8.
        found: What `FixedDetector.forward` returns for it, from wherever.
        rounding: By how much numbers may differ, as a share of the greatest, or of 1 where all are smaller.

    Raises:
        RunError: with the row that is wrong or the object that is missing.
    """
    boxes, labels, scores = (value.to(image.device) for value in found[:3])
    number = int((labels > 0).sum())
    if (labels[:number] <= 0).any() or any(value[number:].any() for value in found):
        raise RunError("rows of label 0 are not the last ones, or not zero")
    if (scores[1:] > scores[:-1]).any():
        raise RunError("scores are not in descending order")
    seen = detector.see(image)
    side = float(max(image.shape[1:]))
    if isinstance(detector, OneStage):
        candidates = _of_one_stage(detector, seen, rounding)
    else:
        assert isinstance(detector, TwoStages)
        candidates = _of_two_stages(detector, seen, rounding)
    candidates = candidates._replace(boxes=candidates.boxes * detector.ratios(image, seen))
    rows = Candidates(boxes[:number], labels[:number], scores[:number], scores[:number] > 0)
    worst = _nearest(rows, candidates, rounding, side)
    overlap, most = detector.limits
    for label in rows.labels.unique().tolist():
        own = rows.labels == label
        _, overlaps = _overlaps(rows.boxes[own], rows.boxes[own], overlap, side)
        if overlaps.fill_diagonal_(False).any():
            raise RunError(f"two boxes of label {label} overlap by more than {overlap:.3g}")
    _check_complete(rows, candidates, overlap, rounding, side, float(scores[-1]) if number == most else 0.0)
    if isinstance(detector, TwoStages) and detector.finds_masks and number:
        worst = max(worst, _check_masks(detector, image, seen, rows, found[3][:number]))
    return worst


def _nearest(rows: Candidates, candidates: Candidates, rounding: float, side: float) -> float:
    worst = 0.0
    for row in range(len(rows.labels)):
        own = candidates.labels == rows.labels[row]
        in_boxes = (candidates.boxes[own] - rows.boxes[row]).abs().amax(dim=1)
        in_scores = (candidates.scores[own] - rows.scores[row]).abs()
        near = (in_boxes <= rounding * max(1.0, side)) & (in_scores <= rounding)
        if not near.any():
            box = ", ".join(f"{x:.2f}" for x in rows.boxes[row].tolist())
            raise RunError(
                f"row {row}, label {rows.labels[row]} with score {rows.scores[row]:.4g} at ({box}), is nothing that "
                f"the network finds"
            )
        worst = max(worst, torch.maximum(in_boxes, in_scores)[near].min().item())
    return worst


def _check_complete(
    rows: Candidates, candidates: Candidates, overlap: float, rounding: float, side: float, least: float
) -> None:
    near = _near(candidates.scores, rounding)
    wanted = candidates.certain & (candidates.scores > least + near)
    for label in candidates.labels[wanted].unique().tolist():
        own, there = wanted & (candidates.labels == label), rows.labels == label
        boxes, scores = candidates.boxes[own], candidates.scores[own]
        may, _ = _overlaps(boxes, rows.boxes[there], overlap, side)
        same = (boxes[:, None] - rows.boxes[there]).abs().amax(dim=2) <= rounding * max(1.0, side)
        same &= (rows.scores[there] - scores[:, None]).abs() <= rounding
        found = (may & (rows.scores[there] >= scores[:, None] - near)) | same
        missing = ~found.any(dim=1)
        if missing.any():
            box = ", ".join(f"{x:.2f}" for x in boxes[missing][0].tolist())
            raise RunError(f"an object of label {label} with score {scores[missing][0]:.4g} at ({box}) is missing")


def _check_masks(detector: TwoStages, image: Tensor, seen: Seen, rows: Candidates, masks: Tensor) -> float:
    scaled = rows.boxes / detector.ratios(image, seen)
    expected = detector.masks(seen, scaled, rows.labels, rows.boxes, image.shape[-2:])
    worst = (masks.to(image.device).short() - expected.short()).abs().max().item()
    if worst > 1:
        raise RunError(f"masks differ by up to {worst} of 255, where 1 is allowed")
    return float(worst)


def _overlaps(boxes: Tensor, others: Tensor, overlap: float, side: float) -> tuple[Tensor, Tensor]:
    """Return whether boxes (N, 4) and others (M, 4) may overlap by more than that, and whether for certain, (N, M)."""
    found = box_iou(boxes, others).nan_to_num(0.0)
    own, theirs = (_OVERLAP + _PIXELS * side / (b[:, 2:] - b[:, :2]).amin(dim=1) for b in (boxes, others))
    slack = torch.minimum(own[:, None], theirs)  # both together are no smaller than the larger one
    return found > overlap - slack, found > overlap + slack


def _near(values: Tensor, rounding: float) -> float:
    """Return how near one another values are of which either may be the greater elsewhere, where each is rounded."""
    greatest = values.abs().max().item() if values.numel() else 0.0
    return rounding * min(5 * greatest, 2 * max(1.0, greatest))


# ---- what may be chosen


def _of_one_stage(detector: OneStage, seen: Seen, rounding: float) -> Candidates:
    boxes, scores = detector.look(seen)
    near = _near(scores, rounding)
    num_classes = scores.shape[1]
    chosen, certain = _best_of_groups(detector.groups(seen, scores), detector.num_candidates, near)
    values = scores.flatten()[chosen]
    may = values > max(detector.score_threshold - near, 0.0)
    chosen, certain, values = chosen[may], certain[may] & (values[may] > detector.score_threshold + near), values[may]
    return Candidates(boxes[chosen // num_classes], chosen % num_classes, values, certain)


def _of_two_stages(detector: TwoStages, seen: Seen, rounding: float) -> Candidates:
    in_boxes = _PIXELS * max(seen.size)
    proposals, sure = _proposals(detector, seen, rounding, in_boxes)
    pool = detector.heads.box_roi_pool
    levels = levels_of(pool, seen, proposals)
    versions = [(proposals, levels, sure)]
    for nearness in (-rounding, rounding):
        other = levels_of(pool, seen, proposals, nearness)
        moved = other != levels
        sure &= ~moved  # in place: of the first version too
        versions.append((proposals[moved], other[moved], sure[moved]))
    found = []
    for places, where, certain in versions:
        for part in zip(places.split(_ROWS), where.split(_ROWS), certain.split(_ROWS), strict=True):
            boxes, scores = detector.classify(seen, part[0], part[1])
            labels = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
            found.append((boxes[:, 1:], labels[:, 1:], scores[:, 1:], part[2][:, None].expand_as(scores[:, 1:])))
    boxes, labels, scores, certain = (torch.cat(values).flatten(0, 1) for values in zip(*found, strict=True))
    near, least = _near(scores, rounding), detector.heads.score_thresh
    may = (scores > least - near) & at_least(boxes, SMALLEST - in_boxes)
    certain = certain & (scores > least + near) & at_least(boxes, SMALLEST + in_boxes)
    return Candidates(boxes[may], labels[may], scores[may], certain[may])


def _proposals(detector: TwoStages, seen: Seen, rounding: float, in_boxes: float) -> tuple[Tensor, Tensor]:
    """Return all boxes that may come from the first stage (P, 4), and which of them do for certain, (P,)."""
    first = detector.first
    boxes, logits, sizes = detector.look(seen)
    near = _near(logits, rounding)
    places = torch.arange(len(logits), device=logits.device)
    levels = list(zip(places.split(sizes), logits.split(sizes), strict=True))
    possible: list[Tensor] = []
    certain: list[Tensor] = []
    for group in levels:
        chosen, sure = _best_of_groups([group], first.pre_nms_top_n(), near)
        scores = logits[chosen].sigmoid()
        may = at_least(boxes[chosen], first.min_size - in_boxes) & (scores >= first.score_thresh - near)
        sure &= at_least(boxes[chosen], first.min_size + in_boxes) & (scores >= first.score_thresh + near)
        chosen, sure = chosen[may], sure[may]
        stays, surely = _not_overlapped(boxes[chosen], logits[chosen], sure, first.nms_thresh, near, max(seen.size))
        possible.append(chosen[stays])
        certain.append(surely[stays])
    chosen, sure = torch.cat(possible), torch.cat(certain)
    values = logits[chosen]
    number = first.post_nms_top_n()
    # those that are better for certain, and those that may be better
    behind = torch.searchsorted(values[sure].sort().values, values + near, right=True)
    ahead = torch.searchsorted(values.sort().values, values - near)
    may = sure.sum() - behind < number
    sure &= len(values) - ahead <= number
    return boxes[chosen[may]], sure[may]


def _best_of_groups(groups: list[tuple[Tensor, Tensor]], number: int, near: float) -> tuple[Tensor, Tensor]:
    """Return the places of all values that may be among the best of their groups, and which are for certain."""
    chosen, certain = [], []
    for places, values in groups:
        last = values.topk(number).values[-1].item() if len(values) > number else -torch.inf
        may = values >= last - near
        chosen.append(places[may])
        certain.append(values[may] > last + near)
    return torch.cat(chosen), torch.cat(certain)


def _not_overlapped(
    boxes: Tensor, scores: Tensor, sure: Tensor, overlap: float, near: float, side: int
) -> tuple[Tensor, Tensor]:
    """Return which boxes (N, 4) may be kept when each makes way for better ones, and which are for certain."""
    order = scores.argsort(descending=True)
    boxes, scores = boxes[order], scores[order]
    may_hide, hides = (found.fill_diagonal_(False) for found in _overlaps(boxes, boxes, overlap, side))
    stays, surely = torch.ones_like(sure), sure[order]
    # up to here others are better for certain, or may be
    better = torch.searchsorted(-scores, -scores - near).tolist()
    perhaps = torch.searchsorted(-scores, -scores + near, right=True).tolist()
    for row in range(len(order)):
        stays[row] = not (hides[row, : better[row]] & surely[: better[row]]).any()
        surely[row] &= stays[row] and not (may_hide[row, : perhaps[row]] & stays[: perhaps[row]]).any()
    back = order.argsort()
    return stays[back], surely[back]
