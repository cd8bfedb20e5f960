"""Prompts from files: a line each, and which line is wrong."""

import json

import pytest

from lightning_bigmodels.data.prompts import read_prompts
from lightning_bigmodels.errors import InputError


def written(folder, name, *rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / name


def test_a_line_is_a_prompt_as_it_stands(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffOne é\r\n  Two\u2028still two \n\n  \n".encode())
    assert read_prompts(file) == ["One é", "  Two\u2028still two "]
    file.write_bytes("é".encode("latin-1"))
    assert read_prompts(file, "latin-1") == ["é"]


def test_a_column_holds_prompts_of_several_lines_and_none(tmp_path):
    rows = [{"prompt": "a\nb"}, {"prompt": ""}, {"prompt": "c"}]
    assert read_prompts(written(tmp_path, "prompts.jsonl", *rows)) == ["a\nb", "", "c"]


def test_what_is_wrong_is_said_with_file_and_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"a red circle\r\n \r\na blue square\n")
    with pytest.raises(InputError, match=r"prompts\.txt, line 2 is blank; write a prompt there or remove the line"):
        read_prompts(file)
    for text in ("", "\n \n"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"prompts\.txt holds no prompt; write one per line"):
            read_prompts(file)
    with pytest.raises(InputError, match=r"none\.txt is not a file; give a text file with one prompt per line"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(InputError, match=r"bad\.jsonl, line 1: no column 'prompt'; did you mean 'promt'\?"):
        read_prompts(written(tmp_path, "bad.jsonl", {"promt": "a"}))
