"""Fine-tuning: rates by depth, and a head that learns alone until a step, on any strategy and after a resume."""

import functools

import pytest
import torch
from lightning.pytorch import Callback

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules import ImageClassifier
from lightning_bigmodels.optim import MuonWithAdamW
from lightning_bigmodels.tasks.task import LR_SCALE
from tests.modules.cnn.classifier_toys import NUM_CLASSES, BarsData
from tests.workers import fit_on

ARGS = {"widths": [4, 8], "num_blocks": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = ImageClassifier("small_resnet", 3, 1, 8, network_args=ARGS)
    model.configure_model()
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(model.network.body.state_dict(), path)
    return str(path)


def tiny(weights, **changes):
    torch.manual_seed(1)
    arguments = {"network_args": ARGS, "weights": weights, "optimizer": functools.partial(torch.optim.AdamW, lr=0.01)}
    return ImageClassifier("small_resnet", NUM_CLASSES, 1, 8, **{**arguments, **changes})


def test_the_rate_falls_from_block_to_block_down_to_the_stem(weights):
    model = tiny(weights, layer_decay=0.5)
    model.configure_model()
    names = {id(p): name for name, p in model.network.body.named_parameters()}
    groups = model.configure_optimizers().param_groups
    rates = {names[id(p)]: group["lr"] / 0.01 for group in groups for p in group["params"]}
    assert len(rates) == len(names)
    expected = {"head": 1.0, "blocks.3": 0.5, "blocks.2": 0.25, "blocks.1": 0.125, "blocks.0": 0.0625, "stem": 0.03125}
    for name, rate in rates.items():
        assert rate == expected[next(start for start in expected if name.startswith(start))], name
    titles = [group["name"] for group in groups]
    assert len(set(titles)) == len(titles)  # LearningRateMonitor wants that
    assert {group["weight_decay"] for group in groups if group["name"].startswith("undecayed")} == {0.0}


def test_a_sharded_network_has_the_same_rates(weights):
    def rates(trainer):
        return [(group["name"], group["lr"], len(group["params"])) for group in trainer.optimizers[0].param_groups]

    build = functools.partial(tiny, weights, layer_decay=0.5)
    (alone,) = fit_on(1, "auto", build, BarsData, report=rates, max_steps=1)
    sharded = fit_on(2, "fsdp2", build, BarsData, report=rates, max_steps=1)
    assert len(alone.report) > 6
    assert [fit.report for fit in sharded] == [alone.report] * 2


def test_without_decay_there_are_the_usual_groups(weights):
    model = tiny(weights)
    model.configure_model()
    assert [group["name"] for group in model.parameter_groups()] == ["hidden", "output", "undecayed"]
    assert not any(LR_SCALE in group for group in model.parameter_groups())


def test_tokens_and_positions_of_a_vit_are_the_lowest_layer_and_not_decayed():
    model = ImageClassifier("vit_b_32", 3, image_size=64, layer_decay=0.5)
    with torch.device("meta"):
        model.configure_model()
    body = model.network.body
    (group,) = (g for g in model.parameter_groups() if any(p is body.class_token for p in g["params"]))
    assert group["name"] == "undecayed_000"
    assert group[LR_SCALE] == 0.5**13
    assert any(p is body.encoder.pos_embedding for p in group["params"])


def test_muon_takes_groups_by_depth_too():
    model = ImageClassifier("vit_b_32", 3, image_size=64, layer_decay=0.5, optimizer=MuonWithAdamW)
    with torch.device("meta"):
        model.configure_model()
    groups = model.configure_optimizers().param_groups
    muons = [group for group in groups if "ns_steps" in group]
    assert len(muons) == 12
    assert all(group["name"].startswith("hidden") for group in muons)
    assert len({group["name"] for group in groups}) == len(groups)


class Watch(Callback):
    """Keeps the body's first weights, its running mean and the head's weights after each step."""

    def __init__(self):
        self.steps = []

    def note(self, module):
        body = module.network.body
        values = (body.stem[0].weight, body.stem[1].running_mean, body.head.weight)
        self.steps.append([getattr(v, "full_tensor", lambda v=v: v)().detach().clone() for v in values])

    def on_train_start(self, trainer, module):
        self.note(module)

    def on_train_batch_end(self, trainer, module, *args):
        self.note(module)


def moved(watch):
    """Return for each step which of the three changed."""
    return [
        tuple(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in zip(watch.steps, watch.steps[1:], strict=False)
    ]


@pytest.mark.parametrize(("strategy", "processes"), [("auto", 1), ("ddp", 2), ("fsdp2", 2)])
@pytest.mark.parametrize("after", [3, 0.5])
def test_the_head_learns_alone_until_the_step(strategy, processes, after, weights):
    def fit():
        watch = Watch()
        (found, *_) = fit_on(
            processes,
            strategy,
            lambda: tiny(weights, unfreeze_after=after),
            lambda: BarsData(batch_size=10 // processes),
            callbacks=[watch],
            report=lambda trainer: moved(trainer.callbacks[0]),
            max_steps=6,
            val_check_interval=1,
            limit_val_batches=1,
        )
        return found

    found = fit()
    assert found.report == [(False, False, True)] * 3 + [(True, True, True)] * 3


def test_the_frozen_body_takes_no_decay_and_fresh_moments(weights, trainer):
    optimizer = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    model = tiny(weights, unfreeze_after=3, optimizer=optimizer)
    run = trainer(max_steps=5)
    run.fit(model, BarsData())
    states = run.optimizers[0].state
    assert states[model.network.body.stem[0].weight]["step"] == 2
    assert states[model.network.body.head.weight]["step"] == 5
    assert model.network.training


@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_fit_unfreezes_at_the_same_step(at, weights, trainer, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, run, *args):
            if run.global_step == at:
                run.save_checkpoint(tmp_path / "cut.ckpt")

    whole, resumed = tiny(weights, unfreeze_after=3), tiny(weights, unfreeze_after=3)
    trainer(max_steps=6, callbacks=[Save()]).fit(whole, BarsData())
    trainer(max_steps=6).fit(resumed, BarsData(), ckpt_path=tmp_path / "cut.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_run_that_would_never_unfreeze_is_refused(weights, trainer):
    with pytest.raises(InputError, match="unfreeze_after is 4 steps and the run has 4; lower it"):
        trainer(max_steps=4).fit(tiny(weights, unfreeze_after=4), BarsData())
