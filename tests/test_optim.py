"""Schedules against their formulas; Muon with AdamW against the two run apart."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_bigmodels import optim
from lightning_bigmodels.errors import InputError

BASE = 0.5
TOTAL = 100


def rates(schedule_class, total=TOTAL, **kwargs):
    """Return the learning rate of each of `total` steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=BASE)
    schedule = schedule_class(optimizer, total, **kwargs)
    values = []
    for _ in range(total):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize(
    ("schedule_class", "kwargs", "formula"),
    [
        (optim.WarmupCosine, {"final": 0.1}, lambda p: 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2),
        (optim.WarmupLinear, {"final": 0.2}, lambda p: 1 - 0.8 * p),
        (optim.WarmupInverseSquareRoot, {}, lambda p: math.sqrt(10 / (10 + 90 * p))),
        (optim.WarmupStep, {"milestones": (0.5,), "gamma": 0.1}, lambda p: 0.1 if p >= 0.5 else 1),
        (optim.WarmupConstantDecay, {"decay": 0.25}, lambda p: min(1, (90 - 90 * p) / 25)),
    ],
)
def test_each_schedule_follows_its_formula_after_the_warm_up(schedule_class, kwargs, formula):
    values = rates(schedule_class, warmup=10, **kwargs)
    assert values[:10] == pytest.approx([BASE * (i + 1) / 11 for i in range(10)])
    assert values[10:] == pytest.approx([BASE * formula(i / 90) for i in range(90)])


def test_warm_up_below_one_is_a_fraction_of_the_run():
    assert rates(optim.WarmupLinear, warmup=0.1) == rates(optim.WarmupLinear, warmup=10)


def test_every_group_is_scheduled_from_its_own_rate():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 3.0}])
    optim.WarmupLinear(optimizer, 10, warmup=3)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.25, 0.75])


def test_a_schedule_resumes_from_plain_values():
    def build():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=BASE)
        return optimizer, optim.WarmupCosine(optimizer, 20, warmup=5)

    whole, schedule = build()
    for _ in range(12):
        whole.step()
        schedule.step()
    state, optimizer_state = copy.deepcopy(schedule.state_dict()), copy.deepcopy(whole.state_dict())
    assert all(isinstance(v, (int, float, list, tuple, bool, type(None))) for v in state.values())
    resumed, second = build()
    resumed.load_state_dict(optimizer_state)
    second.load_state_dict(state)
    for _ in range(5):
        for optimizer, s in ((whole, schedule), (resumed, second)):
            optimizer.step()
            s.step()
        assert whole.param_groups[0]["lr"] == resumed.param_groups[0]["lr"]


def test_a_prolonged_run_follows_the_schedule_of_its_new_length():
    short, long = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=BASE) for _ in range(2))
    first = optim.WarmupLinear(short, 10)
    for _ in range(10):
        short.step()
        first.step()
    assert short.param_groups[0]["lr"] == 0
    second = optim.WarmupLinear(long, 40)
    second.load_state_dict(first.state_dict())
    long.step()
    second.step()
    assert long.param_groups[0]["lr"] == pytest.approx(BASE * (1 - 11 / 40))


@pytest.mark.parametrize(
    ("schedule_class", "kwargs", "message"),
    [
        (optim.WarmupCosine, {"warmup": -1}, "warmup is -1; it must be a number of steps"),
        (optim.WarmupCosine, {"warmup": 100}, "warmup of 100 steps leaves nothing of the run's 100"),
        (
            optim.WarmupStep,
            {"milestones": (0.5, 30)},
            "milestones are fractions of the run between 0 and 1, but one is 30",
        ),
        (optim.WarmupConstantDecay, {"decay": 0}, "decay is 0; it must be a fraction of the run"),
    ],
)
def test_impossible_schedules_are_refused(schedule_class, kwargs, message):
    with pytest.raises(InputError, match=message):
        rates(schedule_class, **kwargs)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3))


def groups(net):
    return [
        {"params": [net[0].weight, net[2].weight], "name": optim.HIDDEN},
        {"params": [net[3].weight], "name": optim.OUTPUT},
        {"params": [p for p in net.parameters() if p.ndim < 2], "name": optim.UNDECAYED, "weight_decay": 0.0},
    ]


def train(net, *optimizers, steps=5, start=0):
    for i in range(start, start + steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
        net.zero_grad()
        net(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_muon_with_adamw_equals_the_two_apart():
    together, apart = network(), network()
    one = optim.MuonWithAdamW(groups(together), lr=0.02, adamw_lr=1e-3, weight_decay=0.1)
    hidden, output, rest = groups(apart)
    muon = torch.optim.Muon(hidden["params"], lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(
        [{"params": output["params"], "weight_decay": 0.1}, {"params": rest["params"], "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    train(together, one)
    train(apart, muon, adamw)
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_with_adamw_resumes_bit_for_bit():
    whole = network()
    optimizer = optim.MuonWithAdamW(groups(whole))
    train(whole, optimizer, steps=3)
    resumed = copy.deepcopy(whole)
    second = optim.MuonWithAdamW(groups(resumed), lr=9.0)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(whole, optimizer, start=3)
    train(resumed, second, start=3)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_schedule_moves_both_parts():
    net = network()
    optimizer = optim.MuonWithAdamW(groups(net), lr=0.02, adamw_lr=1e-3)
    optim.WarmupLinear(optimizer, 10, warmup=3)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.005, 0.00025, 0.00025])
    before = [p.clone() for p in net.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(net, optimizer, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_muon_without_a_matrix_is_refused():
    with pytest.raises(InputError, match="use torch.optim.AdamW instead"):
        optim.MuonWithAdamW([{"params": [nn.Parameter(torch.zeros(3))], "name": optim.HIDDEN}])
