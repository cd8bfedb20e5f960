"""The base of every LightningModule here: network, optimizer, schedule, steps, checkpoints."""

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.optim import Optimizer
from typing_extensions import override

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.exportable import Exportable as Exportable
from lightning_bigmodels.exportable import Exported
from lightning_bigmodels.optim import HIDDEN, OUTPUT, UNDECAYED, ScheduleCallable, default_optimizer
from lightning_bigmodels.png import Drawn
from lightning_bigmodels.strategies.batch_norm import synchronize
from lightning_bigmodels.strategies.clipping import clip_norm, clip_value, on_several_meshes
from lightning_bigmodels.strategies.fsdp2 import keeps_on_host, shard
from lightning_bigmodels.strategies.precision import check_precision
from lightning_bigmodels.tasks.exact_resume import ExactResume

_Network = TypeVar("_Network", bound=nn.Module)
Phase = Literal["train", "val", "test"]
LR_SCALE = "lr_scale"
"""Key of a parameter group: factor on the optimizer's learning rate."""


class Task(ExactResume, ABC):
    """A network and how it learns; families name the network and write `step`.

    The network is built in `configure_model`, so that a strategy can shard it and a planner can size it before any
    memory is taken.

    Args:
        optimizer: From parameter groups to an optimizer; None is AdamW with lr 1e-3 and weight decay 0.1.
        schedule: From optimizer and total steps to a scheduler, stepped after each optimizer step; None is constant.
        l1_penalty: Weight of the sum of absolute values of all decayed parameters, added to the training loss.
        compile: Whether the network runs through torch.compile.
    """

    network: nn.Module | None
    step_period = 1
    """Steps after which they are alike again; the last of so many does all that any of them does."""
    uses_no_data = False
    """Whether steps run on `example_batch` alone: what is read or learned from data before them is made up."""

    @property
    def flops_per_batch(self) -> int | None:
        """Floating-point operations of forward and backward for the last batch, for `Throughput`; None: not known."""
        return None

    def __init__(
        self,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        l1_penalty: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if l1_penalty < 0:
            raise InputError(f"l1_penalty is {l1_penalty}; it must be 0 or more")
        self.optimizer = optimizer or default_optimizer
        self.schedule = schedule
        self.l1_penalty = l1_penalty
        self.compile_network = compile
        self.network = None
        self._matrices: set[nn.Parameter] = set()

    @abstractmethod
    def build_network(self) -> nn.Module:
        """Return the network; called once, in the strategy's own context."""

    @abstractmethod
    def step(self, phase: Phase, batch: Any) -> Tensor:
        """Return the mean loss of a batch and log what the phase reports."""

    def output_modules(self) -> list[nn.Module]:
        """Return the layers that make the network's output: decayed like hidden matrices, but not one of them."""
        return []

    def blocks(self) -> list[nn.Module]:
        """Return the repeated layers, each to be sharded and gathered as a whole."""
        return []

    def tensor_parallel_plan(self, size: int) -> dict[str, ParallelStyle]:
        """Return how layers are split over `size` processes, by their names in the network; empty where none can be.

        Raises:
            InputError: the network cannot be split over so many.
        """
        return {}

    def draw_predictions(self, batch: Any, rows: list[dict[str, Any]]) -> Iterator[tuple[str, Drawn]]:
        """Yield the pictures that belong to what `predict_step` returned for a batch: a name, and (3, H, W) uint8.

        (H, W) of uint8 or uint16 holds classes, and its file keeps them as they are.
        """
        return iter(())

    def collect_predictions(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """Return the contents of JSON files, by their names, that are made of the rows of all batches."""
        return {}

    def tabulate_predictions(self, batch: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return columns of numbers, too many for lines of text, that belong to what `predict_step` returned.

        They become a Parquet file: (B, ...) each, B as many as there are rows, in their order.
        """
        return {}

    def lasting_hyper_parameters(self) -> dict[str, Any]:
        """Return the arguments that a checkpoint holds otherwise than they were given.

        It holds all weights, so it must load where the files that they began from are gone.
        """
        return {}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        lasting = self.lasting_hyper_parameters()
        if lasting:
            checkpoint["hyper_parameters"] = {**checkpoint.get("hyper_parameters", {}), **lasting}

    def exportable(self) -> Exported | None:
        """Return what others run without this package; None for a network of transformers, which has its own format.

        Raises:
            InputError: the network cannot be exported.
        """
        return None

    @override
    def save_hyperparameters(
        self, *args: Any, ignore: Any = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """Save the constructor's arguments, less those that a checkpoint could not hold as plain values.

        An optimizer or a schedule given in Python as a callable is left out; `load_from_checkpoint` takes it again. The
        `bigmodels` command keeps them, since it knows them as plain YAML.
        """
        if frame is None:
            here = inspect.currentframe()
            frame = here.f_back if here is not None else None
        super().save_hyperparameters(*args, ignore=ignore, frame=frame, logger=logger)
        for name in [name for name, value in self.hparams.items() if not _is_plain(value)]:
            del self.hparams[name]
        self._hparams_initial = copy.deepcopy(self.hparams)

    def with_channels_last(self, network: _Network) -> _Network:
        """Return the network with its weights' channels innermost, which convolutions are fastest with."""
        # FSDP2 takes contiguous weights alone; there the pictures' layout is enough
        return network if self.device_mesh is not None else network.to(memory_format=torch.channels_last)

    @override
    def configure_model(self) -> None:
        if self.network is not None:
            return
        if self._trainer is not None:
            check_precision(self._trainer)
        self.network = self.build_network()
        mesh = self.device_mesh
        if self._trainer is not None:
            data_parallel = None if mesh is None else mesh["data_parallel"]
            self.network = synchronize(self.network, self.trainer.strategy, data_parallel)
        if mesh is not None:
            if self.l1_penalty and keeps_on_host(self.trainer.strategy):
                raise InputError(
                    "l1_penalty does not work with the strategy fsdp2_offload, under which weights are in host memory "
                    "while the loss is computed; use fsdp2, or the optimizer's weight_decay"
                )
            size = mesh["tensor_parallel"].size()
            styles = self.tensor_parallel_plan(size) if size > 1 else {}
            shard(self.network, self.trainer.strategy, self.blocks(), styles, str(self.trainer.precision))
        elif self._trainer is not None and isinstance(self._trainer.strategy, FSDPStrategy):
            self._prepare_for_fsdp1(self._trainer.strategy)

    def _prepare_for_fsdp1(self, strategy: FSDPStrategy) -> None:
        """Tell FSDP1, which wraps the whole module later, what to gather as a whole; it leaves only flat parameters."""
        if self.l1_penalty:
            raise InputError("l1_penalty does not work with the strategy fsdp, which flattens matrices; use fsdp2")
        assert self.network is not None
        policy = ModuleWrapPolicy({type(block) for block in self.blocks()})
        strategy.kwargs.setdefault("auto_wrap_policy", policy)
        self._matrices = {p for p in self.network.parameters() if p.ndim >= 2}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[1:2] or [str(error)]
            raise InputError(
                f"the checkpoint holds another network than the one described: {first[0].strip()} Describe the network "
                f"as it was trained, for instance with --config and the config.yaml in its run's folder"
            ) from error

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.step("train", batch)
        return loss + self.l1_penalty * self._l1_norm() if self.l1_penalty else loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step("val", batch)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step("test", batch)

    def _l1_norm(self) -> Tensor:
        decayed = [
            p for group in self.parameter_groups() if not group["name"].startswith(UNDECAYED) for p in group["params"]
        ]
        sums = [p.abs().sum() for p in decayed]
        return torch.stack([total.full_tensor() if isinstance(total, DTensor) else total for total in sums]).sum()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters as up to three named groups.

        `hidden` and `output` take the optimizer's weight decay; `undecayed` (biases, norms, embeddings, and an output
        layer tied to an embedding) takes none.
        """
        if self.network is None:
            raise RuntimeError("parameter_groups needs the network; call configure_model first")
        embeddings = {
            id(p)
            for module in self.network.modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            for p in module.parameters(recurse=False)
        }
        outputs = {id(p) for module in self.output_modules() for p in module.parameters()}
        groups: dict[str, list[nn.Parameter]] = {HIDDEN: [], OUTPUT: [], UNDECAYED: []}
        for parameter in self.network.parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in embeddings or (parameter.ndim < 2 and parameter not in self._matrices):
                groups[UNDECAYED].append(parameter)
            else:
                groups[OUTPUT if id(parameter) in outputs else HIDDEN].append(parameter)
        if not any(groups.values()):
            raise InputError("no parameter of the network is trainable; unfreeze some of it")
        decay = {HIDDEN: {}, OUTPUT: {}, UNDECAYED: {"weight_decay": 0.0}}
        return [{"params": params, "name": name, **decay[name]} for name, params in groups.items() if params]

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameter_groups())
        for group in optimizer.param_groups:
            group["lr"] *= group.get(LR_SCALE, 1.0)
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        by_norm = gradient_clip_algorithm in (None, "norm")
        whole = self.trainer.strategy.model
        if gradient_clip_val and by_norm and isinstance(whole, FullyShardedDataParallel):
            whole.clip_grad_norm_(gradient_clip_val)
        elif gradient_clip_val and on_several_meshes(parameters):
            clip = clip_norm if by_norm else clip_value
            clip(parameters, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def total_steps(self) -> int:
        """Return the optimizer steps of the whole run.

        Raises:
            InputError: The run has no end in steps or epochs that a schedule could be laid over.
        """
        trainer = self.trainer
        batches = getattr(getattr(trainer, "datamodule", None), "num_train_batches", None)
        if trainer.max_steps > 0 and (batches is None or trainer.max_epochs in (None, -1)):
            return trainer.max_steps
        if batches is None or trainer.max_epochs in (None, -1):
            # a loader that we do not know: Lightning may build it to count (our own loader would lose its place)
            steps = trainer.estimated_stepping_batches
        else:
            assert trainer.max_epochs is not None
            limit = trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            steps = math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs
            steps = min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps
        if math.isinf(steps) or steps < 1:
            raise InputError("a schedule needs the run's length; set trainer.max_steps or trainer.max_epochs")
        return int(steps)


def _is_plain(value: Any) -> bool:
    """Whether `torch.load(weights_only=True)` reads the value back as it was."""
    if isinstance(value, dict):
        return all(_is_plain(v) for pair in value.items() for v in pair)
    if isinstance(value, (list, tuple, set)):
        return all(_is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str, bytes)
