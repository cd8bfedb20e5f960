"""How good generated pictures are, against the real ones."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_bigmodels.callbacks.picture_features import PIXELS, load_features, metric_name
from lightning_bigmodels.callbacks.report import show
from lightning_bigmodels.callbacks.samples import MakesPicturesOf, check_strategy
from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.tasks.picture_generation import PictureGeneration
from lightning_bigmodels.tasks.sample_comparison import SampleComparison


class SampleQuality(Callback):
    """Compare as many generated pictures as there are real ones with these, in validation and test.

    Logged are `val_fid_<name>`, `val_kid_<name>`, `val_precision_<name>`, `val_recall_<name>` and
    `val_diversity_<name>`, where `<name>` says which features the pictures were compared by: values of different
    features are not comparable, nor are those of different numbers of pictures. To each real picture belongs one made
    from the noise of its number, and of its caption or class where the model makes pictures by these. `bigmodels
    validate` without a checkpoint tells the values before training.

    Args:
        features: What pictures are compared by, or a list: pixels: averaged to 8 x 8; a checkpoint (.ckpt) of an
            `ImageClassifier`: what its output layer sees, called by the file's name without its ending; inception: what
            published values are measured with, by torch-fidelity.
        num_pictures: Real and generated pictures, at most; None: as many as there are.
        every_n_validations: How often.
        neighbours: The nearest neighbour that a picture's part of the manifold reaches to, for precision and recall.
        collapse_threshold: Diversity below which a line says that the pictures are too much alike.
        inception_weights: File of Inception's weights; None: torch-fidelity downloads them.

    Raises:
        InputError: a value is out of its range, or the features are unknown.
    """

    def __init__(
        self,
        features: str | list[str] = PIXELS,
        num_pictures: int | None = 2048,
        every_n_validations: int = 1,
        neighbours: int = 3,
        collapse_threshold: float = 0.5,
        inception_weights: str | None = None,
    ) -> None:
        bounds = {"num_pictures": 2, "every_n_validations": 1, "neighbours": 1}
        values = {"num_pictures": num_pictures, "every_n_validations": every_n_validations, "neighbours": neighbours}
        for name, value in values.items():
            if value is not None and value < bounds[name]:
                raise InputError(f"{name} is {value}; set it to {bounds[name]} or more")
        if not 0 <= collapse_threshold <= 1:
            raise InputError(f"collapse_threshold is {collapse_threshold}; set it to between 0 (never) and 1")
        self.features = {metric_name(one): one for one in ([features] if isinstance(features, str) else features)}
        if len(self.features) != (1 if isinstance(features, str) else len(features)) or not self.features:
            raise InputError(f"features is {features}; name one or more, each of a name of its own")
        self.num_pictures = num_pictures
        self.every_n_validations = every_n_validations
        self.neighbours = neighbours
        self.collapse_threshold = collapse_threshold
        self.inception_weights = inception_weights
        self._networks: dict[str, nn.Module] = {}
        self._comparisons: dict[str, SampleComparison] = {}
        self._validations = 0
        self._collapsed: list[str] = []

    @property
    @override
    def state_key(self) -> str:
        # there may be several
        return self._generate_state_key(features="_".join(self.features))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, PictureGeneration):
            raise InputError(
                f"{type(pl_module).__name__} makes no pictures that SampleQuality could compare; remove it from "
                f"trainer.callbacks"
            )
        check_strategy(trainer, "SampleQuality")
        if not self._networks and stage != "predict":
            self._networks = {name: load_features(one, self.inception_weights) for name, one in self.features.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "collapsed": list(self._collapsed)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations, self._collapsed = state_dict["validations"], list(state_dict["collapsed"])

    # ---- what is seen

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = trainer.state.fn != "fit" or self._validations % self.every_n_validations == 0
        self._start(pl_module, due and not trainer.sanity_checking)

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module, True)

    def _start(self, module: LightningModule, due: bool) -> None:
        self._comparisons = {}
        if due:
            self._comparisons = {name: SampleComparison(self.neighbours).to(module.device) for name in self._networks}
            for network in self._networks.values():
                network.to(module.device)

    def _compare(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._comparisons:
            return
        indices = batch["indices"]
        counted = indices != FILLER
        if self.num_pictures is not None:
            counted &= indices < self.num_pictures
        mine = counted.nonzero()[:, 0]
        # a sharded network answers only to all processes, and the last pictures may be one process's alone
        if not trainer.strategy.reduce_boolean_decision(len(mine) > 0, all=False):
            return
        if "images" not in batch:
            raise InputError(
                "SampleQuality needs the data's pictures, of which the network has only latents; remove it"
            )
        asked = mine if len(mine) else mine.new_zeros(1)
        with trainer.precision_plugin.forward_context(), torch.no_grad():
            made = _made(pl_module, batch, asked)
        # features in float32, whatever the precision of the run
        with torch.no_grad():
            for name, network in self._networks.items():
                real_seen, made_seen = network(batch["images"][asked]), network(made)
                self._comparisons[name].update(indices[mine], real_seen[: len(mine)], made_seen[: len(mine)])

    on_validation_batch_end = on_test_batch_end = _compare

    # ---- what is said

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "val")
        self._validations += trainer.state.fn == "fit" and not trainer.sanity_checking

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, module: LightningModule, phase: str) -> None:
        comparisons, self._comparisons = self._comparisons, {}
        for features, comparison in comparisons.items():
            if not comparison.update_called:
                raise InputError("SampleQuality found no picture to compare; give pictures for validation")
            values = comparison.compute()
            for name, value in values.items():
                # alike on all processes already, which a maximum leaves as it is
                module.log(
                    f"{phase}_{name}_{features}",
                    value.float(),
                    on_epoch=True,
                    sync_dist=True,
                    reduce_fx="max",
                    batch_size=1,
                    prog_bar=name == "fid",
                )
            self._notice_collapse(trainer, features, float(values["diversity"]))

    def _notice_collapse(self, trainer: Trainer, features: str, diversity: float) -> None:
        """Say when the pictures are too much alike; once, until they have recovered."""
        if diversity >= self.collapse_threshold:
            self._collapsed = [name for name in self._collapsed if name != features]
        elif features not in self._collapsed:
            self._collapsed.append(features)
            show(
                trainer,
                f"collapse: by {features}, generated pictures are {diversity:.2f} times as far apart as real ones, "
                f"below collapse_threshold {self.collapse_threshold}; unless training has only begun, go back to an "
                f"earlier checkpoint with lower learning rates",
            )


def _made(module: LightningModule, batch: Any, rows: Tensor) -> Tensor:
    """Return (B, C, H, W) uint8: a picture for each of some rows of a batch, of its caption or class if it has one."""
    assert isinstance(module, PictureGeneration)
    noise = module.noise("val", batch["indices"][rows])
    if isinstance(module, MakesPicturesOf):
        return module.generate_pictures_of([batch["captions"][row] for row in rows.tolist()], noise)
    return module.generate_pictures(noise, batch["labels"][rows].clamp(min=0) if module.num_classes else None)
