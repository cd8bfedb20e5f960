"""Schedules that torch lacks, and Muon with AdamW for what Muon cannot take."""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.optim_8bit import AdamW8bit as AdamW8bit

ScheduleCallable = Callable[[Optimizer, int], LRScheduler]

HIDDEN = "hidden"
OUTPUT = "output"
UNDECAYED = "undecayed"


def default_optimizer(params: Iterable[Any]) -> Optimizer:
    """Return AdamW as GPT-3 was trained with (Brown et al. 2020, appendix B), at a rate that suits small networks."""
    return AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


class _ShardedMuon(Muon):
    """torch's Muon, also for matrices that are sharded over processes (DTensor).

    Orthogonalization needs whole matrices. As many matrices of a shape as there are processes are exchanged at a time,
    one to each, so that no process computes what another one does.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all matrices; `closure` recomputes the loss."""
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[Any, list[DTensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.device_mesh, p.placements, p.shape].append(p)
            for (mesh, _, _), members in alike.items():
                for start in range(0, len(members), mesh.size()):
                    self._update(members[start : start + mesh.size()], group)
        return loss

    def _update(self, parameters: list[DTensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape and layout, of which this process orthogonalizes at most one."""
        updates = []
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(state["momentum_buffer"], group["momentum"]))
        stacked = torch.stack(updates)
        assert isinstance(stacked, DTensor)
        mesh, whole = stacked.device_mesh, [Shard(0)] * stacked.device_mesh.ndim
        # Newton-Schulz runs in bfloat16 anyhow, and on the device where matrices are in host memory
        sent = stacked.bfloat16().to(mesh.device_type)
        assert isinstance(sent, DTensor)
        mine = sent.redistribute(placements=whole).to_local().to(stacked.dtype)
        steps = DTensor.from_local(
            _orthogonal_steps(mine, group), mesh, whole, run_check=False, shape=stacked.shape, stride=stacked.stride()
        ).redistribute(placements=stacked.placements)
        for p, step in zip(parameters, steps.unbind(0), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(step.to(p.device), alpha=group["lr"])


def _orthogonal_steps(updates: Tensor, group: dict[str, Any]) -> Tensor:
    """Return what Muon adds to each of n matrices (n, rows, columns) at rate 1, by torch's own on matrices of zeros."""
    steps = torch.zeros_like(updates)
    settings = {key: group[key] for key in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    for step, update in zip(steps, updates, strict=True):
        step.grad = update
        Muon([step], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **settings).step()
    return steps


class MuonWithAdamW(Optimizer):
    """Muon for the hidden matrices, AdamW for embeddings, output layer, biases and norms, as one optimizer.

    A matrix is hidden when the name of its parameter group begins with `hidden` (`Task.parameter_groups` sets it) and
    it has exactly two dimensions. Both parts share one list of groups and one state, so schedules, checkpoints and
    gradient scalers see a single optimizer.

    Source: K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024, through `torch.optim.Muon`.

    Args:
        params: Parameter groups with a `name`.
        lr: Learning rate of the hidden matrices, before `adjust_lr_fn` scales it by their shape.
        weight_decay: Decoupled decay per step and unit of learning rate; groups that set their own keep it.
        momentum: Momentum of Muon.
        ns_steps: Newton-Schulz iterations per step.
        adjust_lr_fn: Scale of Muon's rate by shape: `original`, `match_rms_adamw` or `spectral_unclamped`.
        adamw_lr: Learning rate of everything else.
        betas: Decay rates of AdamW's first and second moment.
        eps: AdamW's term for numerical stability.

    Raises:
        InputError: No group holds a hidden matrix, so that plain AdamW is meant.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        adjust_lr_fn: str = "original",
        adamw_lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        matrices: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        for group in params:
            members = list(group["params"])
            is_hidden = str(group.get("name", "")).startswith(HIDDEN)
            hidden = [p for p in members if is_hidden and p.ndim == 2]
            others = [p for p in members if not (is_hidden and p.ndim == 2)]
            if hidden:
                matrices.append({**group, "params": hidden})
            if others:
                # monitors tell groups apart by their names
                rest.append({**group, "params": others, **({"name": f"{group['name']}_other"} if hidden else {})})
        if not matrices:
            raise InputError(
                "MuonWithAdamW found no hidden matrix in its parameter groups; use torch.optim.AdamW instead, or, with "
                "the strategy fsdp, which flattens matrices, fsdp2"
            )
        self._parts: list[Optimizer] = [
            _ShardedMuon(
                matrices,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            )
        ]
        if rest:
            self._parts.append(AdamW(rest, lr=adamw_lr, betas=betas, eps=eps, weight_decay=weight_decay))
        super().__init__([group for part in self._parts for group in part.param_groups], defaults={})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's own groups and state."""
        start = 0
        for part in self._parts:
            stop = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:stop]
            part.state = self.state
            start = stop

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not isinstance(self.state, defaultdict):
            self.state = defaultdict(dict, self.state)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of both parts; `closure` recomputes the loss and is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


class Schedule(LRScheduler):
    """Learning rate = the group's own rate times `factor(step)`, after a linear warm-up from zero.

    Args:
        optimizer: Optimizer whose groups are scheduled, each from its own rate.
        total_steps: Optimizer steps of the whole run.
        warmup: Steps of linear warm-up; below 1, the fraction of `total_steps`.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> None:
        if warmup < 0:
            raise InputError(f"warmup is {warmup}; it must be a number of steps, or a fraction of them below 1")
        self.total_steps = total_steps
        self.warmup_steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
        if self.warmup_steps >= total_steps:
            raise InputError(
                f"warmup of {self.warmup_steps} steps leaves nothing of the run's {total_steps}; lower warmup"
            )
        super().__init__(optimizer)

    @abstractmethod
    def factor(self, step: int) -> float:
        """Return the factor on the learning rate at `step`, counted from the end of the warm-up."""

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group at the present step."""
        step = self.last_epoch
        if step < self.warmup_steps:
            factor = (step + 1) / (self.warmup_steps + 1)
        else:
            factor = self.factor(step - self.warmup_steps)
        return [base * factor for base in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; the length is that of the run that goes on, which may be longer than it was."""
        length = ("total_steps", "warmup_steps")
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in length})

    def _decay_progress(self, step: int) -> float:
        return min(1.0, step / max(1, self.total_steps - self.warmup_steps))


class WarmupCosine(Schedule):
    """Half a cosine from the full rate to `final` of it (Loshchilov and Hutter 2017, equation 5, without restarts).

    Args:
        optimizer: Optimizer whose groups are scheduled, each from its own rate.
        total_steps: Optimizer steps of the whole run.
        warmup: Steps of linear warm-up; below 1, the fraction of `total_steps`.
        final: Factor on the learning rate at the end.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.1) -> None:
        self.final = final
        super().__init__(optimizer, total_steps, warmup)

    def factor(self, step: int) -> float:
        """Return `final + (1 - final) (1 + cos(pi progress)) / 2`."""
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * self._decay_progress(step)))


class WarmupLinear(Schedule):
    """A straight line from the full rate to `final` of it.

    Args:
        optimizer: Optimizer whose groups are scheduled, each from its own rate.
        total_steps: Optimizer steps of the whole run.
        warmup: Steps of linear warm-up; below 1, the fraction of `total_steps`.
        final: Factor on the learning rate at the end.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0) -> None:
        self.final = final
        super().__init__(optimizer, total_steps, warmup)

    def factor(self, step: int) -> float:
        """Return `1 - (1 - final) progress`."""
        return 1 - (1 - self.final) * self._decay_progress(step)


class WarmupInverseSquareRoot(Schedule):
    """Decay by the inverse square root of the step, so that a run can be prolonged (Vaswani et al. 2017, equation 3).

    Args:
        optimizer: Optimizer whose groups are scheduled, each from its own rate.
        total_steps: Optimizer steps of the whole run.
        warmup: Steps of linear warm-up; below 1, the fraction of `total_steps`. The decay's time scale is the same.
    """

    def factor(self, step: int) -> float:
        """Return `sqrt(w / (w + step))` for `w` warm-up steps, at least one."""
        scale = max(1, self.warmup_steps)
        return math.sqrt(scale / (scale + step))


class WarmupStep(Schedule):
    """The rate times `gamma` at each milestone (He et al. 2016, section 3.4).

    Args:
        optimizer: Optimizer whose groups are scheduled, each from its own rate.
        total_steps: Optimizer steps of the whole run.
        warmup: Steps of linear warm-up; below 1, the fraction of `total_steps`.
        milestones: Fractions of the run, warm-up excluded, at which the rate falls.
        gamma: Factor at each milestone.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.0,
        milestones: tuple[float, ...] = (0.5, 0.75),
        gamma: float = 0.1,
    ) -> None:
        outside = [m for m in milestones if not 0 < m < 1]
        if outside:
            raise InputError(f"milestones are fractions of the run between 0 and 1, but one is {outside[0]}")
        self.milestones = tuple(milestones)
        self.gamma = gamma
        super().__init__(optimizer, total_steps, warmup)

    def factor(self, step: int) -> float:
        """Return `gamma` to the power of the milestones passed."""
        return self.gamma ** sum(self._decay_progress(step) >= m for m in self.milestones)


class WarmupConstantDecay(Schedule):
    """The full rate, then a last stretch down to `final` (warm-up, stable, decay; Hu et al. 2024, section 4).

    Args:
        optimizer: Optimizer whose groups are scheduled, each from its own rate.
        total_steps: Optimizer steps of the whole run.
        warmup: Steps of linear warm-up; below 1, the fraction of `total_steps`.
        decay: Fraction of the run, at its end, over which the rate falls in a straight line.
        final: Factor on the learning rate at the end.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.0,
        decay: float = 0.2,
        final: float = 0.0,
    ) -> None:
        if not 0 < decay <= 1:
            raise InputError(f"decay is {decay}; it must be a fraction of the run, above 0 and at most 1")
        self.decay = decay
        self.final = final
        super().__init__(optimizer, total_steps, warmup)

    def factor(self, step: int) -> float:
        """Return 1 until the last `decay` of the run, then a straight line to `final`."""
        left = self.total_steps - self.warmup_steps - step
        share = min(1.0, max(0.0, left / max(1.0, self.decay * self.total_steps)))
        return self.final + (1 - self.final) * share
