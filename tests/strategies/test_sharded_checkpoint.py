"""Sharded checkpoints: whole or not there whatever is killed, on any number of processes, in the background too."""

import errno
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing import ProcessRaisedException, start_processes
from torch.utils.data import DataLoader, TensorDataset

from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.optim import MuonWithAdamW
from lightning_bigmodels.strategies import sharded_checkpoint
from lightning_bigmodels.strategies.checkpoint_io import WholeCheckpointIO, consolidate, read_sharded
from lightning_bigmodels.strategies.sharded_checkpoint import ShardedCheckpoints
from tests.workers import fit_on, run_on

# the checkpoints are read by runs that write none
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path")

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "muon": lambda groups: MuonWithAdamW(groups, lr=0.01, adamw_lr=0.01),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
}


class Network(nn.Module):
    """Predicts a word from a word; the output layer is the embedding."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(depth)))
        self.head = nn.Linear(6, 8, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.blocks(self.embedding(ids)))


class Words(LightningModule):
    """Learns to repeat words; its parameter groups have names, and another order than the network."""

    def __init__(self, optimizer: str = "adamw", depth: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer, self.depth = optimizer, depth
        self.network = None

    def configure_model(self):
        if self.network is not None:
            return
        self.network = Network(self.depth)
        if self.device_mesh is not None:
            for block in self.network.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[0])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        parameters = list(self.network.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim == 2 and len(p) == 6][::-1], "name": "hidden"},
            {"params": [p for p in parameters if p.ndim == 1 or len(p) == 8], "name": "undecayed", "weight_decay": 0.0},
        ]
        return OPTIMIZERS[self.optimizer](groups)


class Data(LightningDataModule):
    """One batch of 8 words, again and again; each process takes its part."""

    def train_dataloader(self):
        ids = torch.randint(8, (8,), generator=torch.Generator().manual_seed(0))
        world, rank = self.trainer.world_size, self.trainer.global_rank
        mine = ids[rank::world]
        return DataLoader(TensorDataset(mine), batch_size=8 // world)


def sharded(processes, **settings):
    """Return a function that builds the strategy for as many processes, for `fit_on`."""
    return lambda: ShardedCheckpoints(data_parallel_size=processes, tensor_parallel_size=1, **settings)


def keep(folder, **settings):
    """Write `last.ckpt` after each epoch, that is, each step."""
    return ModelCheckpoint(folder, **{"filename": "last", "enable_version_counter": False, **settings})


def fit(processes, optimizer, *callbacks, strategy=None, **settings):
    """Return the mean loss of each step."""
    settings = {"max_steps": 6, "use_distributed_sampler": False, "enable_checkpointing": bool(callbacks), **settings}
    strategy = strategy or sharded(processes)
    fits = fit_on(processes, strategy, lambda: Words(optimizer), Data, callbacks=list(callbacks), **settings)
    return torch.tensor([one.losses for one in fits]).mean(0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saved_on_two_processes_it_goes_on_anywhere_as_if_nothing_had_been(optimizer, tmp_path):
    whole = fit(2, optimizer)
    start = fit(2, optimizer, keep(tmp_path), max_steps=3)
    assert torch.equal(start, whole[:3])
    last, plain = tmp_path / "last.ckpt", {"strategy": "auto", "plugins": [WholeCheckpointIO()]}
    assert sorted(p.name for p in last.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    torch.testing.assert_close(fit(1, optimizer, ckpt_path=last, **plain), whole[3:])
    # torch numbers the parameters of a plain file in the order of the optimizer's groups, not in that of the module
    torch.testing.assert_close(fit(2, optimizer, ckpt_path=consolidate(last, tmp_path / "one.ckpt")), whole[3:])
    if optimizer == "adamw":
        assert torch.equal(fit(2, optimizer, ckpt_path=last), whole[3:])
        torch.testing.assert_close(fit(1, optimizer, ckpt_path=last), whole[3:])
        torch.testing.assert_close(fit(4, optimizer, ckpt_path=last), whole[3:])
        torch.testing.assert_close(fit(1, optimizer, ckpt_path=tmp_path / "one.ckpt", strategy="auto"), whole[3:])


def assert_same(found, expected, **tolerance):
    """Compare two checkpoints of one optimizer."""
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], **tolerance)
    (one,), (other,) = found["optimizer_states"], expected["optimizer_states"]
    assert one["param_groups"] == other["param_groups"]
    torch.testing.assert_close(one["state"], other["state"], **tolerance)


def test_one_file_written_by_a_sharded_run_is_the_file_of_a_plain_run(tmp_path):
    fit(1, "adamw", keep(tmp_path / "plain"), strategy="auto", max_steps=3)
    for background in (False, True):
        strategy = sharded(2, save_distributed_checkpoint=False, async_checkpoints=background)
        fit(2, "adamw", keep(tmp_path / str(background)), strategy=strategy, max_steps=3)
        plain, found = (torch.load(tmp_path / name / "last.ckpt") for name in ("plain", str(background)))
        assert found.keys() == plain.keys()
        assert_same(found, plain)


def test_background_saves_hold_what_plain_saves_hold(tmp_path):
    names = {}
    for background in (False, True):
        folder = tmp_path / str(background)
        best = keep(folder, filename="{step}", monitor="loss", mode="max", save_top_k=2, save_last=True)
        fit(2, "adamw", best, strategy=sharded(2, async_checkpoints=background))
        names[background] = sorted(re.sub(r"\.[0-9a-f]{8}$", "", p.name) for p in folder.iterdir())
        assert len(names[background]) == 6
    assert names[True] == names[False]
    for name in ("last.ckpt", "step=2.ckpt"):
        one, other = (read_sharded(tmp_path / str(background) / name) for background in (False, True))
        assert_same(one, other, rtol=0, atol=0)
        assert one["loops"] == other["loops"]


def bare_strategy(**settings):
    """A strategy without a Trainer, in a worker."""
    strategy = ShardedCheckpoints(**settings)
    strategy.cluster_environment = TorchElasticEnvironment()
    return strategy


def in_workers(work, *args, **settings):
    """Call `work(strategy, mesh, *args)` on two workers."""

    def run():
        torch.distributed.init_process_group("gloo")
        return work(bare_strategy(**settings), init_device_mesh("cpu", (2,)), *args)

    return run_on(2, run)


def state(mesh, step, size=50):
    """A checkpoint whose weights hold nothing but the step."""
    weight = distribute_tensor(torch.full((size, 1000), float(step)), mesh, [Shard(0)])
    return {"state_dict": {"weight": weight}, "step": step, "log": [step]}


def step_of(path):
    """Read a checkpoint and return its step, which all of it agrees on."""
    found = read_sharded(path)
    assert found["state_dict"]["weight"].eq(found["step"]).all()
    assert found["log"] == [found["step"]]
    return found["step"]


def names_in(folder):
    return sorted(re.sub(r"\.[0-9a-f]{8}$", ".token", path.name) for path in folder.iterdir())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    old, last = tmp_path / "old.ckpt", tmp_path / "last.ckpt"
    written = tmp_path / "written"
    write_data = sharded_checkpoint._ShardWriter.write_data

    def write_slowly(writer, *args):
        while writer._name == last and not written.exists():
            time.sleep(0.01)
        return write_data(writer, *args)

    monkeypatch.setattr(sharded_checkpoint._ShardWriter, "write_data", write_slowly)

    def work(strategy, mesh):
        strategy.save_checkpoint(state(mesh, 1), old)
        checkpoint = state(mesh, 2)
        weight, log = checkpoint["state_dict"]["weight"], checkpoint["log"]
        strategy.save_checkpoint(checkpoint, last)
        strategy.remove_checkpoint(old)
        weight.add_(1)
        log.append("later")
        # a collective of training, meanwhile
        torch.distributed.barrier()
        seen = old.exists(), last.exists()
        torch.distributed.barrier()
        written.touch()
        strategy._finish()
        torch.distributed.barrier()
        return *seen, old.exists(), last.exists()

    assert in_workers(work, async_checkpoints=True) == [(True, False, False, True)] * 2
    assert step_of(last) == 2
    assert names_in(tmp_path) == [".last.ckpt.token", "last.ckpt", "written"]


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_a_full_disk_is_one_error_everywhere_and_costs_nothing_that_was_there(tmp_path, background):
    last, old = tmp_path / "last.ckpt", tmp_path / "old.ckpt"

    def work(strategy, mesh):
        strategy.save_checkpoint(state(mesh, 1), last)
        strategy.save_checkpoint(state(mesh, 1), old)
        strategy._finish()
        if strategy.global_rank == 1:
            # the limit meets the same write as the end of a disk does
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

        def save():
            strategy.save_checkpoint(state(mesh, 2), last)
            strategy.remove_checkpoint(old)
            strategy._finish()

        with pytest.raises(RunError) as caught:
            save()
        strategy._finish()  # says it once
        return str(caught.value)

    first, second = in_workers(work, async_checkpoints=background)
    assert first == second
    assert re.fullmatch(
        rf"the checkpoint {last} could not be written: File too large \([\d,.]+ MB are free\)\. What was written "
        r"before it is whole: make room, then go on from there with --ckpt_path last",
        first,
    )
    assert step_of(last) == step_of(old) == 1
    assert names_in(tmp_path) == [".last.ckpt.token", ".old.ckpt.token", "last.ckpt", "old.ckpt"]


def test_whatever_has_the_name_gives_way_to_the_checkpoint(tmp_path):
    last, linked = tmp_path / "last.ckpt", tmp_path / "linked.ckpt"

    def work(strategy, mesh):
        errors = []
        for step, before in enumerate([last.touch, lambda: shutil.copytree(last, tmp_path / "copy"), None]):
            if before and strategy.global_rank == 0:
                before()
            torch.distributed.barrier()
            strategy.save_checkpoint(state(mesh, step), last)
        # as Lightning itself writes: a folder of that name
        strategy.save_checkpoint(state(mesh, 3), tmp_path / "copy")
        # as `save_last: link` of ModelCheckpoint
        if strategy.global_rank == 0:
            linked.symlink_to("last.ckpt")
            (tmp_path / "notes.ckpt").mkdir()
            (tmp_path / "notes.ckpt" / "notes.txt").touch()
        torch.distributed.barrier()
        for name in ("notes.ckpt", "s3://bucket/last.ckpt"):
            with pytest.raises(InputError) as caught:
                strategy.save_checkpoint(state(mesh, 4), tmp_path / name if "://" not in name else name)
            errors.append(str(caught.value))
        strategy.save_checkpoint(state(mesh, 5), linked)
        strategy.remove_checkpoint(tmp_path / "copy")
        return errors

    folder, address = in_workers(work)[0]
    assert folder == f"{tmp_path}/notes.ckpt is a folder and no checkpoint; name another file or remove it"
    assert (
        address
        == "a sharded checkpoint needs a folder of this machine, not s3://bucket/last.ckpt; mount it or name another"
    )
    assert step_of(last) == 2
    assert step_of(linked) == 5
    names = ".last.ckpt.token .linked.ckpt.token last.ckpt linked.ckpt notes.ckpt"
    assert names_in(tmp_path) == names.split()


def test_a_file_system_without_links_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)

    def work(strategy, mesh):
        with pytest.raises(InputError) as caught:
            strategy.save_checkpoint(state(mesh, 1), tmp_path / "last.ckpt")
        return str(caught.value)

    assert in_workers(work) == 2 * [
        f"the file system of {tmp_path} has no symbolic links, which sharded checkpoints need; name a folder on "
        "another one, or set save_distributed_checkpoint: false"
    ]
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, capfd):
    fit(1, "adamw", keep(tmp_path / "whole"), max_steps=1)
    fit(1, "adamw", keep(tmp_path / "light", save_weights_only=True), max_steps=1)
    fit(1, "adamw", keep(tmp_path / "plain"), max_steps=1, strategy="auto")

    def error(folder, module):
        settings = {"accelerator": "cpu", "logger": False, "max_steps": 2, "enable_checkpointing": False}
        trainer = Trainer(strategy=sharded(1)(), **settings)
        with pytest.raises(InputError) as caught:
            trainer.fit(module, Data(), ckpt_path=tmp_path / folder / "last.ckpt")
        return str(caught.value)

    def work():
        for folder in ("whole", "plain"):
            yield error(folder, Words(depth=1)), f"{network}network.blocks.1.0.weight is only in the checkpoint. "
            yield error(folder, Words(depth=3)), f"{network}network.blocks.2.0.weight is not in the checkpoint. "
        yield error("whole", Words("muon")), "trained with another optimizer, it has no 'momentum_buffer' of network."
        yield error("light", Words()), "last.ckpt holds no state of the optimizer; start a new run from its weights"
        (tmp_path / "whole" / "last.ckpt" / "__0_0.distcp").unlink()
        yield error("whole", Words()), "last.ckpt is not whole, it lacks __0_0.distcp; take another one"
        shutil.rmtree((tmp_path / "light" / "last.ckpt").resolve())
        yield error("light", Words()), "which is gone); name another one"

    network = "the checkpoint holds another network than the one described: "
    found = run_on(1, lambda: list(work()))[0]
    assert len(found) == 8
    for message, part in found:
        assert part in message


def test_a_link_as_the_last_checkpoint_is_refused_with_background_saves(tmp_path):
    with pytest.raises(ProcessRaisedException, match="InputError: ModelCheckpoint with save_last: link points to"):
        fit(1, "adamw", keep(tmp_path, save_last="link"), strategy=sharded(1, async_checkpoints=True))


def save_for_ever(rank, path, rendezvous, first, background):
    """Save step after step, each with weights that hold nothing but the step, and note what is done."""
    os.environ |= {"RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    strategy = bare_strategy(async_checkpoints=background)
    for step in range(first, first + 10_000):
        strategy.save_checkpoint(state(mesh, step), path)
        if rank == 0:
            path.with_name("noted").write_text(str(step))
            path.with_name("noted").replace(path.with_name("done"))


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_the_name_stands_for_a_whole_checkpoint_whatever_is_killed_when(tmp_path, background):
    path, done, step = tmp_path / "run" / "last.ckpt", tmp_path / "run" / "done", 0
    path.parent.mkdir()
    random.seed(0)
    for trial in range(10):
        arguments = (path, tmp_path / str(trial), step + 1, background)
        context = start_processes(save_for_ever, arguments, nprocs=2, join=False, start_method="fork")
        # in the background, the first is whole when the second is noted
        while not done.exists() or int(done.read_text()) <= step + background:
            time.sleep(0.005)
            assert all(process.is_alive() for process in context.processes)
        time.sleep(random.uniform(0, 0.1))
        for rank in random.sample(range(2), 2):
            os.kill(context.processes[rank].pid, signal.SIGKILL)
            # the other one finds itself alone, or does not
            time.sleep(random.choice([0, 0.05]))
        for process in context.processes:
            process.join()
        step = int(done.read_text())
        found = step_of(path)
        # what is noted may still be on its way in the background, and what is written not yet noted
        assert step - background <= found <= step + 1
        step = found
    # what the kills have left goes with the next save
    in_workers(lambda strategy, mesh: strategy.save_checkpoint(state(mesh, step), path))
    assert {name for name in names_in(path.parent) if "last" in name} == {".last.ckpt.token", "last.ckpt"}
