"""An average of the weights over the last steps, which generalizes better than the weights of any one of them."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.strategies.checkpoint_io import TRAINING_WEIGHTS
from lightning_bigmodels.strategies.local_weights import load_weights, local_weights, plain_name


class WeightAverage(Callback):
    """Keeps an exponential moving average of the weights, and shows it wherever the weights are looked at.

    From the first update on, validation with all that other callbacks do in it, checkpoints and what the fit leaves
    behind hold the average of parameters and floating-point buffers; training goes on from its own weights. Each
    process keeps one copy of what it trains: under sharding strategies, of its shards. A resumed fit continues both,
    bit for bit, and on other processes or under another strategy within rounding. A fit that is resumed from a
    checkpoint without an average begins one; one that is resumed without this callback goes on from the average.

    Args:
        decay: What remains of the average at each update; it reaches over about 1 / (1 - decay) updates.
        every_n_steps: Steps between updates. A step is a training batch in which an optimizer took a step: batches that
            only accumulate gradients and steps that 16-mixed skips do not count, and a batch in which several
            optimizers step counts once.
        start_step: Step of the first update, which copies the weights.
        warm_up: Whether update n (from 0) uses at most (1 + n) / (10 + n) as decay, so that a short run does not end
            with an average of its beginning.

    Raises:
        InputError: A value is out of range, weights are in half precision, or checkpoints cannot hold the average.

    Source:
        The warm-up is that of TensorFlow's `ExponentialMovingAverage` with `num_updates`, and of diffusers' `EMAModel`.
    """

    def __init__(
        self, decay: float = 0.999, every_n_steps: int = 1, start_step: int = 0, warm_up: bool = False
    ) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay is {decay}; it must be 0 or more and below 1")
        if every_n_steps < 1:
            raise InputError(f"every_n_steps is {every_n_steps}; it must be 1 or more")
        if start_step < 0:
            raise InputError(f"start_step is {start_step}; it must be 0 or more")
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.warm_up = warm_up
        self._handles: list[RemovableHandle] = []
        self._forget()

    def _forget(self) -> None:
        self._strategy: Strategy | None = None
        self._module: LightningModule | None = None
        # the averages, or while these are in place the weights that training goes on from
        self._copies: dict[str, Tensor] = {}
        self._in_place: dict[str, Tensor] | None = None
        self._loaded: dict[str, Any] | None = None
        self._stepped = False
        self._num_steps = 0
        self._num_updates = 0

    @property
    def copies(self) -> list[Tensor]:
        """The tensors that are kept beside the weights."""
        return list(self._copies.values())

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._forget()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise InputError(
                    "ModelCheckpoint with save_weights_only asks no callback, so WeightAverage could not put the "
                    "average into its checkpoints; set save_weights_only: false"
                )
        if isinstance(trainer.strategy, FSDPStrategy) and trainer.strategy._state_dict_type == "sharded":
            raise InputError(
                "sharded checkpoints of the strategy fsdp hold one set of weights, and WeightAverage needs two; set "
                "state_dict_type: full, or use fsdp2"
            )
        self._strategy, self._module = trainer.strategy, pl_module

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                raise InputError(
                    f"{name} is in {parameter.dtype}, in which the small steps of an average vanish; set "
                    "trainer.precision to bf16-mixed or 16-mixed, or remove WeightAverage from trainer.callbacks"
                )
        if self._copies:
            # loaded before the network was moved to its device
            weights = self._weights()
            self._copies = {name: copy.to(weights[name].device) for name, copy in self._copies.items()}
        self._remove_hooks()
        self._handles = [optimizer.register_step_post_hook(self._note_step) for optimizer in trainer.optimizers]

    def _note_step(self, optimizer: Optimizer, *args: Any) -> None:
        # a gradient scaler leaves a step out by not calling it, but leaves a fused optimizer to find out for itself
        overflowed = getattr(optimizer, "found_inf", None)
        self._stepped = self._stepped or overflowed is None or not bool(overflowed)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._put_back()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._update()

    @torch.no_grad()
    def _update(self) -> None:
        """Take the weights of a step into the average, unless that was done."""
        if not self._stepped:
            return
        self._stepped = False
        step = self._num_steps
        self._num_steps += 1
        if step < self.start_step or step % self.every_n_steps:
            return
        weights = self._weights()
        known = [(copy, weights[name]) for name, copy in self._copies.items()]
        if known:
            number = self._num_updates
            decay = min(self.decay, (1 + number) / (10 + number)) if self.warm_up else self.decay
            averages, present = map(list, zip(*known, strict=True))
            get_ema_multi_avg_fn(decay)(averages, present, None)
        # all at the first update, later those of layers that learn from now on
        assert self._module is not None
        frozen = {plain_name(name) for name, p in self._module.named_parameters() if not p.requires_grad}
        for name in weights.keys() - self._copies.keys() - frozen:
            self._copies[name] = weights[name].clone()
        self._num_updates += 1

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._put_in_place()

    # Nothing is put back before every callback has seen the end of the validation, where samples and checkpoints are
    # made: the next that happens in training does it.

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_in_place()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_hooks()
        if self._in_place is not None:
            # in the middle of its forward pass a network that is sharded does not name its shards
            self._exchange(self._in_place)
            self._in_place = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._remove_hooks()
            # for `trainer.save_checkpoint` after the fit
            self._copies = {name: copy.cpu() for name, copy in self._copies.items()}

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _weights(self) -> dict[str, Tensor]:
        assert self._strategy is not None
        assert self._module is not None
        return local_weights(self._strategy, self._module)

    def _put_in_place(self) -> None:
        if self._copies and self._in_place is None:
            weights = self._weights()
            self._exchange(weights)
            self._in_place = weights

    def _put_back(self) -> None:
        if self._in_place is not None:
            self._exchange(self._weights())
            self._in_place = None

    @torch.no_grad()
    def _exchange(self, weights: dict[str, Tensor]) -> None:
        for name, copy in self._copies.items():
            kept = weights[name].clone()
            weights[name].copy_(copy)
            copy.copy_(kept)

    @override
    def state_dict(self) -> dict[str, Any]:
        # a callback that saves may come before this one at the end of a batch
        self._update()
        return {
            "num_steps": self._num_steps,
            "num_updates": self._num_updates,
            "averaged": sorted(self._copies),
        }

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._copies:
            return
        weights = self._weights()
        frozen = weights.keys() - self._copies.keys()
        present = checkpoint["state_dict"]
        self._exchange(weights)
        try:
            other = {
                # the value may be the very weight, which is exchanged again
                name: value.clone() if isinstance(value, Tensor) and name not in frozen else value
                for name, value in trainer.strategy.lightning_module_state_dict().items()
            }
        finally:
            self._exchange(self._weights())
        average, training = (other, present) if self._in_place is None else (present, other)
        checkpoint["state_dict"] = average
        checkpoint[TRAINING_WEIGHTS] = {name: value for name, value in training.items() if name not in frozen}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            # the weights are others now, and those that training would go on from do not belong to them
            self._forget()
        else:
            self._loaded = checkpoint.get(TRAINING_WEIGHTS)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._module is None or self._strategy is None:
            return
        self._num_steps = state_dict["num_steps"]
        self._num_updates = state_dict["num_updates"]
        if self._loaded is None:
            return
        # the network holds the average, which a checkpoint has in place of the weights
        weights = self._weights()
        self._copies = {name: weights[name].clone() for name in state_dict["averaged"]}
        load_weights(self._strategy, self._loaded)
        self._loaded = None
