"""Sharded checkpoints: each process writes its part to a new folder, which takes the checkpoint's name once whole."""

import errno
import io
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.optim import Optimizer
from typing_extensions import override

from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.files import sync_folder
from lightning_bigmodels.strategies.checkpoint_io import (
    META_FILE,
    TRAINING_WEIGHTS,
    BackgroundSave,
    PlainReader,
    WholeCheckpointIO,
    as_plain,
    beside,
    by_index,
    causes,
    check_exists,
    disk_errors,
    is_local,
    put_in_place,
    read_index,
    remove_leftovers,
)


class ShardedCheckpoints(ModelParallelStrategy):
    """A ModelParallelStrategy whose checkpoints are whole or not there.

    A sharded checkpoint `last.ckpt` is a link to a hidden folder beside it. Each save writes a new folder; only when
    the files of all processes are complete and synced does the link move to it, in one step, and the former folder is
    deleted. So whatever process is killed when, the name stands for the last complete save. What a killed save leaves
    is deleted by the next one of that name.

    Args:
        args: Arguments of ModelParallelStrategy.
        async_checkpoints: Whether training goes on while a checkpoint is written. It takes the memory of each process's
            shards once more, on the CPU. The next save waits for the former; an error of the former is raised there, or
            at the end of the run, on all processes. Checkpoints that a new one replaces are deleted once it is whole.
        kwargs: Arguments of ModelParallelStrategy.
    """

    def __init__(self, *args: Any, async_checkpoints: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.async_checkpoints = async_checkpoints
        self._background = BackgroundSave()
        self._background_group: torch.distributed.ProcessGroup | None = None

    @override
    def setup(self, trainer: Trainer) -> None:
        if type(self.checkpoint_io) is TorchCheckpointIO:
            self.checkpoint_io = WholeCheckpointIO(self.async_checkpoints)
        links = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.save_last == "link"]
        if self.async_checkpoints and links:
            raise InputError(
                "ModelCheckpoint with save_last: link points to a checkpoint before an asynchronous save has written "
                "it; set save_last: true"
            )
        super().setup(trainer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options, got {storage_options!r}")
        if not self._save_distributed_checkpoint:
            self._on_rank_zero(partial(self.checkpoint_io.save_checkpoint, checkpoint, filepath))
            return
        # the hidden name is drawn on rank zero, for all
        name, folder = self.broadcast((os.fspath(filepath), str(beside(Path(filepath)))))
        if not is_local(name):
            raise InputError(
                f"a sharded checkpoint needs a folder of this machine, not {name}; mount it or name another"
            )
        self._background.finish()
        path = Path(name)
        shards = {key: checkpoint.pop(key) for key in ("state_dict", TRAINING_WEIGHTS) if key in checkpoint}
        shards |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        # now, since training goes on to change callbacks and loops while an asynchronous save writes
        meta = io.BytesIO()
        torch.save(checkpoint, meta)
        writer = _ShardWriter(path, Path(folder), meta.getvalue())
        if self.async_checkpoints:
            future: Any = async_save(shards, storage_writer=writer, process_group=self._group())
            self._background.start(partial(self._complete, future.result, path))
        else:
            self._complete(partial(save, shards, storage_writer=writer), path)

    def _complete(self, work: Callable[[], Any], path: Path) -> None:
        """Let a save come to its end, and clear up after one that failed."""
        with causes():
            try:
                work()
            except CheckpointException:
                # no process writes any more; after another error some may, and the next save of the name clears up
                if self.is_global_zero:
                    remove_leftovers(path)
                raise

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        if not self._save_distributed_checkpoint:
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            self._background.remove(Path(filepath))

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        self._finish()
        path = Path(self.broadcast(os.fspath(checkpoint_path)))
        assert self.lightning_module is not None
        # Lightning would load the optimizers of a former fit too, also where it evaluates
        fits = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        optimizers = self.optimizers if fits else []
        check_exists(path)
        if path.is_dir():
            return self._load_shards(path, optimizers)
        return self._load_file(path, optimizers, weights_only)

    def _load_shards(self, path: Path, optimizers: list[Optimizer]) -> dict[str, Any]:
        index = read_index(path)
        model = self._module()
        state = get_model_state_dict(model)
        self._check_network(_saved_shapes(index), state)
        saved = {tuple(map(str, place)) for place in index.planner_data.values()}
        weights = {name: value for name, value in state.items() if ("state_dict", name) in saved}
        _load({"state_dict": weights}, path)
        model.load_state_dict(weights, strict=self._is_strict())
        for i, optimizer in enumerate(optimizers):
            key = f"optimizer_{i}"
            values = {key: get_optimizer_state_dict(model, optimizer)}
            self._check_optimizer({place[1:] for place in saved if place[0] == key}, values[key], path)
            _load(values, path)
            set_optimizer_state_dict(model, optimizer, values[key], options=StateDictOptions(cpu_offload=True))
        meta: dict[str, Any] = torch.load(path / META_FILE, weights_only=True, map_location="cpu")
        training = {place[1] for place in saved if place[0] == TRAINING_WEIGHTS}
        if optimizers and training:
            meta[TRAINING_WEIGHTS] = {
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in weights.items()
                if name in training
            }
            _load({TRAINING_WEIGHTS: meta[TRAINING_WEIGHTS]}, path)
        return meta

    def _load_file(self, path: Path, optimizers: list[Optimizer], weights_only: bool | None) -> dict[str, Any]:
        # mapped: each process reads only what its shards need
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        model = self._module()
        weights = checkpoint.pop("state_dict")
        self._check_network({name: tuple(value.shape) for name, value in weights.items()}, get_model_state_dict(model))
        options = StateDictOptions(full_state_dict=True, strict=self._is_strict())
        set_model_state_dict(model, weights, options=options)
        states = checkpoint.pop("optimizer_states", [])
        if len(states) < len(optimizers):
            raise InputError(f"the checkpoint {path} holds no state of the optimizer; start a new run from its weights")
        for optimizer, state in zip(optimizers, states, strict=False):
            # torch 2.14 cannot take a whole state without tensors, that of SGD without momentum
            how = options if state["state"] else None
            set_optimizer_state_dict(model, optimizer, _by_name(state, model, optimizer), options=how)
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        # Lightning calls it too, for weights that `load_checkpoint` has taken out of the checkpoint already
        if weights := checkpoint.get("state_dict"):
            whole = not any(isinstance(value, DTensor) for value in weights.values())
            options = StateDictOptions(full_state_dict=whole, strict=strict)
            set_model_state_dict(self._module(), dict(weights), options=options)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        # Lightning 2.6 numbers the parameters in the order of the module, not in that of the optimizer's groups
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = get_optimizer_state_dict(self._module(), inner, options=options)
        return by_index(state) if self.is_global_zero else state

    @override
    def teardown(self) -> None:
        try:
            self._finish()
        finally:
            super().teardown()

    def _finish(self) -> None:
        self._background.finish()
        if isinstance(self.checkpoint_io, WholeCheckpointIO) and self.checkpoint_io.async_checkpoints:
            self._on_rank_zero(self.checkpoint_io.teardown)

    def _on_rank_zero(self, work: Callable[[], None]) -> None:
        """Do on rank zero what can fail, and raise its error on all: the others would wait for it for ever."""
        error: Exception | None = None
        if self.is_global_zero:
            try:
                work()
            except (InputError, RunError) as caught:
                error = caught
        error = self.broadcast(error)
        if error is not None:
            raise error

    def _group(self) -> torch.distributed.ProcessGroup:
        """Return the group in which background saves agree, apart from training's collectives."""
        if self._background_group is None:
            group = torch.distributed.new_group(backend="gloo", timeout=self._timeout)
            assert isinstance(group, torch.distributed.ProcessGroup)
            self._background_group = group
        return self._background_group

    def _module(self) -> torch.nn.Module:
        assert self.model is not None
        return self.model

    def _is_strict(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.strict_loading

    def _check_network(self, saved: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]) -> None:
        """Compare names and shapes: torch ignores what a checkpoint has beyond the module."""
        shapes = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
        other = [
            f"{name} is {saved[name]} in the checkpoint and {shape} here"
            for name, shape in shapes.items()
            if saved.get(name, shape) != shape
        ]
        if self._is_strict():
            other += [f"{name} is not in the checkpoint" for name in shapes if name not in saved]
            other += [f"{name} is only in the checkpoint" for name in saved if name not in state]
        if other:
            raise InputError(
                f"the checkpoint holds another network than the one described: {other[0]}. Describe the network as it "
                "was trained, for instance with --config and the config.yaml in its run's folder"
            )

    def _check_optimizer(self, saved: set[tuple[str, ...]], state: dict[str, Any], path: Path) -> None:
        if not saved:
            raise InputError(f"the checkpoint {path} holds no state of the optimizer; start a new run from its weights")
        for name, values in state["state"].items():
            for key in values:
                if ("state", name, key) not in saved:
                    raise InputError(
                        f"the checkpoint {path} was trained with another optimizer, it has no {key!r} of {name}; name "
                        "that optimizer"
                    )


class _ShardWriter(FileSystemWriter):
    """Writes shards to a new folder, and at the end, when all processes have written, gives it the checkpoint's name.

    Torch calls `finish` on the first process alone, after every process has synced its files, and raises an error of
    any process on all of them.
    """

    def __init__(self, name: Path, folder: Path, meta: bytes) -> None:
        super().__init__(folder)
        self._name, self._folder, self._meta = name, folder, meta
        self._link = folder.with_name(f"{folder.name}.link")

    @override
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            with disk_errors(self._name):
                self._name.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self._name)
                self._make_link()

    def _make_link(self) -> None:
        # before gigabytes are written for nothing
        try:
            self._link.symlink_to(self._folder.name)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            raise InputError(
                f"the file system of {self._name.parent} has no symbolic links, which sharded checkpoints need; name a "
                "folder on another one, or set save_distributed_checkpoint: false"
            ) from error

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with disk_errors(self._name):
            return super().write_data(plan, planner)

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with disk_errors(self._name):
            super().finish(metadata, results)
            with (self._folder / META_FILE).open("wb") as file:
                file.write(self._meta)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self._folder)
        # finds what another host has written to a disk of its own
        read_index(self._folder)
        with disk_errors(self._name):
            put_in_place(self._link, self._name)


class _PlainLoadPlanner(DefaultLoadPlanner):
    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        super().load_bytes(read_item, as_plain(value))


def _load(state: dict[str, Any], path: Path) -> None:
    with causes():
        load(state, storage_reader=PlainReader(path), planner=_PlainLoadPlanner())


def _saved_shapes(index: Metadata) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the network's tensors in a checkpoint."""
    return {
        index.planner_data[key][1]: tuple(value.size)
        for key, value in index.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata) and index.planner_data[key][0] == "state_dict"
    }


def _by_name(state: dict[str, Any], model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Key a plain optimizer's state by the names of its parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "state": {order[index]: value for index, value in state["state"].items()},
        "param_groups": [{**group, "params": [order[i] for i in group["params"]]} for group in state["param_groups"]],
    }
