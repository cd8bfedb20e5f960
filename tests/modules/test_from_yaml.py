"""Optimizers and schedules by their YAML, subclasses of the user's own, and a model without any YAML."""

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from lightning_bigmodels.__main__ import main
from lightning_bigmodels.tasks import LanguageModeling
from tests.conftest import TINY_LLAMA


class Own(LanguageModeling):
    """A language model of the user's own: a bag of words, no context.

    Args:
        scale: Scale of the embedding's initial values.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.scale = scale

    def build_network(self):
        network = torch.nn.Sequential(torch.nn.Embedding(300, 8), torch.nn.Linear(8, 300))
        torch.nn.init.normal_(network[0].weight, std=self.scale)
        return network

    def summed_loss(self, input_ids, labels):
        logits = self.network(input_ids).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        return loss, loss.new_zeros(())

    def generate(self, prompts, indices=None):
        return ["" for _ in prompts]


class Keep(Callback):
    """Hands the optimizer of a run to the test."""

    seen = None

    def on_train_end(self, trainer, pl_module):
        Keep.seen = trainer.optimizers[0], trainer.lr_scheduler_configs


@pytest.fixture
def fit(tmp_path, text_file, cache_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(model):
        config = {
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 3,
                "max_epochs": -1,
                "limit_val_batches": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [{"class_path": f"{__name__}.Keep"}],
            },
            "model": model,
            "data": {
                "class_path": "Text",
                "init_args": {"sources": str(text_file), "vocab_size": 300, "block_size": 32, "cache_dir": cache_dir},
            },
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        assert main(["fit", "--config", "config.yaml"]) == 0
        return Keep.seen

    return run


def llama(**arguments):
    return {
        "class_path": "CausalLanguageModel",
        "init_args": {"architecture": "llama", "config": TINY_LLAMA, **arguments},
    }


@pytest.mark.parametrize(
    ("path", "arguments", "decay"),
    [
        ("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}, 0),
        ("torch.optim.Adam", {"lr": 0.01}, 0),
        ("torch.optim.AdamW", {"lr": 0.01, "weight_decay": 0.3}, 0.3),
        ("torch.optim.Adafactor", {"lr": 0.01, "weight_decay": 0.2}, 0.2),
        ("lightning_bigmodels.optim.MuonWithAdamW", {"lr": 0.01, "weight_decay": 0.4}, 0.4),
    ],
)
def test_every_optimizer_runs_from_yaml_with_just_what_the_user_gave(path, arguments, decay, fit):
    optimizer, _ = fit(llama(optimizer={"class_path": path, "init_args": arguments}))
    assert f"{type(optimizer).__name__}" == path.rpartition(".")[2]
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"hidden": decay, "output": decay, "undecayed": 0.0}


@pytest.mark.parametrize(
    "name", ["WarmupCosine", "WarmupLinear", "WarmupInverseSquareRoot", "WarmupStep", "WarmupConstantDecay"]
)
def test_every_schedule_runs_from_yaml(name, fit):
    _, (config,) = fit(llama(schedule={"class_path": f"lightning_bigmodels.optim.{name}", "init_args": {"warmup": 1}}))
    assert type(config.scheduler).__name__ == name
    assert (config.scheduler.total_steps, config.scheduler.last_epoch, config.interval) == (3, 3, "step")


def test_a_language_model_of_the_users_own_takes_the_rule(fit):
    optimizer, _ = fit({"class_path": f"{__name__}.Own", "init_args": {"scale": 0.1}})
    assert isinstance(optimizer, torch.optim.AdamW)
