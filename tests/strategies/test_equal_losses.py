"""With the same global batch every strategy has the losses and the weights of one process, within rounding."""

import functools

import pytest
import torch

from lightning_bigmodels import CausalLanguageModel, optim
from lightning_bigmodels.strategies import FSDP2Strategy
from tests.conftest import TINY_LLAMA
from tests.workers import fit_on

# processes, and how many of them see different data
STRATEGIES = {"ddp": (2, 2), "fsdp2": (2, 2), "tp": (2, 1), "fsdp2_tp2": (4, 2), "offload and split": (4, 2)}
UNNAMED = {"offload and split": lambda: FSDP2Strategy(tensor_parallel_size=2, offload=True)}

# plain descent at a high rate: a gradient that is wrong by a factor shows at once, which Adam would hide
SGD = functools.partial(torch.optim.SGD, lr=0.5)

# arguments of the module, arguments of the Trainer
SETTINGS = {
    "descent": (
        {"optimizer": SGD, "l1_penalty": 1e-3, "config": {**TINY_LLAMA, "tie_word_embeddings": True}},
        {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2, "limit_val_batches": 1.0, "val_check_interval": 6},
    ),
    "AdamW": ({"activation_checkpointing": True}, {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"}),
    "Muon": ({"optimizer": optim.MuonWithAdamW}, {}),
}


def fit(processes, data_parallel, strategy, setting, text, **more):
    arguments, settings = SETTINGS[setting]
    values = {"architecture": "llama", "config": TINY_LLAMA, **arguments}
    return fit_on(
        processes,
        strategy,
        lambda: CausalLanguageModel(**values),
        lambda: text(batch_size=8 // data_parallel, eval_batch_size=16),
        max_steps=3,
        **settings,
        **more,
    )


def compare(found, expected, tolerance):
    losses = [sum(batch) / len(found) for batch in zip(*(fit.losses for fit in found), strict=True)]
    assert losses == pytest.approx(expected.losses, rel=tolerance)
    for fit in found:
        assert fit.weights.keys() == expected.weights.keys()
        assert fit.metrics.keys() == expected.metrics.keys()
        if "val_loss" in expected.metrics:
            assert fit.metrics["val_loss"] == pytest.approx(expected.metrics["val_loss"], rel=tolerance)


@pytest.fixture(scope="module")
def runs_alone():
    """Runs on one process, by setting."""
    return {}


@pytest.fixture
def alone(runs_alone, text):
    """Return a function from a setting to its run on one process."""

    def run(setting):
        if setting not in runs_alone:
            (runs_alone[setting],) = fit(1, 1, "auto", setting, text)
        return runs_alone[setting]

    return run


@pytest.mark.parametrize(
    ("setting", "strategy"),
    [
        ("descent", "ddp"),
        ("descent", "fsdp2"),
        ("descent", "tp"),
        ("descent", "fsdp2_tp2"),
        ("AdamW", "fsdp2"),
        ("AdamW", "offload and split"),
        ("Muon", "fsdp2"),
        ("Muon", "fsdp2_tp2"),
    ],
)
def test_losses_weights_and_metrics_equal_the_single_process(setting, strategy, text, alone):
    found = fit(*STRATEGIES[strategy], UNNAMED.get(strategy, strategy), setting, text)
    expected = alone(setting)
    # Newton-Schulz in bfloat16 makes much of the last bit of a gradient, under ddp as well
    tolerance = 3e-5 if setting == "Muon" else 1e-5
    compare(found, expected, tolerance)
    if setting != "Muon":
        for fit_ in found:
            torch.testing.assert_close(fit_.weights, expected.weights, rtol=1e-4, atol=1e-5)


# torch's own tracing asks for it (2.14)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_network_is_sharded_alike(text, monkeypatch):
    # what is compiled matters here, and not by what
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    config = {**TINY_LLAMA, "num_hidden_layers": 1}

    def build(compile):
        return lambda: CausalLanguageModel(architecture="llama", config=config, optimizer=SGD, compile=compile)

    (expected,) = fit_on(1, "auto", build(False), lambda: text(batch_size=8), max_steps=2)
    compare(fit_on(2, "fsdp2", build(True), lambda: text(batch_size=4), max_steps=2), expected, 1e-5)


def test_tensor_parallelism_within_nodes_and_data_parallelism_between_them(text, alone):
    def sizes(trainer):
        mesh = trainer.strategy.device_mesh
        weight = trainer.model.network.model.layers[0].self_attn.q_proj.weight
        return mesh["data_parallel"].size(), mesh["tensor_parallel"].mesh.tolist(), tuple(weight.to_local().shape)

    found = fit(4, 2, "tp", "AdamW", text, num_nodes=2, report=sizes)
    compare(found, alone("AdamW"), 1e-5)
    assert [fit.report for fit in found] == [(2, group, (8, 32)) for group in ([0, 1], [0, 1], [2, 3], [2, 3])]
