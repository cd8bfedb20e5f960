"""Variational autoencoders: the bound by hand, and settings that must not contradict each other."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Independent, Normal, kl_divergence

from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules.autoencoder.likelihoods import log_likelihood
from tests.modules.autoencoder.toys import KL, Losses, batch, built, digits, short_fit, variational
from tests.workers import run_on

BAD = [
    ({"latent_dim": 0}, "latent_dim is 0; set it to 1 or more"),
    ({"beta": -1.0}, "beta is -1.0; set it to 0 or more"),
    ({"beta": 0.0, "free_bits": 0.5}, "free_bits is 0.5 and has no effect, since beta is 0: .* set it to 0"),
    ({"beta": 0.0, "kl_warmup": 10}, "kl_warmup is 10 and has no effect, since beta is 0"),
    ({"codebook_size": 8, "free_bits": 0.5}, "free_bits is 0.5 and has no effect, since codebook_size is set"),
    ({"codebook_size": 8, "beta": 2.0}, "beta is 2.0 and has no effect, since codebook_size is set: .* set it to 1"),
    ({"codebook_size": 1}, "codebook_size is 1; set it to 2 or more"),
    ({"codebook_size": 8, "architecture": "dense", "config": None}, "which dense does not make; set model.architec"),
    ({"codebook_decay": 1.0}, "codebook_decay is 1.0; set it from 0 to below 1"),
    ({"likelihood": "bernouli"}, "no likelihood is named 'bernouli'; did you mean 'bernoulli'?"),
    ({"pretrained": "folder"}, "pretrained is a folder of diffusers, and architecture is convolutional; set"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        variational(**changes)


def test_the_bound_is_that_of_the_paper(monkeypatch):
    module = built(variational(beta=0.5), monkeypatch)
    given = batch(indices=torch.tensor([3, 1, 4, 2, FILLER, FILLER]))
    images = given["images"][:4]
    mean, log_variance = module.network.encode(images)
    normal = module.noise("val", given["indices"][:4]).normal(4)
    code = mean + (0.5 * log_variance).exp() * normal
    posterior = Independent(Normal(mean, (0.5 * log_variance).exp()), 1)
    prior = Independent(Normal(torch.zeros(4), torch.ones(4)), 1)
    # summed over latent dimensions, and of the pictures the mean
    kl = kl_divergence(posterior, prior).mean().item()
    reconstruction = log_likelihood("logistic", module.network.decode(code), images).mean().item()
    module.step("val", given)
    found = {name: metric.compute().item() for name, metric in module.logged.items()}
    assert found["val_kl"] == pytest.approx(kl, rel=1e-5)
    assert found["val_elbo"] == pytest.approx(reconstruction - kl, rel=1e-5)
    assert found["val_loss"] == pytest.approx(0.5 * kl - reconstruction, rel=1e-5)
    assert found["val_bits_per_dim"] == pytest.approx((kl - reconstruction) / math.log(2) / 64, rel=1e-5)
    # training draws other noise: the same sum of it
    loss = module.step("train", given).item()
    normal = module.noise("train", given["indices"][:4]).normal(4)
    made = module.network.decode(mean + (0.5 * log_variance).exp() * normal)
    assert loss == pytest.approx(0.5 * kl - log_likelihood("logistic", made, images).mean().item(), rel=1e-5)


def test_no_model_beats_eight_bits_on_random_pixels(trainer, tmp_path):
    # nothing can foretell them: probabilities that add up to more than one would, and densities do
    pixels = np.random.default_rng(0).integers(0, 256, (400, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=pixels, labels=np.arange(400) % 2)
    module = variational(optimizer=lambda groups: torch.optim.Adam(groups, lr=0.01))
    data = digits(source=str(tmp_path / "noise.npz"), val_fraction=0.2, eval_batch_size=80)
    run = trainer(max_steps=60, limit_val_batches=1.0)
    run.fit(module, data)
    (found,) = run.validate(module, data, verbose=False)
    assert 7.97 < found["val_bits_per_dim"] < 8.3


def test_dimensions_below_the_free_bits_cost_a_constant(monkeypatch):
    module = built(variational(free_bits=0.3), monkeypatch)
    # means over pictures: 0.2, 0.6, 0.3, 1.1
    kl = torch.tensor([[0.0, 0.5, 0.1, 2.0], [0.4, 0.7, 0.5, 0.2], [9.0, 9.0, 9.0, 9.0]], requires_grad=True)
    loss = module._kl_loss(kl, torch.tensor([1.0, 1.0, 0.0]))
    assert loss.item() == pytest.approx(0.3 + 0.6 + 0.3 + 1.1)
    loss.backward()
    assert kl.grad.tolist() == [[0, 0.5, 0, 0.5], [0, 0.5, 0, 0.5], [0, 0, 0, 0]]


def test_beta_rises_in_the_warmup(trainer):
    seen = []
    module = variational(beta=2.0, kl_warmup=4)
    step = module.step

    def watched(phase, batch):
        seen.append(module._beta())
        return step(phase, batch)

    module.step = watched
    trainer(max_steps=6, limit_val_batches=0).fit(module, digits())
    assert seen == [0, 0.5, 1, 1.5, 2, 2]
    module = variational(kl_warmup=0.5)
    trainer(max_steps=6, limit_val_batches=0).fit(module, digits())
    assert module._warmup_steps == 3


def test_weights_may_be_bfloat16_but_a_codebook_s_averages_may_not(trainer):
    losses = Losses()
    trainer(max_steps=2, precision="bf16-true", callbacks=[losses]).fit(variational(), digits())
    assert len(losses.values) == 2
    assert all(map(math.isfinite, losses.values))
    with pytest.raises(InputError, match="bf16-true would round the moving .*; set it to bf16-mixed"):
        trainer(max_steps=2, precision="bf16-true").fit(variational(codebook_size=8), digits())


def test_bernoulli_pixels_are_black_or_white(monkeypatch):
    module = built(variational(likelihood="bernoulli"), monkeypatch)
    with pytest.raises(InputError, match="set model.likelihood to logistic"):
        module.step("train", batch())
    binary = {**batch(), "images": (batch()["images"] > 127).to(torch.uint8) * 255}
    module.step("val", binary)
    # a new network knows nothing: about a bit for each pixel
    assert 0.9 < module.logged["val_bits_per_dim"].compute().item() < 1.5
    assert set(module.draw(binary)[0].unique().tolist()) <= {0, 255}


def test_with_a_codebook_the_kl_divergence_is_that_of_a_uniform_prior(monkeypatch):
    module = built(variational(codebook_size=8), monkeypatch)
    given = batch()
    module.step("val", given)
    found = {name: metric.compute().item() for name, metric in module.logged.items()}
    coded = module.network(given["images"])
    nats = -log_likelihood("logistic", coded.pixels, given["images"]).mean().item()
    assert found["val_kl"] == pytest.approx(4 * math.log(8), rel=1e-6)  # 2 x 2 places
    assert found["val_elbo"] == pytest.approx(-nats - 4 * math.log(8), rel=1e-5)
    shares = torch.bincount(coded.chosen.flatten(), minlength=8) / coded.chosen.numel()
    perplexity = torch.special.entr(shares).sum().exp().item()
    assert found["val_codebook_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    # the loss has the distance of codes from their vectors besides, equation 3
    distance = (coded.unquantized - coded.code).square().sum((1, 2, 3)).mean().item()
    loss = module.step("train", given).item()
    assert loss == pytest.approx(nats + 4 * math.log(8) + 0.25 * distance, rel=1e-5)
    assert module.network.quantizer.num_updates == 1


@pytest.mark.parametrize("changes", [{}, {"codebook_size": 8}])
def test_a_picture_is_that_of_its_number(changes):
    module = built(variational(**changes)).eval()
    with torch.no_grad():
        whole = module.generate_pictures(module.noise("val", torch.arange(5)))
        last = module.generate_pictures(module.noise("val", torch.arange(3, 5)))
    assert whole.shape == (5, 1, 8, 8)
    assert torch.equal(whole[3:], last)
    assert not torch.equal(whole[3], whole[4])


@pytest.mark.parametrize("changes", [{}, {"codebook_size": 8}, {"free_bits": 0.2}])
def test_a_training_step_asks_nothing_of_what_tensors_hold(changes, monkeypatch):
    # a planner runs it without any numbers
    module = variational(**changes)
    with FakeTensorMode():
        built(module, monkeypatch)
        images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
        loss = module.step("train", {"images": images, "indices": torch.arange(4)})
        loss.backward()
    assert loss.shape == ()


CASES = [
    ({"codebook_size": 8}, ["ddp", "fsdp2"]),
    ({"free_bits": 0.2, "kl_warmup": 2}, ["ddp"]),
    (KL, ["fsdp2"]),
]


@pytest.mark.parametrize(("changes", "strategies"), CASES)
def test_two_processes_learn_as_one(changes, strategies, tmp_path):
    def fit(strategy, processes):
        def build():
            return variational(**changes, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.003, eps=1e-4))

        return short_fit(tmp_path / strategy, strategy, processes, build)

    losses, metrics, codes = fit("auto", 1)
    for strategy in strategies:
        both = run_on(2, fit, strategy, 2)
        mean = [sum(pair) / 2 for pair in zip(*(own[0] for own in both), strict=True)]
        assert mean == pytest.approx(losses, rel=2e-5)
        for name in ("val_loss", "val_kl", "val_bits_per_dim"):
            assert both[0][1][name] == pytest.approx(metrics[name], rel=2e-5)
        if codes is not None:
            assert torch.equal(both[0][2], both[1][2])
            assert torch.allclose(both[0][2], codes, atol=1e-4)
