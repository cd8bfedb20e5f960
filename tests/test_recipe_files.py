import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_bigmodels import recipe_files
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.recipe_files import display_name, find_config, find_recipe, list_recipes, settles_model

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two recipes and a file that is none."""
    folder = tmp_path / "recipes"
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "small.yaml").write_text("# A small model on your text.\n# more\nmodel: X\n")
    (folder / "text" / "large.yaml").write_text("model: X\n")
    (folder / "stray.yaml").write_text("# not below a data type\n")
    monkeypatch.setattr(recipe_files, "recipes_folder", lambda: folder)
    return folder


def test_names_and_summaries_come_from_files(folder):
    assert [(recipe.name, recipe.summary) for recipe in list_recipes()] == [
        ("text/large", ""),
        ("text/small", "A small model on your text."),
    ]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["model: {class_path: X}"], True),
        (["model: {class_path: X}", "model: {init_args: {a: 1}}"], True),
        (["trainer: {max_steps: 1}", "model: {class_path: X}"], True),
        (["trainer: {max_steps: 1}"], False),
        (["model: {init_args: {a: 1}}"], False),
        (["model: X"], False),
        (["model: {class_path: X}", "model: null"], False),
        (["model: {class_path: X}", "model: [broken"], False),
        (["- a list"], False),
        ([], False),
    ],
)
def test_configurations_settle_the_model_only_where_they_name_its_class(texts, expected, tmp_path):
    paths = [tmp_path / f"{number}.yaml" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    apart = [word for path in paths for word in ("--config", str(path))]
    joined = [f"-c={path}" for path in paths]
    assert settles_model(["fit", *apart, "--ckpt_path", "last"]) is expected
    assert settles_model(["fit", *joined]) is expected
    assert not settles_model(["fit", *apart, "--config", "gone.yaml"])
    assert not settles_model(["fit", *apart, "--config"])


def test_a_recipe_is_found_by_name(folder):
    assert find_recipe("text/small") == folder / "text" / "small.yaml"
    with pytest.raises(InputError, match=r"^no recipe is named 'text/smal'; did you mean 'text/small'\?$"):
        find_recipe("text/smal")


def test_a_file_goes_before_a_recipe(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("text/small") == str(folder / "text" / "small.yaml")
    Path("text").mkdir()
    Path("text/small").write_text("model: Y\n")
    assert find_config("text/small") == "text/small"
    assert find_config("s3://bucket/run.yaml") == "s3://bucket/run.yaml"
    with pytest.raises(InputError) as error:
        find_config("text/smal")
    assert str(error.value) == (
        "--config text/smal: no such file, and no recipe of this name; did you mean 'text/small'?"
    )


def test_display_name_is_what_config_takes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert display_name(folder / "text" / "small.yaml") == "text/small"
    assert display_name(tmp_path / "mine.yaml") == "mine.yaml"
    assert display_name("mine.yaml") == "mine.yaml"
    assert display_name("/elsewhere/mine.yaml") == "/elsewhere/mine.yaml"


def test_every_recipe_of_the_package_is_listed_and_has_a_header():
    files = {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in ROOT.glob("recipes/**/*.y*ml")}
    recipes = list_recipes()
    assert {recipe.name for recipe in recipes} == files
    assert [recipe.name for recipe in recipes if not recipe.summary] == []


def test_the_wheel_brings_the_recipes(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = (
        "import lightning_bigmodels.recipe_files as r; print(r.__file__);"
        "[print(recipe.name, r.find_recipe(recipe.name)) for recipe in r.list_recipes()]"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "empty",
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    package = tmp_path / "site" / "lightning_bigmodels"
    assert output[0] == str(package / "recipe_files.py")
    assert output[1:] == [f"{recipe.name} {package / 'recipes' / recipe.name}.yaml" for recipe in list_recipes()]
