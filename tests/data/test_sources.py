"""Sources: each kind gives its documents, the cuts lose nothing, and bad input is named with its place and remedy."""

import gzip
import json
import os
from itertools import pairwise

import pytest
import zstandard

from lightning_bigmodels.data.sources import Corpus, TextParts, cut
from lightning_bigmodels.errors import InputError

ROWS = ["first é", "second\nline", "", "third 🙂"]


def read(*names, **options):
    return list(Corpus([str(name) for name in names], **options).documents())


def jsonl(rows, column="text"):
    return "".join(json.dumps({column: row}, ensure_ascii=False) + "\n" for row in rows).encode()


def test_python_docs_are_the_topics_in_order():
    from pydoc_data.topics import topics

    documents = read("python-docs")
    assert len(documents) == len(topics)
    assert documents[0] == topics[min(topics)]
    assert Corpus("python-docs").fingerprint() == Corpus("python-docs").fingerprint()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".dat"])
def test_files_compressed_or_not(tmp_path, kind, suffix):
    data = jsonl(ROWS) if kind == ".jsonl" else "é\r\n\ttext\x85\n".encode()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    file = tmp_path / f"a{kind}{suffix}"
    file.write_bytes(pack(data))
    assert read(file) == (ROWS if kind == ".jsonl" else ["é\r\n\ttext\x85\n"])


def test_several_zstandard_frames_are_one_file(tmp_path):
    file = tmp_path / "a.txt.zst"
    compressor = zstandard.ZstdCompressor()
    file.write_bytes(compressor.compress(b"one " * 400_000) + compressor.compress(b"two"))
    assert read(file) == ["one " * 400_000 + "two"]


def test_parquet_and_another_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"n": [1, 2, 3, 4], "body": ROWS})
    assert read(tmp_path / "a.parquet", column="body") == ROWS
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS, "body") + b"\n\n")
    assert read(tmp_path / "a.jsonl", column="body") == ROWS


def test_folders_and_globs_are_sorted(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", "skipped.py", ".hidden/d.txt", "empty.txt"):
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    (tmp_path / "r.jsonl").write_bytes(jsonl(["row"]))
    assert read(tmp_path) == ["a.md", "b.txt", "row", "sub/c.txt"]
    assert read(tmp_path / "**" / "*.txt") == [".hidden/d.txt", "b.txt", "sub/c.txt"]
    assert read(tmp_path / "sub", tmp_path / "skipped.py") == ["sub/c.txt", "skipped.py"]


def test_a_relative_glob_starts_here(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert read("*.txt") == ["here"]
    assert read("a.txt") == ["here"]


def test_another_encoding(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("café".encode("latin-1"))
    assert read(file, encoding="latin-1") == ["café"]
    with pytest.raises(
        InputError, match=r"a\.txt, line 1: byte 3 \(0xe9\) of the file is not utf-8; convert it to UTF-8 or set"
    ):
        read(file)
    (tmp_path / "b.jsonl").write_bytes(jsonl(["ok"]) + b'{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"b\.jsonl, line 2: byte 28 \(0xe9\) of the file is not utf-8"):
        read(tmp_path / "b.jsonl")


def test_fingerprints_change_with_the_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = Corpus(str(tmp_path)).fingerprint()
    assert before == [[str(file.resolve()), 3, file.stat().st_mtime_ns]]
    os.utime(file, ns=(0, 0))
    assert Corpus(str(tmp_path)).fingerprint() != before


def test_a_hub_data_set_in_a_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(jsonl(ROWS))
    (folder / "test.jsonl").write_bytes(jsonl(["held out"]))
    assert read(f"hub:{folder}") == ROWS
    assert read(f"hub:{folder}@test") == ["held out"]
    assert read(f"hub:{folder}:default@train[:1]") == ROWS[:1]
    corpus = Corpus(f"hub:{folder}")
    assert corpus.fingerprint() == Corpus(f"hub:{folder}").fingerprint() != Corpus(f"hub:{folder}@test").fingerprint()
    with pytest.raises(InputError, match=r"no column 'txt'; did you mean 'text'\?; set `column`"):
        read(f"hub:{folder}", column="txt")
    with pytest.raises(InputError, match=r"set@nope cannot be loaded .*; check hub:<name>\[:<configuration>\]"):
        read(f"hub:{folder}@nope")
    (folder / "train.jsonl").write_bytes(jsonl([*ROWS, "more"]))
    assert Corpus(f"hub:{folder}").fingerprint() != corpus.fingerprint()


def write_parquet(path, columns):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def bad(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty; give a file that holds text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: Expecting value at column \d+; write one JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: a list, not an object; write one JSON object per line"),
        ("a.jsonl", b'\n{"texts": "x"}\n', r"line 2: no column 'text'; did you mean 'texts'\?; set `column`"),
        ("a.jsonl", b'{"text": 7}\n', r"line 1: column 'text' holds 7, not a string; mend or remove the row"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: column 'text' holds half a surrogate pair \('\\ud800'\) at char"),
        ("a.txt.gz", gzip.compress(b"text" * 99)[:-9], r"a\.txt\.gz cannot be read: .*cut short: fetch it again"),
        ("a.txt.gz", b"text", r"a\.txt\.gz cannot be read: Not a gzipped file"),
        ("a.txt.zst", zstandard.compress(os.urandom(9999))[:-9], r"a\.txt\.zst cannot be read: .* before its end"),
        ("a.txt.zst", b"text", r"a\.txt\.zst cannot be read: .*fetch it again"),
    ],
)
def test_bad_files_are_named(tmp_path, name, data, message):
    with pytest.raises(InputError, match=message):
        read(bad(tmp_path, name, data))


def test_bad_parquet_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    write_parquet(file, {"text": ["a", None]})
    with pytest.raises(InputError, match=r"a\.parquet, row 1: column 'text' holds None, not a string"):
        read(file)
    with pytest.raises(InputError, match=r"a\.parquet: no column 'test'; did you mean 'text'\?"):
        read(file, column="test")
    with pytest.raises(InputError, match=r"a\.parquet is not a readable Parquet file: .*; fetch or write it again"):
        read(bad(tmp_path, "a.parquet", b"text"))


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        InputError, match=r"no file or folder .*shakspeare\.txt; did you mean 'shakespeare\.txt'\?; check"
    ):
        read(tmp_path / "shakspeare.txt")
    with pytest.raises(InputError, match=r"no file or folder python-doc; did you mean 'python-docs'\?; check the path"):
        read("python-doc")
    with pytest.raises(InputError, match=r"no file with text matches .*\*\.md; check the pattern"):
        read(tmp_path / "*.md")
    with pytest.raises(InputError, match=r"no file with text matches .*folder; put files with the suffixes \.txt"):
        read(tmp_path / "folder")


@pytest.mark.parametrize("cuts", [(0, 3, 11), (1, 2, 9), (5, 6, 7), (0, 0, 100)])
def test_neighbouring_cuts_lose_nothing(cuts):
    documents = ["aé", "🙂b", "", "日本", "c"]
    bounds = [0, *cuts, 1000]
    parts = [list(cut(iter(documents), a, b)) for a, b in pairwise(bounds)]
    assert "".join("".join(part) for part in parts) == "".join(documents)
    for part, bound in zip(parts, bounds[1:], strict=True):
        assert len("".join(part).encode()) <= bound


def test_parts_follow_each_other(tmp_path):
    text = "".join(f"line {number} é\n" for number in range(100))
    (tmp_path / "a.txt").write_text(text[:600])
    (tmp_path / "b.txt").write_text(text[600:])
    parts = TextParts(Corpus(str(tmp_path)), val_fraction=0.1, test_fraction=0.2)
    train, test, val = ("".join(parts.documents(part)) for part in ("train", "test", "val"))
    assert train + test + val == text
    total = len(text.encode())
    assert abs(len(val.encode()) - total / 10) < 3
    assert abs(len(test.encode()) - total / 5) < 3
    assert len(list(parts.documents("train"))) == 2  # b.txt is cut
    own = TextParts(Corpus(str(tmp_path)), val=Corpus(str(tmp_path / "a.txt")), test_fraction=0.2)
    assert own.names() == ["train", "val", "test"]
    assert "".join(own.documents("val")) == text[:600]
    assert "".join([*own.documents("train"), *own.documents("test")]) == text
    assert TextParts(Corpus("x"), val_fraction=0.0).names() == ["train"]


def test_text_without_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["", ""]))
    with pytest.raises(InputError, match=r"a\.jsonl holds no text; give sources that do"):
        list(TextParts(Corpus(str(tmp_path / "a.jsonl"))).documents("train"))
