import csv
import math
import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional.classification import binary_fairness

from lightning_bigmodels.__main__ import main
from lightning_bigmodels.callbacks import Fairness
from lightning_bigmodels.callbacks.fairness import worst_ratio
from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.data.loading import EvaluationSampler, identity
from lightning_bigmodels.errors import InputError
from tests.toys import ToyData, ToyModel
from tests.workers import run_on

# group, label, predicted: by hand
#   a: 10 examples, 4 positive, 3 of them found, 1 false alarm: rates 0.4, 0.75, 1/6; 8 right
#   b: 5 examples, 2 positive, 1 found, 0 false alarms: rates 0.2, 0.5, 0; 4 right
A = [(0, 1, 1)] * 3 + [(0, 1, 0)] + [(0, 0, 1)] + [(0, 0, 0)] * 5
B = [(1, 1, 1)] + [(1, 1, 0)] + [(1, 0, 0)] * 3
RATES = {
    "demographic_parity": 0.2 / 0.4,
    "equal_opportunity": 0.5 / 0.75,
    "accuracy_a": 0.8,
    "accuracy_b": 0.8,
    "positive_rate_a": 0.4,
    "positive_rate_b": 0.2,
    "true_positive_rate_a": 0.75,
    "true_positive_rate_b": 0.5,
    "false_positive_rate_a": 1 / 6,
    "false_positive_rate_b": 0.0,
}


class Rows(Dataset):
    """Examples (group, label, predicted) as batches; what a process lacks counts for nothing, however it looks."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, indices):
        rows = [self.rows[index] if index < len(self) else (0, self.rows[0][1], 1) for index in indices]
        groups, labels, predicted = (torch.tensor(values) for values in zip(*rows, strict=True))
        places = torch.tensor([index if index < len(self) else FILLER for index in indices])
        return {"groups": groups, "labels": labels, "predicted": predicted, "indices": places}


class Data(LightningDataModule):
    def __init__(self, rows, groups=("a", "b"), batch_size=4):
        super().__init__()
        self.rows, self.group_names, self.batch_size = rows, groups and list(groups), batch_size

    def _loader(self):
        shard = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = EvaluationSampler(Rows(self.rows), shard["num_replicas"], shard["rank"])
        return DataLoader(Rows(self.rows), batch_size=self.batch_size, sampler=sampler, collate_fn=identity)

    train_dataloader = val_dataloader = test_dataloader = _loader


class Says(LightningModule):
    """Says what the data let it say."""

    def __init__(self, num_classes=2, class_names=None):
        super().__init__()
        self.num_classes, self.class_names = num_classes, class_names
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def _step(self, batch, batch_idx):
        predicted = batch["predicted"]
        if predicted.ndim == 1:
            predicted = torch.nn.functional.one_hot(predicted, self.num_classes)
        return {"probabilities": 0.2 + 0.6 * predicted.float()}

    validation_step = test_step = _step

    def training_step(self, batch, batch_idx):
        return self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def judge(trainer, rows, groups=("a", "b"), model=None, **arguments):
    run = trainer(callbacks=[Fairness(**{"min_examples": 0, **arguments})], limit_val_batches=1.0)
    run.validate(model or Says(), Data(rows, groups), verbose=False)
    return {name.removeprefix("val_"): value.item() for name, value in run.callback_metrics.items()}


def table(folder, name="val_step_00000000.csv"):
    with (folder / "fairness" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- formulas


def test_rates_and_ratios_are_those_worked_by_hand(trainer, tmp_path):
    assert judge(trainer, A + B) == pytest.approx(RATES, abs=1e-6)
    assert table(tmp_path) == [
        {
            "group": group, "class": "1", "examples": examples, "positives": positives, "accuracy": accuracy,
            "positive_rate": rate, "true_positive_rate": true, "false_positive_rate": false,
        }
        for group, examples, positives, accuracy, rate, true, false in [
            ("a", "10", "4", "0.8000", "0.4000", "0.7500", "0.1667"),
            ("b", "5", "2", "0.8000", "0.2000", "0.5000", "0.0000"),
            ("lowest / highest", "15", "6", "1.0000", "0.5000", "0.6667", "0.0000"),
        ]
    ]  # fmt: skip


def test_ratios_are_torchmetrics_own_where_every_group_has_positives(trainer):
    torch.manual_seed(0)
    rows = torch.stack([torch.randint(3, (300,)), torch.randint(2, (300,)), torch.randint(2, (300,))], 1)
    groups, labels, predicted = rows.unbind(1)
    expected = {name[:2]: float(value) for name, value in binary_fairness(predicted, labels, groups).items()}
    found = judge(trainer, [tuple(row) for row in rows.tolist()], groups=("x", "y", "z"))
    assert found["demographic_parity"] == pytest.approx(expected["DP"], abs=1e-6)
    assert found["equal_opportunity"] == pytest.approx(expected["EO"], abs=1e-6)


def test_the_other_class_is_judged_on_demand(trainer):
    found = judge(trainer, A + B, model=Says(class_names=["no", "yes"]), positive_class="no")
    # of "no": a says it of 6 of 10, b of 4 of 5; a finds 5 of 6, b 3 of 3
    assert found["demographic_parity"] == pytest.approx(0.6 / 0.8, abs=1e-6)
    assert found["equal_opportunity"] == pytest.approx((5 / 6) / 1, abs=1e-6)


def test_of_several_classes_the_worst_is_logged_and_all_are_in_the_table(trainer, tmp_path):
    # class 0: a 2 of 4, b 2 of 4; class 1: a 1 of 4, b 2 of 4; class 2: a 1 of 4, b never
    a = [(0, 0, 0), (0, 0, 0), (0, 1, 1), (0, 2, 2)]
    b = [(1, 0, 0), (1, 0, 0), (1, 1, 1), (1, 2, 1)]
    found = judge(trainer, a + b, model=Says(3))
    assert found == {"demographic_parity": 0.0, "equal_opportunity": 0.0, "accuracy_a": 1.0, "accuracy_b": 0.75}
    ratios = {row["class"]: row["positive_rate"] for row in table(tmp_path) if row["group"] == "lowest / highest"}
    assert ratios == {"0": "1.0000", "1": "0.5000", "2": "0.0000"}


def test_several_labels_have_a_decision_each(trainer, tmp_path):
    a = [(0, [1.0, 0.0], [1, 0]), (0, [1.0, 1.0], [1, 1])]
    b = [(1, [1.0, 0.0], [1, 1]), (1, [0.0, 1.0], [0, 1]), (1, [IGNORED] * 2, [1, 1])]
    found = judge(trainer, a + b)
    # first label: said of 2 of 2 and of 1 of 2; second: of 1 of 2 and of 2 of 2; each one found that is there
    expected = {"demographic_parity": 0.5, "equal_opportunity": 1.0, "accuracy_a": 1.0, "accuracy_b": 0.75}
    assert found == expected
    assert [row["examples"] for row in table(tmp_path)] == ["2", "2", "4"] * 2


def test_worst_ratio_leaves_out_what_has_no_rate():
    rates = torch.tensor([[0.2, math.nan, 0.0, math.nan], [0.8, 0.5, 0.0, math.nan], [math.nan, 0.25, 0.0, 0.5]])
    ratios = worst_ratio(rates)
    assert ratios[:2].tolist() == pytest.approx([0.25, 0.5])
    assert ratios[2:].isnan().all()  # 0 of 0, and one group alone


# ---- what counts


def test_what_has_no_label_or_no_group_is_left_out(trainer):
    rows = [*A, *B, (0, IGNORED, 1), (IGNORED, 1, 1)]
    assert judge(trainer, rows) == pytest.approx(RATES, abs=1e-6)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_exactly_the_numbers_of_one(trainer, tmp_path, processes):
    expected = judge(trainer, A + B)

    def found():
        run = trainer(
            callbacks=[Fairness(min_examples=0)], limit_val_batches=1.0, strategy="ddp", devices=processes,
            default_root_dir=tmp_path / "several",
        )  # fmt: skip
        run.validate(Says(), Data(A + B), verbose=False)
        return {name.removeprefix("val_"): value.item() for name, value in run.callback_metrics.items()}

    assert run_on(processes, found) == [expected] * processes
    assert table(tmp_path / "several") == table(tmp_path)


def test_each_validation_counts_anew_and_the_sanity_check_not_at_all(trainer, tmp_path):
    run = trainer(
        max_steps=2, val_check_interval=1, limit_val_batches=1.0, num_sanity_val_steps=1,
        callbacks=[Fairness(min_examples=0)],
        logger=CSVLogger(tmp_path, "csv", version=0, flush_logs_every_n_steps=1),
    )  # fmt: skip
    run.fit(Says(), Data(A + B))
    folder = tmp_path / "csv/version_0"
    names = sorted(path.name for path in (folder / "fairness").iterdir())
    assert names == ["val_step_00000001.csv", "val_step_00000002.csv"]
    assert table(folder, names[1]) == table(folder, names[0])
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val_demographic_parity"]]
    assert [float(row["val_demographic_parity"]) for row in rows] == [0.5, 0.5]
    assert not any("/" in name for name in rows[0])


def test_the_test_data_are_judged_too_and_loggers_get_the_table(trainer, tmp_path):
    board = TensorBoardLogger(tmp_path, name="board")
    run = trainer(callbacks=[Fairness(min_examples=0)], logger=board)
    run.test(Says(), Data(A + B), verbose=False)
    assert run.callback_metrics["test_equal_opportunity"] == pytest.approx(2 / 3)
    board.experiment.flush()
    (events,) = (tmp_path / "board").rglob("events*")
    assert b"lowest / highest" in events.read_bytes()
    assert len(table(events.parent, "test_step_00000000.csv")) == 3


def test_names_of_groups_become_names_of_metrics(trainer):
    found = judge(trainer, A + B, groups=("18/25 years", "26-40"))
    assert {"accuracy_18_25_years", "accuracy_26-40"} <= set(found)


# ---- what is said


def test_small_groups_are_warned_of_once(trainer):
    run = trainer(
        max_steps=2, val_check_interval=1, limit_val_batches=1.0, num_sanity_val_steps=0,
        callbacks=[Fairness(min_examples=10)],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="fairness") as caught:
        run.fit(Says(), Data(A + B))
    (text,) = [str(one.message) for one in caught if "fairness" in str(one.message)]
    assert text == (
        "fairness in val: fewer than 10 examples in 1 of 2 groups ('b' 5): their rates are guesses; give more data"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fairness")
        judge(trainer, A * 10 + B * 20, min_examples=100)
    with pytest.warns(UserWarning, match=r"'a' 99, 'b' 99"):
        judge(trainer, [(0, 1, 1)] * 99 + [(1, 1, 1)] * 99, min_examples=100)


def test_a_group_without_positives_is_said_and_left_out(trainer, tmp_path):
    rows = A + B + [(2, 0, 0), (2, 0, 1)]
    with pytest.warns(UserWarning, match="group 'c' has no example of class '1': no true positive rate, and left out"):
        found = judge(trainer, rows, groups=("a", "b", "c"))
    assert found["equal_opportunity"] == pytest.approx(RATES["equal_opportunity"], abs=1e-6)
    assert found["demographic_parity"] == pytest.approx(0.2 / 0.5, abs=1e-6)  # c says so of one of two
    assert "true_positive_rate_c" not in found
    assert [row["true_positive_rate"] for row in table(tmp_path) if row["group"] == "c"] == [""]


def test_where_there_is_no_ratio_none_is_logged_and_that_is_said(trainer):
    with pytest.warns(UserWarning, match="fairness") as caught:
        found = judge(trainer, [(0, 0, 0), (0, 0, 0), (1, 0, 0)])
    words = (
        "no demographic_parity and no equal_opportunity, since fewer than two groups have a rate, or all rates are 0"
    )
    assert any(words in str(one.message) for one in caught)
    assert "demographic_parity" not in found
    assert "equal_opportunity" not in found
    assert found["accuracy_a"] == 1.0


# ---- what is refused


def test_data_and_models_that_do_not_fit_are_refused(trainer):
    def refuse(words, model, data, **arguments):
        with pytest.raises(InputError, match=words):
            trainer(callbacks=[Fairness(**arguments)]).validate(model, data, verbose=False)

    refuse("Data has none; name a column of groups in the data, or remove the callback", Says(), Data(A, None))
    refuse("there is one only, 'a'; remove the callback", Says(), Data(A, ["a"]))
    named = Says(class_names=["no", "yes"])
    refuse("positive_class is 'yess', which is no class; did you mean 'yes'", named, Data(A + B), positive_class="yess")
    silent = ToyData()
    silent.group_names = ["a", "b"]
    refuse(
        "ToyModel gives no probabilities of classes, by which groups are judged; leave out data.group_column",
        ToyModel(),
        silent,
    )
    with pytest.raises(InputError, match="min_examples is -1; set it to 0 or more"):
        Fairness(min_examples=-1)


# ---- the command


@pytest.fixture(scope="module")
def table_of_pictures(tmp_path_factory):
    """A CSV of sixty pictures with a class and a group each."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = ["path,label,camera"]
    for number in range(60):
        label, camera = number % 2, "old" if number % 3 else "new"
        pixels = torch.full((8, 8), 40 + 150 * label, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'bright' if label else 'dark'},{camera}")
    (folder / "pictures.csv").write_text("\n".join(lines))
    return folder / "pictures.csv"


def test_the_command_judges_groups_where_a_column_of_them_is_named(table_of_pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    flags = [
        "--model", "ImageClassifier", "--model.network", "small_cnn", "--model.num_classes", "2",
        "--model.image_size", "8", "--model.channels", "1", "--data", "Images", "--data.image_size", "8",
        "--data.channels", "1", "--data.source", str(table_of_pictures), "--data.val_fraction", "0.4",
        "--data.batch_size", "12", "--trainer.max_steps", "1", "--trainer.val_check_interval", "1",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_checkpointing", "false",
    ]  # fmt: skip

    def fit(name, *more):
        assert main(["fit", *flags, "--trainer.default_root_dir", str(tmp_path / name), *more]) == 0
        return sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("fairness/*"))

    assert fit("without") == []
    grouped = ["--data.group_column", "camera"]
    with pytest.warns(UserWarning, match=r"fewer than 100 examples in 2 of 2 groups \('new' \d+, 'old' \d+\)"):
        assert fit("with", *grouped) == ["fit/version_0/fairness/val_step_00000001.csv"]
    rows = table(tmp_path / "with/fit/version_0", "val_step_00000001.csv")
    assert [(row["group"], row["class"]) for row in rows[:2]] == [("new", "dark"), ("old", "dark")]
    assert sum(int(row["examples"]) for row in rows[:2]) == 24
    # the user's own callback is the only one
    own = [
        "--trainer.callbacks+=Fairness",
        "--trainer.callbacks.min_examples=0",
        "--trainer.callbacks.positive_class=bright",
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "fairness"
        )  # the network has learned nothing yet, and may say the other class
        fit("own", *grouped, *own)
    assert {row["class"] for row in table(tmp_path / "own/fit/version_0", "val_step_00000001.csv")} == {"bright"}
