"""The README is true: its blocks run in order, and what it names is there."""

import inspect
import re
from pathlib import Path

import pytest

from lightning_bigmodels.__main__ import VERBS
from lightning_bigmodels.recipe_files import list_recipes
from tests import story as page

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
SPANS = re.findall(r"`([^`]+)`", PROSE)


def blocks():
    return page.blocks(README)


@pytest.fixture
def story(tmp_path, monkeypatch, capsys, python):
    with page.reading(tmp_path, monkeypatch, capsys, python) as told:
        yield told


def test_every_block_runs_in_order(story):
    for block in blocks():
        try:
            story.run(block)
        except BaseException as error:
            pytest.fail(f"README.md, the block of line {block.line}: {type(error).__name__}: {error}")
    assert story.unused == set(), "files that no command of the README uses"
    folder = Path("runs")
    assert len((folder / "quickstart/predict/version_1/predictions.jsonl").read_text().splitlines()) == 2
    for name in ("quickstart", "my_text", "finetune", "bigram"):
        assert (folder / name / "fit/version_0/metrics.csv").is_file(), name
    assert {path.name for path in Path("exported").iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}


def test_the_two_commands_of_the_setup_stand_alone_in_their_blocks():
    found = [block.text.strip() for block in blocks() if block.language == "bash"]
    assert "pip install -e . && bigmodels fit --config text/quickstart" in found
    # .ci/run takes this line from here
    assert [line for line in README.splitlines() if re.fullmatch("pip install .* && pytest", line)] == [
        'pip install -e ".[test]" && pytest'
    ]
    assert 'pip install -e ".[test]" && pytest' in found


def test_commands_in_sentences_are_in_blocks_or_known():
    known = {
        "wandb login": "asks for a key",
        "wandb sync": "sends to a server",
        "gzip -9": "a compressor, to compare with",
        "xz -9": "a compressor, to compare with",
    }
    shown = "\n".join(block.text for block in blocks())
    programs = {"bigmodels", "pip", "python", *(command.split()[0] for command in known)}
    spans = [span for span in SPANS if span.split()[0] in programs and " " in span]
    assert [span for span in spans if span not in known and span not in shown] == []
    assert sorted(set(known) - set(spans)) == []


def test_options_in_sentences_exist():
    from lightning.pytorch import Trainer

    from lightning_bigmodels import CausalLanguageModel, Text

    arguments = {
        owner: set(inspect.signature(parent).parameters)
        for owner, parent in {"trainer": Trainer, "model": CausalLanguageModel, "data": Text}.items()
    }
    found = re.findall(r"`(?:--)?(trainer|model|data)\.(\w+)", PROSE)
    assert len(found) > 5
    assert [f"{owner}.{name}" for owner, name in found if name not in arguments[owner]] == []
    plain = {word for span in SPANS for word in span.split() if re.match(r"--\w+$", word)}
    assert plain <= {"--config", "--ckpt_path", "--output", "--seed_everything"}
    assert {span.split()[1] for span in SPANS if span.startswith("bigmodels ")} <= set(VERBS)


def test_what_there_is_is_what_the_tables_list():
    from lightning_bigmodels import callbacks, data, modules, optim

    schedules = [value for value in vars(optim).values() if inspect.isclass(value) and value is not optim.Schedule]
    assert column("`schedule`", 0) == {value.__name__ for value in schedules if issubclass(value, optim.Schedule)}
    assert column("recipe", 0) == {recipe.name for recipe in list_recipes()}
    assert column("family", 1) == set(modules.__all__)
    assert column("data", 1) == set(data.__all__) - {"DataModule"}
    assert [name for name in callbacks.__all__ if name not in SPANS] == []


def column(head, place):
    """Return what stands in one column of the table whose first row begins with `head`."""
    table = re.search(rf"^\| {re.escape(head)}.*\n\|[ |-]+\n((?:\|.*\n)+)", PROSE, flags=re.M)
    return {row.split("|")[place + 1].strip(" `") for row in table[1].splitlines()}


def test_links_and_extras_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", PROSE)
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = {span.strip("[]") for span in SPANS if re.fullmatch(r"\[\w+\]", span)}
    assert extras == {"parquet", "zstd", "hub", "vision", "generative"}
    assert [extra for extra in extras if not re.search(rf"^{extra} = \[", text, flags=re.M)] == []


def test_every_benchmark_is_named():
    paths = (ROOT / "tests" / "benchmarks").glob("*.py")
    scripts = {path.name for path in paths if "\nif __name__ ==" in path.read_text(encoding="utf-8")}
    assert set(re.findall(r"^python tests/benchmarks/(.*)$", README, flags=re.M)) == scripts


def test_no_figure_is_left_open():
    assert re.findall(r"\{\{\w+\}\}", README) == []
