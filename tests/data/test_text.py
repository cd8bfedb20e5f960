"""The Text data module: batches of the declared shapes, exact evaluation, exact resume under a Trainer, prompts."""

from itertools import chain

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DistributedSampler

from lightning_bigmodels.data import DataModule, Text
from lightning_bigmodels.data.batches import IGNORED
from lightning_bigmodels.data.text import _check_fractions
from lightning_bigmodels.errors import InputError

# Lightning 2.6.6 on torch 2.14.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make(cache_dir):
    def text(**options):
        return Text(**{"cache_dir": cache_dir, "vocab_size": 512, "block_size": 32, "batch_size": 4, **options})

    return text


def opened(text, stage=None):
    text.prepare_data()
    text.setup(stage)
    return text


class Recorder(pl.LightningModule):
    """The smallest module that learns a little and remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shown = []

    def training_step(self, batch, index):
        self.shown.append(batch["input_ids"].tolist())
        return self.weight * batch["labels"].float().mean()

    def validation_step(self, batch, index):
        self.shown.append(batch["num_bytes"].sum().item())

    test_step = validation_step

    def predict_step(self, batch, index):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "enable_checkpointing": False, **options})


def test_the_defaults_without_a_trainer(tmp_path):
    text = opened(Text(cache_dir=str(tmp_path)))
    assert isinstance(text, DataModule)
    batch = next(iter(text.train_dataloader()))
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].shape == batch["labels"].shape == (16, 256)
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert text.num_train_batches == len(text.train_dataloader()) > 10
    assert len(text.tokenizer) <= 8192
    assert set(text.splits) == {"train", "val"}


def test_evaluation_counts_every_token_and_byte_of_the_text(make):
    for options in ({}, {"eval_stride": 10}, {"eval_batch_size": 7, "block_size": 100}):
        text = opened(make(test_fraction=0.05, **options))
        for part, loader in (("val", text.val_dataloader()), ("test", text.test_dataloader())):
            batches = list(loader)
            assert batches[0].keys() == {"input_ids", "labels", "num_bytes"}
            assert len(batches[0]["input_ids"]) == text.eval_batch_size
            size = sum(len(document.encode()) for document in text.text.documents(part))
            assert sum(int(batch["num_bytes"].sum()) for batch in batches) == size
            counted = torch.cat([batch["labels"].flatten() for batch in batches])
            assert (counted != IGNORED).sum() == text.splits[part] - 1


def test_the_example_batch_has_the_shape_of_a_real_one(make):
    text = make(cache_dir="/nowhere")
    example = text.example_batch(3)
    text = opened(make(eval_batch_size=3))
    real = next(iter(text.val_dataloader()))
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == {
        name: (t.shape, t.dtype) for name, t in real.items()
    }
    assert 0 <= example["input_ids"].min() <= example["labels"].max() < 512
    assert torch.equal(example["input_ids"][:, 1:], example["labels"][:, :-1])
    assert example["input_ids"].is_contiguous()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_workers_give_the_same_batches(make):
    alone, helped = (opened(make(num_workers=number)).train_dataloader() for number in (0, 2))
    for epoch in range(2):  # persistent workers see the new order and shift
        for loader in (alone, helped):
            loader.sampler.set_epoch(epoch)
        for one, two in zip(alone, helped, strict=True):
            assert torch.equal(one["input_ids"], two["input_ids"])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("place", ["mid-epoch", "last batch", "second epoch"])
def test_a_trainer_resumes_with_the_next_batch(make, tmp_path, place):
    def few():
        return make(batch_size=4, block_size=1200, val_fraction=0.0)

    batches = opened(few()).num_train_batches
    steps = {"mid-epoch": 5, "last batch": batches, "second epoch": batches + 7}[place]

    def fit(max_steps, **options):
        module = Recorder()
        saver = ModelCheckpoint(
            tmp_path, every_n_train_steps=steps, save_top_k=-1, filename="{step}", enable_version_counter=False
        )
        trainer(max_steps=max_steps, callbacks=[saver], enable_checkpointing=True).fit(module, few(), **options)
        return module

    whole = fit(2 * batches + 9)
    first = fit(steps + 2)
    second = fit(2 * batches + 9, ckpt_path=str(tmp_path / f"step={steps}.ckpt"))
    assert first.shown[:steps] + second.shown == whole.shown
    assert torch.equal(second.weight, whole.weight)
    assert whole.shown[0] not in whole.shown[batches:]  # the second epoch's rows are others


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_limited_epoch_is_resumed_too(make, tmp_path):
    def fit(max_epochs, **options):
        module = Recorder()
        saver = ModelCheckpoint(
            tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}", enable_version_counter=False
        )
        limits = {"max_epochs": max_epochs, "limit_train_batches": 5}
        trainer(**limits, callbacks=[saver], enable_checkpointing=True).fit(module, make(val_fraction=0.0), **options)
        return module

    whole, first = fit(3), fit(1)
    second = fit(3, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert first.shown + second.shown == whole.shown


def test_verbs_of_a_trainer(make):
    text = make(test_fraction=0.05)
    module = Recorder()
    trainer().validate(module, text)
    assert sum(module.shown) == sum(len(document.encode()) for document in text.text.documents("val"))
    module = Recorder()
    trainer().test(module, text)
    assert sum(module.shown) == sum(len(document.encode()) for document in text.text.documents("test"))
    module = Recorder()
    trainer(max_steps=3, limit_val_batches=1).fit(module, text)
    # Lightning's samplers are not put in the place of ours.
    assert isinstance(text.train_dataloader().sampler, DistributedSampler)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches(make):
    module = Recorder()
    trainer(max_epochs=2, overfit_batches=2, num_sanity_val_steps=0, check_val_every_n_epoch=2).fit(module, make())
    assert len(module.shown) == 2 + 2 + 2
    assert module.shown[:2] == module.shown[2:4]


def test_without_a_validation_part(make):
    text = make(val_fraction=0.0)
    trainer(max_steps=2).fit(Recorder(), text)
    assert text.val_dataloader() == []
    with pytest.raises(InputError, match=r"python-docs has no val part; set val_fraction above 0, or val_sources"):
        trainer().validate(Recorder(), text)
    with pytest.raises(InputError, match=r"python-docs has no test part; set test_fraction above 0, or test_sources"):
        trainer().test(Recorder(), text)
    with pytest.raises(InputError, match=r"has no test part"):
        text.test_dataloader()
    with pytest.raises(InputError, match=r"no validation text to take prompts from; set `prompts`"):
        text.predict_dataloader()


class Process(Text):
    """One of several processes, without starting any."""

    process = (1, 0)

    def shard(self):
        return self.process


def test_processes_share_every_loader(make, cache_dir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {number}" for number in range(7)))
    parts = []
    for rank in range(2):
        options = {"cache_dir": cache_dir, "vocab_size": 512, "block_size": 32, "batch_size": 4}
        text = Process(prompts=str(prompts), **options)
        text.process = (2, rank)
        parts.append(opened(text))
    alone = opened(make(batch_size=8))
    assert parts[0].num_train_batches == parts[1].num_train_batches == alone.num_train_batches
    rows = next(iter(alone.train_dataloader()))["input_ids"]
    assert torch.equal(rows[0::2], next(iter(parts[0].train_dataloader()))["input_ids"])
    assert torch.equal(rows[1::2], next(iter(parts[1].train_dataloader()))["input_ids"])
    assert len(parts[0].val_dataloader()) == len(parts[1].val_dataloader())
    total = [sum(int(batch["num_bytes"].sum()) for batch in part.val_dataloader()) for part in parts]
    assert sum(total) == sum(int(batch["num_bytes"].sum()) for batch in alone.val_dataloader())
    predicted = [
        [*zip(b["indices"].tolist(), b["prompts"], strict=True)] for p in parts for b in p.predict_dataloader()
    ]
    assert sorted(chain.from_iterable(predicted)) == [(number, f"prompt {number}") for number in range(7)]


def test_prompts_need_neither_text_nor_tokenizer(make, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One\nTwo\nThree\n")
    text = make(sources="/nowhere", tokenizer="/nowhere", prompts=str(prompts), eval_batch_size=2)
    batches = trainer().predict(Recorder(), text)
    assert [batch["prompts"] for batch in batches] == [["One", "Two"], ["Three"]]
    assert [batch["indices"].tolist() for batch in batches] == [[0, 1], [2]]
    assert text.tokenizer is None


def test_prompts_from_the_validation_text(make):
    text = make(num_prompts=5)
    (batch,) = trainer().predict(Recorder(), make(num_prompts=5, eval_batch_size=8))
    validation = "".join(opened(text).text.documents("val"))
    assert len(batch["prompts"]) == 5
    assert validation.startswith(batch["prompts"][0])
    for prompt in batch["prompts"]:
        assert prompt in validation
        assert 1 <= len(prompt) <= 64


def test_text_that_is_too_short_is_refused(make, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("A few words are not enough for a row of this size.")
    with pytest.raises(
        InputError, match=r"short\.txt has \d+ tokens, fewer than one block of 500 .*; set a smaller block"
    ):
        opened(make(sources=str(file), block_size=500))
    text = opened(make(sources=str(file), block_size=8, batch_size=50))
    with pytest.raises(
        InputError, match=r"do not fill one batch of 50 on each of 1 processes; set a smaller batch_size"
    ):
        text.train_dataloader()
    short = opened(make(sources=str(file), block_size=20, batch_size=1))
    assert sum(int(batch["num_bytes"].sum()) for batch in short.val_dataloader()) == 5
    with pytest.raises(InputError, match=r"not open yet; call prepare_data\(\) and setup\(\)"):
        make().train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction is 1\.0; set it to 0 or more and below 1"),
        ({"test_fraction": -0.1}, r"test_fraction is -0\.1; set it to 0 or more"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"leave no training text; let their sum be below 1"),
        ({"batch_size": 0}, r"batch_size is 0; set it to 1 or more"),
        ({"eval_batch_size": 0}, r"eval_batch_size is 0; set it to 1 or more"),
        ({"block_size": 0}, r"block_size is 0; set it to 1 or more"),
        ({"eval_stride": 0}, r"eval_stride is 0; set it to 1 or more"),
        ({"eval_stride": 33}, r"eval_stride is 33; set it to at most block_size \(32\)"),
        ({"vocab_size": 256}, r"vocab_size is 256; set it to 257 or more"),
        ({"num_prompts": 0}, r"num_prompts is 0; set it to 1 or more"),
        ({"num_workers": -1}, r"num_workers is -1; set it to 0 or more"),
        ({"seed": -1}, r"seed is -1; set it to 0 or more"),
        ({"encoding": "utf-9"}, r"encoding 'utf-9' is unknown; set one that Python has"),
        ({"sources": []}, r"sources is empty; name at least one source"),
        ({"val_sources": []}, r"val_sources is empty; name at least one source"),
    ],
)
def test_impossible_arguments_are_refused(make, options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


def test_a_fraction_does_not_matter_beside_sources_of_its_own(make):
    make(val_sources="a.txt", val_fraction=2.0)
    _check_fractions(0.4, 0.5)
