"""Photos for super-resolution: parts, crops, whole photos, pictures to enlarge, and what is wrong with them."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_bigmodels.data import SuperResolutionImages
from lightning_bigmodels.data.batches import FILLER
from lightning_bigmodels.data.vision.degradation import reduce_bicubic
from lightning_bigmodels.errors import InputError


def write(path, height, width, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        write(folder / f"photo{number}.png", 40 + 3 * number, 65 - 2 * number, number)
    return folder


def images(source, **changes):
    values = {"crop_size": 8, "crops_per_photo": 3, "batch_size": 4, "val_fraction": 0.34}
    return SuperResolutionImages(str(source), **{**values, **changes})


def ready(data, stage="fit"):
    data.prepare_data()
    data.setup(stage)
    return data


def file_names(part):
    return [path.name for path in part.files]


def test_parts_by_fraction_by_name_and_by_folder(photos, tmp_path):
    data = ready(images(photos, test_fraction=0.17))
    assert {name: len(part.files) for name, part in data.parts.items()} == {"train": 3, "val": 2, "test": 1}
    names = [name for part in data.parts.values() for name in file_names(part)]
    assert sorted(names) == sorted(path.name for path in photos.iterdir())
    again = ready(images(photos, test_fraction=0.17))
    assert file_names(again.parts["val"]) == file_names(data.parts["val"])
    others = [file_names(ready(images(photos, split_seed=seed)).parts["val"]) for seed in range(6)]
    assert len({tuple(names) for names in others}) > 1
    named = ready(images(photos, val_photos=["photo4", "photo1.png"], test_photos=["photo0"]))
    assert file_names(named.parts["val"]) == ["photo1.png", "photo4.png"]
    assert file_names(named.parts["test"]) == ["photo0.png"]
    assert file_names(named.parts["train"]) == ["photo2.png", "photo3.png", "photo5.png"]
    write(tmp_path / "held" / "out.png", 50, 50)
    held_out = ready(images(photos, val_source=str(tmp_path / "held")))
    assert file_names(held_out.parts["val"]) == ["out.png"]
    assert len(held_out.parts["train"].files) == 6
    assert "val" not in ready(images(photos, val_fraction=0.0)).parts


def test_an_epoch_is_several_crops_of_each_photo(photos):
    data = ready(images(photos, scale=3, batch_size=4))
    assert data.num_train_samples == 4 * 3
    batches = list(data.train_dataloader())
    assert len(batches) == data.num_train_batches == 3
    for batch in batches:
        assert batch["images"].shape == (4, 3, 8, 8)
        assert batch["targets"].shape == (4, 3, 24, 24)
        assert batch["images"].dtype == batch["targets"].dtype == torch.uint8
    indices = torch.cat([batch["indices"] for batch in batches])
    assert sorted(indices.tolist()) == list(range(12))


@pytest.mark.parametrize("flips", [True, False])
def test_a_crop_lies_in_its_photo_and_its_small_picture_was_made_from_it(photos, flips):
    part = ready(images(photos, flips=flips)).parts["train"]
    ways = set()
    for epoch in range(12):
        batch = part[(epoch, 4)]
        photo = part.read(4).large
        large, small = batch["targets"][0], batch["images"][0]
        # the crop's inside, from itself alone
        assert (reduce_bicubic(large, 2)[:, 2:-2, 2:-2].int() - small[:, 2:-2, 2:-2].int()).abs().max() <= 1
        for way in range(8):
            back = torch.rot90(large.flip(2) if way >= 4 else large, way % 4, (1, 2))
            windows = photo.unfold(1, 16, 1).unfold(2, 16, 1)
            if (windows == back[:, None, None]).all(-1).all(-1).all(0).any():
                ways.add(way)
    assert len(ways) > 3 if flips else ways == {0}


def test_crops_change_from_epoch_to_epoch_and_belong_to_seed_epoch_and_index(photos):
    part = ready(images(photos)).parts["train"]
    again = ready(images(photos)).parts["train"]
    other = ready(images(photos, seed=1)).parts["train"]
    first, second = part[(0, 2)], part[(1, 2)]
    assert not torch.equal(first["targets"], second["targets"])
    assert torch.equal(again[(1, 2)]["targets"], second["targets"])
    assert not torch.equal(other[(0, 2)]["targets"], first["targets"])
    assert not torch.equal(part[(0, 1)]["targets"], first["targets"])


def test_whole_photos_are_cut_to_a_multiple_of_the_scale(photos):
    data = ready(images(photos, scale=4, eval_batch_size=2, val_photos=["photo0", "photo1", "photo2"]))
    batches = list(data.val_dataloader())
    assert [len(batch["images"]) for batch in batches] == [2, 1]
    shapes = [tuple(large.shape[1:]) for batch in batches for large in batch["targets"]]
    assert shapes == [(40, 64), (40, 60), (44, 60)]
    for batch in batches:
        for small, large in zip(batch["images"], batch["targets"], strict=True):
            assert torch.equal(small, reduce_bicubic(large, 4))


def test_what_a_realistic_validation_draws_is_the_same_every_time(photos):
    def pictures(**changes):
        data = ready(images(photos, degradation="realistic", **changes))
        return [batch["images"][0] for batch in data.val_dataloader()]

    first = pictures()
    assert all(torch.equal(one, two) for one, two in zip(first, pictures(), strict=True))
    assert not torch.equal(first[0], pictures(seed=5)[0])
    batch = ready(images(photos, degradation="realistic")).parts["train"][(0, 0)]
    assert batch["images"].shape == (1, 3, 8, 8)


def test_the_cache_is_bounded_and_changes_nothing(photos):
    part, without = (ready(images(photos, cache_mib=size)).parts["train"] for size in (1, 0))
    for index in range(len(part)):
        assert torch.equal(part[(0, index)]["images"], without[(0, index)]["images"])
    assert len(part._cache) == 4
    assert len(without._cache) == 1


def test_predict_takes_pictures_of_any_size_and_mode(tmp_path):
    write(tmp_path / "a.png", 1, 1)
    write(tmp_path / "gray.png", 9, 7, mode="L")
    write(tmp_path / "deep" / "alpha.png", 20, 30, mode="RGBA")
    data = SuperResolutionImages(predict_source=str(tmp_path), eval_batch_size=2)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    shapes = {
        file: tuple(image.shape)
        for batch in batches
        for file, image in zip(batch["files"], batch["images"], strict=True)
    }
    assert shapes == {
        str(tmp_path / "a.png"): (3, 1, 1),
        str(tmp_path / "deep" / "alpha.png"): (3, 20, 30),
        str(tmp_path / "gray.png"): (3, 9, 7),
    }
    one = SuperResolutionImages(predict_source=str(tmp_path / "gray.png"))
    one.setup("predict")
    assert len(one.parts["predict"]) == 1


def test_transparent_pixels_are_laid_on_white_and_gray_ones_coloured(tmp_path):
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (40, 40), 7).save(tmp_path / "gray.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "other.png")
    data = ready(images(tmp_path, val_photos=["clear", "gray"]))
    first, second = (batch["images"][0] for batch in data.val_dataloader())
    assert (first == 255).all()
    assert (second == 7).all()


def test_without_a_folder_predict_enlarges_what_was_held_out(photos):
    data = ready(images(photos, val_photos=["photo3"]), "predict")
    (batch,) = data.predict_dataloader()
    assert batch["files"] == [str(photos / "photo3.png")]
    with pytest.raises(InputError, match="nothing to enlarge; set data.predict_source"):
        ready(images(photos, val_fraction=0.0), "predict")


def test_scikit_images_photos_need_no_download():
    data = ready(SuperResolutionImages("skimage-photos", val_photos=["coffee"], crops_per_photo=1, batch_size=8))
    assert len(data.parts["train"].files) == 8
    (batch,) = data.val_dataloader()
    assert batch["targets"][0].shape == (3, 400, 600)
    assert next(iter(data.train_dataloader()))["targets"].shape == (8, 3, 96, 96)


def test_an_example_batch_is_like_a_real_one_without_a_disk(photos):
    example = SuperResolutionImages("nowhere", scale=4, crop_size=8).example_batch(3)
    real = next(iter(ready(images(photos, batch_size=3, scale=4)).train_dataloader()))
    assert {key: (value.shape, value.dtype) for key, value in example.items()} == {
        key: (value.shape, value.dtype) for key, value in real.items()
    }


def test_a_broken_photo_ends_the_run_or_is_left_out(photos, tmp_path):
    for name in ("photo0", "photo1", "photo2"):
        (tmp_path / f"{name}.png").write_bytes((photos / f"{name}.png").read_bytes())
    (tmp_path / "photo1.png").write_bytes((photos / "photo1.png").read_bytes()[:300])
    (tmp_path / "photo2.png").write_text("no picture")
    with pytest.raises(InputError, match="photo1.png is damaged or cut off"):
        list(ready(images(tmp_path, val_photos=["photo1"])).val_dataloader())
    data = ready(images(tmp_path, val_photos=["photo1"], on_error="skip", batch_size=6))
    (batch,) = data.val_dataloader()
    assert batch["indices"].tolist() == [FILLER]
    assert "photo1.png" in batch["errors"][0]
    (batch,) = data.train_dataloader()
    assert sorted(batch["indices"].tolist()) == [FILLER] * 3 + [0, 1, 2]
    assert batch["images"].shape == (6, 3, 8, 8)


def test_photos_that_are_too_small_are_named(photos, tmp_path):
    write(tmp_path / "small.png", 15, 30)
    write(tmp_path / "large.png", 60, 60)
    data = ready(images(tmp_path, val_photos=["large"]))
    with pytest.raises(
        InputError, match=r"small.png is 30 x 15 pixels, smaller than a crop of 16 .*lower data.crop_size"
    ):
        data.parts["train"][(0, 0)]
    data = ready(images(tmp_path, val_photos=["small"]))
    with pytest.raises(InputError, match=r"small.png is 30 x 15 pixels, and a photo that is measured needs 17"):
        list(data.val_dataloader())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 5}, "scale is 5; set it to 2, 3, 4 or 8"),
        ({"degradation": "blurry"}, "degradation is 'blurry'; set it to bicubic or realistic"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0; set it to 0 or more, and below 1"),
        ({"crop_size": 0}, "crop_size is 0; set it to 1 or more"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
    ],
)
def test_wrong_arguments_are_refused(photos, changes, message):
    with pytest.raises(InputError, match=message):
        images(photos, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"val_photos": ["foto2.png"]},
            "val_photos names 'foto2.png', and no photo has that name; did you mean 'photo2",
        ),
        ({"val_fraction": 0.01}, "val_fraction 0.01 of 6 photos is none; change it, or name the photos"),
        ({"val_fraction": 0.99}, "val_fraction 0.99 of 6 photos is 6; change it"),
        ({"val_photos": [f"photo{n}" for n in range(6)]}, "none is left to train on; hold out fewer"),
        ({"source": None}, "data.source is not set; name a folder of photos, or skimage-photos"),
        ({"source": "gone"}, "gone: no such folder"),
    ],
)
def test_sources_that_do_not_fit_are_refused(photos, changes, message):
    values = {"source": photos, **changes}
    data = images(**values) if values["source"] is not None else SuperResolutionImages()
    with pytest.raises(InputError, match=message):
        ready(data)


def test_a_name_of_two_photos_is_refused(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder / "same.png", 40, 40)
    with pytest.raises(InputError, match=r"val_photos names 'same', as .*a.same.png and .*b.same.png both are"):
        ready(images(tmp_path, val_photos=["same"]))


def test_a_missing_part_says_how_to_give_it(photos):
    with pytest.raises(InputError, match=r"has no test part; name its photos in data.test_photos"):
        ready(images(photos), "test").test_dataloader()
