"""Pictures with captions: sources, parts, buckets of one shape, prompts, and what is wrong with them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bigmodels.data import CaptionedImages
from lightning_bigmodels.data.batches import FILLER, CaptionBatch
from lightning_bigmodels.data.vision.buckets import (
    BucketEvaluationSampler,
    BucketSampler,
    bucket_sizes,
    nearest_bucket,
    samples_in_batches,
)
from lightning_bigmodels.errors import InputError

SIZES = [(16, 16), (16, 32), (32, 16), (20, 16)]


def picture(path, height=16, width=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def folder_of(folder, number=22):
    """Write pictures of four shapes, each with its caption beside it."""
    for index in range(number):
        path = picture(folder / f"{index:03}.png", *SIZES[index % len(SIZES)], seed=index)
        path.with_suffix(".txt").write_text(f" picture\n number {index}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("beside"))


def images(source, **changes):
    values = {"image_size": 16, "batch_size": 4, "val_fraction": 0.0, "interpolation": "bilinear"}
    return CaptionedImages(str(source), **{**values, **changes})


def ready(data, stage="fit"):
    data.prepare_data()
    data.setup(stage)
    return data


def pairs(data, part="train"):
    examples = data.captioned(part)
    return [(examples.name(index).rpartition("/")[2], examples.part.caption(index)) for index in range(len(examples))]


# ---- sources


def test_a_text_beside_each_picture(beside):
    data = ready(images(beside))
    assert pairs(data)[:2] == [("000.png", "picture number 0"), ("001.png", "picture number 1")]
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (4, 3, 16, 16)
    assert batch["captions"] == [f"picture number {index}" for index in batch["indices"].tolist()]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "table.csv", "table.jsonl"])
def test_a_table(tmp_path, name):
    rows = [{"file_name": f"{number}.png", "text": f"caption, {number}", "part": "train"} for number in range(4)]
    rows[1]["part"] = "val"
    for row in rows:
        picture(tmp_path / row["file_name"])
    if name.endswith("jsonl"):
        lines = [json.dumps(row) for row in rows]
    else:
        lines = ["file_name,text,part", *(f'{row["file_name"]},"{row["text"]}",{row["part"]}' for row in rows)]
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = tmp_path if name.startswith("metadata") else tmp_path / name
    assert len(ready(images(source)).captioned("train")) == 4
    parted = ready(images(source, split_column="part"))
    assert pairs(parted, "val") == [("1.png", "caption, 1")]
    assert pairs(parted) == [(f"{number}.png", f"caption, {number}") for number in (0, 2, 3)]


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = {"image": [Image.new("RGB", (16, 16))] * 4, "text": [f"caption {number}" for number in range(4)]}
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "set" / "train.parquet")
    data = ready(images(f"hub:{tmp_path / 'set'}"))
    assert data.captions == rows["text"]
    assert data.captioned("train").read(0).image.shape == (3, 16, 16)


def test_parts_in_folders_and_by_fraction(tmp_path, beside):
    for part, number in {"train": 6, "val": 3}.items():
        folder_of(tmp_path / part, number)
    named = ready(images(tmp_path))
    assert {part: len(named.captioned(part)) for part in ("train", "val")} == {"train": 6, "val": 3}
    parted = ready(images(beside, val_fraction=0.2, test_fraction=0.1))
    found = {part: pairs(parted, part) for part in ("train", "val", "test")}
    assert {part: len(rows) for part, rows in found.items()} == {"train": 16, "val": 4, "test": 2}
    assert sorted(row for rows in found.values() for row in rows) == pairs(ready(images(beside)))


def test_shapes_hold_out_objects():
    data = ready(images("shapes:40"))
    assert not any("red triangle" in caption for caption in data.captions)
    assert any("red triangle" in caption for caption in data.captioned("test").captions)
    assert data.captioned("train").read(0).image.shape == (3, 16, 16)


def test_a_batch_without_a_disk(beside):
    batch = images(None).example_batch(3)
    real = next(iter(ready(images(beside)).train_dataloader()))
    assert batch.keys() == real.keys() == CaptionBatch.__annotations__.keys() - {"errors"}
    assert batch["images"].dtype == real["images"].dtype
    assert len(batch["captions"]) == len(batch["images"]) == 3


# ---- shapes of pictures


def test_crops_and_flips_are_the_samples_own(beside):
    data = ready(images(beside, crop_scale=(0.3, 0.9), horizontal_flip=0.5))
    examples = data.captioned("train")
    first, again, later = (examples.__getitems__([(epoch, 5)])["images"] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_buckets_are_no_larger_than_the_square_and_nearest_to_the_picture():
    sizes = bucket_sizes(512, 64, 2.0)
    assert (512, 512) in sizes
    assert all(h * w <= 512 * 512 and h % 64 == w % 64 == 0 and max(h, w) <= 2 * min(h, w) for h, w in sizes)
    assert all((w, h) in sizes for h, w in sizes)
    assert sizes[nearest_bucket((1000, 1000), sizes)] == (512, 512)
    height, width = sizes[nearest_bucket((600, 1000), sizes)]
    assert abs(height / width - 0.6) < 0.08


def test_each_batch_has_one_shape_and_evaluation_counts_each_picture_once(beside):
    data = ready(images(beside, aspect_buckets=True, bucket_step=4, batch_size=2, eval_batch_size=3, val_fraction=0.5))
    shapes = {tuple(batch["images"].shape[2:]) for batch in data.train_dataloader()}
    assert len(shapes) > 1
    assert all(height * width <= 16 * 16 for height, width in shapes)
    counted = []
    for batch in data.val_dataloader():
        assert batch["images"].shape[0] == len(batch["captions"]) == 3
        counted += [index for index in batch["indices"].tolist() if index != FILLER]
    assert sorted(counted) == list(range(11))


def batches_of(sampler, batch_size):
    places = list(sampler)
    return [places[start : start + batch_size] for start in range(0, len(places), batch_size)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_buckets_over_processes(processes):
    buckets = torch.tensor([0] * 13 + [1] * 7 + [2])
    samplers = [BucketSampler(buckets, 2, processes, rank, seed=3) for rank in range(processes)]
    ranks = [batches_of(sampler, 2) for sampler in samplers]
    assert all(len(sampler) == 2 * len(batches) for sampler, batches in zip(samplers, ranks, strict=True))
    seen = [index for batches in ranks for batch in batches for _, index in batch]
    assert len(set(seen)) == len(seen) == samples_in_batches(buckets, 2 * processes)
    for together in zip(*ranks, strict=True):
        assert len({int(buckets[index]) for batch in together for _, index in batch}) == 1
    shares = [batches_of(BucketEvaluationSampler(buckets, 2, processes, rank), 2) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    places = [place for share in shares for batch in share for place in batch]
    assert sorted(place for place in places if place < len(buckets)) == list(range(len(buckets)))


def test_a_resumed_epoch_goes_on_with_the_next_batch(beside):
    def loader(batch_size=2):
        return ready(images(beside, aspect_buckets=True, bucket_step=4, batch_size=batch_size)).train_dataloader()

    whole = [batch["indices"].tolist() for batch in loader()]
    broken = loader()
    taken = iter(broken)
    begun = [next(taken)["indices"].tolist() for _ in range(3)]
    resumed = loader()
    resumed.load_state_dict(broken.state_dict())
    assert begun + [batch["indices"].tolist() for batch in resumed] == whole
    # with another batch size what follows has one shape in each batch too
    larger = loader(3)
    larger.load_state_dict(broken.state_dict())
    assert all(batch["images"].shape[0] == 3 for batch in larger)


# ---- prompts


def test_prompts_from_a_file_a_list_or_the_held_out_captions(tmp_path, beside):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n two \n\n", encoding="utf-8")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "four"}\n', encoding="utf-8")
    for given, expected in [(str(file), ["one", "two"]), (["three"], ["three"]), (str(rows), ["four"])]:
        data = ready(images(None, predict_prompts=given, pictures_per_prompt=2), "predict")
        (batch,) = data.predict_dataloader()
        assert batch["prompts"] == [prompt for prompt in expected for _ in range(2)]
        assert batch["indices"].tolist() == list(range(2 * len(expected)))
    held_out = ready(images(beside, val_fraction=0.1), "predict")
    (batch,) = held_out.predict_dataloader()
    assert len(batch["prompts"]) == 2
    assert all(prompt.startswith("picture number") for prompt in batch["prompts"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gone.txt", "no such file 'gone.txt'; name a text file"),
        ("blank.txt", "blank.txt, line 2 is blank; write a prompt there or remove the line"),
        (["a dog", " "], "data.predict_prompts: prompt 2 is blank; write what its picture shows, or leave it out"),
        ([], "data.predict_prompts is empty; give at least one prompt"),
    ],
)
def test_no_prompts(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text("a dog\n\na cat\n", encoding="utf-8")
    with pytest.raises(InputError, match=words):
        ready(images(None, predict_prompts=given), "predict")


# ---- what is wrong


def test_json_lines_that_are_none(tmp_path):
    table = tmp_path / "table.jsonl"
    for content, words in {
        '{"file_name": "a.png", "text"}': "table.jsonl, line 1: .*; write one JSON object a line",
        '\n["a.png"]': "table.jsonl, line 2: .* is no JSON object",
        "\n": "table.jsonl holds no rows",
    }.items():
        table.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=words):
            ready(images(table))


def test_a_row_without_its_picture_and_one_without_a_caption(tmp_path):
    picture(tmp_path / "a.png")
    table = tmp_path / "table.csv"
    table.write_text("file_name,text\na.png,a\nb.png,b\n", encoding="utf-8")
    with pytest.raises(InputError, match="table.csv, line 3: a caption without its picture .*b.png; correct the path"):
        ready(images(table))
    table.write_text("file_name,text\na.png, \n", encoding="utf-8")
    with pytest.raises(InputError, match="table.csv, line 2: column 'text' is empty; fill it in or remove the row"):
        ready(images(table))
    with pytest.raises(InputError, match="no column 'caption'.*set data.caption_column to one it has"):
        ready(images(table, caption_column="caption"))


def test_a_broken_picture_ends_the_run_or_is_left_out(tmp_path):
    folder_of(tmp_path / "set", 4)
    (tmp_path / "set" / "002.png").write_bytes(b"no picture")
    examples = ready(images(tmp_path / "set")).captioned("train")
    with pytest.raises(InputError, match="002.png is no picture that Pillow knows"):
        examples.__getitems__([0, 2])
    lenient = ready(images(tmp_path / "set", on_error="skip", aspect_buckets=True, bucket_step=4)).captioned("train")
    batch = lenient.__getitems__([0, 2])
    assert batch["indices"].tolist() == [0, FILLER]
    assert batch["captions"][1] == ""
    assert "002.png" in batch["errors"][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": [16, 16, 16]}, "image_size is"),
        ({"image_size": [16, 32], "aspect_buckets": True}, "is the side of a square: set one number"),
        ({"image_size": 100, "aspect_buckets": True}, "no multiple of bucket_step 64; set it to 128"),
        ({"image_size": 64, "aspect_buckets": True, "max_aspect": 0.5}, "max_aspect is 0.5; set it to 1 or more"),
        ({"pictures_per_prompt": 0}, "pictures_per_prompt is 0; set it to 1 or more"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
    ],
)
def test_impossible_arguments(changes, words):
    with pytest.raises(InputError, match=words):
        images("shapes", **changes)


def test_shapes_are_square():
    with pytest.raises(InputError, match="shapes are drawn on squares; set one number"):
        ready(images("shapes", image_size=[16, 32]))


def test_check_reports_file_by_file(tmp_path, capsys):
    from lightning_bigmodels.__main__ import main

    folder_of(tmp_path / "set", 8)
    (tmp_path / "set" / "002.png").write_bytes(b"no picture")
    (tmp_path / "set" / "alone.txt").write_text("a caption", encoding="utf-8")
    (tmp_path / "set" / "003.txt").write_text(" ", encoding="utf-8")
    flags = ["--data", "CaptionedImages", "--data.source", str(tmp_path / "set"), "--data.val_fraction", "0"]
    assert main(["check", *flags]) != 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("002.png is no picture", "alone.txt: a caption without a picture", "003.txt, line 1"):
        assert words in said
