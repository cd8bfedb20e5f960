"""CausalLanguageModel: parity with transformers' own forward, causality, generation, checkpoints, refusals."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lightning_bigmodels import CausalLanguageModel
from lightning_bigmodels.callbacks import Throughput
from lightning_bigmodels.errors import InputError
from tests.conftest import TINY_LLAMA

VOCABULARY = 300
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GATED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
ARCHITECTURES = {
    "llama": TINY_LLAMA,
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "qwen3": {**GATED, "head_dim": 8},
    # experts, with the loss that balances them
    "mixtral": {**GATED, "num_local_experts": 4},
    # a soft cap behind the head
    "gemma2": {**GATED, "head_dim": 8},
    # scaled logits
    "cohere": {**GATED, "logit_scale": 0.5},
    "granite": {**GATED, "logits_scaling": 3.0},
    # an encoder unless told otherwise, with a head of several layers
    "bert": {**SMALL, "intermediate_size": 64, **NO_DROPOUT},
    # a decoder inside the body, projections around it
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 16, "dropout": 0.0},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def build(architecture="llama", **kwargs):
    torch.manual_seed(0)
    model = CausalLanguageModel(architecture=architecture, config=ARCHITECTURES[architecture], **kwargs)
    model.configure_model()
    return model.train()


def batch(rows=3, length=16):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, :5] = -100
    return ids[:, :-1], labels


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}


@every_architecture
def test_loss_and_gradients_equal_those_of_the_whole_logits(architecture):
    model = build(architecture, loss_chunk_size=7)
    ids, labels = batch()
    nats, extra = model.summed_loss(ids, labels)
    found = gradients(model, nats / 40 + extra)
    outputs = model.network(input_ids=ids, use_cache=False)
    plain = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert nats.item() == pytest.approx(plain.item(), rel=1e-5)
    if architecture == "mixtral":
        assert extra.item() == pytest.approx(model.network.config.router_aux_loss_coef * outputs.aux_loss.item())
    expected = gradients(model, plain / 40 + extra.new_tensor(0.0) + _balance(model, outputs))
    assert found.keys() == expected.keys() == dict(model.network.named_parameters()).keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def _balance(model, outputs):
    return model.network.config.router_aux_loss_coef * outputs.aux_loss if "aux_loss" in outputs else 0.0


@every_architecture
def test_no_token_sees_a_later_one(architecture):
    model = build(architecture).eval()
    ids, _ = batch(rows=1)
    changed = ids.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model.network(input_ids=ids).logits, model.network(input_ids=changed).logits
    torch.testing.assert_close(before[0, :9], after[0, :9])
    assert not torch.allclose(before[0, 9:], after[0, 9:])


@every_architecture
def test_it_builds_on_the_meta_device_and_counts_its_work(architecture):
    with torch.device("meta"):
        model = CausalLanguageModel(architecture=architecture, config=ARCHITECTURES[architecture])
        model.configure_model()
    assert all(p.is_meta for p in model.parameters())
    model._batch_shape = (2, 32)
    matrices = sum(p.numel() for g in model.parameter_groups() if g["name"] == "hidden" for p in g["params"])
    # two operations forward and four backward for each weight that each token meets; experts are met by half of them
    assert model.flops_per_batch > 6 * 2 * 32 * matrices * (0.3 if architecture == "mixtral" else 0.9)


def test_activation_checkpointing_changes_no_number():
    ids, labels = batch()
    results = []
    for switch in (False, True):
        model = build(activation_checkpointing=switch)
        nats, _ = model.summed_loss(ids, labels)
        results.append((nats.item(), gradients(model, nats)))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name])


def test_compile_changes_neither_loss_nor_checkpoint_keys(monkeypatch):
    # inductor's half minute of C++ is spent in the test of the compiled classifier; here the graphs count
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ids, labels = batch()
    plain, compiled = build(), build(compile=True)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    expected, found = plain.summed_loss(ids, labels)[0], compiled.summed_loss(ids, labels)[0]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted, got = gradients(plain, expected), gradients(compiled, found)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "lama"}, "architecture 'lama' is no causal language model of transformers; did you mean"),
        ({"architecture": "llama", "config": {"hiden_size": 3}}, "model.config.hiden_size .* mean 'hidden_size'"),
        ({}, "set either architecture"),
        ({"architecture": "llama", "pretrained": "folder"}, "set either architecture"),
        ({"architecture": "llama", "temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
        ({"architecture": "llama", "top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
        ({"architecture": "llama", "top_k": 0}, "top_k is 0; it must be 1 or more"),
        ({"architecture": "llama", "max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CausalLanguageModel(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "llama", "config": {"hidden_size": "x"}}, "config of llama: .*hidden_size"),
        ({"architecture": "llama", "config": {"hidden_size": 30, "num_attention_heads": 4}}, "config of llama: .*30"),
        ({"pretrained": "no/such/folder/here"}, "pretrained 'no/such/folder/here' cannot be read"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CausalLanguageModel(**settings).configure_model()


# ---- with data, in a Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file, cache_dir):
    """A model after four steps, and its checkpoint."""
    from lightning.pytorch import Trainer

    from lightning_bigmodels import Text

    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = CausalLanguageModel(architecture="llama", config=TINY_LLAMA, max_new_tokens=12)
    data = Text(sources=str(text_file), vocab_size=300, block_size=32, batch_size=8, cache_dir=cache_dir)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=2,
        callbacks=[Throughput(window_size=2)],
        default_root_dir=folder,
    )
    trainer.fit(model, data)
    trainer.save_checkpoint(folder / "model.ckpt")
    trainer.fit_metrics = dict(trainer.callback_metrics)
    return model, trainer, folder / "model.ckpt"


def test_validation_counts_every_token_and_byte_of_the_text(trained, text, text_file):
    model, trainer, _ = trained
    metrics = trainer.validate(model, text(), verbose=False)[0]
    data = text()
    data.prepare_data()
    data.setup("validate")
    nats = tokens = size = 0
    with torch.no_grad():
        for one in data.val_dataloader():
            logits = model.network(input_ids=one["input_ids"]).logits
            nats += F.cross_entropy(logits.flatten(0, 1), one["labels"].flatten(), reduction="sum").double()
            tokens += (one["labels"] != -100).sum()
            size += one["num_bytes"].sum()
    assert tokens == data.splits["val"] - 1
    assert size == pytest.approx(len(text_file.read_bytes()) / 10, abs=4)
    assert metrics["val_loss"] == pytest.approx((nats / tokens).item(), rel=1e-6)
    assert metrics["val_perplexity"] == pytest.approx(torch.exp(nats / tokens).item(), rel=1e-5)
    assert metrics["val_bits_per_byte"] == pytest.approx((nats / size / torch.log(torch.tensor(2.0))).item(), rel=1e-6)


def test_the_number_of_batches_moves_no_metric(trained, text):
    model, trainer, _ = trained
    first = trainer.validate(model, text(eval_batch_size=1), verbose=False)[0]
    second = trainer.validate(model, text(eval_batch_size=13), verbose=False)[0]
    assert first == pytest.approx(second, rel=1e-6)


def test_tokens_per_second_and_utilisation_are_reported(trained):
    _, trainer, _ = trained
    assert trainer.fit_metrics["tokens_per_s"] > 0
    monitor = next(c for c in trainer.callbacks if isinstance(c, Throughput))
    (training,) = [t for stage, t in monitor._throughputs.items() if stage.value == "train"]
    assert 0 < training.compute()["device/mfu"] < 1


def test_a_checkpoint_loads_in_a_process_that_saw_no_yaml(trained):
    path = trained[2]
    script = """
import json, sys, torch
from lightning_bigmodels import CausalLanguageModel
content = torch.load(sys.argv[1], weights_only=True)
model = CausalLanguageModel.load_from_checkpoint(sys.argv[1])
model.temperature = 0.0
print(json.dumps(model.generate(["The class", "If"])))
"""
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    expected = CausalLanguageModel.load_from_checkpoint(path, temperature=0.0).generate(["The class", "If"])
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_greedy_generation_is_that_of_transformers(trained):
    model = CausalLanguageModel.load_from_checkpoint(trained[2], temperature=0.0)
    ids = model.tokenizer("The class", return_tensors="pt")["input_ids"]
    out = model.network.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=0)
    assert model.generate(["The class"]) == [model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]


def test_a_completion_depends_on_its_place_and_seed_and_not_on_its_neighbours(trained):
    model = CausalLanguageModel.load_from_checkpoint(trained[2], temperature=1.0)
    both = model.generate(["The class", "If the value of"])
    assert model.generate(["If the value of"], indices=[1]) == [both[1]]
    assert model.generate(["The class"], indices=[5]) != [both[0]]
    model.generation_seed = 1
    assert model.generate(["The class"]) != [both[0]]


def test_an_empty_prompt_starts_a_text(trained):
    model = CausalLanguageModel.load_from_checkpoint(trained[2])
    assert len(model.generate([""])[0]) > 0


def test_a_prompt_beyond_the_positions_is_refused(trained):
    model = CausalLanguageModel.load_from_checkpoint(trained[2], max_new_tokens=120)
    with pytest.raises(InputError, match=r"exceed the network's 128 positions; lower max_new_tokens to \d+"):
        model.generate(["The class definition is a statement of its own kind"])


def test_generation_without_a_tokenizer_says_where_to_get_one():
    with pytest.raises(InputError, match=r"load one of its checkpoints \(--ckpt_path\) or fit it on Text first"):
        build().generate(["x"])


def test_predict_answers_each_prompt_of_a_file_in_order(trained, text, tmp_path, trainer):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"The {i}" for i in range(5)), encoding="utf-8")
    # no sources: the checkpoint carries all that predict needs
    data = text(sources=str(tmp_path / "gone.txt"), prompts=str(prompts), eval_batch_size=2)
    model = CausalLanguageModel.load_from_checkpoint(trained[2])
    rows = [row for part in trainer().predict(model, data) for row in part]
    assert [row["index"] for row in rows] == list(range(5))
    assert [row["prompt"] for row in rows] == [f"The {i}" for i in range(5)]
    assert all(row["completion"] for row in rows)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        ({"vocab_size": 260}, {}, "the tokenizer has 300 tokens and the network's vocab_size is 260; set model.config"),
        ({}, {"block_size": 200}, "data.block_size is 200 and the network has 128 positions; lower block_size"),
    ],
)
def test_data_that_does_not_fit_the_network_is_refused_before_training(config, data, message, text, trainer):
    model = CausalLanguageModel(architecture="llama", config={**TINY_LLAMA, **config})
    with pytest.raises(InputError, match=message):
        trainer().fit(model, text(**data))


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(trained, text, trainer):
    model = CausalLanguageModel(architecture="llama", config=TINY_LLAMA)
    with pytest.raises(InputError, match="set data.tokenizer to the checkpoint's path"):
        trainer().validate(model, text(vocab_size=290), ckpt_path=trained[2])
    # and the remedy works
    model = CausalLanguageModel(architecture="llama", config=TINY_LLAMA)
    assert trainer().validate(
        model, text(vocab_size=290, tokenizer=str(trained[2])), ckpt_path=trained[2], verbose=False
    )
