"""Muon on sharded matrices against torch's own on whole ones, from the same gradients."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_bigmodels import optim
from tests.workers import run_on

# five of one shape, which four processes do not share evenly, and wider and smaller ones
SHAPES = [(6, 4)] * 5 + [(4, 9), (3, 3)]


def descend(place):
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(place(torch.randn(shape, generator=generator))) for shape in SHAPES]
    bias = nn.Parameter(place(torch.zeros(6)))
    groups = [{"params": matrices, "name": "hidden"}, {"params": [bias], "name": "undecayed"}]
    optimizer = optim.MuonWithAdamW(groups, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p in (*matrices, bias):
            p.grad = place(torch.randn(p.shape, generator=generator))
        optimizer.step()
    states = [optimizer.state[p]["momentum_buffer"] for p in matrices]
    values = [p.detach() for p in (*matrices, bias)] + states
    return [value.full_tensor() if isinstance(value, DTensor) else value for value in values]


def test_weights_and_momentum_equal_those_of_whole_matrices():
    expected = descend(lambda tensor: tensor)

    def work():
        torch.distributed.init_process_group("gloo")
        mesh = torch.distributed.init_device_mesh("cpu", (2, 2))
        return [
            descend(
                lambda t, second=second: distribute_tensor(t, mesh, [Shard(0), Shard(second if t.ndim == 2 else 0)])
            )
            for second in (0, 1)
        ]

    for layouts in run_on(4, work):
        for found in layouts:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
