"""Export: what others load gives the same logits; what could mislead is refused; `pretrained` takes it back."""

import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_bigmodels import CausalLanguageModel
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.export import export
from tests.conftest import TINY_LLAMA


@pytest.fixture
def model(text, trainer):
    torch.manual_seed(0)
    model = CausalLanguageModel(architecture="llama", config=TINY_LLAMA)
    trainer(max_steps=1).fit(model, text())
    return model


def test_the_folder_loads_elsewhere_with_equal_logits(model, tmp_path):
    folder = export(model, tmp_path / "out")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    other, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The class definition", return_tensors="pt")["input_ids"]
    assert ids.tolist()[0] == model.tokenizer("The class definition")["input_ids"]
    with torch.no_grad():
        assert torch.equal(other.eval()(ids).logits, model.network.eval()(ids).logits)
    assert other.config.eos_token_id == model.tokenizer.eos_token_id
    assert other.generation_config.eos_token_id == model.tokenizer.eos_token_id


def test_pretrained_takes_it_back_and_its_checkpoint_outlives_the_folder(model, tmp_path, text, trainer):
    folder = export(model, tmp_path / "out")
    tuned = CausalLanguageModel(pretrained=str(folder), max_new_tokens=5)
    run = trainer(max_steps=1)
    run.fit(tuned, text(tokenizer=str(folder)))
    run.save_checkpoint(tmp_path / "tuned.ckpt")
    shutil.rmtree(folder)
    loaded = CausalLanguageModel.load_from_checkpoint(tmp_path / "tuned.ckpt")
    for a, b in zip(tuned.network.parameters(), loaded.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert loaded.generate(["The"]) == tuned.generate(["The"])


def test_pretrained_starts_from_the_weights_of_the_folder(model, tmp_path):
    folder = export(model, tmp_path / "out")
    again = CausalLanguageModel(pretrained=str(folder), max_new_tokens=5)
    again.configure_model()
    for a, b in zip(model.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.generate(["The"])


def test_pretrained_refuses_another_tokenizer(model, tmp_path, text, trainer):
    folder = export(model, tmp_path / "out")
    with pytest.raises(InputError, match="set data.tokenizer to"):
        trainer().fit(CausalLanguageModel(pretrained=str(folder)), text(vocab_size=280))


def test_nothing_is_overwritten_and_nothing_half_is_left(model, tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(InputError, match="exists already; name another folder or remove it"):
        export(model, target)
    assert [p.name for p in target.iterdir()] == ["precious"]

    def wrong(*args, **kwargs):
        copy = original(*args, **kwargs)
        with torch.no_grad():
            next(copy.parameters()).add_(1.0)
        return copy

    original = type(model.network).from_pretrained
    monkeypatch.setattr(type(model.network), "from_pretrained", wrong)
    with pytest.raises(RuntimeError, match="logits differ from the original's by up to"):
        export(model, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_network_without_a_format_is_refused(model, tmp_path):
    model.network = nn.Linear(2, 2)
    with pytest.raises(InputError, match="no export format is known for the network of CausalLanguageModel"):
        export(model, tmp_path / "out")


def test_a_network_of_transformers_has_one_format(model, tmp_path):
    with pytest.raises(InputError, match="becomes a Hugging Face folder; leave formats out"):
        export(model, tmp_path / "out", ["onnx"])


def test_an_exported_folder_follows_the_umask(model, tmp_path):
    folder = export(model, tmp_path / "out")
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
