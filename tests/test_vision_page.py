"""docs/vision.md is true: its blocks run in order on small pictures, and what it names is there."""

import json
import re
from pathlib import Path

import pytest
import torch
from torchvision.io import write_jpeg, write_png

from lightning_bigmodels import callbacks
from tests import story as page

PAGE = (page.ROOT / "docs" / "vision.md").read_text(encoding="utf-8")


def draw(path, number):
    """Write a picture of 48 x 64 pixels whose colour belongs to its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(number)
    picture = torch.randint(60, (3, 48, 64), dtype=torch.uint8, generator=generator)
    picture["rose" not in path.parts] += 150
    write_jpeg(picture, str(path))
    return path


def draw_forest(name, height, width):
    """Write a photo from above as deepforest has it, with two trees: one in the first tile, one in its lower corner."""
    folder = Path("deepforest", "data")
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(height)
    write_png(
        torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator), str(folder / f"{name}.png")
    )
    corners = ("xmin", "ymin", "xmax", "ymax")
    boxes = [
        "".join(f"<{side}>{value}</{side}>" for side, value in zip(corners, box, strict=True))
        for box in ((40, 30, 80, 70), (240, 240, 290, 290))
    ]
    objects = "".join(f"<object><name>Tree</name><bndbox>{box}</bndbox></object>" for box in boxes)
    (folder / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>", encoding="utf-8")


@pytest.fixture
def story(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with page.reading(tmp_path, monkeypatch, capsys) as told:
        monkeypatch.setenv("WANDB_MODE", "disabled")
        rows = ["path,label,camera"]
        for number in range(40):
            name = "rose" if number % 2 else "tulip"
            path = draw(Path("flowers", name, f"{number}.jpg"), number)
            rows.append(f"{path},{name},{'old' if number % 3 else 'new'}")
        Path("flowers.csv").write_text("\n".join(rows), encoding="utf-8")
        boxes = ["image_path,xmin,ymin,xmax,ymax,label"]
        for number in range(8):
            boxes.append(f"{draw(Path('photos', f'{number}.jpg'), number)},8,8,40,40,thing")
        Path("boxes.csv").write_text("\n".join(boxes), encoding="utf-8")
        draw_forest("2019_YELL_2_528000_4978000_image_crop2", height=384, width=512)
        draw_forest("2019_YELL_2_541000_4977000_image_crop", height=300, width=600)
        yield told


@pytest.mark.filterwarnings("ignore:.*fewer than 100 examples")
def test_every_block_runs_in_order(story):
    for block in page.blocks(PAGE):
        try:
            story.run(block)
        except BaseException as error:
            pytest.fail(f"docs/vision.md, the block of line {block.line}: {type(error).__name__}: {error}")
    assert story.unused == set(), "files that no command of the page uses"
    # a tile keeps a tree of which it has more than half
    assert "train_0_0.png,40,30,80,70,tree\n" in Path("trees/train.csv").read_text(encoding="utf-8")
    assert "train_0_128.png,112,240,162,256,tree" not in Path("trees/train.csv").read_text(encoding="utf-8")
    assert "train_128_128.png,112,112,162,162,tree\n" in Path("trees/train.csv").read_text(encoding="utf-8")
    rows = Path("runs/flowers/predict/version_0/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(json.loads(rows[0])["probabilities"]) == {"rose", "tulip"}
    assert list(Path("runs/detection_digits/predict/version_0/predictions").glob("*.png"))
    assert list(Path("runs/edsr_x2/predict/version_0").rglob("*.png"))
    assert list(Path("runs/flowers").glob("explain/version_0/explanations/*.png"))
    assert list(Path("runs/flowers").glob("fit/*/fairness/*.csv"))


def test_links_options_and_names_exist():
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links
    assert [link for link in links if not (page.ROOT / "docs" / link).exists()] == []
    for option in ("mixup_alpha", "cutmix_alpha", "label_smoothing", "unfreeze_after", "layer_decay"):
        assert f"`{option}`" in PAGE
        assert option in (page.ROOT / "lightning_bigmodels/modules/cnn/classifier.py").read_text(encoding="utf-8")
    told = {"ConfusionMatrix", "ConfidentMistakes", "ClassTable", "WeightAverage", "Explain"}
    pictures = set(callbacks.__all__) & told
    assert len(pictures) == 5
    assert [name for name in sorted(pictures) if f"`{name}`" not in PAGE] == []
