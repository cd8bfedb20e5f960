"""Grids of generated pictures, by class and by prompt, and the animation of them."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from PIL import Image, ImageSequence
from torchvision.transforms.v2.functional import pil_to_tensor

from lightning_bigmodels.callbacks import SampleQuality, Samples, WeightAverage
from lightning_bigmodels.callbacks.animation import animate
from lightning_bigmodels.callbacks.report import write_picture
from lightning_bigmodels.callbacks.validation_pictures import grid
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.pictures import captioned, wrapped
from lightning_bigmodels.tasks.sample_noise import SampleNoise
from tests.painters import Painter, pictures, write_pictures
from tests.workers import fit_on


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set.npz")


class Illustrator(Painter):
    """Paints as many red rows as the prompt has letters."""

    def generate_pictures_of(self, prompts, noise):
        made = self.generate_pictures(noise)
        for picture, prompt in zip(made, prompts, strict=True):
            picture[0, : len(prompt)] = 255
        return made


def read(path):
    return pil_to_tensor(Image.open(path))


def frames(path):
    with Image.open(path) as animation:
        return [pil_to_tensor(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]


def files(folder):
    return sorted(path.name for path in (folder / "samples").iterdir())


def fit(trainer, file, model, samples, max_steps=4, **options):
    ckpt_path = options.pop("ckpt_path", None)
    callbacks = [samples, *options.pop("callbacks", [])]
    run = trainer(max_steps=max_steps, val_check_interval=2, limit_val_batches=2, callbacks=callbacks, **options)
    run.fit(model, pictures(file), ckpt_path=ckpt_path)
    return run


def made_by(model, indices):
    """Return the pictures of these numbers, enlarged, as a grid shows them."""
    model.eval()
    with torch.no_grad():
        made = model.generate_pictures(SampleNoise(indices, seed=0), model.labels_in_turn(indices))
    return made.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_the_same_pictures_are_shown_before_training_and_after_each_validation(trainer, file, tmp_path):
    torch.manual_seed(0)
    model = Painter()
    model.configure_model()
    before = made_by(model, torch.arange(20))
    model.train()
    fit(trainer, file, model, Samples(num_pictures=20))
    assert files(tmp_path) == ["samples.gif", *(f"step_{step:08d}.png" for step in (0, 2, 4))]
    assert model.training
    shown = [read(tmp_path / "samples" / f"step_{step:08d}.png") for step in (0, 4)]
    assert torch.equal(shown[0], grid(list(before), columns=8))
    assert torch.equal(shown[1], grid(list(made_by(model, torch.arange(20))), columns=8))
    assert not torch.equal(shown[0], shown[1])


def test_each_row_is_a_class_where_there_are_classes(trainer, file, tmp_path):
    model = Painter(num_classes=2)
    fit(trainer, file, model, Samples(num_pictures=7))
    rows = torch.tensor([0, 2, 4, 1, 3, 5])
    shown = read(tmp_path / "samples" / "step_00000004.png")
    assert torch.equal(shown, grid(list(made_by(model, rows)), columns=3))


def test_pictures_of_prompts_stand_above_them(trainer, file, tmp_path):
    torch.manual_seed(0)
    prompts = ["a", "seven letters and more of them than fit into a line"]
    fit(trainer, file, Illustrator(), Samples(prompts))
    shown = read(tmp_path / "samples" / "step_00000004.png")
    enlarged = 120
    assert shown.shape[2] == 2 * (enlarged + 2) + 2
    assert shown.shape[1] > enlarged + 3 * 14
    red = (shown[0] == 255) & (shown[1] < 250)
    assert red[2:12, 2 : 2 + enlarged].all()
    assert red[2 : 2 + enlarged, enlarged + 4 : -2].all()
    assert (shown[:, enlarged + 2 :] < 100).all(0).any(), "letters are dark"


def test_captions_are_cut_into_lines():
    picture = torch.zeros(3, 120, 120)
    assert wrapped("", picture) == [""]
    assert wrapped("a red circle left of a blue square", picture) == ["a red circle left of", "a blue square"]
    lines = wrapped("word " * 50, picture, most=2)
    assert len(lines) == 2
    assert lines[-1].endswith("..")
    assert captioned(picture, lines).shape == (3, 120 + 2 * 14, 120)


def test_the_animation_has_a_frame_of_each_grid_also_after_a_resume(trainer, file, tmp_path):
    folder = tmp_path / "samples"
    fit(trainer, file, Painter(), Samples(num_pictures=4)).save_checkpoint(tmp_path / "kept.ckpt")
    assert len(frames(folder / "samples.gif")) == 3
    # a picture of a run that went on from the checkpoint and was killed belongs to no step of this one
    write_picture(folder / "step_00000005.png", torch.zeros(3, 5, 5, dtype=torch.uint8))
    fit(trainer, file, Painter(), Samples(num_pictures=4), max_steps=9, ckpt_path=tmp_path / "kept.ckpt")
    found = frames(folder / "samples.gif")
    shown = [read(folder / f"step_{step:08d}.png") for step in (0, 2, 4, 7, 9)]
    for frame, picture in zip(found, shown, strict=True):
        height, width = frame.shape[1] - 14, frame.shape[2]
        factor = width // picture.shape[2]
        enlarged = picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        # 256 colours
        assert (frame[:, :height].float() - enlarged.float()).abs().mean() < 12


def test_equal_pictures_are_frames_of_their_own_and_of_many_some_are_left_out(tmp_path):
    steps = list(range(0, 240, 2))
    for step in steps:
        size = 20 if step else 30  # of another run
        write_picture(tmp_path / f"step_{step:08d}.png", torch.full((3, size, size), step, dtype=torch.uint8))
    animate(tmp_path / "few.gif", tmp_path, [0, 2, 4, 999])
    assert len(frames(tmp_path / "few.gif")) == 3
    animate(tmp_path / "many.gif", tmp_path, steps)
    many = frames(tmp_path / "many.gif")
    assert len(many) == 100
    assert (many[-1][:, 1, 1] == 238).all()
    animate(tmp_path / "none.gif", tmp_path, [1])
    assert not (tmp_path / "none.gif").exists()
    assert not list(tmp_path.glob(".*"))


def test_grids_are_made_of_the_average_where_there_is_one(trainer, file, tmp_path):
    model = Painter()
    # an average that stays at the first weights
    average = WeightAverage(decay=0.9999999)
    fit(trainer, file, model, Samples(num_pictures=4), callbacks=[average])
    first, last = (read(tmp_path / "samples" / f"step_{step:08d}.png").int() for step in (0, 4))
    assert (first - last).abs().max() <= 1


def test_training_goes_on_as_if_there_were_none(trainer, file):
    def weights(callbacks):
        torch.manual_seed(0)
        model = Painter()
        trainer(max_steps=4, val_check_interval=2, callbacks=callbacks).fit(model, pictures(file))
        return torch.cat([parameter.flatten() for parameter in model.parameters()]), torch.get_rng_state()

    for found, plain in zip(weights([Samples()]), weights([]), strict=True):
        assert torch.equal(found, plain)


def test_loggers_get_the_grids(trainer, file, tmp_path):
    board = TensorBoardLogger(tmp_path, name="board")
    fit(trainer, file, Painter(), Samples(num_pictures=4), logger=board)
    board.finalize("success")
    (events,) = (tmp_path / "board").rglob("events*")
    assert events.read_bytes().count(b"samples") == 3


@pytest.mark.parametrize(("processes", "strategy"), [(2, "ddp"), (2, "fsdp2")])
def test_processes_make_the_grid_of_one_together(processes, strategy, file, tmp_path):
    def run(processes, strategy, folder):
        fit_on(
            processes,
            strategy,
            Painter,
            lambda: pictures(file, batch_size=4 // processes),
            limit_val_batches=1,
            max_steps=1,
            val_check_interval=1,
            callbacks=[Samples(num_pictures=4)],
            default_root_dir=folder,
        )
        return read(folder / "samples" / "step_00000001.png").int()

    together, alone = run(processes, strategy, tmp_path / strategy), run(1, "auto", tmp_path / "alone")
    assert (together - alone).abs().max() <= 1  # a pixel on the edge of rounding


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(InputError, match="num_pictures is 0; it must be 1 or more"):
        Samples(num_pictures=0)
    run = SimpleNamespace(strategy=FSDPStrategy())
    for callback in (Samples(), SampleQuality()):
        with pytest.raises(InputError, match="cannot make pictures under the strategy fsdp, .* use fsdp2"):
            callback.setup(run, Painter(), "fit")
