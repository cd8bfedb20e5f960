"""Ways to train a pretrained network gently: slower rates deeper down, and a body that waits for its head."""

from abc import ABC
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.optim import UNDECAYED
from lightning_bigmodels.tasks.task import LR_SCALE, Task


class FineTuning(Task, ABC):
    """A Task that can train its network's blocks at slower rates the deeper they lie, and its head alone at first.

    `blocks` and `output_modules` say what is what.

    Args:
        layer_decay: Factor on the learning rate from each block to the one below it; 1: none.
        unfreeze_after: Optimizer steps in which only the output layers learn; below 1, the fraction of the run.
        kwargs: The arguments of the next class, in the end of `Task`.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(self, layer_decay: float = 1.0, unfreeze_after: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < layer_decay <= 1:
            raise InputError(f"layer_decay is {layer_decay}; it must be above 0 and at most 1")
        if unfreeze_after < 0:
            raise InputError(f"unfreeze_after is {unfreeze_after}; it must be a number of steps, or a fraction of them")
        self.layer_decay = layer_decay
        self.unfreeze_after = unfreeze_after
        self._frozen_body: FrozenBody | None = None
        self._unfreeze_step = 0

    def undecayed(self) -> set[nn.Parameter]:
        """Return parameters of several axes that take no weight decay."""
        return set()

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = {group["name"]: group for group in super().parameter_groups()}
        groups.setdefault(UNDECAYED, {"params": [], "name": UNDECAYED, "weight_decay": 0.0})
        kept = self.undecayed()
        for name in [name for name in groups if name != UNDECAYED]:
            members = groups[name]["params"]
            groups[name]["params"] = [parameter for parameter in members if parameter not in kept]
            groups[UNDECAYED]["params"] += [parameter for parameter in members if parameter in kept]
        filled = [group for group in groups.values() if group["params"]]
        if self.layer_decay == 1:
            return filled
        assert self.network is not None
        return by_depth(filled, depths(self.network, self.blocks(), self.output_modules()), self.layer_decay)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if not self.unfreeze_after:
            return
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise InputError("unfreeze_after does not work with the strategy fsdp, which joins layers; use fsdp2")
        assert self.network is not None
        self._unfreeze_step = steps_of(self.unfreeze_after, self.total_steps())
        self._frozen_body = FrozenBody(self.network, self.output_modules())

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self._frozen_body is not None:
            # of the step alone, so that a resumed run does the same
            if self.trainer.global_step < self._unfreeze_step:
                self._frozen_body.freeze()
            else:
                self._frozen_body.thaw()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        body = self._frozen_body
        if body is not None and body.frozen and isinstance(self.trainer.strategy, DDPStrategy):
            loss = loss + body.nothing()
        return loss

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self._frozen_body is not None and self._frozen_body.frozen:
            self._frozen_body.forget_gradients()

    @override
    def on_train_end(self) -> None:
        if self._frozen_body is not None:
            self._frozen_body.thaw()


def depths(network: nn.Module, blocks: Sequence[nn.Module], heads: Sequence[nn.Module]) -> dict[nn.Parameter, int]:
    """Return the depth of each parameter: the number of blocks begun before it, with the heads on top.

    Args:
        network: Its parameters are in the order in which they are used, as far as blocks are concerned.
        blocks: The repeated layers, in their order.
        heads: The layers that make the output.
    """
    starts = {parameter: number for number, block in enumerate(blocks, 1) for parameter in block.parameters()}
    top = {parameter for head in heads for parameter in head.parameters()}
    found: dict[nn.Parameter, int] = {}
    current = 0
    for parameter in network.parameters():
        current = max(current, starts.get(parameter, 0))
        found[parameter] = len(blocks) + 1 if parameter in top else current
    return found


def by_depth(
    groups: Iterable[dict[str, Any]], depth_of: dict[nn.Parameter, int], layer_decay: float
) -> list[dict[str, Any]]:
    """Return parameter groups split by depth, each with a factor on its rate: 1 on top, `layer_decay` per layer below.

    Source: Clark et al. 2020, "ELECTRA", appendix A.
    """
    top = max(depth_of.values())
    split = []
    for group in groups:
        members: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            members.setdefault(depth_of[parameter], []).append(parameter)
        for depth, parameters in sorted(members.items()):
            scale = layer_decay ** (top - depth)
            name = f"{group['name']}_{depth:03d}"
            split.append({**group, "params": parameters, "name": name, LR_SCALE: scale})
    return split


def steps_of(after: float, total_steps: int) -> int:
    """Return a number of steps that is given as such or, below 1, as a fraction of the run.

    Raises:
        InputError: nothing of the run would be left.
    """
    steps = round(after * total_steps) if after < 1 else int(after)
    if steps >= total_steps:
        raise InputError(f"unfreeze_after is {steps} steps and the run has {total_steps}; lower it")
    return steps


class FrozenBody:
    """Lets the heads of a network learn alone, on features that are those of evaluation.

    Nothing is taken out of the optimizer or of the strategy, so that DDP, sharding and a resume need no care: the
    heads' inputs are detached, which also spares the backward pass, and what gradient the body has is forgotten.

    Args:
        network: Head and body.
        heads: The layers that learn.
    """

    def __init__(self, network: nn.Module, heads: Sequence[nn.Module]) -> None:
        self._network, self._heads = network, list(heads)
        own = {parameter for head in heads for parameter in head.parameters()}
        self.body = [parameter for parameter in network.parameters() if parameter not in own]
        self._handles: list[RemovableHandle] = []

    @property
    def frozen(self) -> bool:
        """Whether the heads learn alone now."""
        return bool(self._handles)

    def freeze(self) -> None:
        """Let the heads alone learn; also puts the modes back that something else may have changed."""
        self._network.eval()
        for head in self._heads:
            head.train()
        if not self._handles:
            self._handles = [head.register_forward_pre_hook(_detach) for head in self._heads]

    def thaw(self) -> None:
        """Let all learn."""
        if self._handles:
            self._network.train()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def nothing(self) -> Tensor:
        """Return zero, as a function of the whole body: DDP waits for a gradient of each parameter."""
        return torch.stack([parameter.sum() for parameter in self.body]).sum() * 0.0

    def forget_gradients(self) -> None:
        """Let the optimizer pass over the body, with its weight decay and its moments."""
        for parameter in self.body:
            parameter.grad = None


def _detach(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in inputs)
