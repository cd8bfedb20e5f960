"""The options that turn a recipe into a run on some data: where they lie, their classes, sizes and numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_bigmodels.advice.facts import Facts
from lightning_bigmodels.advice.recipe_facts import RecipeFacts

Options = dict[str, Any]

_TABLES = (".csv", ".tsv", ".parquet", ".jsonl")
# of a recipe's data what speaks of its own files, and what stands for nothing said
_OWN_FILES: dict[str, Any] = {
    "encoding": "utf-8",
    "column": "text",
    "images": None,
    "masks": None,
    "class_names": None,
    "val_source": None,
    "val_sources": None,
    "val_images": None,
    "val_masks": None,
    "val_photos": None,
    "test_source": None,
    "test_sources": None,
    "test_photos": None,
}
_LARGEST_SMALL_SIDE = 64
"""Side to which a recipe of small pictures is led by larger ones."""
_LARGE = 128
"""Side from which on a recipe's pictures are large, and stay as they are."""
_SMALL_DETECTOR = 320
_BYTES_PER_TOKEN = 3.6
"""Of English in the tokens of a vocabulary of 2,048, as the recipe text/quickstart has it; larger ones make longer."""


def options_for(facts: Facts, recipe: RecipeFacts) -> Options:
    """Return the options beside `--config` with which a recipe reads some data, whatever devices there are.

    Args:
        facts: The data.
        recipe: One that suits them.
    """
    options: Options = {f"data.{name}": value for name, value in facts.data.items()}
    if recipe.data_class != "Images":
        options.pop("data.labelled", None)
    if recipe.data_class == "SuperResolutionImages":
        options = {"data.source": facts.data["source"]}
    for name, nothing in _OWN_FILES.items():
        if name in recipe.data and f"data.{name}" not in options and recipe.data[name] != nothing:
            options[f"data.{name}"] = nothing
    if recipe.data.get("root") and str(facts.data.get("source", "")).endswith(_TABLES):
        options["data.root"] = None
    options |= _OF_TASKS[recipe.task](facts, recipe)
    return options | _held_out(facts, recipe) | _batch(facts, recipe)


def side_for(facts: Facts, recipe: RecipeFacts) -> int:
    """Return the side of the pictures that a recipe is to see: its own, or for small ones one nearer to the data's."""
    own = recipe.side
    if not own or not facts.side:
        return own
    if recipe.task == "detect":
        return own if own >= _LARGE else max(own, min(_SMALL_DETECTOR, _multiple(facts.side, 32)))
    if recipe.task == "segment" and "leftImg8bit" not in {path.name for path in _folders(facts)}:
        return min(own, _multiple(facts.side, 8)) if own >= _LARGE else max(own, min(256, _multiple(facts.side, 8)))
    if own >= _LARGE or facts.side <= own:
        return own
    if recipe.model_class == "ImageClassifier":
        return min(_LARGEST_SMALL_SIDE, facts.side)
    # those that make pictures halve them, a GAN down to four pixels
    return _LARGEST_SMALL_SIDE if facts.side >= _LARGEST_SMALL_SIDE else own


def num_training(facts: Facts, recipe: RecipeFacts, options: Mapping[str, Any]) -> int:
    """Return how many rows an epoch has: pictures, crops of photos, blocks of tokens.

    Args:
        facts: The data.
        recipe: The recipe.
        options: What `options_for` has returned.
    """
    held = 0.0
    for part, fraction in (("val", 0.1), ("test", 0.0)):
        if part not in facts.parts:
            held += float(options.get(f"data.{part}_fraction", recipe.data.get(f"{part}_fraction", fraction)))
    kept = 1.0 - held
    if recipe.task == "language model":
        return int(kept * num_tokens(facts, recipe)) // int(recipe.data.get("block_size", 256))
    photos = facts.num_train - round(held * facts.num_train)
    return photos * int(recipe.data.get("crops_per_photo", 16)) if recipe.task == "enlarge" else photos


def num_tokens(facts: Facts, recipe: RecipeFacts) -> int:
    """Return about how many tokens a text has in a recipe's vocabulary."""
    vocabulary = int(recipe.data.get("vocab_size") or recipe.model.get("config", {}).get("vocab_size", 8192))
    # a vocabulary four times as large has tokens of about half a byte more, up to Llama 3's 4.4 bytes
    bytes_per_token = min(4.4, _BYTES_PER_TOKEN + 0.25 * max(0, vocabulary.bit_length() - 12))
    return round(facts.num_bytes / bytes_per_token)


# ---- of each task


def _classify(facts: Facts, recipe: RecipeFacts) -> Options:
    options: Options = {"model.num_classes": len(facts.classes)}
    if facts.multi_label:
        options["model.multi_label"] = True
    return options | _channels(facts, recipe) | _size(facts, recipe)


def _generate(facts: Facts, recipe: RecipeFacts) -> Options:
    options = _channels(facts, recipe) | _size(facts, recipe)
    if recipe.conditional:
        known = len(facts.classes) if facts.kind == "classes" and not facts.multi_label else 0
        options["model.num_classes"] = known
        if not known and recipe.model.get("guidance_scale", 1) != 1:
            options |= {"model.guidance_scale": 1.0, "model.label_dropout": 0.0}
    return options


def _detect(facts: Facts, recipe: RecipeFacts) -> Options:
    options: Options = {"model.num_classes": len(facts.classes)}
    side = side_for(facts, recipe)
    if side != recipe.side:
        options |= {"data.picture_size": side, "model.network_args.min_size": side}
    return options


def _segment(facts: Facts, recipe: RecipeFacts) -> Options:
    names = facts.data.get("class_names")
    options: Options = {"model.num_classes": len(names or facts.classes)}
    side = side_for(facts, recipe)
    if side != recipe.side:
        options["data.image_size"] = side
    if names and recipe.data.get("eval_size"):
        options["data.eval_size"] = None
    if names and recipe.data.get("own_scale"):
        options["data.own_scale"] = False
    return options


def _enlarge(facts: Facts, recipe: RecipeFacts) -> Options:
    return {}


def _text_to_image(facts: Facts, recipe: RecipeFacts) -> Options:
    options = _size(facts, recipe)
    encoder = recipe.model.get("text_encoder_config") or {}
    if recipe.model.get("text_encoder") or not facts.lengths:
        return options
    # from scratch: a word is about one token and a half, and there is one more at each end
    wanted = facts.lengths[1] * 3 // 2 + 2
    positions = int(encoder.get("max_position_embeddings", 77))
    if wanted > positions:
        options["model.text_encoder_config.max_position_embeddings"] = min(77, _multiple(wanted + 7, 8))
    if facts.num_train >= 1000 and int(encoder.get("vocab_size", 0)) < 4096:
        options["model.text_encoder_config.vocab_size"] = 4096
    return options


def _language_model(facts: Facts, recipe: RecipeFacts) -> Options:
    return {}


_OF_TASKS = {
    "classify": _classify,
    "generate": _generate,
    "denoise": _generate,
    "detect": _detect,
    "segment": _segment,
    "enlarge": _enlarge,
    "text to image": _text_to_image,
    "language model": _language_model,
}


def _channels(facts: Facts, recipe: RecipeFacts) -> Options:
    options: Options = {}
    # a recipe of coloured pictures takes gray ones too
    if facts.channels not in (recipe.channels, 1):
        options |= {"data.channels": facts.channels, "model.channels": facts.channels}
    options |= {f"model.{name}": None for name in ("mean", "std") if recipe.model.get(name)}
    return options


def _size(facts: Facts, recipe: RecipeFacts) -> Options:
    side = side_for(facts, recipe)
    options: Options = {}
    if side != recipe.side:
        options["data.image_size"] = side
        if "image_size" in recipe.model:
            options["model.image_size"] = side
    return options


def _held_out(facts: Facts, recipe: RecipeFacts) -> Options:
    """Hold out one example at least for validation, where the recipe's fraction is none of few."""
    if "val" in facts.parts or recipe.task == "language model" or recipe.data_class == "SuperResolutionImages":
        fraction = 0.1
    else:
        fraction = float(recipe.data.get("val_fraction", 0.1))
    if "val" in facts.parts or recipe.task == "language model" or round(fraction * facts.num_train) >= 1:
        return {}
    return {"data.val_fraction": round(max(0.1, 1 / max(1, facts.num_train)), 3)}


def _batch(facts: Facts, recipe: RecipeFacts) -> Options:
    """Have an epoch of at least four batches, where there is so little of the data; batch norm needs two rows."""
    rows = num_training(facts, recipe, {})
    batch = recipe.batch_size
    while batch > 2 and 4 * batch > rows:
        batch //= 2
    return {} if batch == recipe.batch_size else {"data.batch_size": batch}


def _multiple(number: int, of: int) -> int:
    return max(of, number // of * of)


def _folders(facts: Facts) -> list[Path]:
    folder = Path(facts.path).expanduser()
    return list(folder.iterdir()) if folder.is_dir() else []
