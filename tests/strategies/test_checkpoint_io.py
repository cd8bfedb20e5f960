"""Plain checkpoints are whole or not there too, and the command reads sharded ones wherever it reads plain ones."""

import os
import pickle
import random
import re
import resource
import shutil
import signal
import time

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.distributed.checkpoint.state_dict_saver import save
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM

from lightning_bigmodels import CausalLanguageModel, runs
from lightning_bigmodels.__main__ import main
from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.strategies import checkpoint_io
from lightning_bigmodels.strategies.checkpoint_io import WholeCheckpointIO, read_sharded
from lightning_bigmodels.trainer import Trainer
from tests.conftest import TINY_LLAMA
from tests.toys import ToyData, ToyModel
from tests.workers import run_on


def content(step, size=100_000):
    """A checkpoint that holds nothing but the step, with a weight that two names share."""
    weight = torch.full((size,), float(step))
    return {"state_dict": {"embedding": weight, "head": weight}, "step": step, "log": [step]}


def step_of(path):
    """Read a checkpoint and return its step, which all of it agrees on."""
    found = WholeCheckpointIO().load_checkpoint(path)
    assert found["state_dict"]["embedding"].eq(found["step"]).all()
    assert found["state_dict"]["head"].data_ptr() == found["state_dict"]["embedding"].data_ptr()
    assert found["log"] == [found["step"]]
    return found["step"]


def save_for_ever(rank, path, first, background):
    plugin = WholeCheckpointIO(background)
    for step in range(first, first + 10_000):
        plugin.save_checkpoint(content(step), path)
        path.with_name("noted").write_text(str(step))
        path.with_name("noted").replace(path.with_name("done"))


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_a_file_is_whole_whenever_its_process_is_killed(tmp_path, background):
    path, done, step = tmp_path / "last.ckpt", tmp_path / "done", 0
    random.seed(0)
    for _ in range(10):
        arguments = (path, step + 1, background)
        context = start_processes(save_for_ever, arguments, nprocs=1, join=False, start_method="fork")
        while not done.exists() or int(done.read_text()) <= step + background:
            time.sleep(0.005)
            assert context.processes[0].is_alive()
        time.sleep(random.uniform(0, 0.05))
        os.kill(context.processes[0].pid, signal.SIGKILL)
        context.processes[0].join()
        step, found = int(done.read_text()), step_of(path)
        assert step - background <= found <= step + 1
        step = found
    WholeCheckpointIO().save_checkpoint(content(step), path)
    assert {p.name for p in tmp_path.iterdir()} - {"noted"} == {"last.ckpt", "done"}


def test_in_the_background_a_save_holds_the_state_of_its_call(tmp_path, monkeypatch):
    old, last, written = tmp_path / "old.ckpt", tmp_path / "last.ckpt", tmp_path / "written"
    put_in_place = checkpoint_io.put_in_place

    def put_slowly(part, path):
        while path == last and not written.exists():
            time.sleep(0.01)
        put_in_place(part, path)

    monkeypatch.setattr(checkpoint_io, "put_in_place", put_slowly)
    plugin = WholeCheckpointIO(async_checkpoints=True)
    plugin.save_checkpoint(content(1), old)
    checkpoint = content(2)
    plugin.save_checkpoint(checkpoint, last)
    plugin.remove_checkpoint(old)
    checkpoint["state_dict"]["embedding"].add_(1)
    checkpoint["log"].append("later")
    assert step_of(old) == 1
    assert not last.exists()
    written.touch()
    plugin.teardown()
    assert step_of(last) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt", "written"}
    plugin.remove_checkpoint(last)
    assert not last.exists()


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_a_full_disk_costs_nothing_that_was_there(tmp_path, background):
    last, old = tmp_path / "last.ckpt", tmp_path / "old.ckpt"

    def work():
        plugin = WholeCheckpointIO(background)
        plugin.save_checkpoint(content(1), last)
        plugin.save_checkpoint(content(1), old)
        plugin.teardown()
        # the limit meets the same write as the end of a disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

        def save():
            plugin.save_checkpoint(content(2), last)
            plugin.remove_checkpoint(old)
            plugin.save_checkpoint(content(3), last)

        with pytest.raises(RunError) as caught:
            save()
        plugin.teardown()  # says it once
        return str(caught.value)

    (message,) = run_on(1, work)
    assert re.fullmatch(
        rf"the checkpoint {last} could not be written: File too large \([\d,.]+ MB are free\)\. What was written "
        r"before it is whole: make room, then go on from there with --ckpt_path last",
        message,
    )
    assert step_of(last) == step_of(old) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt", "old.ckpt"}


class FullDisk(ModelCheckpoint):
    """Meets the end of the disk on rank zero with the checkpoint of the second step, which is the last."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 1 and trainer.is_global_zero:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_under_ddp_the_command_ends_on_all_processes(tmp_path, background):
    def work():
        trainer = Trainer(
            accelerator="cpu",
            strategy="ddp",
            devices=2,
            max_steps=2,
            logger=False,
            enable_progress_bar=False,
            plugins=[WholeCheckpointIO(background)],
            callbacks=[FullDisk(tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)],
        )
        with pytest.raises(RunError, match="could not be written: File too large") as caught:
            trainer.fit(ToyModel(), ToyData())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return str(caught.value)

    first, second = run_on(2, work)
    assert first == second
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory, text_file, cache_dir):
    """A folder in which the command has trained two epochs on two processes, sharded, and the recipe."""
    folder = tmp_path_factory.mktemp("sharded")
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "limit_train_batches": 3,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"monitor": "val_loss", "filename": "best", "save_last": True},
                },
            ],
        },
        "model": {
            "class_path": "CausalLanguageModel",
            "init_args": {
                "architecture": "llama",
                "config": TINY_LLAMA,
                "optimizer": {"class_path": "lightning_bigmodels.optim.MuonWithAdamW"},
                "schedule": {"class_path": "lightning_bigmodels.optim.WarmupCosine"},
            },
        },
        "data": {
            "class_path": "Text",
            "init_args": {
                "sources": str(text_file),
                "vocab_size": 300,
                "block_size": 32,
                "batch_size": 2,
                "cache_dir": cache_dir,
            },
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    command_on(2, folder, "fit", "--trainer.strategy=fsdp2", "--trainer.devices=2")
    return folder


def command_on(processes, folder, verb, *arguments):
    """Run the command in workers, in `folder`, and check that it succeeds."""

    def work():
        # what Lightning reads when it is imported
        rank_zero_only.rank = int(os.environ["RANK"])
        os.chdir(folder)
        os.environ["WANDB_MODE"] = "disabled"
        return main([verb, "--config=recipe.yaml", *arguments])

    assert run_on(processes, work) == [0] * processes


@pytest.fixture
def run(sharded_run, tmp_path, monkeypatch):
    """A copy of that folder, in which the test is."""
    shutil.copytree(sharded_run, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    handler = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, handler)


def val_losses(folder):
    """Return what a run has logged after each epoch."""
    rows = (folder / "runs" / "fit" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val_loss")
    return [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]


def test_the_command_goes_on_with_a_sharded_run_on_other_processes(run):
    found = {}
    for processes, strategy in {1: "auto", 4: "fsdp2_async"}.items():
        folder = run / strategy
        shutil.copytree(run, folder, symlinks=True, ignore=shutil.ignore_patterns("auto"))
        given = {"trainer.strategy": strategy, "trainer.devices": processes, "data.batch_size": 4 // processes}
        given |= {"ckpt_path": "last", "trainer.max_epochs": 3}
        command_on(processes, folder, "fit", *(f"--{key}={value}" for key, value in given.items()))
        found[strategy] = val_losses(folder)
        assert (folder / "runs/fit/version_0/checkpoints/last.ckpt").is_symlink() == (processes > 1)
    before = val_losses(run)
    assert len(before) == 2
    for after in found.values():
        assert after[:2] == before
        assert after[2] < before[1]
    assert found["auto"][2] == pytest.approx(found["fsdp2_async"][2], rel=1e-3)


def test_the_command_measures_exports_and_consolidates_a_sharded_checkpoint(run, capsys):
    last = runs.find_checkpoint("runs", "last")
    assert main(["validate", "--config=recipe.yaml", "--ckpt_path=best"]) == 0
    assert main(["export", "--ckpt_path=last", "--output=exported"]) == 0
    assert main(["export", f"--ckpt_path={last}", "--output=by-path"]) == 0
    assert main(["consolidate", str(last), "--output", "one.ckpt"]) == 0
    assert capsys.readouterr().out.endswith("exported to by-path\nconsolidated to one.ckpt\n")
    weights = read_sharded(last)["state_dict"]
    for folder in ("exported", "by-path"):
        network = AutoModelForCausalLM.from_pretrained(run / folder)
        for name, value in network.state_dict().items():
            assert torch.equal(value, weights[f"network.{name}"])
    loaded = CausalLanguageModel.load_from_checkpoint("one.ckpt")
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    assert main(["validate", "--config=recipe.yaml", "--ckpt_path=one.ckpt"]) == 0


def error_of(capsys, *arguments):
    assert main(list(arguments)) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("bigmodels: error: ")


def test_consolidate_refuses_in_one_line(run, capsys):
    last = runs.find_checkpoint("runs", "last")
    (run / "one.ckpt").touch()
    usage = "write: bigmodels consolidate CHECKPOINT --output FILE"
    for arguments, message in {
        (): f"the following arguments are required: checkpoint, --output; {usage}",
        (str(last),): f"the following arguments are required: --output; {usage}",
        (str(last), "--output=one.ckpt"): "the output 'one.ckpt' exists already; name another file or remove it",
        ("none.ckpt", "--output=o"): "there is no checkpoint at none.ckpt; name another one",
        ("runs", "--output=o"): "runs is not a sharded checkpoint; name a folder with .metadata and meta.pt",
        ("one.ckpt", "--output=o"): "one.ckpt is not a sharded checkpoint; name a folder with .metadata and meta.pt",
    }.items():
        assert error_of(capsys, "consolidate", *arguments) == message
    (last / "__0_0.distcp").write_bytes(b"cut")
    (last / "__1_0.distcp").unlink()
    (last / "meta.pt").unlink()
    message = error_of(capsys, "consolidate", str(last), "--output=o")
    assert re.fullmatch(
        rf"the checkpoint {last} is not whole, it lacks meta.pt, the end of __0_0.distcp \(3 of \d+ bytes are there\), "
        r"__1_0.distcp; take another one, or copy it again with all of its files",
        message,
    )
    assert f"{last} is not a whole checkpoint, it lacks meta.pt" in error_of(capsys, "validate", f"--ckpt_path={last}")
    assert main(["consolidate", "--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_last_prefers_a_whole_checkpoint_and_never_starts_anew_without_a_word(run, capsys):
    folder = run / "runs/fit/version_0/checkpoints"
    shutil.copytree(folder / "last.ckpt", folder / "last-v1.ckpt")
    (folder / "last-v1.ckpt" / "meta.pt").unlink()
    assert runs.find_checkpoint("runs", "last") == folder.relative_to(run) / "last.ckpt"
    shutil.rmtree((folder / "last.ckpt").resolve())
    shutil.rmtree(folder / "last-v1.ckpt")
    again = ["fit", "--config=recipe.yaml", "--ckpt_path=last", "--trainer.max_epochs=3"]
    assert "which is gone); name another one" in error_of(capsys, *again)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_no_object_but_the_index_is_unpickled(tmp_path):
    save({"state_dict": {"weight": torch.ones(2)}}, checkpoint_id=tmp_path / "last.ckpt", no_dist=True)
    torch.save({}, tmp_path / "last.ckpt" / "meta.pt")
    assert read_sharded(tmp_path / "last.ckpt")["state_dict"]["weight"].tolist() == [1, 1]
    (tmp_path / "last.ckpt" / ".metadata").write_bytes(pickle.dumps(os.system))
    with pytest.raises(InputError, match=r"names posix.system, which no checkpoint needs; do not load it"):
        read_sharded(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt" / ".metadata").write_bytes(b"")
    with pytest.raises(InputError, match=r"\.metadata is broken \(Ran out of input\); take another checkpoint"):
        read_sharded(tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_values_are_read_without_unpickling(tmp_path):
    save({"state_dict": {"value": os.getcwd}}, checkpoint_id=tmp_path / "last.ckpt", no_dist=True)
    torch.save({}, tmp_path / "last.ckpt" / "meta.pt")
    with pytest.raises(pickle.UnpicklingError, match="posix.getcwd"):
        read_sharded(tmp_path / "last.ckpt")
