"""Random state and half-accumulated gradients in the checkpoint, and validation kept off the training stream."""

import random
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

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

    The order of the data is the loader's part (`lightning_bigmodels.data.loading`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded_states: list[RandomState] | None = None
        self._loaded_gradients: dict[str, Tensor] = {}
        self._before_validation: RandomState | None = None

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # a checkpoint written in validation must hold the stream at which training goes on
        mine = self._before_validation or get_random_state()
        states = [mine]
        if self.trainer.world_size > 1:
            # every process gets here, but only the first one's dictionary is written
            states = [{} for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(states, mine)
        checkpoint[_RANDOM_STATES] = states
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

    @override
    def on_train_start(self) -> None:
        parameters = dict(self.named_parameters())
        for name, gradient in self._loaded_gradients.items():
            parameters[name].grad = gradient.to(parameters[name].device)
        self._loaded_gradients = {}
        states, self._loaded_states = self._loaded_states, None
        if states is None:
            return
        rank = self.trainer.global_rank
        if len(states) == self.trainer.world_size:
            set_random_state(states[rank])
        else:
            # other processes, other streams: what was drawn from is the first one's state, so no two ranks are alike
            set_random_state(states[0])
            torch.manual_seed(int(torch.randint(2**62, ())) + rank)

    @override
    def on_validation_start(self) -> None:
        self._before_validation = get_random_state()

    @override
    def on_validation_end(self) -> None:
        if self._before_validation is not None:
            set_random_state(self._before_validation)
            self._before_validation = None
