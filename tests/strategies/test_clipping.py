"""Clipping of gradients on several meshes against torch's own on whole ones; the norm is everybody's."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_bigmodels.strategies.clipping import clip_norm, clip_value, on_several_meshes
from tests.workers import run_on


def test_norm_and_value_equal_those_of_whole_gradients():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((4, 4), (6,), (4, 6))]
    whole = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(whole, gradients, strict=True):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(whole, 0.5)
    clipped = [p.grad.clone() for p in whole]
    torch.nn.utils.clip_grad_value_(whole, 0.05)

    def work():
        torch.distributed.init_process_group("gloo")
        mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
        places = [(mesh, [Shard(0), Shard(1)]), (mesh["data_parallel"], [Shard(0)]), (mesh, [Shard(0), Replicate()])]
        parameters = []
        for g, place in zip(gradients, places, strict=True):
            parameters.append(nn.Parameter(distribute_tensor(torch.zeros_like(g), *place)))
            parameters[-1].grad = distribute_tensor(g, *place)
        assert on_several_meshes(parameters)
        assert not on_several_meshes(parameters[:1] + parameters[2:])
        found = clip_norm(parameters, 0.5)
        by_norm = [p.grad.full_tensor().clone() for p in parameters]
        clip_value(parameters, 0.05)
        return float(found), by_norm, [p.grad.full_tensor() for p in parameters]

    for found, by_norm, by_value in run_on(4, work):
        assert found == pytest.approx(float(norm))
        torch.testing.assert_close(by_norm, clipped)
        torch.testing.assert_close(by_value, [p.grad for p in whole])
