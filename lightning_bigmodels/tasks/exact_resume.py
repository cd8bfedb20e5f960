"""Steps that come out the same: after a resume, around a validation, and where a process has run out of batches."""

import math
import random
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_bigmodels.data import DataModule
from lightning_bigmodels.data.uneven import EvenBatches
from lightning_bigmodels.optim import Schedule
from lightning_bigmodels.strategies.collectives import gather

RandomState = dict[str, Any]

_RANDOM_STATES = "random_states"
_GRADIENTS = "accumulated_gradients"


def get_random_state() -> RandomState:
    """Return the state of Python's, NumPy's, torch's and the present CUDA device's generator as plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: RandomState = {
        "python": random.getstate(),
        # a NumPy array would need unpickling, which weights_only=True refuses
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys, dtype="int64")),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: RandomState) -> None:
    """Put back what `get_random_state` returned."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class ExactResume(LightningModule, ABC):
    """A LightningModule whose resumed run continues its random stream bit for bit.

    The order of the data is the loader's part (`lightning_bigmodels.data.loading`). With another number of processes or
    another batch size the run goes on with the next sample; dropout then draws other numbers. A run whose length is in
    epochs goes on at the same fraction of its schedule, one whose length is in steps at the same step. Where an
    optimizer step now takes another number of samples, the first one may take fewer, as the last one of an epoch does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded_states: list[RandomState] | None = None
        self._loaded_gradients: dict[str, Tensor] = {}
        self._before_validation: RandomState | None = None
        self._schedule_step: int | None = None
        self._batch_counts = True

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        loader = self.trainer.train_dataloader
        self._batch_counts = loader.next_counts() if isinstance(loader, EvenBatches) else True

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss if self._batch_counts else 0.0 * loss, *args, **kwargs)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # a checkpoint written in validation must hold the stream at which training goes on
        mine = self._before_validation or get_random_state()
        # every process gets here, but only the first one's dictionary is written
        checkpoint[_RANDOM_STATES] = gather(mine)
        if self.trainer.state.fn == "fit" and self.trainer.fit_loop._should_accumulate():
            checkpoint[_GRADIENTS] = self._accumulated_gradients()

    def _accumulated_gradients(self) -> dict[str, Tensor]:
        """Return what the batches since the last optimizer step have added up to, the mean over all processes."""
        if self.device_mesh is not None:
            rank_zero_warn(
                "this checkpoint lies inside an accumulated step of a sharded network, whose part before it is lost on "
                "resume; let the interval between checkpoints be a multiple of accumulate_grad_batches"
            )
            return {}
        gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}
        return {name: self.trainer.strategy.reduce(gradient) for name, gradient in gradients.items()}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._loaded_states = checkpoint.get(_RANDOM_STATES)
        self._loaded_gradients = checkpoint.get(_GRADIENTS, {})
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self._count_in_batches_of_this_run(checkpoint)

    def _count_in_batches_of_this_run(self, checkpoint: dict[str, Any]) -> None:
        """Put Lightning's progress, which counts each process's batches, where the loader's place in the samples is.

        They part when the checkpoint comes from a run with another number of processes or another batch size. Also
        Lightning 2.6 goes on wrongly behind an epoch that it has closed, if the run's length is in steps: it trains one
        more batch of that epoch, or skips the rest of one that `max_steps` cut short.
        """
        data = getattr(self.trainer, "datamodule", None)
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        places = loop.get("state_dict", {}).get("combined_loader", [])
        if not isinstance(data, DataModule) or len(places) != 1 or not places[0]:
            return
        batches, epochs, logs = (
            loop[key] for key in ("epoch_loop.batch_progress", "epoch_progress", "epoch_loop.state_dict")
        )
        limit = self.trainer.limit_train_batches
        num_batches = data.num_train_batches
        num_batches = min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)
        behind = num_batches
        if not batches["is_last_batch"]:  # else the epoch is over, whatever this run could still cut from its rest
            behind = data.num_batches_behind(places[0]["samples"], num_batches)
        moved = places[0]["global_batch_size"] != data.global_batch_size
        closed = epochs["current"]["processed"] == epochs["current"]["started"]
        if not (moved or closed):
            return
        is_last = behind >= num_batches
        ends_step = is_last or behind % self.trainer.accumulate_grad_batches == 0
        steps = (
            checkpoint["global_step"] if self.automatic_optimization else logs["_batches_that_stepped"] + (not closed)
        )
        # Lightning knows several states between two batches. This is the one behind a training batch and before its
        # validation: from there it closes an epoch that is over, and counts a step for the logs if the batch ended one.
        for name, ready in (("total", batches["total"]["ready"]), ("current", behind)):
            batches[name] = {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}
            epochs[name]["processed"] = epochs[name]["completed"] = epochs[name]["started"] - 1
        batches["is_last_batch"] = is_last
        logs["_batches_that_stepped"] = steps - ends_step
        if moved and self.trainer.max_steps < 0:
            size = self.trainer.accumulate_grad_batches
            whole_epochs = epochs["current"]["completed"] * math.ceil(num_batches / size)
            self._schedule_step = whole_epochs + (math.ceil(behind / size) if is_last else behind // size)

    @override
    def on_train_start(self) -> None:
        parameters = dict(self.named_parameters())
        for name, gradient in self._loaded_gradients.items():
            parameters[name].grad = gradient.to(parameters[name].device)
        self._loaded_gradients = {}
        self._move_schedule()
        states, self._loaded_states = self._loaded_states, None
        if states is None:
            return
        rank = self.trainer.global_rank
        if len(states) == self.trainer.world_size:
            set_random_state(states[rank])
        else:
            # other processes, other streams, drawn from the first one's state: one for each share of the data, since
            # processes that split a layer must draw alike
            set_random_state(states[0])
            share = self.trainer.distributed_sampler_kwargs
            torch.manual_seed(int(torch.randint(2**62, ())) + (share["rank"] if share else 0))

    def _move_schedule(self) -> None:
        """Go on at the same fraction of the run, where its length is in epochs and these now have other steps."""
        step, self._schedule_step = self._schedule_step, None
        if step is None:
            return
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, Schedule):
                config.scheduler.last_epoch = step - 1
                config.scheduler.step()

    @override
    def on_validation_start(self) -> None:
        self._before_validation = get_random_state()

    @override
    def on_validation_end(self) -> None:
        if self._before_validation is not None:
            set_random_state(self._before_validation)
            self._before_validation = None
