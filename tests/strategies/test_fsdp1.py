"""Lightning's `fsdp`, which runs on GPUs: its mathematics, on CPU processes that torch takes as well as a GPU's."""

import functools

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.multiprocessing import ProcessRaisedException

from lightning_bigmodels import CausalLanguageModel
from tests.conftest import TINY_LLAMA
from tests.workers import fit_on

SGD = functools.partial(torch.optim.SGD, lr=0.5)


class OnCPU(FSDPStrategy):
    """FSDP1 told to stay on the CPU; Lightning asks for a device's number."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )


def whole_weights(trainer):
    wrapped = trainer.strategy.model
    with FullyShardedDataParallel.summon_full_params(wrapped):
        weights = {name.replace("_fsdp_wrapped_module.", ""): p.clone() for name, p in wrapped.named_parameters()}
    return weights, sum(isinstance(module, FullyShardedDataParallel) for module in wrapped.modules())


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        # a tied head under the chunked loss, whose parameters FSDP1 replaces by views
        (
            {"optimizer": SGD, "config": {**TINY_LLAMA, "tie_word_embeddings": True}, "activation_checkpointing": True},
            {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2},
        ),
        # weight decay of matrices that FSDP1 flattens
        ({"optimizer": functools.partial(torch.optim.AdamW, weight_decay=10.0)}, {}),
    ],
)
def test_losses_and_weights_equal_the_single_process(arguments, settings, text):
    def build():
        return CausalLanguageModel(**{"architecture": "llama", "config": TINY_LLAMA, **arguments})

    (alone,) = fit_on(1, "auto", build, lambda: text(batch_size=8), max_steps=3, **settings)
    fits = fit_on(2, OnCPU, build, lambda: text(batch_size=4), max_steps=3, report=whole_weights, **settings)
    losses = [sum(pair) / 2 for pair in zip(fits[0].losses, fits[1].losses, strict=True)]
    assert losses == pytest.approx(alone.losses, rel=1e-5)
    weights, wrapped = fits[0].report
    # each block and the whole
    assert wrapped == 1 + TINY_LLAMA["num_hidden_layers"]
    for name, value in weights.items():
        torch.testing.assert_close(value, alone.weights[name], rtol=1e-4, atol=1e-5)


def test_an_l1_penalty_is_refused(text):
    with pytest.raises(ProcessRaisedException, match="InputError: l1_penalty does not work with the strategy fsdp"):
        fit_on(
            1,
            OnCPU,
            lambda: CausalLanguageModel(architecture="llama", config=TINY_LLAMA, l1_penalty=0.1),
            lambda: text(batch_size=8),
        )
