"""Parts of a data set by fraction: stratified, seeded, exact."""

import numpy as np
from numpy.typing import NDArray

from lightning_bigmodels.data.vision.labelled import Labelled
from lightning_bigmodels.errors import InputError


def check_fractions(fractions: dict[str, float]) -> None:
    """Refuse fractions out of their range, or that leave nothing to train on."""
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise InputError(f"{name}_fraction is {fraction}; set it from 0 to below 1")
    if sum(fractions.values()) >= 1:
        raise InputError(
            f"{' + '.join(f'{name}_fraction' for name in fractions)} is {sum(fractions.values())}; leave something to "
            f"train on"
        )


def split_off(part: Labelled, fractions: dict[str, float], seed: int) -> dict[str, Labelled]:
    """Return the parts that some fractions of the examples make, and under `train` what remains.

    A part has exactly its fraction of all examples, rounded, and of every class as nearly its fraction as whole numbers
    allow; no class loses its last training example. Examples of several classes count as one class for each
    combination. Within a part the order is that of the source.

    Args:
        part: What is parted.
        fractions: For each new part its fraction of the examples, from 0 to below 1.
        seed: Chooses which examples go where.
    """
    generator = np.random.default_rng(seed)
    strata = _strata(part)
    members = [generator.permutation(np.flatnonzero(strata == number)) for number in range(int(strata.max()) + 1)]
    sizes = np.array([len(member) for member in members])
    taken = np.zeros_like(sizes)
    # of a combination of classes nothing need remain: its classes are in other combinations
    reserve = 0 if part.multi_label else 1
    found = {}
    for name, fraction in fractions.items():
        quotas = sizes * fraction
        numbers = _whole_numbers(quotas, round(len(part) * fraction), sizes - taken - reserve, generator)
        chosen = [member[start : start + n] for member, start, n in zip(members, taken, numbers, strict=True)]
        found[name] = part.take(np.sort(np.concatenate(chosen)))
        taken += numbers
    rest = np.sort(np.concatenate([member[start:] for member, start in zip(members, taken, strict=True)]))
    return {"train": part.take(rest), **found}


def _strata(part: Labelled) -> NDArray[np.int64]:
    if not part.multi_label:
        return np.unique(part.labels, return_inverse=True)[1].astype(np.int64)
    return np.unique(part.labels, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _whole_numbers(
    quotas: NDArray[np.float64], total: int, bounds: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return whole numbers near the quotas that sum to the total: largest remainders first, ties by lot."""
    numbers = np.minimum(np.floor(quotas + 1e-9).astype(np.int64), bounds)
    lots = generator.permutation(len(quotas))
    while (missing := total - int(numbers.sum())) > 0:
        free = np.flatnonzero(numbers < bounds)
        if len(free) == 0:
            break
        order = free[np.lexsort((lots[free], numbers[free] - quotas[free]))]
        numbers[order[:missing]] += 1
    return numbers
