"""Settings that cannot be simulated: what is said of them, and between which plans theirs would lie."""

from dataclasses import replace

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry

from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.strategies import CompressedDDPStrategy, FSDP2Strategy

FLAGS = {
    "batch_size": "data.batch_size",
    "accumulate_grad_batches": "trainer.accumulate_grad_batches",
    "activation_checkpointing": "model.activation_checkpointing",
    "strategy": "trainer.strategy",
    "precision": "trainer.precision",
    "devices": "trainer.devices",
    "num_nodes": "trainer.num_nodes",
}
"""What the fields of a Setting are called on the command line."""
PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
_STRATEGIES = (DDPStrategy, CompressedDDPStrategy, FSDP2Strategy, SingleDeviceStrategy)
_ON_TPUS = ("xla", "xla_debug", "single_xla", "single_tpu")
_BUCKET_ELEMENTS = 2 * 200_000_000
"""What DeepSpeed's two buckets hold by default, however small the network is."""
_LOWER = {"16-mixed": "16-true", "bf16-mixed": "bf16-true"}


def check_setting(setting: Setting) -> None:
    """Refuse a setting that no step can be simulated of.

    Raises:
        InputError: a number is below 1, or strategy or precision are none that run on tensors without memory.
    """
    for field in ("batch_size", "accumulate_grad_batches", "devices", "num_nodes"):
        if (value := getattr(setting, field)) < 1:
            raise InputError(f"{FLAGS[field]} is {value}; set it to 1 or more")
    if setting.precision not in PRECISIONS:
        raise InputError(
            f"the precision {setting.precision} cannot be simulated; plan with one of {', '.join(PRECISIONS)}"
        )
    name = setting.strategy
    if _is_bounded(name):
        raise InputError(
            f"the strategy {name} needs code that runs on GPUs only, and cannot be planned; plan with fsdp2, which "
            f"holds the same shards"
        )
    if name in _ON_TPUS:
        raise InputError(f"the strategy {name} is for TPUs, of which the planner knows nothing; plan with ddp or fsdp2")
    known = ["auto", *StrategyRegistry.available_strategies()]
    if name not in known:
        raise InputError(
            f"the planner does not know the strategy {name}{near(name, known) or '; plan with ddp or fsdp2'}"
        )
    # one that somebody else has registered may do anything
    if name != "auto" and StrategyRegistry[name]["strategy"] not in _STRATEGIES:
        raise InputError(f"the planner does not know the strategy {name}; plan with ddp or fsdp2")


def bounds_of(setting: Setting) -> tuple[Setting | None, Setting, int] | None:
    """Return what holds no more than a setting that cannot be simulated, and what holds no less.

    Returns:
        A setting with less memory of a device, if there is one; one with more; and the bytes that come on top of it.
        None where there are no bounds.
    """
    name = setting.strategy
    if not _is_bounded(name):
        return None
    # both round activations to 16 bits that fsdp2 leaves as they are
    low = replace(setting, strategy="fsdp2", precision=_LOWER.get(setting.precision, setting.precision))
    on_top = 0
    if name.startswith("deepspeed"):
        on_top = _BUCKET_ELEMENTS * (2 if "16" in setting.precision else 4)
    is_elsewhere = "offload" in name or "config" in name
    return (None if is_elsewhere else low), replace(setting, strategy="ddp"), on_top


def _is_bounded(name: str) -> bool:
    """Whether a strategy divides state as fsdp2 does, and at worst holds all of it as ddp does."""
    return name.startswith(("fsdp", "deepspeed")) and not name.startswith("fsdp2")
