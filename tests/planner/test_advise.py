"""`bigmodels advise` as a user has it: help, errors, and commands that start as they are printed."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image

from lightning_bigmodels.__main__ import main
from lightning_bigmodels.advice.arguments import HELP


def draw(path, number, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(
        256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
    )
    Image.fromarray(pixels.numpy()).save(path)


def advise(capsys, *words):
    code = main(["advise", *map(str, words)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def test_help_comes_without_torch_and_fits_a_screen():
    code = (
        "import sys; from lightning_bigmodels.__main__ import main; code = main(['advise', '--help']);"
        "assert not {'torch', 'lightning', 'jsonargparse', 'yaml', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", HELP)
    assert max(map(len, HELP.splitlines())) <= 110
    assert len(HELP.splitlines()) <= 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --data, --gpu, --hours; write: bigmodels advise --data"),
        (["--hours", "0"], "--hours is 0; set it above 0, such as 8 or 0.5"),
        (["--hours", "-1"], "--hours is -1; set it above 0"),
        (["--hours", "nan"], "--hours is nan; set it above 0"),
        (["--hours", "many"], "argument --hours: 'many' is no number of hours; write: bigmodels advise"),
        (["--devices", "0"], "--devices is 0; set it to 1 or more"),
        (["--plans", "0"], "--plans is 0; set it to 1 or more"),
        (["--gpus", "l4"], "unrecognized arguments: --gpus l4; write: bigmodels advise"),
        (["--data", ""], "--data is empty; name the folder or file that holds your data"),
        (
            ["--gpu", "h10"],
            "no device 'h10' in the table; one of your own (--gpu_table) can add it; did you mean 'h100'?",
        ),
        (["--data", "nowhere"], "--data nowhere: no such file or folder"),
    ],
)
def test_wrong_input_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"--data": "python-docs", "--gpu": "l4", "--hours": "8"} if words else {}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    assert main(["advise", *(word for pair in given.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bigmodels: error: {message}")
    assert error.count("\n") == 1


def test_the_extra_for_pictures_is_named_where_it_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert main(["advise", "--data", "python-docs", "--gpu", "l4", "--hours", "8"]) == 2
    assert "pip install 'lightning-bigmodels[vision]'" in capsys.readouterr().err


def test_a_recipe_whose_extra_is_missing_stands_beside_those_that_can_be_planned(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for number in range(6):
        draw(tmp_path / f"{number}.png", number)
    ask = ["--data", tmp_path, "--gpu", "l4", "--hours", 8, "--task", "generate", "--plans", 9, "--json"]
    found = {each["recipe"]: each for each in json.loads(advise(capsys, *ask))["recipes"]}
    assert found["gan/dcgan"]["fits"]
    assert "pip install 'lightning-bigmodels[generative]'" in found["diffusion/ddpm"]["remark"]


def test_data_without_a_recipe_are_described_all_the_same(capsys, tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("user_id,item_id,rating\n" + "".join(f"{n % 5},{n % 7},3\n" for n in range(20)), encoding="utf-8")
    shown = advise(capsys, "--data", path, "--gpu", "l4", "--hours", 8)
    assert "20 rows" in shown
    assert "No recipe learns from who took which item (interactions) yet. Missing: a data module for" in shown
    found = json.loads(advise(capsys, "--data", path, "--gpu", "l4", "--hours", 8, "--json"))
    assert (found["data"]["kind"], found["recipes"]) == ("interactions", [])


def test_commands_as_printed_start_on_the_users_own_data(capsys, tmp_path, monkeypatch, text_file):
    """Every recipe for pictures with classes reads them; the one for text is run."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for number in range(24):
        draw(tmp_path / "my photos" / ("rose" if number % 3 else "tulip") / f"{number}.png", number)
    ask = ["--gpu", "l4", "--hours", 8, "--json"]
    found = json.loads(advise(capsys, "--data", "my photos", *ask, "--task", "classify", "--plans", 9))
    commands = {each["recipe"]: shlex.split(each["command"]) for each in found["recipes"]}
    assert found["recipes"][0]["recipe"] == "image/finetune_efficientnet"
    assert all(each["fits"] and each["plan"]["step"]["seconds"] > 0 for each in found["recipes"])
    tiny = ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    small = commands["image/quickstart"]
    assert main([*small[1:], *tiny]) == 0
    found = json.loads(advise(capsys, "--data", text_file, *ask, "--plans", 1))
    (recipe,) = found["recipes"]
    assert recipe["recipe"] == "text/quickstart"
    assert recipe["length"]["steps_per_epoch"] >= 4
    assert main([*shlex.split(recipe["command"])[1:], *tiny]) == 0
