"""A loss or gradient that is not finite ends the run or is left out; a loss far above the recent ones is reported."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_bigmodels.callbacks.report import show
from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.strategies.collectives import gather
from lightning_bigmodels.tasks.exact_resume import get_random_state, set_random_state

_ROWS_SHOWN = 8


class BadNumbersError(RunError):
    """A loss or a gradient is not finite; raised on all processes alike, before the optimizer has seen it."""


@runtime_checkable
class _HasPlace(Protocol):
    def place(self) -> Any: ...


@dataclass
class _Batch:
    """One of the batches of an optimizer step."""

    batch: Any
    index: int
    rows: list[int] | None
    losses: list[Tensor] = field(default_factory=list)


class BadNumbers(Callback):
    """Looks at loss and gradients before each optimizer step, on all processes together.

    A loss or gradient that is not finite ends the run with a `BadNumbersError`, which names the step, the batch's place
    in the data, the process, and the module whose output was the first not to be finite (the step is repeated without
    gradients to find it), or else the first such gradient of the backward pass. Checkpoints written before stay as
    they are.

    With `skip` the optimizer step is left out instead: weights, optimizer state and running statistics of norms stay,
    while the step counter and the schedule go on. In `16-mixed` a gradient that overflows is the scaler's matter, which
    leaves out the step and lowers its scale; only a loss that is not finite counts here.

    A finite loss far above the mean of the recent ones is logged as `loss_spike`, in standard deviations, with a line
    that names its place. With several optimizers each has its own mean.

    It costs one pass over the gradients, one sum of three numbers over the processes and one wait for the device for
    each optimizer step.

    Args:
        action: `stop`, or `skip`, whose count is logged as `skipped_batches`.
        max_skips: Optimizer steps left out in the whole run before it ends all the same.
        spike_deviations: Standard deviations above the mean at which a loss is reported; None: never.
        spike_window: Optimizer steps that make the mean; the first ones of the run are not judged.

    Raises:
        InputError: an argument is out of bounds.
    """

    def __init__(
        self,
        action: Literal["stop", "skip"] = "stop",
        max_skips: int = 10,
        spike_deviations: float | None = 6.0,
        spike_window: int = 100,
    ) -> None:
        if action not in ("stop", "skip"):
            raise InputError(f"action is {action!r}; set it to stop or skip")
        if max_skips < 1:
            raise InputError(f"max_skips is {max_skips}; set it to 1 or more, or action to stop")
        if spike_deviations is not None and spike_deviations <= 0:
            raise InputError(f"spike_deviations is {spike_deviations}; it must be above 0, or null for no report")
        if spike_window < 2:
            raise InputError(f"spike_window is {spike_window}; it must be 2 or more")
        self.action = action
        self.max_skips = max_skips
        self.spike_deviations = spike_deviations
        self.spike_window = spike_window
        self.skipped_batches = 0
        self._recent: dict[int, deque[float]] = {}
        self._batches: list[_Batch] = []
        self._losses: list[Tensor] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._stepped = True

    @override
    def state_dict(self) -> dict[str, Any]:
        recent = {index: list(losses) for index, losses in self._recent.items()}
        return {"skipped_batches": self.skipped_batches, "recent_losses": recent}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped_batches = state_dict["skipped_batches"]
        recent = state_dict["recent_losses"]
        self._recent = {index: deque(losses, maxlen=self.spike_window) for index, losses in recent.items()}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # a step of the user's own may pass by the hook that sets this
        if self._stepped or not pl_module.automatic_optimization:
            self._stepped = False
            self._batches.clear()
            self._losses.clear()
            if self.action == "skip":
                self._statistics = [(value, value.clone()) for value in _running_statistics(pl_module)]
        loader = trainer.train_dataloader
        rows = loader.place()["indices"] if isinstance(loader, _HasPlace) else None
        self._batches.append(_Batch(batch, batch_idx, rows))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        loss = loss.detach()
        self._losses.append(loss.full_tensor() if isinstance(loss, DTensor) else loss)
        self._batches[-1].losses.append(self._losses[-1])

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self._losses = self._losses, []
        self._stepped = True
        scaler = _scaler(trainer)
        loss = torch.zeros((), device=pl_module.device)
        if losses:
            # Lightning divides by the number of accumulated batches, which an epoch's last step may not reach
            loss = torch.stack([loss.float() for loss in losses]).mean() * trainer.accumulate_grad_batches
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        finite = loss.isfinite()
        # to a scaler the overflow of a gradient is the sign to lower the scale
        norm = torch.zeros_like(loss) if scaler is not None else _norm(optimizer).to(loss)
        verdict = torch.stack([loss.where(finite, 0.0), (~finite).float(), (~norm.isfinite()).float()])
        total, bad_losses, bad_gradients = _sum_over_processes(trainer, verdict).tolist()
        if bad_gradients and not bad_losses:
            # the norm of finite gradients can overflow too
            bad_gradients = _sum_over_processes(trainer, _count_bad(optimizer).to(loss)).item()
        if bad_losses:
            self._refuse(trainer, optimizer, _describe_loss(trainer, pl_module, self._batches))
        elif bad_gradients:
            self._refuse(trainer, optimizer, _describe_gradient(trainer, pl_module, self._batches))
        elif losses and self.spike_deviations is not None:
            self._judge(trainer, trainer.optimizers.index(optimizer), total / trainer.world_size)

    def _refuse(self, trainer: Trainer, optimizer: Optimizer, what: str) -> None:
        """End the run, or leave out this step."""
        if self.action == "stop" or self.skipped_batches == self.max_skips:
            limit = f" after {self.max_skips} batches that were skipped (max_skips)" if self.action == "skip" else ""
            raise BadNumbersError(f"{what}{limit}; {_remedy(trainer, self.action)}")
        self.skipped_batches += 1
        fused = _scaler(trainer) is not None and _optimizer_handles_unscaling(optimizer)
        for parameter in _parameters(optimizer):
            if fused and parameter.grad is not None:
                # the scaler has not seen them yet: it leaves such a step out, and fails where there is no gradient
                parameter.grad.fill_(math.inf)
            else:
                parameter.grad = None
        for value, before in self._statistics:
            value.copy_(before)
        show(trainer, f"skipped batch {self.skipped_batches} of at most {self.max_skips}: {what}")
        _log(trainer, "skipped_batches", self.skipped_batches)

    def _judge(self, trainer: Trainer, index: int, loss: float) -> None:
        """Report a loss far above the recent ones of the same optimizer."""
        assert self.spike_deviations is not None
        recent = self._recent.setdefault(index, deque(maxlen=self.spike_window))
        if len(recent) == self.spike_window:
            mean = math.fsum(recent) / len(recent)
            deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in recent) / len(recent))
            if deviation > 0 and loss - mean > self.spike_deviations * deviation:
                own = [(batch_loss.item(), batch) for batch in self._batches for batch_loss in batch.losses]
                highest, batch = max(own, key=lambda pair: pair[0])
                _, place = max(gather((highest, _place(trainer, batch))))
                above = (loss - mean) / deviation
                show(
                    trainer,
                    f"loss spike: {loss:.4g} in {place} is {above:.1f} standard deviations of {deviation:.3g} above "
                    f"the mean of the last {len(recent)} steps, {mean:.4g}",
                )
                _log(trainer, "loss_spike", above)
        recent.append(loss)


def _scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    return getattr(trainer.precision_plugin, "scaler", None)


def _local(tensor: Tensor) -> Tensor:
    """Return the values that this process holds."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [_local(parameter.grad) for parameter in _parameters(optimizer) if parameter.grad is not None]


def _norm(optimizer: Optimizer) -> Tensor:
    # not the largest value, which is safe from overflow: on a CPU it takes ten times as long
    return torch.nn.utils.get_total_norm(_gradients(optimizer))


def _count_bad(optimizer: Optimizer) -> Tensor:
    return sum(((~gradient.isfinite()).sum() for gradient in _gradients(optimizer)), torch.zeros(()))


def _sum_over_processes(trainer: Trainer, values: Tensor) -> Tensor:
    if trainer.world_size > 1:
        torch.distributed.all_reduce(values)
    return values


def _log(trainer: Trainer, name: str, value: float) -> None:
    # at once: `self.log` drops what falls between two of the steps that are logged
    for logger in trainer.loggers:
        logger.log_metrics({name: value}, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _running_statistics(module: nn.Module) -> list[Tensor]:
    return [value for part in module.modules() if isinstance(part, _NormBase) for value in part.buffers(recurse=False)]


def _place(trainer: Trainer, batch: _Batch) -> str:
    place = f"step {trainer.global_step + 1} (epoch {trainer.current_epoch}, batch {batch.index}"
    if trainer.world_size > 1:
        place += f", rank {trainer.global_rank}"
    if batch.rows:
        rows = ", ".join(map(str, batch.rows[:_ROWS_SHOWN]))
        more = f", ... {len(batch.rows)} in all" if len(batch.rows) > _ROWS_SHOWN else ""
        place += f", rows {rows}{more} of the training data"
    return place + ")"


def _remedy(trainer: Trainer, action: str) -> str:
    skip = "" if action == "skip" else ", or leave such batches out with BadNumbers' action: skip"
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    paths = [path for c in checkpoints if (path := c.last_model_path or c.best_model_path)]
    saved = f"the last checkpoint is {paths[0]}" if paths else "no checkpoint was written before"
    return f"look at this batch, lower the learning rate, clip gradients{skip}; {saved}"


def _describe_loss(trainer: Trainer, pl_module: LightningModule, batches: list[_Batch]) -> str:
    """Say which loss is not finite and why; all processes must ask, the innocent too."""
    bad = [(loss.item(), batch) for batch in batches for loss in batch.losses if not loss.isfinite()]
    value, batch = bad[0] if bad else (0.0, batches[-1])
    # a sharded network needs every process for its forward pass
    origin, _ = _repeat(trainer, pl_module, batch)
    origin = origin or "every module's output is finite, so look at the loss function"
    finding = f"the loss is {value} in {_place(trainer, batch)}: {origin}"
    return next(text for guilty, text in gather((bool(bad), finding)) if guilty)


def _describe_gradient(trainer: Trainer, pl_module: LightningModule, batches: list[_Batch]) -> str:
    """Say where a gradient became infinite or not a number; all processes must ask.

    The gradients are sums over the processes, so each repeats its last batch to see whether it is to blame.
    """
    origin, guilty = _repeat(trainer, pl_module, batches[-1], backward=True)
    order, name = _first_bad_gradient(pl_module)
    origin = origin or f"it arose in the backward pass, first in the gradient of {name}"
    findings = gather((guilty, order, _place(trainer, batches[-1]), origin))
    for guilty, _, place, origin in findings:
        if guilty:
            return f"a gradient is not finite in {place}: {origin}"
    # an earlier batch of this step, or a sharded network: no process alone has its gradients
    _, _, _, origin = max(findings, key=lambda finding: finding[1])
    step = f"step {trainer.global_step + 1} (epoch {trainer.current_epoch}, batch {batches[0].index}"
    step += f" to {batches[-1].index}" if len(batches) > 1 else ""
    return f"a gradient is not finite in {step}): {origin}"


def _first_bad_gradient(module: nn.Module) -> tuple[int, str]:
    """Return place and name of the parameter whose gradient was the first one not to be finite: the last in order."""
    found = (-1, "")
    for order, (name, parameter) in enumerate(module.named_parameters()):
        if parameter.grad is not None and not _local(parameter.grad).isfinite().all():
            found = (order, name)
    return found


def _repeat(trainer: Trainer, pl_module: LightningModule, batch: _Batch, backward: bool = False) -> tuple[str, bool]:
    """Repeat a training step to see what is not finite.

    Args:
        trainer: The run.
        pl_module: Its module; neither its gradients nor the random state are changed.
        batch: What the step is given.
        backward: Whether to compute gradients too, where no other process is needed for them.

    Returns:
        What was the first not to be finite in the forward pass, or an empty text; and whether this batch is to blame.
    """
    found = [] if _all_finite(batch.batch) else ["the batch itself holds numbers that are not finite"]
    if not pl_module.automatic_optimization:
        return (found[0], True) if found else ("", False)  # the step would train
    trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
    backward = backward and not any(isinstance(parameter, DTensor) for parameter in trained)

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not _all_finite(output):
                found.append(f"the first output that is not finite is that of {name} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in pl_module.named_modules() if name]
    random_state = get_random_state()
    vars(pl_module)["log"] = lambda *args, **kwargs: None  # shadows the method: nothing is logged twice
    arguments = [batch.batch]
    if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2):
        arguments.append(batch.index)
    guilty = False
    try:
        # compiled code would not see the hooks
        with (
            torch.set_grad_enabled(backward),
            torch.compiler.set_stance("force_eager"),
            trainer.precision_plugin.train_step_context(),
        ):
            output = pl_module.training_step(*arguments)
            if backward:
                loss = output["loss"] if isinstance(output, Mapping) else output
                assert isinstance(loss, Tensor)
                # not `backward`: it would add to the gradients, and DDP would wait for the other processes
                guilty = not _all_finite(torch.autograd.grad(loss, trained, allow_unused=True))
    except Exception as error:  # it must not hide what is being told
        found.append(f"the step, repeated to find the origin, raised {type(error).__name__}: {error}")
    finally:
        del vars(pl_module)["log"]
        set_random_state(random_state)
        for handle in hooks:
            handle.remove()
    return (found[0], True) if found else ("", guilty)


def _all_finite(values: Any) -> bool:
    tensors = [_local(value) for value in tree_leaves(values) if isinstance(value, Tensor)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())
