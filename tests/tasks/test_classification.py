"""Classification against its formulas: losses by hand, metrics by scikit-learn, names, rows, several processes."""

import math

import pytest
import torch
from sklearn.metrics import f1_score, precision_recall_fscore_support, top_k_accuracy_score
from torch import nn

from lightning_bigmodels.data.batches import FILLER, IGNORED
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules import ImageClassifier
from lightning_bigmodels.tasks import Classification
from tests.modules.cnn.classifier_toys import NUM_CLASSES, BarsData
from tests.workers import fit_on


class Given(Classification):
    """Its logits are the batch's."""

    def __init__(self, num_classes=3, **kwargs):
        super().__init__(num_classes=num_classes, **kwargs)

    def build_network(self):
        return nn.Linear(1, 1)

    def logits(self, batch):
        return batch["logits"]


def given(**kwargs):
    task = Given(**kwargs)
    task.logged = {}
    task.log_dict = lambda values, **_: task.logged.update(values)
    task.log = lambda name, value, **_: task.logged.update({name: value})
    return task


LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5], [0.0, 3.0, 0.0]])


def log_softmax(row):
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


def test_the_loss_is_the_mean_over_examples_that_count():
    batch = {"logits": LOGITS, "labels": torch.tensor([0, 2, IGNORED])}
    expected = -(log_softmax(LOGITS[0].tolist())[0] + log_softmax(LOGITS[1].tolist())[2]) / 2
    assert given().step("train", batch).item() == pytest.approx(expected)


def test_label_smoothing_and_class_weights_by_hand():
    labels, smoothing, weights = [0, 2, 1], 0.1, [1.0, 2.0, 0.5]
    losses = []
    for row, label in zip(LOGITS.tolist(), labels, strict=True):
        target = [smoothing / 3 + (1 - smoothing) * (k == label) for k in range(3)]
        losses.append(-sum(w * t * x for w, t, x in zip(weights, target, log_softmax(row), strict=True)))
    expected = sum(losses) / sum(weights[label] for label in labels)
    task = given(label_smoothing=smoothing, class_weights=weights)
    hard = {"logits": LOGITS, "labels": torch.tensor(labels)}
    soft = {"logits": LOGITS, "labels": nn.functional.one_hot(torch.tensor(labels), 3).float()}
    assert task.step("train", hard).item() == pytest.approx(expected)
    assert task.step("train", soft).item() == pytest.approx(expected)


def test_a_mixture_of_labels_by_hand_and_what_does_not_count():
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 0.4], [float(IGNORED)] * 3])
    first, second = (log_softmax(LOGITS[i].tolist()) for i in (0, 1))
    expected = -(0.7 * first[0] + 0.3 * first[1] + 0.4 * second[2]) / 1.4
    assert given().step("train", {"logits": LOGITS, "labels": shares}).item() == pytest.approx(expected)


def test_several_labels_by_hand():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [float(IGNORED)] * 3])
    total = 0.0
    for row, targets in zip(LOGITS[:2].tolist(), labels[:2].tolist(), strict=True):
        for x, target in zip(row, targets, strict=True):
            p, t = 1 / (1 + math.exp(-x)), 0.8 * target + 0.1
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    task = given(multi_label=True, label_smoothing=0.2)
    assert task.step("train", {"logits": LOGITS, "labels": labels}).item() == pytest.approx(total / 6)


def test_a_batch_in_which_nothing_counts_costs_nothing():
    logits = LOGITS.clone().requires_grad_()
    loss = given().step("train", {"logits": logits, "labels": torch.full((3,), IGNORED)})
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def evaluated(task, logits, labels, size):
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        task.validation_step({"logits": logits[rows], "labels": labels[rows]}, 0)
    return {name: metric.compute().item() for name, metric in task.logged.items()}


def test_metrics_are_scikit_learns_and_fillers_do_not_count():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 7, generator=generator), torch.randint(7, (200,), generator=generator)
    logits[range(200), labels] += 1.0
    padded = torch.cat([logits, torch.full((3, 7), 9.0)]), torch.cat([labels, torch.full((3,), IGNORED)])
    task = given(num_classes=7, label_smoothing=0.3, class_weights=[3.0] * 7)
    found = evaluated(task, *padded, size=11)
    p, predicted = logits.softmax(1), logits.argmax(1)
    bins = (p.max(1).values * 15).ceil() - 1
    right = (predicted == labels).float()
    expected = {
        # no smoothing and no weights: runs compare
        "val_loss": nn.functional.cross_entropy(logits, labels).item(),
        "val_accuracy": right.mean().item(),
        "val_top5_accuracy": top_k_accuracy_score(labels, p, k=5),
        "val_macro_f1": f1_score(labels, predicted, average="macro"),
        "val_calibration_error": sum(
            abs((right[bins == b] - p.max(1).values[bins == b]).sum().item()) for b in range(15)
        )
        / 200,
    }
    assert found == pytest.approx(expected, rel=1e-5)
    task.on_validation_epoch_end()
    columns, rows = task.class_table()
    assert columns == ("class", "precision", "recall", "f1", "support")
    table = zip(*precision_recall_fscore_support(labels, predicted), strict=True)
    assert rows == [(str(i), *(f"{x:.4f}" for x in (a, b, c)), str(n)) for i, (a, b, c, n) in enumerate(table)]


def test_a_class_that_is_not_there_has_no_rates():
    task = given()
    evaluated(task, LOGITS, torch.tensor([0, 0, 1]), size=3)
    task.on_validation_epoch_end()
    assert task.class_table()[1][2] == ("2", "-", "-", "-", "0")


def test_metrics_of_several_labels():
    logits = torch.tensor([[2.0, -1.0], [-1.0, -1.0], [3.0, 2.0], [0.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [float(IGNORED)] * 2])
    found = evaluated(given(num_classes=2, multi_label=True), logits, labels, size=4)
    assert found["val_accuracy"] == pytest.approx(5 / 6)
    assert found["val_exact_match"] == pytest.approx(2 / 3)
    assert found["val_macro_f1"] == pytest.approx((0.8 + 1.0) / 2)
    assert found["val_average_precision"] == pytest.approx(1.0)
    expected = nn.functional.binary_cross_entropy_with_logits(logits[:3], labels[:3])
    assert found["val_loss"] == pytest.approx(expected.item())


def test_validation_hands_probabilities_to_callbacks():
    batch = {"logits": LOGITS, "labels": torch.tensor([0, 1, 2])}
    assert torch.allclose(given().validation_step(batch, 0)["probabilities"], LOGITS.softmax(1))
    several = {"logits": LOGITS, "labels": torch.ones(3, 3)}
    assert torch.allclose(given(multi_label=True).test_step(several, 0)["probabilities"], LOGITS.sigmoid())


def test_rows_of_predictions_have_names_and_leave_fillers_out():
    task = given()
    task.class_names = ["ant", "bee", "cow"]
    batch = {"logits": LOGITS, "indices": torch.tensor([4, FILLER, 6]), "files": ["4.png", "", "6.png"]}
    first, last = task.predict_step(batch, 0)
    p = LOGITS.softmax(1)
    assert (first["index"], first["file"], first["label"]) == (4, "4.png", "ant")
    assert first["probability"] == pytest.approx(p[0, 0].item())
    assert first["probabilities"] == pytest.approx(dict(zip(task.class_names, p[0].tolist(), strict=True)))
    assert (last["index"], last["label"]) == (6, "bee")
    several = given(multi_label=True).predict_step({**batch, "logits": LOGITS}, 0)
    assert several[0]["labels"] == ["0", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1; set it to 2 or more"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be 0 or more and below 1"),
        ({"class_weights": [1.0]}, "class_weights holds 1 numbers, .* each of the 3 classes"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Given(**arguments)


def tiny(**changes):
    return ImageClassifier(
        **{"network": "small_cnn", "num_classes": NUM_CLASSES, "channels": 1, "image_size": 8, **changes}
    )


def test_data_of_other_classes_are_refused(trainer):
    with pytest.raises(InputError, match=r"the data have 6 classes \(a, b, c, \.\.\.\).*set model.num_classes to 6"):
        trainer().fit(tiny(num_classes=5), BarsData())
    with pytest.raises(InputError, match="one label for each example; set model.multi_label to false"):
        trainer().fit(tiny(multi_label=True), BarsData())


def test_names_travel_in_the_checkpoint_and_others_are_refused(trainer, tmp_path):
    run = trainer(max_steps=2)
    run.fit(tiny(), BarsData())
    run.save_checkpoint(tmp_path / "bars.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "bars.ckpt", weights_only=True)
    assert loaded.class_names == list("abcdef")
    rows = trainer().predict(loaded, BarsData(class_names=()))
    assert [row["index"] for row in rows[0]] == [0, 1, 2, 3, 4]
    assert set(rows[0][0]["probabilities"]) == set("abcdef")
    with pytest.raises(InputError, match="class 1 is 'x' in the data and 'b' in the checkpoint"):
        trainer().test(tiny(), BarsData(class_names="axcdef"), ckpt_path=tmp_path / "bars.ckpt")


def test_metrics_are_the_same_on_any_number_of_processes():
    def metrics(processes):
        # one optimizer step moves the networks apart by rounding alone
        fits = fit_on(
            processes,
            "ddp" if processes > 1 else "auto",
            lambda: tiny(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0)),
            BarsData,
            limit_val_batches=1.0,
            val_check_interval=1,
            max_steps=1,
        )
        return [{key: value for key, value in fit.metrics.items() if key.startswith("val_")} for fit in fits]

    (alone,) = metrics(1)
    assert len(alone) == 5
    for found in metrics(3):
        assert found == pytest.approx(alone, rel=1e-6)
