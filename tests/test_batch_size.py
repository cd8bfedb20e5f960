"""The batch size found fits and the next one does not, against a loop written by hand."""

import functools
import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_bigmodels import CausalLanguageModel, batch_size, peak_memory
from lightning_bigmodels.__main__ import main
from lightning_bigmodels.batch_size import find_batch_size
from lightning_bigmodels.callbacks import ProcessWatch
from lightning_bigmodels.errors import InputError, RunError
from lightning_bigmodels.peak_memory import GIB, memory_of
from lightning_bigmodels.tasks import Task
from tests.conftest import TINY_LLAMA
from tests.workers import run_on

CPU = torch.device("cpu")
MIB = 2**20


# ---- real steps, against loops written by hand


class Wide(Task):
    """Activations of 4 MiB a row, weights of 0.25 MiB; `breaks` raises what it returns for a number of rows."""

    def __init__(self, breaks=lambda rows: None, **kwargs):
        super().__init__(**kwargs)
        self.breaks = breaks

    def build_network(self):
        return network()

    def blocks(self):
        return list(self.network)

    def step(self, phase, batch):
        error = self.breaks(len(batch["inputs"]))
        if error is not None:
            raise error
        loss = loss_of(self.network, batch["inputs"])
        self.log("train_loss", loss.detach())
        return loss


def loss_of(net, inputs):
    return (net(inputs) - inputs).square().mean()


def network():
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Tanh()) for _ in range(2)]
    )


class Rows(LightningDataModule):
    """What a search needs of data; it has no loader at all."""

    def example_batch(self, rows):
        return {"inputs": torch.ones(rows, 720, 64)}


def quiet(**settings):
    values = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": 1.0,
    }
    return Trainer(**{**values, **settings})


def loop_peak(strategy, rows):
    """Peak of three steps of a loop without Lightning: the running sum of what the profiler saw."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        net = network()
        if strategy != "auto":
            torch.distributed.init_process_group("gloo")
        if strategy == "ddp":
            net = nn.parallel.DistributedDataParallel(net)
        elif strategy == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for block in net:
                fully_shard(block)
            fully_shard(net)
        optimizer = torch.optim.AdamW(net.parameters())
        for _ in range(3):
            inputs = Rows().example_batch(rows)["inputs"]
            loss = loss_of(net, inputs)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    path = Path(f"trace-{torch.distributed.get_rank() if strategy != 'auto' else 0}.json")
    profile.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def find(strategy, processes, memory, **settings):
    return find_batch_size(quiet(strategy=strategy, devices=processes, **settings), Wide(), Rows(), memory)


@pytest.mark.parametrize(("strategy", "processes"), [("auto", 1), ("ddp", 2), ("fsdp2", 2)])
def test_the_batch_found_fits_and_one_row_more_does_not(strategy, processes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    fits = run_on(processes, loop_peak, strategy, 9)
    exceeds = run_on(processes, loop_peak, strategy, 10)
    limit = (max(fits) + min(exceeds)) / 2
    assert max(fits) < limit < min(exceeds)
    for found in run_on(processes, find, strategy, processes, limit / GIB):
        assert found.batch_size == 9
        assert found.limits == [round(limit)] * processes
        # the loop's sum keeps what gloo's threads released, each time a gathered block
        assert found.peaks == pytest.approx(fits, rel=0.03)
        assert "batch_size 10 needs" in found.beyond


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_with_different_room_find_the_same(strategy):
    def unequal():
        return find(strategy, 2, [0.02, 0.01][int(os.environ["RANK"])])

    first, second = run_on(2, unequal)
    assert first == second
    assert first.batch_size == run_on(2, find, strategy, 2, 0.01)[0].batch_size
    assert "on rank 1" in first.beyond
    assert first.limits == [round(0.02 * GIB), round(0.01 * GIB)]


def test_a_second_search_in_the_same_process_finds_the_same():
    assert find("auto", 1, 0.01) == find("auto", 1, 0.01)


def test_the_step_is_the_trainers_own():
    plain = find("auto", 1, 0.01)
    # the gradients of the batches before are there in the backward pass
    accumulated = find("auto", 1, 0.01, accumulate_grad_batches=4)
    assert accumulated.batch_size <= plain.batch_size


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_a_copy_of_the_weights_that_a_callback_keeps_is_counted():
    weights = sum(p.nbytes for p in network().parameters())
    plain = find_batch_size(quiet(), Wide(), Rows(), max_batch_size=1)
    averaged = find_batch_size(quiet(callbacks=[EMAWeightAveraging()]), Wide(), Rows(), max_batch_size=1)
    assert averaged.peaks[0] - plain.peaks[0] >= weights


def test_a_scale_that_begins_too_high_does_not_hide_the_optimizers_state():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    found = find_batch_size(
        quiet(plugins=[MixedPrecision("16-mixed", "cpu", scaler)]), Wide(), Rows(), max_batch_size=1
    )
    assert scaler.get_scale() < 2.0**40
    assert found.peaks[0] > 4 * sum(p.nbytes for p in network().parameters())


def test_nothing_is_written_and_no_data_are_asked_for(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    trainer = quiet(
        logger=CSVLogger(tmp_path), callbacks=[ModelCheckpoint(every_n_train_steps=1)], min_steps=5, max_steps=2
    )
    data = text(sources=str(tmp_path / "nowhere.txt"))
    found = find_batch_size(trainer, CausalLanguageModel("llama", TINY_LLAMA), data, max_batch_size=3)
    assert found.batch_size == 3
    assert list(tmp_path.iterdir()) == []


def test_what_is_available_is_shared_by_the_processes_of_the_host(monkeypatch):
    monkeypatch.setattr(peak_memory, "available_host_memory", lambda: 16 * MIB)
    (found, _) = run_on(2, find, "ddp", 2, None)
    held = found.limits[0] / 0.9 - 8 * MIB
    assert 1 * MIB < held < 4 * MIB, "half of what is free, and what the process has already"


# ---- when memory runs out all the same


def test_a_process_that_runs_out_of_memory_says_what_fitted():
    def breaks(rows):
        return torch.OutOfMemoryError("CUDA out of memory") if rows > 4 else None

    with pytest.raises(
        RunError, match=r"ran out of memory at batch_size 8, where 0.\d+ GiB were predicted; 4 ran with "
    ):
        find_batch_size(quiet(), Wide(breaks), Rows(), 1.0)
    with pytest.raises(RunError, match="rank 0 ran out of memory at batch_size 1; set model.activation_checkpointing"):
        find_batch_size(quiet(), Wide(lambda rows: torch.OutOfMemoryError("CUDA out of memory")), Rows(), 1.0)
    with pytest.raises(RuntimeError, match="another"):
        find_batch_size(quiet(), Wide(lambda rows: RuntimeError("another")), Rows(), 1.0)
    assert find("auto", 1, 0.01).batch_size > 1, "the profiler was put away"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_if_one_runs_out_of_memory_the_others_end(strategy, monkeypatch):
    monkeypatch.setattr(batch_size, "ProcessWatch", functools.partial(ProcessWatch, timeout=2, interval=0.5))

    def search_on_one_small_device():
        def breaks(rows):
            is_small = torch.distributed.get_rank() == 1 and rows > 2
            return torch.OutOfMemoryError("CUDA out of memory") if is_small else None

        with pytest.raises(RunError) as error:
            find_batch_size(quiet(strategy=strategy, devices=2), Wide(breaks), Rows(), 1.0)
        return str(error.value)

    healthy, small = run_on(2, search_on_one_small_device, timeout=60)
    assert small.startswith("rank 1 ran out of memory at batch_size 4")
    assert re.match(r"rank 1 \(process \d+ on .*\) gave no sign of life", healthy)


# ---- refusals


def test_what_does_not_suit_is_refused():
    with pytest.raises(InputError, match=r"LightningDataModule has no example_batch\(batch_size\)"):
        find_batch_size(quiet(), Wide(), LightningDataModule())
    with pytest.raises(InputError, match="memory is 0 GiB; it must be above 0"):
        find_batch_size(quiet(), Wide(), Rows(), memory=0)
    with pytest.raises(InputError, match="the largest batch size to try is 0; set it to 1 or more"):
        find_batch_size(quiet(), Wide(), Rows(), max_batch_size=0)
    with pytest.raises(InputError, match="set trainer.strategy to ddp"):
        find_batch_size(quiet(strategy="ddp_fork", devices=2), Wide(), Rows())
    with pytest.raises(InputError, match="memory cannot be measured on meta; set trainer.accelerator to cpu or gpu"):
        memory_of(torch.device("meta"))


# ---- the command


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose data are nowhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    values = {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "gradient_clip_val": 1.0},
        "model": {"class_path": "CausalLanguageModel", "init_args": {"architecture": "llama", "config": TINY_LLAMA}},
        "data": {"class_path": "Text", "init_args": {"sources": "nowhere.txt", "vocab_size": 300, "block_size": 32}},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    return ["--config", "recipe.yaml"]


def test_the_command_ends_with_what_can_be_pasted(recipe, tmp_path, capsys):
    assert main(["batch-size", *recipe, "--memory=0.004"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0].split() == ["peak", "GiB", "limit", "GiB", "left", "GiB"]
    assert output[1].startswith("rank 0 ")
    size = int(output[-1].removeprefix("largest batch per process: --data.batch_size "))
    assert output[2].startswith(f"batch_size {size + 1} needs ")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    with pytest.raises(SystemExit):
        main(["fit", *recipe, *output[-1].split(": ")[1].split(), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["batch_size"] == size

    assert main(["batch-size", *recipe, f"--max={size - 1}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"--data.batch_size {size - 1}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--memory=0.0001"],
            r"a step with batch_size 1 needs 0.\d+ GiB on rank 0, where the limit is 0.000 GiB; set ",
        ),
        (["--max=0"], "the largest batch size to try is 0; set it to 1 or more"),
        (["--data=null"], "no data is named"),
    ],
)
def test_the_commands_errors_are_one_line(recipe, options, message, capsys):
    assert main(["batch-size", *recipe, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bigmodels: error: ")
    assert re.search(message, error), error


def test_the_help_names_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["batch-size", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: bigmodels batch-size [--config")
    assert "--memory" in text
    assert "--max " in text
