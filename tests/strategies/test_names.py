"""Strategies by name: from Python, under the variables of torchrun and SLURM, and from the command."""

import json
import os

import pytest
import torch
from lightning.pytorch import Trainer
from torch.multiprocessing import ProcessRaisedException

from lightning_bigmodels import CausalLanguageModel
from lightning_bigmodels.cli import CLI
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.strategies import FSDP2Strategy
from tests.conftest import TINY_LLAMA
from tests.workers import fit_on, run_on

ONE_LAYER = {**TINY_LLAMA, "num_hidden_layers": 1}


def build():
    return CausalLanguageModel(architecture="llama", config=ONE_LAYER)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_async", "fsdp2_offload", "tp", "fsdp2_tp2", "fsdp2_tp4", "fsdp2_tp8"])
def test_each_name_makes_the_strategy(name):
    strategy = Trainer(strategy=name, accelerator="cpu", devices=2, logger=False).strategy
    assert isinstance(strategy, FSDP2Strategy)
    assert strategy.async_checkpoints == (name == "fsdp2_async")
    assert strategy.offload == (name == "fsdp2_offload")


def sizes(trainer):
    mesh = trainer.strategy.device_mesh
    return mesh["data_parallel"].size(), mesh["tensor_parallel"].size()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tensor_parallel_size": 4},
            r"tensor_parallel_size 4 does not make up the 2 processes \(devices 2 times num_",
        ),
        ({"data_parallel_size": 3}, "tensor_parallel_size 1 times data_parallel_size 3 does not make up the 2 proc"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size 0 does not make up the 2 processes"),
    ],
)
def test_sizes_that_do_not_make_up_the_world_are_refused(arguments, message, text):
    with pytest.raises(ProcessRaisedException, match=f"InputError: {message}"):
        fit_on(2, lambda: FSDP2Strategy(**arguments), build, text)


def test_processes_that_split_layers_draw_alike_without_a_seed(text):
    def draw(trainer):
        return float(torch.rand(()))

    def unseeded():
        torch.manual_seed(int(os.environ["RANK"]))
        return build()

    draws = [fit.report for fit in fit_on(2, "tp", unseeded, text, max_steps=1, report=draw)]
    assert draws[0] == draws[1]


def test_under_the_variables_of_slurm(text):
    def under_slurm():
        rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
        for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            del os.environ[name]
        os.environ |= {
            "SLURM_JOB_ID": "1",
            "SLURM_JOB_NAME": "train",
            "SLURM_NTASKS": world,
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_NNODES": world,
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": rank,
            "SLURM_NODELIST": "localhost",
        }
        return "fsdp2"

    def seen(trainer):
        return type(trainer.strategy.cluster_environment).__name__, trainer.global_rank, sizes(trainer)

    fits = fit_on(2, under_slurm, build, lambda: text(batch_size=4), num_nodes=2, max_steps=2, report=seen)
    assert [fit.report for fit in fits] == [("SLURMEnvironment", 0, (2, 1)), ("SLURMEnvironment", 1, (2, 1))]
    (alone,) = fit_on(1, "auto", build, lambda: text(batch_size=8), max_steps=2)
    for fit in fits:
        torch.testing.assert_close(fit.weights, alone.weights, rtol=1e-4, atol=1e-5)


@pytest.fixture
def quiet(monkeypatch):
    """Lightning 2.6 calls what jsonargparse 4.53 deprecates; the command says nothing of it."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture
def command(text_file, cache_dir, tmp_path, quiet):
    """Return a function that runs `bigmodels fit` with options on so many workers and returns what `seen` returned."""

    def run(processes, seen, *options):
        values = {
            "trainer.accelerator": "cpu",
            "trainer.devices": processes,
            "trainer.max_steps": 1,
            "trainer.logger": "false",
            "trainer.enable_checkpointing": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "trainer.limit_val_batches": 0,
            "trainer.default_root_dir": tmp_path,
            "model": "CausalLanguageModel",
            "model.architecture": "llama",
            "model.config": json.dumps(ONE_LAYER),
            "data": "Text",
            "data.sources": text_file,
            "data.vocab_size": 300,
            "data.block_size": 32,
            "data.cache_dir": cache_dir,
        }
        args = ["fit", *(f"--{key}={value}" for key, value in values.items()), *options]
        return run_on(processes, lambda: seen(CLI(args).trainer))

    return run


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainer.strategy=fsdp2"], (2, 1)),
        (["--trainer.strategy=FSDP2Strategy", "--trainer.strategy.tensor_parallel_size=2"], (1, 2)),
    ],
)
def test_the_command_takes_names_and_classes(options, expected, command):
    assert command(2, sizes, *options) == [expected] * 2


@pytest.mark.parametrize(
    "strategy",
    [[], ["--trainer.strategy=FSDP2Strategy", "--trainer.strategy.tensor_parallel_size=1"]],
)
def test_the_command_trains_in_real_float16_on_a_cpu(strategy, command):
    def seen(trainer):
        plugin = trainer.precision_plugin
        return str(trainer.precision), plugin.device, plugin.scaler.get_scale() > 1

    assert command(1, seen, "--trainer.precision=16-mixed", *strategy) == [("16-mixed", "cpu", True)]


def test_the_command_names_fsdp2_where_fsdp_cannot_run(quiet):
    args = ["fit", "--trainer.accelerator=cpu", "--trainer.strategy=fsdp", "--trainer.logger=false"]
    with pytest.raises(InputError, match="fsdp runs on GPUs only; use fsdp2, which runs on CPUs too"):
        CLI([*args, "--model=CausalLanguageModel", "--model.architecture=llama", "--seed_everything=false"])
