"""The memory over a step, in few enough moments to draw and none of them below a peak."""

from lightning_bigmodels.planner.trace import Change, Kind, Moment, Phase, StepTrace

NUM_MOMENTS = 600


def course_of(trace: StepTrace, num_moments: int = NUM_MOMENTS) -> list[Moment]:
    """Return the fullest moment of each stretch of a step, and its first one.

    Args:
        trace: A step.
        num_moments: Stretches of equally many operations that it is cut into.
    """
    held: dict[Kind, int] = dict(trace.start)
    first: Phase = trace.changes[0].phase if trace.changes else "forward"
    fullest = [Moment(0, first, dict(held))]
    length = max(1, -(-(_last_operation(trace.changes) + 1) // num_moments))
    total = most = sum(held.values())
    stretch = -1
    for change in trace.changes:
        held[change.kind] = held.get(change.kind, 0) + change.difference
        total += change.difference
        here = change.operation // length
        if here == stretch and total <= most:
            continue
        moment = Moment(change.operation, change.phase, {kind: size for kind, size in held.items() if size > 0})
        if here == stretch:
            fullest[-1] = moment
        else:
            fullest.append(moment)
            stretch = here
        most = total
    return fullest


def _last_operation(changes: list[Change]) -> int:
    return changes[-1].operation if changes else 0
