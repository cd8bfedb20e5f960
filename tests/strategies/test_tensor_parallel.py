"""Layers split by transformers' plans: which, how, and what is refused."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_bigmodels import CausalLanguageModel
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.huggingface import scratch_config, scratch_network, tensor_parallel_plan
from lightning_bigmodels.strategies.tensor_parallel import parallel_styles, parallelize
from tests.conftest import TINY_LLAMA
from tests.workers import fit_on, run_on

SGD = functools.partial(torch.optim.SGD, lr=0.5)
ONE_LAYER = {**TINY_LLAMA, "num_hidden_layers": 1}


def network(architecture="llama", **changes):
    return scratch_network(scratch_config(architecture, {**TINY_LLAMA, **changes}))


def test_the_plan_of_a_network_names_each_of_its_layers():
    styles = tensor_parallel_plan(network(num_hidden_layers=1), 2)
    layer = "model.layers.0"
    assert {name for name, style in styles.items() if isinstance(style, RowwiseParallel)} == {
        "model.embed_tokens",
        f"{layer}.self_attn.o_proj",
        f"{layer}.mlp.down_proj",
    }
    assert {name for name, style in styles.items() if isinstance(style, ColwiseParallel)} == {
        "lm_head",
        *(f"{layer}.self_attn.{name}_proj" for name in "qkv"),
        *(f"{layer}.mlp.{name}_proj" for name in ("gate", "up")),
    }


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        # norms of each head, whose gradient is a sum over processes
        ("qwen3", {**ONE_LAYER, "head_dim": 8}),
        # one matrix for q, k and v, gathered; the next one's input is split again
        ("phi3", {**ONE_LAYER, "pad_token_id": None}),
        # tied and scaled embeddings, a vocabulary that does not divide
        ("gemma3_text", {**ONE_LAYER, "head_dim": 8, "vocab_size": 301}),
    ],
)
def test_losses_and_weights_equal_the_single_process(architecture, config, text):
    def build():
        return CausalLanguageModel(architecture=architecture, config=config, optimizer=SGD)

    def split(trainer):
        parameters = list(trainer.model.network.parameters())
        return sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)

    (alone,) = fit_on(1, "auto", build, text, max_steps=3)
    for fit in fit_on(2, "tp", build, text, max_steps=3, report=split):
        assert fit.losses == pytest.approx(alone.losses, rel=1e-5)
        torch.testing.assert_close(fit.weights, alone.weights, rtol=1e-4, atol=1e-5)
        assert fit.report == pytest.approx(0.5, abs=0.02)


def test_an_architecture_without_a_plan_is_refused():
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(InputError, match="no tensor-parallel plan for GPT2LMHeadModel; use the strategy fsdp2"):
        tensor_parallel_plan(gpt2, 2)


def test_a_style_without_a_counterpart_is_refused():
    with pytest.raises(InputError, match="'moe_tp_experts' for model.layers.0.mlp.experts .* use the strategy fsdp2"):
        tensor_parallel_plan(network("mixtral"), 2)
    with pytest.raises(InputError, match=r"the style 'colwise' for 0 \(Conv1d\), which is not supported"):
        parallel_styles({"0": "colwise"}, nn.Sequential(nn.Conv1d(2, 2, 1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3, "hidden_size": 24, "num_key_value_heads": 3}, "num_attention_heads is 3"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    ],
)
def test_heads_that_do_not_divide_are_refused(changes, message):
    with pytest.raises(InputError, match=f"{message}, which does not divide over 2 tensor-parallel processes"):
        tensor_parallel_plan(network(**changes), 2)


def test_what_cannot_be_split_is_refused_on_every_process():
    def work():
        torch.distributed.init_process_group("gloo")
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        messages = []
        for styles in ({}, {"0": ColwiseParallel(), "1": RowwiseParallel()}):
            with pytest.raises(InputError) as caught:
                parallelize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)), mesh, styles)
            messages.append(str(caught.value))
        return messages

    for nothing, odd in run_on(2, work):
        assert nothing == "Sequential has no tensor-parallel plan; use the strategy fsdp2"
        assert odd.startswith("the width 3 of 0 does not divide over 2 tensor-parallel processes")


def test_layers_that_share_a_weight_share_it_still_and_the_rest_is_made_equal():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight
            nn.init.normal_(self.norm.weight)

    def work():
        torch.distributed.init_process_group("gloo")
        torch.manual_seed(torch.distributed.get_rank())
        tied = Tied()
        plan = {"embedding": "embedding_rowwise", "head": "colwise_gather_output", "absent": "colwise"}
        parallelize(tied, torch.distributed.init_device_mesh("cpu", (2,)), parallel_styles(plan, tied))
        assert tied.head.weight is tied.embedding.weight
        assert tied.head.weight.to_local().shape == (3, 4)
        return tied.norm.weight.detach(), tied.head.weight.detach().full_tensor()

    first, second = run_on(2, work)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
