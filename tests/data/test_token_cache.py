"""The cache is whole or not there, written once by whoever comes first, and new when the text is."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from lightning_bigmodels.data.sources import Corpus, TextParts
from lightning_bigmodels.data.token_cache import default_cache_dir, prepare
from lightning_bigmodels.data.tokenizer import same_tokenizer
from lightning_bigmodels.errors import InputError

# One start of Python for several processes: they are forked when all is imported and no thread runs.
PROCESSES = """
import os, signal, sys
from pathlib import Path
from lightning_bigmodels.data.sources import Corpus, TextParts
from lightning_bigmodels.data import token_cache

def process():
    {inside}
    text = TextParts(Corpus(sys.argv[2]))
    cache = token_cache.prepare(Path(sys.argv[1]), text, None, 300, lambda sentence: None)
    os.write(1, (cache.folder.name + "\\n").encode())
    os._exit(0)

children = []
for _ in range({count}):
    children.append(os.fork())
    if not children[-1]:
        process()
print([os.waitpid(child, 0)[1] for child in children])
"""


def run_processes(cache_dir, source, count, inside):
    code = PROCESSES.format(count=count, inside=inside)
    command = [sys.executable, "-W", "ignore", "-c", code, cache_dir, source]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout.splitlines()


@pytest.fixture
def source(tmp_path, odd_text):
    file = tmp_path / "text.txt"
    file.write_text(odd_text * 5, newline="")
    return file


def build(tmp_path, source, tokenizer=None, **options):
    told = []
    parts = TextParts(Corpus(str(source)), **options)
    return prepare(tmp_path / "cache", parts, tokenizer, 300, told.append), told


def test_tokens_spell_the_text(tmp_path, source):
    cache, told = build(tmp_path, source, test_fraction=0.1)
    text = source.read_bytes()
    spelled = b""
    for part in ("train", "test", "val"):
        tokens = cache.tokens(part).array
        assert tokens.dtype == np.uint16
        assert len(tokens) == cache.num_tokens[part] == len(cache.tokens(part))
        assert tokens[0] == cache.tokenizer.eos_token_id
        piece = cache.tokenizer.decode(tokens[1:].tolist()).encode()
        assert len(piece) == cache.meta["parts"][part]["bytes"]
        if part != "train":
            assert cache.num_bytes(part).array.sum() == len(piece)
        spelled += piece
    assert spelled == text
    assert [sentence.split()[0] for sentence in told] == ["training", "tokenized"]
    again, told = build(tmp_path, source, test_fraction=0.1)
    assert again.folder == cache.folder
    assert told == []


def test_documents_are_parted_by_end_of_text(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.md").write_text(name * 5)
    cache, _ = build(tmp_path, tmp_path, val_fraction=0.0)
    end = cache.tokenizer.eos_token
    tokens = cache.tokens("train").array.tolist()
    assert cache.tokenizer.decode(tokens) == f"{end}aaaaa{end}bbbbb{end}ccccc"
    assert cache.meta["parts"] == {"train": {"tokens": len(tokens), "bytes": 15, "documents": 3}}
    assert not (cache.folder / "val.bin").exists()


def test_a_tokenizer_is_trained_on_the_training_part_alone(tmp_path):
    (tmp_path / "a.txt").write_text("abcd " * 100 + "wxyz " * 100)
    cache, _ = build(tmp_path, tmp_path / "a.txt", val_fraction=0.5)
    vocabulary = cache.tokenizer.get_vocab()
    assert "abcd" in vocabulary
    assert not any("wx" in token for token in vocabulary)


def test_another_tokenizer_is_kept_as_it_is(tmp_path, source, word_pieces):
    cache, _ = build(tmp_path, source, word_pieces)
    assert same_tokenizer(cache.tokenizer, word_pieces)
    assert cache.num_bytes("val").array.sum() == cache.meta["parts"]["val"]["bytes"]


def test_a_large_vocabulary_takes_four_bytes(tmp_path, source):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[END]": 0, **{f"word{number}": number for number in range(1, 70_000)}, "x": 70_000}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    cache, _ = build(tmp_path, source, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]"))
    assert cache.tokens("train").array.max() == 70_000


def test_the_key_follows_text_and_settings(tmp_path, source, word_pieces):
    folders = {build(tmp_path, source)[0].folder, build(tmp_path, source, val_fraction=0.2)[0].folder}
    folders.add(build(tmp_path, source, word_pieces)[0].folder)
    source.write_text(source.read_text() + "more")
    folders.add(build(tmp_path, source)[0].folder)
    assert len(folders) == 4


def test_a_damaged_cache_is_written_again(tmp_path, source):
    cache, _ = build(tmp_path, source)
    whole = (cache.folder / "train.bin").read_bytes()
    (cache.folder / "train.bin").write_bytes(whole[:-2])
    again, told = build(tmp_path, source)
    assert (again.folder / "train.bin").read_bytes() == whole
    assert told
    (cache.folder / "meta.json").unlink()
    assert (build(tmp_path, source)[0].folder / "train.bin").read_bytes() == whole


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_whole(tmp_path, source):
    # At the first file, and when all are written but the folder has not its name yet.
    for place in ("_sync", "sync_folder"):
        inside = f"token_cache.{place} = lambda what: os.kill(os.getpid(), signal.SIGKILL)"
        assert run_processes(tmp_path / "cache", source, 1, inside) == [f"[{int(signal.SIGKILL)}]"]
        assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [".partial"]
    cache, told = build(tmp_path, source)
    assert told
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [cache.folder]
    assert cache.num_tokens["train"] == len(cache.tokens("train").array)


def test_four_processes_at_once_write_one_cache(tmp_path, source):
    inside = "write = token_cache._write; token_cache._write = lambda *a: (os.write(1, b'writes\\n'), write(*a))[1]"
    output = run_processes(tmp_path / "cache", source, 4, inside)
    assert output.count("writes") == 1
    assert "[0, 0, 0, 0]" in output
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert output.count(folder.name) == 4


def test_what_cannot_be_prepared_is_refused(tmp_path, source, word_pieces):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cache_dir .*cache cannot be written .*; set another cache_dir"):
        build(tmp_path, source)
    (tmp_path / "cache").unlink()
    (tmp_path / "blank.txt").write_text("  \n")
    parts = TextParts(Corpus(str(source)), val=Corpus(str(tmp_path / "blank.txt")))
    with pytest.raises(InputError, match=r"the val part has no tokens .*; give it more text"):
        prepare(tmp_path / "cache", parts, word_pieces, 300, print)


def test_bad_input_leaves_no_folder_behind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 99 + "{")
    with pytest.raises(InputError, match=r"a\.jsonl, line 100"):
        build(tmp_path, tmp_path / "a.jsonl")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "lightning_bigmodels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "lightning_bigmodels"
