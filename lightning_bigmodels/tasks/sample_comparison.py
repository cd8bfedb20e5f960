"""How near two sets of examples are, by their features: distances of distributions, precision, recall, diversity."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from lightning_bigmodels.errors import InputError

_ROWS = 1024  # of a matrix of distances, held at a time
_SUBSET, _NUM_SUBSETS = 1000, 20  # of the kernel distance; section 4 of its paper has subsets of 1000 too
# what is left of equal features where (a - b)^2 is computed as a^2 + b^2 - 2 a b
_ROUNDING = 1e-13


class SampleComparison(Metric):
    """Compares made examples with real ones by features, the same on any number of processes.

    Features are kept and put into the order of their indices, so that neither sums nor random subsets depend on who saw
    what.

    Args:
        neighbours: The nearest neighbour whose distance is the radius of an example's part of the manifold.

    Source:
        Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", section
        4 (FID); Binkowski et al. 2018, "Demystifying MMD GANs", section 4 (KID), both by torchmetrics; Kynkäänniemi et
        al. 2019, "Improved precision and recall metric for assessing generative models", section 2.
    """

    full_state_update = False
    indices: list[Tensor]
    real: list[Tensor]
    made: list[Tensor]

    def __init__(self, neighbours: int = 3) -> None:
        super().__init__()
        self.neighbours = neighbours
        for name in ("indices", "real", "made"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, indices: Tensor, real: Tensor, made: Tensor) -> None:
        """Add a batch, which may be empty.

        Args:
            indices: (B,) int64 places of the examples.
            real: (B, D) features of the data's.
            made: (B, D) features of the model's.
        """
        self.indices.append(indices)
        self.real.append(real.double())
        self.made.append(made.double())

    def compute(self) -> dict[str, Tensor]:
        """Return `fid`, `kid`, `precision`, `recall` and `diversity`, each () float64.

        `precision` is the share of made examples that lie among the real ones, `recall` of real ones among the made.
        `diversity` is the mean distance of two made examples over that of two real ones.

        Raises:
            InputError: there are fewer than two examples.
        """
        order = dim_zero_cat(self.indices).argsort()
        if len(order) < 2:
            raise InputError(
                f"the number of pictures to compare is {len(order)}; give 2 or more for validation, and look at "
                f"trainer.limit_val_batches"
            )
        real, made = (dim_zero_cat(features)[order] for features in (self.real, self.made))
        precision, recall = precision_and_recall(real, made, self.neighbours)
        return {
            "fid": frechet_distance(real, made),
            "kid": kernel_distance(real, made),
            "precision": precision,
            "recall": recall,
            "diversity": mean_distance(made) / mean_distance(real),
        }


class _AsGiven(nn.Identity):
    """Stands where torchmetrics has a network that makes features of pictures."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, made: Tensor) -> Tensor:
    """Return the Frechet distance of the normal distributions with the features' means and covariances: (N, D) each."""
    # each process has all features already
    metric = FrechetInceptionDistance(feature=_AsGiven(real.shape[1]), sync_on_compute=False).to(real.device)
    return _distance(metric, real, made)


def kernel_distance(real: Tensor, made: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy under the cubic kernel, the mean over subsets of 1000 examples."""
    number = min(len(real), len(made))
    with warnings.catch_warnings():
        # of features kept in memory, which this is about
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
        metric = KernelInceptionDistance(
            feature=_AsGiven(real.shape[1]),
            # of fewer examples all subsets are the whole
            subsets=_NUM_SUBSETS if number > _SUBSET else 1,
            subset_size=min(number, _SUBSET),
            sync_on_compute=False,
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return _distance(metric, real, made)[0]


def _distance(metric: Metric, real: Tensor, made: Tensor) -> Any:
    metric.update(real, real=True)
    metric.update(made, real=False)
    return metric.compute()


def precision_and_recall(real: Tensor, made: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """Return the share of made examples on the manifold of the real ones, and of real ones on that of the made.

    A manifold is the union of balls round its examples, each as large as the distance to its k-th nearest neighbour.

    Args:
        real: (N, D) features.
        made: (M, D) features.
        neighbours: k; fewer where there are fewer.
    """
    return _covered(made, real, neighbours), _covered(real, made, neighbours)


def _covered(points: Tensor, centres: Tensor, neighbours: int) -> Tensor:
    """Return the share of points that lie in the ball of any centre."""
    # the first neighbour of each is itself
    place = min(neighbours, len(centres) - 1) + 1
    radii = torch.cat([part.kthvalue(place, dim=1).values for part in _squared_distances(centres, centres)])
    inside = [(part <= radii).any(1) for part in _squared_distances(points, centres)]
    return torch.cat(inside).double().mean()


def mean_distance(features: Tensor) -> Tensor:
    """Return the mean distance of two different examples of (N, D)."""
    total = torch.stack([part.sqrt().sum() for part in _squared_distances(features, features)]).sum()
    return total / (len(features) * (len(features) - 1))


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Yield (n, M) of the rows of (N, M), from the first on; equal features are exactly 0 apart."""
    squares = b.square().sum(1)
    for rows in a.split(_ROWS):
        sums = rows.square().sum(1, keepdim=True) + squares
        distances = sums - 2 * rows @ b.T
        yield distances.where(distances > _ROUNDING * sums, 0.0)
