"""Steps on CPU tensors keep for the backward pass what they keep on CUDA, and in compiled code."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lightning_bigmodels import CausalLanguageModel, Text
from lightning_bigmodels.planner.corrections import on_cuda, use_cuda_defaults
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.simulation import simulate
from lightning_bigmodels.planner.trace import StepTrace

ROWS, WIDTH = 256, 512
ELEMENTS = ROWS * WIDTH


def kept(function, dtype=torch.float32, autocast=False, **how):
    """Return the bytes that are held when a function of a tensor has run, its input and result not counted."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = torch.empty(ROWS, WIDTH, dtype=dtype, requires_grad=True)
        with StepTrace() as trace:
            trace.note([x], "inputs")
            result = function(x)
            size = sum(trace.held.values()) - x.nbytes - result.nbytes
            result.sum().backward()
            assert x.grad is not None
        return size


def test_rms_norm_keeps_a_number_of_each_row():
    def norm(x):
        return F.rms_norm(x, (WIDTH,), torch.ones(WIDTH, dtype=x.dtype), 1e-6)

    assert kept(norm, torch.bfloat16) > ELEMENTS * 4
    with on_cuda():
        assert kept(norm, torch.bfloat16) <= ROWS * 4 + WIDTH * 2
        assert kept(lambda x: nn.RMSNorm(WIDTH)(x)) <= ROWS * 4 + WIDTH * 4
    assert kept(norm, torch.bfloat16) > ELEMENTS * 4


def test_dropout_keeps_a_byte_of_each_element():
    assert kept(F.dropout) == ELEMENTS * 4
    with on_cuda():
        assert kept(F.dropout) == ELEMENTS
        assert kept(nn.Dropout(0.1)) == ELEMENTS
        assert kept(lambda x: F.dropout(x, 0.5, training=False) * 2) == 0


def test_attention_with_dropout_keeps_no_probabilities():
    def attention(x):
        heads = x.view(1, ROWS, 8, 64).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1)

    assert kept(attention) > 8 * ROWS * ROWS * 4
    with on_cuda():
        assert kept(attention) == 8 * ROWS * 4  # a logarithm of each row's sum


@pytest.mark.parametrize(
    "function", [lambda x: F.layer_norm(x, (WIDTH,)), lambda x: x.softmax(-1), lambda x: torch.exp(x)]
)
def test_under_autocast_more_is_computed_in_float32(function):
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.ones(2, WIDTH, dtype=torch.bfloat16)
        assert function(x).dtype == torch.bfloat16
        with on_cuda():
            assert function(x).dtype == torch.float32
    with on_cuda():
        assert function(x).dtype == torch.bfloat16


def test_blocks_that_are_computed_anew_are_so_in_the_same_way():
    with on_cuda():
        size = kept(lambda x: checkpoint(nn.Sequential(nn.RMSNorm(WIDTH), nn.Dropout(0.1)), x, use_reentrant=False))
    assert size <= WIDTH * 4


def test_optimizers_update_all_parameters_at_once():
    parameters = [nn.Parameter(torch.ones(3))]
    optimizer, told = torch.optim.AdamW(parameters), torch.optim.AdamW(parameters, foreach=False)
    fused = torch.optim.AdamW(parameters, fused=True)
    for each in (optimizer, told, fused):
        use_cuda_defaults(each)
    assert [each.param_groups[0]["foreach"] for each in (optimizer, told, fused)] == [True, False, None]


def test_compiled_blocks_keep_what_the_partitioner_of_torch_keeps():
    width, inner, length, rows = 64, 160, 128, 4
    config = {"vocab_size": 300, "hidden_size": width, "intermediate_size": inner, "max_position_embeddings": length}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}

    def of_a_block(compile, **changes):
        held = []
        for layers in (2, 6):
            model = CausalLanguageModel("llama", {**config, "num_hidden_layers": layers}, compile=compile)
            data = Text("python-docs", vocab_size=300, block_size=length, batch_size=rows)
            setting = Setting(batch_size=rows, precision="bf16-true", **changes)
            held.append(simulate(model, data, setting, like_cuda=True).peak.held["activations"])
        return (held[1] - held[0]) / 4

    # of a block of Llama, torch 2.14's partitioner keeps, in the width: what comes in, norms (2), query, key and value
    # (2 with half the heads for keys), attention's result, what the output makes of it; and three of the inner width
    compiled = of_a_block(compile=True)
    assert compiled == pytest.approx(rows * length * (7 * width + 3 * inner) * 2, rel=0.03)
    assert compiled < 0.7 * of_a_block(compile=False)
    assert of_a_block(compile=True, activation_checkpointing=True) == pytest.approx(rows * length * width * 2, rel=0.03)


def test_a_tensor_that_two_layers_share_is_held_once():
    config = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 32}
    data = Text("python-docs", vocab_size=300, block_size=32, batch_size=1)
    held = []
    for tied in (True, False):
        trace = simulate(CausalLanguageModel("llama", {**config, "tie_word_embeddings": tied}), data, Setting())
        held.append(trace.start["parameters"])
        assert all(change.kind not in ("parameters", "optimizer state") for change in trace.changes)
    assert held[1] - held[0] == 300 * 64 * 4
