"""Two networks that learn in turns, each by its own optimizer, under every strategy."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lightning_bigmodels.data.batches import ImageBatch
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.optim import HIDDEN, UNDECAYED, Schedule, ScheduleCallable
from lightning_bigmodels.strategies.batch_norm import synchronize
from lightning_bigmodels.strategies.collectives import gather
from lightning_bigmodels.strategies.compressed_ddp import CompressedDDPStrategy
from lightning_bigmodels.strategies.fsdp2 import shard
from lightning_bigmodels.tasks.task import Task

_WINDOW = "batches_for_the_generator"


class Alternation(Task, ABC):
    """A generator, the Task's network, and a discriminator: manual optimization that the Trainer's lines still govern.

    A step, as `trainer.max_steps`, `global_step`, schedules and callbacks count, is one of the discriminator, on
    `trainer.accumulate_grad_batches` batches. Behind every `discriminator_steps`-th the generator steps too: against
    the discriminator that has just learned, on the same batches' noise. So accumulation gives what one large batch
    gives.

    Lightning's manual optimization leaves three things to us. It refuses accumulation and clipping, which are done
    here, by the Trainer's numbers. DDP's reducer expects one backward pass for each forward pass (Lightning's issues
    19773 and 20138, 2.6.6): it is kept out of the way, and the gradients are averaged before each optimizer step. And
    each optimizer's steps would be counted: the generator's are not.

    Args:
        optimizer: The generator's; None is Adam with lr 2e-4 and betas 0.5 and 0.999.
        schedule: The generator's, laid over its own steps.
        discriminator_optimizer: As `optimizer`.
        discriminator_schedule: As `schedule`.
        discriminator_steps: Steps of the discriminator for each of the generator.
        kwargs: The arguments of `Task`.
    """

    discriminator: nn.Module | None

    def __init__(
        self,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        discriminator_optimizer: OptimizerCallable | None = None,
        discriminator_schedule: ScheduleCallable | None = None,
        discriminator_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer or _default_optimizer, schedule=schedule, **kwargs)
        if discriminator_steps < 1:
            raise InputError(f"discriminator_steps is {discriminator_steps}; set it to 1 or more")
        self.discriminator_optimizer = discriminator_optimizer or _default_optimizer
        self.discriminator_schedule = discriminator_schedule
        self.discriminator_steps = self.step_period = discriminator_steps
        self.discriminator = None
        # what the generator is to learn from at the end of the step: places and classes, no pictures
        self._window: list[dict[str, Any]] = []
        self._loaded_windows: list[list[dict[str, Any]]] | None = None

    @abstractmethod
    def build_discriminator(self) -> nn.Module:
        """Return the discriminator; called once, in the strategy's own context."""

    @abstractmethod
    def make(self, batch: Any) -> Tensor:
        """Return pictures made of a batch's `indices` and `labels`, through which gradients pass."""

    @abstractmethod
    def discriminator_loss(self, batch: ImageBatch, made: Tensor) -> Tensor:
        """Return the discriminator's mean loss, and log it; `made` carries no gradient."""

    @abstractmethod
    def generator_loss(self, batch: Any, made: Tensor) -> Tensor:
        """Return the generator's mean loss, and log it; the batch has `indices` and `labels` only."""

    # ---- networks, optimizers

    @override
    def configure_model(self) -> None:
        if self.network is not None:
            return
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, (FSDPStrategy, CompressedDDPStrategy)):
            raise InputError(
                f"{type(self).__name__} has two networks with a backward pass each, which this strategy takes for one; "
                f"set trainer.strategy to ddp or fsdp2"
            )
        super().configure_model()
        self.discriminator = self.build_discriminator()
        mesh = self.device_mesh
        if mesh is not None:
            self.discriminator = synchronize(self.discriminator, self.trainer.strategy, mesh["data_parallel"])
            shard(self.discriminator, self.trainer.strategy, [], {}, str(self.trainer.precision))

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.discriminator is not None
        steps = 0 if self.schedule is None and self.discriminator_schedule is None else self.total_steps()
        parameters = list(self.discriminator.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "name": HIDDEN},
            {"params": [p for p in parameters if p.ndim < 2], "name": UNDECAYED, "weight_decay": 0.0},
        ]
        return (
            _with_schedule(self.optimizer(self.parameter_groups()), self.schedule, steps // self.discriminator_steps),
            _with_schedule(self.discriminator_optimizer(groups), self.discriminator_schedule, steps),
        )

    @override
    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        # called just before Lightning checks that manual optimization has neither accumulation nor clipping (2.6.6)
        self.automatic_optimization = True
        return super().configure_callbacks()

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.automatic_optimization = False
        # of checkpoints that hold the weights behind a step, which a resume is to go on from (Lightning 2.6.6)
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization and every_n_train_steps")

    # ---- steps

    @override
    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        with self._without_reducer():
            return self._train_on(batch)

    def _train_on(self, batch: ImageBatch) -> Tensor:
        generator, discriminator = self._optimizers()
        ends_step = not self.trainer.fit_loop._should_accumulate()
        generator_learns = (self.trainer.global_step + 1) % self.discriminator_steps == 0
        with torch.set_grad_enabled(ends_step and generator_learns):
            made = self.make(batch)
        loss = self.discriminator_loss(batch, made.detach())
        self._backward(loss)
        if generator_learns:
            kept = {name: value for name, value in batch.items() if name in ("indices", "labels")}
            self._window.append({**kept, "counts": self._batch_counts})
        if ends_step:
            self._average_gradients(self.discriminator)
            discriminator.step()
            self._after_step(discriminator)
            if generator_learns:
                self._train_generator(made)
                self._average_gradients(self.network)
                # past Lightning's count of steps
                self.trainer.strategy.optimizer_step(generator.optimizer, lambda: None)
                self._after_step(generator)
        return loss.detach()

    def _train_generator(self, made: Tensor | None) -> None:
        """Add up the generator's gradient over the batches of a step; `made` is of the last one."""
        assert self.discriminator is not None
        window, self._window = self._window, []
        with _frozen(self.discriminator):
            for batch in reversed(window):
                self._batch_counts = batch["counts"]
                self._backward(self.generator_loss(batch, self.make(batch) if made is None else made))
                made = None

    def _backward(self, loss: Tensor) -> None:
        # the precision of a loss's slope is that of its forward pass, not that of this step
        with torch.autocast(loss.device.type, enabled=False):
            self.manual_backward(loss / self.trainer.accumulate_grad_batches)

    def _average_gradients(self, network: nn.Module | None) -> None:
        """Replace gradients by their means over all processes, as DDP does; sharded ones are it already."""
        assert network is not None
        if self.device_mesh is not None or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _after_step(self, optimizer: LightningOptimizer) -> None:
        optimizer.zero_grad()
        for config in self.trainer.lr_scheduler_configs:
            if config.scheduler.optimizer is optimizer.optimizer:
                self.lr_scheduler_step(config.scheduler, None)

    def _optimizers(self) -> list[LightningOptimizer]:
        return cast(list[LightningOptimizer], self.optimizers())

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        trainer = self.trainer
        self.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)

    def _without_reducer(self) -> AbstractContextManager[None]:
        model = self.trainer.strategy.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            # averages of batch norm are those of the first process, also behind a pass that its reducer took no part in
            model.require_forward_param_sync = True

    # ---- checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._window:
            checkpoint[_WINDOW] = gather([_to(batch, "cpu") for batch in self._window])

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._loaded_windows = checkpoint.get(_WINDOW)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        windows, self._loaded_windows = self._loaded_windows, None
        self._window = []
        if windows is not None and len(windows) == self.trainer.world_size:
            # with other processes the generator's next step takes fewer batches
            self._window = [_to(batch, self.device) for batch in windows[self.trainer.global_rank]]

    @override
    def _move_schedule(self) -> None:
        step = self._schedule_step
        super()._move_schedule()
        generator = self._optimizers()[0].optimizer
        for config in self.trainer.lr_scheduler_configs:
            if step is not None and isinstance(config.scheduler, Schedule) and config.scheduler.optimizer is generator:
                config.scheduler.last_epoch = step // self.discriminator_steps - 1
                config.scheduler.step()


def _default_optimizer(params: Any) -> Optimizer:
    """Return Adam as Radford et al. 2016, section 4, trained DCGANs with."""
    return Adam(params, lr=2e-4, betas=(0.5, 0.999))


def _with_schedule(optimizer: Optimizer, schedule: ScheduleCallable | None, steps: int) -> Any:
    """Return what Lightning takes for an optimizer, with a schedule over that many steps if there is one."""
    if schedule is None:
        return {"optimizer": optimizer}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer, max(1, steps))}}


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Let gradients pass through a network that takes none."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


def _to(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
