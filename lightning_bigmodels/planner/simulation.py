"""Steps of a run on tensors without memory, as the first of any number of processes."""

import copy
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_bigmodels.planner.buckets import keep_buckets
from lightning_bigmodels.planner.corrections import on_cuda, use_cuda_defaults
from lightning_bigmodels.planner.detections import assume_detections
from lightning_bigmodels.planner.eight_bit import use_8bit
from lightning_bigmodels.planner.first_process import FirstProcess, without_gpus
from lightning_bigmodels.planner.fusion import fuse
from lightning_bigmodels.planner.refusals import check_setting
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.synchronized import synchronized_as_on_cuda
from lightning_bigmodels.planner.trace import StepTrace
from lightning_bigmodels.planner.workspace import cpu_workspace
from lightning_bigmodels.strategies.batch_norm import one_value_allowed
from lightning_bigmodels.strategies.precision import with_true_precision
from lightning_bigmodels.tasks import Task

_LONG_RUN = 10**6
"""What a schedule is laid over, whose warmup may be longer than what is simulated."""
_NO_THREAD = -1
"""Where torch keeps meshes of threads apart, that of no thread."""


class _WithoutMemory(FakeTensorMode):
    """Tensors without memory, on a machine that is asked once whether it has a GPU.

    torch asks before each operation that makes a tensor, which takes a fifth of a small network's step (2.14).
    """

    avoid_device_init = True  # a property of torch's; no tensor here is on a GPU


class _Batches(LightningDataModule):
    """Made-up batches, changed as the user's data module changes real ones."""

    def __init__(self, datamodule: Any, batch_size: int, num_batches: int) -> None:
        super().__init__()
        self._datamodule = datamodule
        self._batch_size = batch_size
        self._num_batches = num_batches
        for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            setattr(self, hook, getattr(datamodule, hook))

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._num_batches):
            yield self._datamodule.example_batch(self._batch_size)

    def train_dataloader(self) -> "_Batches":
        return self

    def val_dataloader(self) -> list[Any]:
        return []


class _Watch(Callback):
    """Tells the trace what the step is at, and which tensors are what; the last step begins with `first_batch`."""

    def __init__(self, trace: StepTrace, first_batch: int = 1, num_batches: int = 2, like_cuda: bool = False) -> None:
        self.trace = trace
        self.first_batch = first_batch
        self.num_batches = num_batches
        self.like_cuda = like_cuda

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with torch.device("meta"), trainer.precision_plugin.module_init_context():
            if self.like_cuda and isinstance(pl_module, Task):
                fuse(pl_module)
            pl_module.configure_model()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx <= self.first_batch:
            self.trace.restart()
        # a single batch is a step: counted among others, it would keep the gradients of the step before
        if batch_idx == self.first_batch < self.num_batches - 1:
            # Lightning steps behind those batches, counted from the run's first, that this divides
            trainer.accumulate_grad_batches = self.num_batches
        self.trace.phase = "forward"
        self.trace.note(tree_leaves(batch), "inputs")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = batch_idx + 1 == trainer.num_training_batches
        if trainer.should_stop:
            self.trace.end()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self.trace.phase = "backward"

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trace.phase = "forward"

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.trace.phase = "update"

    def after_update(self, optimizer: Optimizer, *_: Any) -> None:
        """Note the state that the optimizer has made."""
        self.trace.note([value for state in optimizer.state.values() for value in state.values()], "optimizer state")
        self.trace.phase = "forward"


def simulate(
    model: LightningModule, datamodule: Any, setting: Setting, block_size: int = 1, like_cuda: bool = False
) -> StepTrace:
    """Run steps of a fit as rank 0 of all processes, and return what the second one costs.

    Of steps that are not alike, such as those in which the generator of a GAN learns and does not, it is a second one
    of the costliest.

    No tensor has memory and no other process is there, so that a network of any size on any number of processes takes
    seconds. Compiled networks are run as they are written, but hold what fused operations hold if `like_cuda`.

    Args:
        model: The model, whose network is not built yet; it stays so.
        datamodule: Its `example_batch(batch_size)` makes the batches.
        setting: How the step is run.
        block_size: Bytes that the allocator's blocks are a multiple of, 512 on CUDA.
        like_cuda: Whether operations hold what they hold on CUDA, instead of what they hold on a CPU.

    Raises:
        InputError: the setting cannot be simulated, or an operation hangs on values.
    """
    check_setting(setting)
    # to a CPU host memory is no other than its own
    trace = StepTrace(block_size, None if like_cuda else cpu_workspace, like_cuda and setting.offloads)
    model = copy.deepcopy(model)
    if isinstance(model, Task):
        model.uses_no_data = True
    if hasattr(model, "unfreeze_after"):
        model.unfreeze_after = 0.0  # type: ignore[assignment]  # what all of the network needs, once it learns
    if setting.activation_checkpointing is not None:
        model.activation_checkpointing = setting.activation_checkpointing  # type: ignore[assignment]
    if setting.optimizer_8bit:
        use_8bit(model)
    # in the first steps the optimizers make their state, for which a batch each will do. In the second batch of a step
    # gradients are there in the backward pass: more batches need no more memory
    first_batch = 2 * getattr(model, "step_period", 1) - 1
    num_batches = first_batch + min(2, setting.accumulate_grad_batches)
    with ExitStack() as stack:
        stack.enter_context(_only_new_garbage())
        stack.enter_context(_quiet())
        stack.enter_context(without_gpus())
        trainer = _trainer(setting, _Watch(trace, first_batch, num_batches, like_cuda))
        stack.enter_context(_process_group(trainer.strategy, setting.world_size))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # only to wrap a network it imports for half a second
        stack.enter_context(mock.patch("torch.compile", _as_it_is))
        if "transformers" in sys.modules:
            # it would leave out what is right only while a graph is recorded, such as attention without a mask (5.24)
            stack.enter_context(mock.patch("transformers.utils.import_utils.is_fake_tensor", return_value=False))
        if like_cuda:
            stack.enter_context(on_cuda())
            stack.enter_context(synchronized_as_on_cuda())
        stack.enter_context(assume_detections(trace))
        if setting.sync_batchnorm and setting.world_size > 1:
            stack.enter_context(one_value_allowed())  # there are those of the other processes
        stack.enter_context(warnings.catch_warnings())
        # what a real run may be told of, a plan need not
        warnings.simplefilter("ignore")
        _set_up_without_memory(trainer.strategy, trace, stack, like_cuda, setting.averages_weights)
        trainer.fit(model, datamodule=_Batches(datamodule, setting.batch_size, num_batches))
    return trace


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Look for garbage among what is made inside alone; the modules of a program are a tenth of a second each time."""
    if gc.get_freeze_count():
        yield  # whoever has frozen them unfreezes them
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what Lightning says of a Trainer that only plans."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _as_it_is(network: Any = None, **_: Any) -> Any:
    """Return a network or a function that is not compiled; stands in for torch.compile, as a decorator too."""
    return (lambda function: function) if network is None else network


def _trainer(setting: Setting, watch: Callback) -> Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": setting.devices,
        "num_nodes": setting.num_nodes,
        "strategy": "ddp" if setting.strategy == "auto" and setting.world_size > 1 else setting.strategy,
        "precision": setting.precision,
        "gradient_clip_val": setting.gradient_clip_val,
        "sync_batchnorm": setting.sync_batchnorm and setting.world_size > 1,
        "max_epochs": -1,
        "max_steps": _LONG_RUN,
        "limit_val_batches": 0,
        "logger": False,
        "callbacks": [watch],
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**with_true_precision(arguments))
    trainer.barebones = True  # self.log does nothing: its metrics would want values
    return trainer


@contextmanager
def _process_group(strategy: Strategy, world_size: int) -> Iterator[None]:
    """Let the strategy find itself the first of all its processes."""
    if isinstance(strategy, SingleDeviceStrategy):
        yield
        return
    strategy.cluster_environment = FirstProcess(world_size)  # type: ignore[attr-defined]
    strategy._launcher = None
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        with mock.patch.object(DeviceMesh, "__init__", _made_up(DeviceMesh.__init__)):
            yield
    finally:
        dist.destroy_process_group()


def _made_up(make: Callable[..., None]) -> Callable[..., None]:
    """Return what makes meshes that equal those of other plans, and no real one.

    torch keeps what operations on equal meshes return, and would give a run one whose processes are not there (2.14).
    """

    def make_apart(mesh: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        make(mesh, *args, **kwargs)
        mesh._thread_id = _NO_THREAD

    return make_apart


def _set_up_without_memory(
    strategy: Strategy, trace: StepTrace, stack: ExitStack, like_cuda: bool, averages_weights: bool
) -> None:
    """Have the network built on the meta device, and everything that comes after it on tensors without memory.

    What shards a network has to run before that mode, in which meshes cannot be looked into (torch 2.14).
    """
    set_up = strategy.setup

    def set_up_in_mode(trainer: Trainer) -> None:
        module = strategy.lightning_module
        assert module is not None
        trace.mode = stack.enter_context(_WithoutMemory(allow_non_fake_inputs=True))
        _fill(module)
        trace.note((*module.parameters(), *module.buffers()), "parameters")
        stack.enter_context(trace)
        set_up(trainer)
        if averages_weights:
            averages = [torch.empty_like(parameter) for parameter in module.parameters() if parameter.requires_grad]
            trace.note(averages, "parameters")
            # held until the steps have been run
            stack.callback(averages.clear)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(trace.note_gradient)
        for optimizer in strategy.optimizers:
            if like_cuda and not trace.offloads:
                use_cuda_defaults(optimizer)
            optimizer.register_step_post_hook(_Watch(trace).after_update)

    def nothing(*_: Any) -> None:
        return None

    strategy.setup = set_up_in_mode  # type: ignore[method-assign]
    # tensors without memory are on no device, and cannot be moved to one
    strategy.model_to_device = nothing  # type: ignore[method-assign]
    strategy.teardown = nothing  # type: ignore[method-assign]
    # they were built in their dtype
    strategy.precision_plugin.convert_module = lambda module: module  # type: ignore[method-assign]
    if isinstance(strategy, DDPStrategy):
        # held until the steps have been run
        strategy.configure_ddp = lambda: stack.callback(keep_buckets(strategy, trace).clear)  # type: ignore[method-assign,assignment]
        strategy.pre_backward = nothing  # type: ignore[method-assign,assignment]
        strategy.block_backward_sync = nullcontext  # type: ignore[method-assign,assignment]


def _emptied(tensor: torch.Tensor) -> torch.Tensor:
    """Return one like a tensor on the meta device, which torch would first turn into one without memory (2.14)."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if type(local) not in (torch.Tensor, torch.nn.Parameter) or not local.is_contiguous():
        return torch.empty_like(tensor, device="cpu")
    made = torch.empty(local.shape, dtype=local.dtype, device="cpu")
    return DTensor(made, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else made


def _fill(module: LightningModule) -> None:
    """Move a network from the meta device, and leave tensors that several of its layers share in common."""
    places = [(layer._parameters, name, p) for layer in module.modules() for name, p in layer._parameters.items()]
    owners = {id(p): (owner, name) for owner, name, p in reversed(places)}
    module._apply(_emptied)
    for owner, name, p in places:
        first, first_name = owners[id(p)]
        owner[name] = first[first_name]
