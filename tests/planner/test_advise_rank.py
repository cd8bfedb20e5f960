"""Which recipe is best for which data, with which options, and how long it takes, with made plans."""

import dataclasses

import pytest

from lightning_bigmodels.advice import report
from lightning_bigmodels.advice.facts import LACKING, NAMES, Facts
from lightning_bigmodels.advice.length import Length, device_options, length_of, length_options, rate_options
from lightning_bigmodels.advice.options import num_training, options_for
from lightning_bigmodels.advice.recipe_facts import TASKS, read_recipes
from lightning_bigmodels.advice.report import Planned, in_order
from lightning_bigmodels.advice.suit import TASKS_OF, rank, tasks_of
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.recipe_files import list_recipes

RECIPES = {recipe.name: recipe for recipe in read_recipes()}
PARAMETERS = {"text/quickstart": 2_600_000, "text/gpt_shakespeare": 4_300_000, "text/llama_8b": 8_030_000_000}


def pictures(number, side, classes=10, channels=3, **more):
    each = {f"class {n}": number // classes for n in range(classes)}
    values = {"classes": each, "sides": (side, side), "extremes": (side, side), "channels": channels, **more}
    return Facts("classes", "photos", {"source": "photos"}, parts={"train": number}, **values)


def text(num_bytes, **more):
    values = {"parts": {"train": 1}, "num_bytes": num_bytes, "lengths": (100, 100), **more}
    return Facts("text", "book.txt", {"sources": "book.txt"}, "documents", **values)


def ranked(facts, task=None):
    return rank(facts, RECIPES.values(), tasks_of(facts, task), PARAMETERS)


def test_every_recipe_has_a_task_and_every_task_data_that_teach_it():
    assert sorted(RECIPES) == sorted(recipe.name for recipe in list_recipes())
    taught = {task for tasks in TASKS_OF.values() for task in tasks}
    assert {recipe.task for recipe in RECIPES.values()} == taught == set(TASKS)
    assert set(TASKS_OF) | set(LACKING) == set(NAMES)
    assert set(TASKS_OF) & set(LACKING) == set()


def test_a_recipes_header_is_read_by_its_paragraphs():
    header = RECIPES["image/finetune_efficientnet"].header
    assert header["Hardware"] == "one GPU, or a CPU with patience."
    assert RECIPES["image/finetune_efficientnet"].untried
    assert not RECIPES["image/quickstart"].untried


@pytest.mark.parametrize(
    ("facts", "best"),
    [
        (pictures(40, 200), "image/finetune_efficientnet"),  # few: pretrained
        (pictures(1_300_000, 400, 1000), "image/resnet50_imagenet"),  # many: from scratch
        (pictures(60_000, 28, channels=1), "image/fashion_mnist"),  # small pictures: a small network
        (pictures(1_800, 8, channels=1), "image/quickstart"),
        (text(460_000), "text/quickstart"),  # little: strong decay, a small network
        (text(40_000_000_000), "text/llama_8b"),
    ],
)
def test_the_best_is_first(facts, best):
    assert ranked(facts)[0].recipe.name == best


def test_reasons_say_why():
    first, *_, last = ranked(pictures(40, 200), "classify")
    assert first.reasons == ("pretrained: 40 pictures, 4 of a class, are few to learn to see from",)
    assert "from scratch, for which 40 pictures, 4 of a class, are few: about 200,000 would do" in last.reasons
    assert first.cautions[0] == "the recipe has not been run in full: what it reaches is not known"
    little = ranked(text(460_000, lengths=(50_000, 60_000)))[0]
    assert "little text" in little.reasons[0]
    assert little.reasons[1] == "a weight decay of 1, made for little text, holds it back"
    assert "--data.block_size 1024" in little.cautions[0]
    assert "pretrained network" in little.cautions[1]
    makers = {each.recipe.name: each.reasons for each in ranked(pictures(500, 28, channels=1), "generate")}
    assert "pictures of a class can be asked for" in makers["diffusion/flow_matching"]
    assert "its judge soon knows so few pictures by heart" in makers["gan/dcgan"]


def test_imbalance_is_told_with_weights_to_paste():
    counts = {"many": 900, "few": 10}
    facts = dataclasses.replace(pictures(910, 200), classes=counts)
    cautions = " ".join(ranked(facts)[0].cautions)
    assert "90 times the examples of the smallest" in cautions
    # by the root of the counts: 1 / sqrt(900) and 1 / sqrt(10), with a mean of 1
    assert "--model.class_weights '[0.19,1.81]'" in cautions


def test_digits_are_told_to_be_mirrored():
    facts = dataclasses.replace(pictures(60_000, 28, channels=1), classes=dict.fromkeys("0123456789", 6000))
    assert "--data.horizontal_flip 0" in " ".join(ranked(facts)[0].cautions)


def test_options_say_where_data_are_and_what_a_recipe_says_of_its_own_is_taken_back():
    quick = options_for(pictures(2_000, 200, 3), RECIPES["image/quickstart"])
    sizes = {"data.image_size": 64, "model.image_size": 64, "data.channels": 3, "model.channels": 3}
    assert quick == {"data.source": "photos", "model.num_classes": 3, **sizes}
    fashion = options_for(pictures(60_000, 28, channels=1), RECIPES["image/fashion_mnist"])
    assert fashion == {"data.source": "photos", "model.num_classes": 10, "model.mean": None, "model.std": None}
    assert options_for(text(10**7), RECIPES["text/gpt_shakespeare"])["data.encoding"] == "utf-8"
    boxes = Facts("boxes", "d", {"source": "a.json"}, parts={"train": 400}, classes={"x": 9}, sides=(500, 500))
    options = options_for(boxes, RECIPES["detection/fasterrcnn_coco"])
    assert [options[f"data.{name}"] for name in ("val_source", "images", "val_images")] == [None] * 3
    table = dataclasses.replace(pictures(60_000, 28, channels=1), data={"source": "a.csv"})
    assert options_for(table, RECIPES["image/fashion_mnist"])["data.root"] is None


def test_few_data_get_smaller_batches_a_part_to_measure_on_and_a_lower_rate():
    facts = pictures(8, 32, 2)
    recipe = RECIPES["image/fashion_mnist"]  # a twentieth for validation
    options = options_for(facts, recipe)
    assert (options["data.batch_size"], options["data.val_fraction"]) == (2, 0.125)
    # SGD: in proportion, 0.1 x 2 / 128
    assert rate_options(recipe, options, 1) == {"model.optimizer.init_args.lr": 0.0016}
    adam = rate_options(RECIPES["gan/dcgan"], {"data.batch_size": 32}, 1)
    assert adam == dict.fromkeys(("model.optimizer.init_args.lr", "model.discriminator_optimizer.init_args.lr"), 0.0005)
    assert rate_options(recipe, {}, 1) == {}


def test_a_model_told_classes_is_told_none_where_there_are_none():
    facts = dataclasses.replace(pictures(5_000, 28, channels=1), kind="pictures", classes={})
    options = options_for(facts, RECIPES["diffusion/flow_matching"])
    assert {"model.num_classes": 0, "model.guidance_scale": 1.0, "model.label_dropout": 0.0}.items() <= options.items()


def test_one_device_accumulates_what_eight_see_in_a_step():
    recipe = RECIPES["image/resnet50_imagenet"]
    expected = {"trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto"}
    found = device_options(recipe, {}, devices=1, on_cpu=False, rows=1_000_000)
    assert found.pop("trainer.accumulate_grad_batches") == 8
    assert found.items() <= expected.items()
    assert device_options(recipe, {}, devices=1, on_cpu=True, rows=1_000_000)["trainer.accelerator"] == "cpu"
    assert device_options(recipe, {}, devices=8, on_cpu=False, rows=1_000_000) == {}
    # four devices share the batch of one
    shared = device_options(RECIPES["image/fashion_mnist"], {}, devices=4, on_cpu=False, rows=60_000)
    assert shared == {"trainer.devices": 4, "trainer.strategy": "ddp", "data.batch_size": 32}


def test_hours_are_epochs_and_a_run_that_is_too_long_is_cut():
    recipe = RECIPES["image/fashion_mnist"]  # 12 epochs
    rows = num_training(pictures(60_000, 28, channels=1), recipe, {})
    assert rows == 57_000
    length = length_of(recipe, {}, 1, rows, seconds=1.0, hours=1.0)
    assert (length.steps_per_epoch, length.steps) == (445, 12 * 445)
    assert length.own_hours == pytest.approx(12 * 445 / 3600)
    assert length.possible_steps == 3240  # nine tenths of 3,600 s
    assert length_options(recipe, length, 1) == {"trainer.max_epochs": 7}
    assert length_options(recipe, dataclasses.replace(length, hours=10.0), 1) == {}
    less = length_options(recipe, dataclasses.replace(length, hours=0.1), 1)  # not one epoch
    expected = {"max_steps": 324, "val_check_interval": 324, "check_val_every_n_epoch": None}
    assert less == {f"trainer.{name}": value for name, value in expected.items()}
    rare = RECIPES["image/resnet50_imagenet"]  # validates every fifth of 600 epochs
    length = Length(steps_per_epoch=100, seconds_per_step=1.0, steps=60_000, hours=0.1)
    assert length_options(rare, length, 8) == {"trainer.max_epochs": 3, "trainer.check_val_every_n_epoch": 3}
    by_steps = RECIPES["diffusion/ddpm"]  # 1,000 steps, validates behind 500
    length = length_of(by_steps, {}, 1, 57_000, seconds=1.0, hours=0.1)
    assert length.steps == 1000
    assert length_options(by_steps, length, 1) == {"trainer.max_steps": 324, "trainer.val_check_interval": 324}


def test_rows_of_text_are_blocks_of_tokens_and_of_photos_crops():
    # the quickstart's own text: 466 kB in 115,806 tokens for training, 452 rows of 256
    assert num_training(text(466_117), RECIPES["text/quickstart"], {}) == pytest.approx(452, rel=0.03)
    photos = Facts("pictures", "d", {"source": "d"}, parts={"train": 20}, sides=(300, 300))
    assert num_training(photos, RECIPES["super_resolution/edsr_x2"], {}) == 18 * 160


@pytest.mark.parametrize(
    ("facts", "task", "message"),
    [
        (pictures(40, 200), "detect", "--task detect: from pictures with classes can be learned: classify, generate"),
        (pictures(40, 200), "generat", "did you mean 'generate'"),
        (Facts("audio", "d"), "classify", "--task classify: no recipe learns from audio"),
    ],
)
def test_a_task_that_data_do_not_teach_is_refused(facts, task, message):
    with pytest.raises(InputError, match=message):
        tasks_of(facts, task)


# ---- the report


def made_plan(fits=True, seconds=0.1):
    memory = {"used": 3 * 2**30, "available": 22 * 2**30, "uncertainty": 2**29, "spare": 2**30 if fits else -(2**30)}
    step = {"seconds": seconds, "rows": 32, "unit": "samples", "units_per_second": 320.0, "bound": "compute"}
    return {"fits": fits, "memory": memory, "step": step}


def planned(candidate, fits=True, hours=8.0):
    length = Length(steps_per_epoch=100, seconds_per_step=0.1, steps=1000, hours=hours)
    return Planned(candidate, candidate.options, made_plan(fits), length)


def test_the_report_names_data_hardware_recipe_reason_plan_and_command():
    facts = pictures(40, 200, 2, notes=("a note",))
    first, second, *others = ranked(facts)
    shown = report.text(facts, "l4", 22 * 2**30, 8.0, [planned(first), planned(second, hours=0.01)], others)
    for line in (
        "data      photos: pictures with classes",
        "          40 pictures, 200 x 200 pixels, coloured",
        "          2 classes of 20 each: class 0, class 1",
        "        - a note",
        "hardware  l4 with 22.0 GiB, for 8 h",
        "to tell classes apart",
        "1. image/finetune_efficientnet",
        "   + pretrained: 40 pictures, 20 of a class, are few to learn to see from",
        "   = fits: uses 3.0 of 22.0 GiB, uncertain by 0.50",
        "   = 100 ms a step of 32 rows, 320 samples/s, bound by compute",
        "   = the recipe's 10 epochs are 1,000 steps and take 2 min; 8 h would do for 2,592 epochs",
        "   ! fetches weights of ImageNet when it starts",
        "   bigmodels fit --config image/finetune_efficientnet --data.source photos --model.num_classes 2 \\",
    ):
        assert f"\n{line}\n" in f"\n{shown}\n", f"{line!r} is not in:\n{shown}"
    assert "0.01 h do for 3.24 epochs, to which the command is cut" in " ".join(shown.split())
    assert "to make more pictures like these (--task generate): diffusion/flow_matching, " in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_kinds_without_recipes_are_said_with_what_is_missing():
    facts = Facts("table", "a.csv", unit="rows", parts={"train": 9}, columns={"age": "numbers"}, missing={"age": 2})
    shown = report.text(facts, "l4", 2**34, 8.0, [], [])
    assert "age: numbers, 2 missing" in shown
    said = "No recipe learns from a table yet. Missing: a data module for tables, and networks for their columns."
    assert " ".join(shown.split()).endswith(said)


def test_where_nothing_fits_the_command_is_that_of_a_plan():
    first = dataclasses.replace(planned(ranked(pictures(40, 200))[0], fits=False), hardware={"gpu": "l4"})
    command = ["bigmodels", "plan", "--config", "image/finetune_efficientnet", "--gpu", "l4", "--data.source", "photos"]
    assert first.command[:8] == command
    shown = report.text(pictures(40, 200), "l4", 22 * 2**30, 8.0, [first], [])
    assert "   = DOES NOT FIT: uses 3.0 of 22.0 GiB" in shown
    assert "   = what would make it fit is found by\n" in shown


def test_hours_that_are_far_too_few_are_said():
    shown = report.text(pictures(40, 200), "l4", 2**30, 0.001, [planned(ranked(pictures(40, 200))[0], hours=0.001)], [])
    assert "which is 3.2% of it and too little to learn much" in " ".join(shown.split())


def test_what_fits_and_has_time_comes_first():
    one, two, three, *_ = ranked(pictures(40, 200))
    found = in_order([planned(one, fits=False), planned(two, hours=0.0001), planned(three)])
    assert [each.candidate for each in found] == [three, two, one]


def test_values_are_what_json_holds_with_the_command():
    facts = pictures(40, 200, 2)
    first, *others = ranked(facts)
    found = report.values(facts, "l4", 8.0, [planned(first)], others)
    (recipe,) = found["recipes"]
    assert recipe["command"].startswith("bigmodels fit --config image/finetune_efficientnet --data.source photos")
    assert (recipe["fits"], recipe["length"]["possible_epochs"]) == (True, 2592)
    assert found["data"]["classes"] == {"class 0": 20, "class 1": 20}


def test_options_are_words_that_a_shell_passes_on():
    options = {"data.source": "my photos", "data.root": None, "data.labelled": False, "data.class_names": ["a b", "c"]}
    expected = ["--data.source", "my photos", "--data.root", "null", "--data.labelled", "false"]
    assert report.words(options) == [*expected, "--data.class_names", '["a b", "c"]']
