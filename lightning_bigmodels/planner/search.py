"""The smallest changes that make a step fit: those that leave the result alone come first, and each is tried."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner.eight_bit import SAVED, arguments_8bit
from lightning_bigmodels.planner.flags import changed_flags, replicas
from lightning_bigmodels.planner.plan import Plan
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.trace import Kind

_ENOUGH = 2
"""Changes that fit, after which no other is tried."""
_HELPS = 0.95
"""Share of the memory that is left with a change that is worth keeping, or less."""
_DEVICES_OF_A_NODE = 8
_MOST_PROCESSES = 4096
_WITH_FLOAT32 = ("32-true", "16-mixed", "bf16-mixed")
_SHARDED: tuple[Kind, ...] = ("parameters", "gradients", "optimizer state")


_Change = Callable[[Setting], Setting | None]
"""From a setting to one that needs less memory; None where that is not possible."""


@dataclass(frozen=True)
class Trial:
    """A change of the setting, and what came of it.

    Attributes:
        flags: What to add to the command line.
        plan: With the change; None where it cannot be planned.
        reason: Why it cannot.
    """

    flags: list[str]
    plan: Plan | None
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether the changed step fits."""
        return self.plan is not None and self.plan.room.fits

    def to_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        if self.plan is None:
            return {"flags": self.flags, "reason": self.reason}
        return {"flags": self.flags, "plan": self.plan.to_dict()}


def find_changes(plan: Plan, model: Any, replan: Callable[[Setting], Plan]) -> list[Trial]:
    """Return all changes that were tried, in this order; those that fit are among them, if any does.

    First each change alone: smaller batches and as many more of them, activation checkpointing, sharding. What is
    learnt stays the same with them. If none of them fits, those that help are put together. If that is not enough, one
    of these comes on top, or all: weights and optimizer in host memory, where what is learnt still is the same and
    time is lost; mixed precision, an optimizer of 8 bits, layers split over devices, more devices, weights of 16 bits.

    Args:
        plan: One that does not fit.
        model: The model, for what can be changed of it.
        replan: Plans the same model in another setting; its InputError says why a setting is not possible.
    """
    search = _Search(plan, model, replan)
    search.run()
    return search.trials


class _Search:
    def __init__(self, plan: Plan, model: Any, replan: Callable[[Setting], Plan]) -> None:
        self.trials: list[Trial] = []
        self._first = plan
        self._model = model
        self._replan = replan
        self._plans: dict[Setting, Plan | None] = {plan.setting: plan}
        self._checkpointing: bool | None = getattr(model, "activation_checkpointing", None)
        # a training step that steps its optimizers itself cannot spread a batch over several
        self._accumulates = bool(getattr(model, "automatic_optimization", True))
        self._may_use_8bit = arguments_8bit(model) is not None
        self._fewest_rows = 1

    def run(self) -> None:
        start = self._first.setting
        self._largest_batch(start)
        helpful: list[_Change] = []
        for change in (self._checkpoint, _shard):
            setting = change(start)
            if self._has_found(_ENOUGH) or setting is None:
                continue
            plan = self._try(setting)
            if plan is not None and plan.room.used < _HELPS * self._first.room.used:
                helpful.append(change)
        if not self._has_found(1):
            self._combine(start, helpful)

    def _combine(self, setting: Setting, changes: list[_Change]) -> None:
        for change in changes:
            setting = change(setting) or setting
        if setting != self._first.setting and self._largest_batch(setting):
            return
        ways = (_mix_precision, self._use_8bit, _split, self._spread, _lower_precision)
        for change in (self._offload, *ways):
            if not self._has_found(_ENOUGH):
                self._climb(setting, change)
        # with more devices less would have to be in host memory, if anything
        for change in (*ways, self._offload):
            if not self._has_found(1):
                setting = self._climb(setting, change)

    def _climb(self, setting: Setting, change: _Change) -> Setting:
        """Apply a change as often as it helps and is needed, with the fewest rows; return how far that went."""
        while (changed := change(setting)) is not None:
            plan = self._try(self._with_batch(changed, 1))
            before = self._plans.get(self._with_batch(setting, 1))
            if plan is not None and plan.room.fits:
                self._largest_batch(changed)
                return changed
            if plan is None or before is None or plan.room.used >= _HELPS * before.room.used:
                break
            setting = changed
        return setting

    def _try(self, setting: Setting) -> Plan | None:
        if setting not in self._plans:
            flags = changed_flags(self._first.setting, setting, self._model)
            try:
                plan, reason = self._replan(setting), ""
            except InputError as error:
                plan, reason = None, str(error)
            self._plans[setting] = plan
            self.trials.append(Trial(flags, plan, reason))
        return self._plans[setting]

    def _has_found(self, number: int) -> bool:
        return sum(trial.fits for trial in self.trials) >= number

    # ---- changes

    def _with_batch(self, setting: Setting, size: int) -> Setting:
        if not self._accumulates:
            return setting
        size = max(size, self._fewest_rows)
        factor = setting.batch_size // size
        return replace(setting, batch_size=size, accumulate_grad_batches=setting.accumulate_grad_batches * factor)

    def _largest_batch(self, setting: Setting) -> bool:
        """Find the largest part of the batch that fits, the whole included; return whether there is one."""
        sizes = [size for size in range(setting.batch_size, 0, -1) if setting.batch_size % size == 0]
        sizes = sizes if self._accumulates else sizes[:1]
        whole = self._try(setting)
        least = self._try(self._with_batch(setting, sizes[-1]))
        if least is None and whole is not None and self._fewest_rows == 1 and len(sizes) > 1:
            # batch norm may want two rows
            self._fewest_rows = sizes[-2]
            least = self._try(self._with_batch(setting, sizes[-2]))
        if whole is None or least is None or not least.room.fits:
            return False
        # memory grows in proportion to the batch
        fewest = least.setting.batch_size
        slope = (whole.room.used - least.room.used) / max(1, setting.batch_size - fewest)
        for size in sizes[:-1]:
            if size > fewest and (size - fewest) * slope <= least.room.spare - least.room.uncertainty:
                plan = self._try(self._with_batch(setting, size))
                if plan is not None and plan.room.fits:
                    # of the fewest rows was tried to find this
                    self.trials = [trial for trial in self.trials if trial.plan is not least]
                    break
        return True

    def _checkpoint(self, setting: Setting) -> Setting | None:
        if self._checkpointing is not False or setting.activation_checkpointing:
            return None
        return replace(setting, activation_checkpointing=True)

    def _use_8bit(self, setting: Setting) -> Setting | None:
        """Return the setting with an optimizer of 8 bits, where its state is much of what is held."""
        plan = self._plans.get(self._with_batch(setting, 1))
        if plan is None or setting.optimizer_8bit or not self._may_use_8bit:
            return None
        saved = SAVED * plan.peak.held.get("optimizer state", 0)
        return replace(setting, optimizer_8bit=True) if saved > (1 - _HELPS) * plan.room.used else None

    def _offload(self, setting: Setting) -> Setting | None:
        """Return the setting with weights and optimizer in host memory, where they are what does not fit."""
        plan = self._plans.get(self._with_batch(setting, 1))
        splits = not setting.strategy.startswith(("auto", "ddp", "fsdp2")) or "_tp" in setting.strategy
        if plan is None or splits or plan.hardware.name == "cpu":
            return None
        state, _ = _state_and_missing(plan)
        if plan.peak.phase == "update":
            state += plan.peak.held.get("temporary", 0)
        if state < -plan.room.spare:
            return None
        # whatever its bits, the optimizer's state is not on the device then
        return replace(setting, strategy="fsdp2_offload", optimizer_8bit=self._first.setting.optimizer_8bit)

    def _spread(self, setting: Setting) -> Setting | None:
        """Return the setting on more devices, at most as many as state would need that is divided among them."""
        plan = self._plans.get(self._with_batch(setting, 1))
        if plan is None:
            return None
        state, missing = _state_and_missing(plan)
        factor = 2
        while factor * setting.world_size <= _MOST_PROCESSES and state * (1 - 1 / factor) < missing:
            factor *= 2
        if factor * setting.world_size > _MOST_PROCESSES:
            return None
        factor = max(2, factor // 4)
        devices = min(factor * setting.devices, max(_DEVICES_OF_A_NODE, setting.devices))
        num_nodes = -(-factor * setting.world_size // devices)
        spread = replace(setting, devices=devices, num_nodes=num_nodes)
        if not setting.strategy.startswith(("fsdp2", "tp")):
            spread = replace(spread, strategy="fsdp2")
        return _keep_rows(setting, spread)


def _state_and_missing(plan: Plan) -> tuple[float, int]:
    """Return the bytes that weights, gradients and optimizer take of a device, and by how many more it does not fit."""
    # what the allocator keeps shrinks with what it is asked for
    state = sum(plan.peak.held.get(kind, 0) for kind in _SHARDED) * plan.room.used / max(1, plan.room.allocated)
    return state, plan.room.uncertainty - plan.room.spare


def _shard(setting: Setting) -> Setting | None:
    if setting.world_size == 1 or not setting.strategy.startswith(("auto", "ddp")):
        return None
    return replace(setting, strategy="fsdp2")


def _mix_precision(setting: Setting) -> Setting | None:
    return replace(setting, precision="bf16-mixed") if setting.precision == "32-true" else None


def _lower_precision(setting: Setting) -> Setting | None:
    return replace(setting, precision="bf16-true") if setting.precision in _WITH_FLOAT32 else None


def _split(setting: Setting) -> Setting | None:
    """Return the setting with each layer split over more processes of a node."""
    sizes = {"fsdp2": 2, "fsdp2_tp2": 4, "fsdp2_tp4": 8}
    size = sizes.get(setting.strategy)
    if size is None or setting.devices % size:
        return None
    return _keep_rows(setting, replace(setting, strategy=f"fsdp2_tp{size}"))


def _keep_rows(old: Setting, new: Setting) -> Setting:
    """Return the new setting with batches accumulated so that a step sees as many rows, where that divides."""
    batches = old.accumulate_grad_batches * replicas(old)
    return replace(new, accumulate_grad_batches=max(1, batches // replicas(new)))
