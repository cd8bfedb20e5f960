"""Tokenizers: lossless, deterministic, the same from every place they are kept; parallel encoding changes nothing."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_bigmodels.data import tokenizer as module
from lightning_bigmodels.data.tokenizer import (
    Encoder,
    can_be_cut,
    load_tokenizer,
    pieces,
    same_tokenizer,
    tokenizer_from_files,
    tokenizer_rules,
    tokenizer_to_files,
    train_tokenizer,
)
from lightning_bigmodels.errors import InputError


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(["the cat sat on the mat\n" * 20, "le café était là\n" * 20], 300)


def stream(tokenizer, documents, count_bytes=True):
    batches = list(Encoder(tokenizer).encode(documents, count_bytes))
    return np.concatenate([b.tokens for b in batches]), np.concatenate([b.num_bytes for b in batches])


def test_any_text_round_trips(trained, odd_text):
    assert trained.decode(trained(odd_text).input_ids) == odd_text
    tokens, num_bytes = stream(trained, [odd_text])
    assert tokens[0] == trained.eos_token_id
    assert trained.eos_token_id not in tokens[1:]  # the name in the text is only text
    assert trained.decode(tokens[1:]) == odd_text
    assert num_bytes.sum() == len(odd_text.encode())
    assert trained.eos_token_id == trained.pad_token_id == trained.bos_token_id


def test_training_is_deterministic_and_learns_merges(trained):
    again = train_tokenizer(["the cat sat on the mat\n" * 20, "le café était là\n" * 20], 300)
    assert same_tokenizer(trained, again)
    assert 257 < len(trained) <= 300
    assert trained.tokenize("the cat") == ["the", "Ġcat"]


def test_vocab_size_must_hold_all_bytes():
    assert len(train_tokenizer(["aaaa"], 257)) == 257
    with pytest.raises(InputError, match=r"vocab_size is 256; set it to 257 or more"):
        train_tokenizer(["aaaa"], 256)


def test_bytes_belong_to_the_token_that_spells_them(trained):
    tokens, num_bytes = stream(trained, ["the €🙂", "cat"])
    assert trained.convert_ids_to_tokens(tokens)[:3] == ["<|endoftext|>", "the", "Ġ"]
    assert num_bytes[tokens == trained.eos_token_id].tolist() == [0, 0]
    assert num_bytes[1:3].tolist() == [3, 1]
    assert num_bytes.sum() == len("the €🙂cat".encode())


def test_bytes_are_exact_where_the_tokenizer_drops_white_space(word_pieces, odd_text):
    documents = [" \n ", odd_text, "\n\n", "  x  ", " "]
    tokens, num_bytes = stream(word_pieces, documents)
    assert num_bytes.sum() == len("".join(documents).encode())
    assert num_bytes[0] == 0  # the first token is never predicted
    assert (num_bytes >= 0).all()
    assert len(tokens) == len(num_bytes)
    assert (tokens == word_pieces.eos_token_id).sum() == len(documents)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_pieces_give_the_tokens_of_the_whole(trained, odd_text, size, monkeypatch):
    text = odd_text * 3
    whole = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    whole.encode_special_tokens = True
    expected = whole.encode(text).ids
    cut = list(pieces(text, size))
    assert "".join(cut) == text
    assert len(cut) > 3
    assert [token for piece in cut for token in whole.encode(piece).ids] == expected
    monkeypatch.setattr(module, "pieces", lambda document: pieces(document, size))
    for batch_characters in (50, 1 << 20):
        monkeypatch.setattr(module, "BATCH_CHARACTERS", batch_characters)
        tokens, num_bytes = stream(trained, [text])
        assert tokens[1:].tolist() == expected
        assert num_bytes.sum() == len(text.encode())
        fast = np.concatenate([batch.tokens for batch in Encoder(trained).encode([text], count_bytes=False)])
        assert np.array_equal(fast, tokens)


def test_random_text_may_be_cut_anywhere_that_is_allowed(trained):
    generator = random.Random(0)
    whole = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    for _ in range(300):
        text = "".join(generator.choices("\n\n\n\n\n \t\r\x85\x1f\u2028\u200b\u180eaé1٣_.'s-🙂\u0301<|", k=60))
        cut = list(pieces(text, 1))
        assert [token for piece in cut for token in whole.encode(piece).ids] == whole.encode(text).ids, ascii(text)


def test_only_known_rules_are_cut(trained, word_pieces):
    rules = tokenizer_rules(trained)
    assert can_be_cut(rules)
    assert not can_be_cut(tokenizer_rules(word_pieces))
    byte_level = rules["pre_tokenizer"]
    digits = {"type": "Digits", "individual_digits": True}
    assert can_be_cut({**rules, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}})
    split = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
    assert not can_be_cut({**rules, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}})
    assert not can_be_cut({**rules, "pre_tokenizer": {**byte_level, "use_regex": False}})
    assert not can_be_cut({**rules, "pre_tokenizer": {**byte_level, "add_prefix_space": True}})
    assert not can_be_cut({**rules, "pre_tokenizer": None})
    assert not can_be_cut({**rules, "normalizer": {"type": "NFC"}})
    assert not can_be_cut({**rules, "added_tokens": [{"content": "\n", "special": False}]})


def test_the_same_from_every_place(trained, tmp_path):
    files = tokenizer_to_files(trained)
    assert all(isinstance(text, str) for text in files.values())
    assert same_tokenizer(tokenizer_from_files(files), trained)
    trained.save_pretrained(tmp_path / "folder")
    bare = tmp_path / "bare.json"
    shutil.copy(tmp_path / "folder" / "tokenizer.json", bare)
    torch.save({"state_dict": {}, "tokenizer": files}, tmp_path / "run.ckpt")
    sharded = tmp_path / "sharded.ckpt"
    sharded.mkdir()
    torch.save({"tokenizer": files}, sharded / "meta.pt")
    for source in ("folder", "folder/tokenizer.json", "bare.json", "run.ckpt", "sharded.ckpt"):
        loaded = load_tokenizer(str(tmp_path / source))
        assert same_tokenizer(loaded, trained), source
        assert loaded.eos_token == "<|endoftext|>"
        assert loaded.decode(loaded("a .b , c 's").input_ids) == "a .b , c 's"


def test_a_call_with_padding_does_not_make_another_tokenizer(trained, word_pieces):
    other = tokenizer_from_files(tokenizer_to_files(trained))
    other(["a", "the cat sat"], padding=True, truncation=True, max_length=2)
    assert same_tokenizer(trained, other)
    assert not same_tokenizer(trained, word_pieces)


def test_what_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"tokenizer '/nowhere/at/all' cannot be loaded.*; give a tokenizer\.json"):
        load_tokenizer("/nowhere/at/all")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json' cannot be loaded"):
        load_tokenizer(str(tmp_path / "broken.json"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"other\.ckpt holds no tokenizer; give one of a language model"):
        load_tokenizer(str(tmp_path / "other.ckpt"))
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "endless")
    for source in ("endless", "endless/tokenizer.json"):
        with pytest.raises(InputError, match=r"has no end-of-text token .*; set eos_token in"):
            load_tokenizer(str(tmp_path / source))
    assert json.loads((tmp_path / "endless" / "tokenizer.json").read_text())["model"]["vocab"] == {"a": 0, "[UNK]": 1}
