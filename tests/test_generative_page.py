"""docs/generative.md is true: its blocks run in order on small pictures, and what it names is there."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from lightning_bigmodels import callbacks
from tests import story as page
from tests.test_vision_page import draw

PAGE = (page.ROOT / "docs" / "generative.md").read_text(encoding="utf-8")


@pytest.fixture
def story(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with page.reading(tmp_path, monkeypatch, capsys) as told:
        monkeypatch.setenv("WANDB_MODE", "disabled")
        for number in range(40):
            name = "rose" if number % 2 else "tulip"
            draw(Path("flowers", name, f"{number}.jpg"), number)
            path = draw(Path("captioned", f"{number}.jpg"), number)
            path.with_suffix(".txt").write_text(f"a {name}", encoding="utf-8")
        for number in range(4):
            draw(Path("photos", f"{number}.jpg"), number)
        yield told


@pytest.mark.filterwarnings("ignore:.*fewer than 100 examples")
def test_every_block_runs_in_order(story):
    for block in page.blocks(PAGE):
        try:
            story.run(block)
        except BaseException as error:
            pytest.fail(f"docs/generative.md, the block of line {block.line}: {type(error).__name__}: {error}")
    assert story.unused == set(), "files that no command of the page uses"
    rows = [json.loads(row) for row in Path("runs/shapes/predict/version_0/predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a red circle left of a blue square", "a green triangle"]
    with Image.open(Path("runs/shapes/predict/version_0", rows[1]["picture"])) as picture:
        assert picture.info["prompt"] == "a green triangle"
    with Image.open("runs/shapes/fit/version_0/samples/samples.gif") as animation:
        assert animation.n_frames >= 2
    rows = Path("runs/flowers_gan/predict/version_0/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(row)["class"] for row in rows} == {"rose"}
    assert "val_fid_flowers" in Path("runs/flowers_gan/fit/version_0/metrics.csv").read_text(encoding="utf-8")
    assert list(Path("runs/flowers_vae/predict/version_0").glob("*.parquet"))
    assert Path("flowers_pipeline/model_index.json").is_file()
    assert Path("flowers_generator/model.onnx").is_file()


def test_links_and_names_exist():
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links
    assert [link for link in links if not (page.ROOT / "docs" / link).exists()] == []
    for name in ("Samples", "SampleQuality", "WeightAverage", "Latents"):
        assert name in callbacks.__all__
        assert f"`{name}`" in PAGE
