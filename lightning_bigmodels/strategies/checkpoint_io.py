"""Checkpoints that are whole or not there: written beside their place, read whether they are a file or shards."""

import io
import os
import pickle
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from typing_extensions import override

from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.files import sync_folder

# Lightning's names: epochs, loops, callbacks and the like; torch's: what lies in which shard
META_FILE = "meta.pt"
INDEX_FILE = ".metadata"

# Lightning's name for what training goes on from where `state_dict` holds an average of it
TRAINING_WEIGHTS = "current_model_state"

_INDEX_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    # Python 3.13 moved them
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes plain checkpoints whole or not at all, and reads sharded ones too, for every strategy of one file.

    A file is written and synced beside its place, then takes its name in one step; what has a name is always whole. A
    sharded checkpoint is assembled in memory, on the CPU of each process. The `bigmodels` command uses this class by
    itself; in Python: `Trainer(plugins=[WholeCheckpointIO()])`.

    Args:
        async_checkpoints: Whether training goes on while a checkpoint is written. It takes the checkpoint's size in
            memory once more. The next save waits for the former; an error of the former is raised there, or at the
            end of the run. Checkpoints that a new one replaces are deleted once it is whole.
    """

    def __init__(self, async_checkpoints: bool = False) -> None:
        super().__init__()
        self.async_checkpoints = async_checkpoints
        self._background = BackgroundSave()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if not is_local(path):
            if self.async_checkpoints:
                raise InputError(f"async_checkpoints writes to a folder of this machine, not to {path}; set it false")
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self._background.finish()
        if not self.async_checkpoints:
            write_whole(Path(path), lambda file: torch.save(checkpoint, file))
            return
        # training changes the state, lists and numbers as well as tensors, as soon as this returns
        content = io.BytesIO()
        torch.save(checkpoint, content)
        executor = ThreadPoolExecutor(max_workers=1)
        future = executor.submit(write_whole, Path(path), lambda file: file.write(content.getbuffer()))
        executor.shutdown(wait=False)
        self._background.start(future.result)

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        self._background.finish()
        if is_local(path):
            check_exists(Path(path))
            if Path(path).is_dir():
                return read_sharded(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        if is_local(path):
            self._background.remove(Path(path))
        else:
            super().remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        self._background.finish()


class BackgroundSave:
    """The one save that is on its way to the disk, and the checkpoints that may go once it is whole."""

    def __init__(self) -> None:
        self._wait: Callable[[], Any] | None = None
        self._replaced: list[Path] = []

    def start(self, wait: Callable[[], Any]) -> None:
        """Take over a save when there is none under way; `wait` returns when it is done or raises its error."""
        self._wait = wait

    def remove(self, path: Path) -> None:
        """Delete a checkpoint, after the save that is under way if there is one."""
        if self._wait is None:
            remove_checkpoint(path)
        else:
            self._replaced.append(path)

    def finish(self) -> None:
        """Wait for the save, then delete what it replaces; if it failed, raise its error and delete nothing."""
        wait, replaced = self._wait, self._replaced
        self._wait, self._replaced = None, []
        if wait is not None:
            wait()
        for path in replaced:
            remove_checkpoint(path)


def is_local(path: str | Path) -> bool:
    """Whether a path is one of this machine's file system, not an address."""
    return "://" not in str(path)


def beside(path: Path) -> Path:
    """Return a new hidden name in the folder of `path` for what shall become `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill the file `path`, which is there when it is whole; what was there before stays until then.

    Raises:
        RunError: The disk does not take it.
    """
    part = beside(path)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
            with part.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(part, path)
    except BaseException:
        remove_leftovers(path)
        raise


def put_in_place(part: Path, path: Path) -> None:
    """Give a file or link the name `path` in one step, then delete what `path` was."""
    if path.is_dir() and not path.is_symlink():
        if not is_sharded(path):
            raise InputError(f"{path} is a folder and no checkpoint; name another file or remove it")
        # written in place by Lightning itself; a folder cannot be replaced in one step, so this once the name is away
        path.rename(beside(path))
    part.replace(path)
    sync_folder(path.parent)
    remove_leftovers(path)


def remove_leftovers(path: Path) -> None:
    """Delete what was written for the checkpoint `path` and is not it: unfinished, or replaced."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}(\.link)?")
    present = str(path.readlink()) if path.is_symlink() else None
    siblings = list(path.parent.iterdir()) if path.parent.is_dir() else []
    for sibling in siblings:
        if pattern.fullmatch(sibling.name) and sibling.name != present:
            _delete(sibling)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, the name first: what is half deleted has none."""
    if os.path.lexists(path):
        _delete(path)
    remove_leftovers(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says while the checkpoint `path` is written into a RunError that says how to go on."""
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        # torch reports a full disk as an unexpected position in its file
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = shutil.disk_usage(folder).free
        raise RunError(
            f"the checkpoint {path} could not be written: {cause.strerror or cause} ({free / 1e6:,.1f} MB are free). "
            "What was written before it is whole: make room, then go on from there with --ckpt_path last"
        ) from error


@contextmanager
def causes() -> Iterator[None]:
    """Raise what went wrong on some process; torch wraps it in a BaseException with the stack of each process."""
    try:
        yield
    except CheckpointException as error:
        found = [failure[0] for failure in error.failures.values()]
        known = [cause for cause in found if isinstance(cause, (InputError, RunError))]
        raise (known or found)[0] from error


def check_exists(path: Path) -> None:
    """Refuse a path where nothing is, or a link whose folder is gone.

    Raises:
        InputError: Nothing is there.
    """
    if not path.exists():
        gone = f" (it points to {path.readlink()}, which is gone)" if path.is_symlink() else ""
        raise InputError(f"there is no checkpoint at {path}{gone}; name another one")


def is_sharded(path: Path) -> bool:
    """Whether a path is the folder of a sharded checkpoint, be it whole or not."""
    return path.is_dir() and any(
        child.name in (META_FILE, INDEX_FILE) or child.suffix == ".distcp" for child in path.iterdir()
    )


def read_index(folder: Path) -> Metadata:
    """Return what lies where in a sharded checkpoint.

    Raises:
        InputError: `folder` is no sharded checkpoint, or files of it are missing or cut off.
    """
    if not is_sharded(folder):
        raise InputError(f"{folder} is not a sharded checkpoint; name a folder with {INDEX_FILE} and {META_FILE}")
    missing = [name for name in (INDEX_FILE, META_FILE) if not (folder / name).is_file()]
    if INDEX_FILE not in missing:
        try:
            index = PlainReader(folder).read_metadata()
        except (EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{folder / INDEX_FILE} is broken ({error}); take another checkpoint") from error
        sizes: dict[str, int] = {}
        for place in index.storage_data.values():
            end = place.offset + place.length
            sizes[place.relative_path] = max(end, sizes.get(place.relative_path, 0))
        for name, size in sorted(sizes.items()):
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found is None or found < size:
                missing.append(name if found is None else f"the end of {name} ({found} of {size} bytes are there)")
    if missing:
        raise InputError(
            f"the checkpoint {folder} is not whole, it lacks {', '.join(missing)}; take another one, or copy it again "
            "with all of its files"
        )
    return index


def read_sharded(folder: Path, network_only: bool = False) -> dict[str, Any]:
    """Return a sharded checkpoint as Lightning would have written it to one file, in memory on the CPU.

    Args:
        folder: The checkpoint.
        network_only: Leave out the states of optimizers, with Adam two thirds of the memory.

    Raises:
        InputError: `folder` is no sharded checkpoint, or files of it are missing or cut off.
    """
    read_index(folder)
    shards: dict[str, Any] = {}
    planner = _PlainPlanner(keys={"state_dict"} if network_only else None)
    with causes():
        _load_state_dict(shards, storage_reader=PlainReader(folder), planner=planner, no_dist=True)
    if "state_dict" not in shards:
        raise InputError(f"the checkpoint {folder} was not written by fsdp2: it holds {', '.join(sorted(shards))}")
    checkpoint = torch.load(folder / META_FILE, weights_only=True, map_location="cpu")
    checkpoint["state_dict"] = shards.pop("state_dict")
    if TRAINING_WEIGHTS in shards:
        checkpoint[TRAINING_WEIGHTS] = shards.pop(TRAINING_WEIGHTS)
    if shards:
        checkpoint["optimizer_states"] = [by_index(shards[f"optimizer_{i}"]) for i in range(len(shards))]
    return checkpoint


def by_index(state: dict[str, Any]) -> dict[str, Any]:
    """Key an optimizer's state by the place of each parameter in the optimizer's groups, as plain optimizers do."""
    groups = state["param_groups"]
    index = {name: place for place, name in enumerate(name for group in groups for name in group["params"])}
    return {
        # DCP drops an empty state, that of SGD without momentum
        "state": {index[name]: value for name, value in state.get("state", {}).items()},
        "param_groups": [{**group, "params": [index[name] for name in group["params"]]} for group in groups],
    }


def consolidate(checkpoint: str | Path, output: str | Path) -> Path:
    """Turn a sharded checkpoint into one plain file, which every strategy reads and can go on from.

    Needs memory for the whole of it, with Adam in float32 12 bytes for each parameter.

    Args:
        checkpoint: The folder of a sharded checkpoint, or a link to it.
        output: The file to write.

    Raises:
        InputError: `checkpoint` is no sharded checkpoint or not whole, or `output` exists.
        RunError: The disk does not take it.
    """
    folder, target = Path(checkpoint), Path(output)
    if os.path.lexists(target):
        raise InputError(f"the output {str(target)!r} exists already; name another file or remove it")
    check_exists(folder)
    state = read_sharded(folder)
    write_whole(target, lambda file: torch.save(state, file))
    return target


class PlainReader(FileSystemReader):
    """Reads shards, and of Python objects only those that torch's index consists of."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX_FILE).open("rb") as file:
            return _IndexUnpickler(file).load()


class _IndexUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise InputError(
            f"the checkpoint's {INDEX_FILE} names {module}.{name}, which no checkpoint needs; do not load it"
        )


class _PlainPlanner(_EmptyStateDictLoadPlanner):
    """Rebuilds a state from its index; values are plain, nothing is unpickled."""

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        super().load_bytes(read_item, as_plain(value))


def as_plain(value: io.BytesIO) -> io.BytesIO:
    """Return what torch's planners read with pickle, after it was read without."""
    torch.load(value, weights_only=True)
    value.seek(0)
    return value
