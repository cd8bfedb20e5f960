"""How well each recipe suits some data, and why: a score whose parts are told as reasons."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_bigmodels.advice.facts import NAMES, Facts, Kind
from lightning_bigmodels.advice.options import num_tokens, options_for, side_for
from lightning_bigmodels.advice.recipe_facts import RecipeFacts, Task
from lightning_bigmodels.errors import InputError, near

TASKS_OF: dict[Kind, tuple[Task, ...]] = {
    "classes": ("classify", "generate", "denoise", "enlarge"),
    "pictures": ("generate", "denoise", "enlarge"),
    "captions": ("text to image",),
    "boxes": ("detect",),
    "masks": ("segment",),
    "text": ("language model",),
}
"""What data of a kind can teach, what they were most likely made for first."""

_IMBALANCE = 10
_PICTURES_PER_PIXEL = 4
"""From scratch, of those of one picture: 1,000 at 16 x 16, 200,000 at 224 x 224. A rule of thumb."""
_LEAST_PHOTO = 64
_TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", table 3."""
_MOST_PASSES = 8
"""Repeated text is worth ever less: Muennighoff et al. 2023, "Scaling Data-Constrained Language Models"."""
_FEW = 2000
_MILLION = 1_000_000


@dataclass(frozen=True)
class Candidate:
    """A recipe for some data.

    Attributes:
        recipe: The recipe.
        score: 0 is the best that there can be; one less is ten times too little data, or so.
        reasons: What speaks for it, or against.
        cautions: What to look at before a run.
        options: Options of the command beside `--config`.
    """

    recipe: RecipeFacts
    score: float
    reasons: tuple[str, ...]
    cautions: tuple[str, ...]
    options: Mapping[str, Any]


def tasks_of(facts: Facts, wanted: str | None = None) -> tuple[Task, ...]:
    """Return the tasks that data can teach, or the one of them that is wanted.

    Raises:
        InputError: it is none of them.
    """
    known = TASKS_OF.get(facts.kind, ())
    if wanted is None:
        return known
    for task in known:
        if task == wanted or task.replace(" ", "-") == wanted:
            return (task,)
    can = ", ".join(task.replace(" ", "-") for task in known)
    learned = f"from {NAMES[facts.kind]} can be learned: {can}" if can else f"no recipe learns from {NAMES[facts.kind]}"
    raise InputError(f"--task {wanted}: {learned}{near(wanted, [task.replace(' ', '-') for task in known])}")


def rank(
    facts: Facts, recipes: Iterable[RecipeFacts], tasks: Iterable[Task], parameters: Mapping[str, int]
) -> list[Candidate]:
    """Return the recipes of some tasks for the data, task by task, the best of each first.

    Args:
        facts: The data.
        recipes: All recipes.
        tasks: What is to be learned, most important first.
        parameters: Weights of the networks of language models, by their recipes' names.
    """
    known = list(recipes)
    ranked: list[Candidate] = []
    for task in tasks:
        found = [_judge(facts, recipe, parameters) for recipe in known if recipe.task == task]
        ranked += sorted((each for each in found if each is not None), key=lambda each: -each.score)
    return ranked


def _judge(facts: Facts, recipe: RecipeFacts, parameters: Mapping[str, int]) -> Candidate | None:
    """Return a recipe with its score; None where it cannot learn from the data."""
    if recipe.task == "language model":
        score, reasons = _text_fit(facts, recipe, parameters[recipe.name])
    elif recipe.task == "enlarge":
        if facts.side < _LEAST_PHOTO or facts.channels not in (1, 3):
            return None
        score, reasons = _photo_fit(facts)
    else:
        score, reasons = _picture_fit(facts, recipe)
    cautions = _cautions(facts, recipe)
    return Candidate(recipe, score, tuple(reasons), tuple(cautions), options_for(facts, recipe))


# ---- pictures


def _picture_fit(facts: Facts, recipe: RecipeFacts) -> tuple[float, list[str]]:
    number, reasons = facts.num_train, []
    of_each = number // max(1, len(facts.classes))
    enough = _PICTURES_PER_PIXEL * recipe.side**2
    shown = f"{number:,} pictures" + (f", {of_each:,} of a class," if facts.kind == "classes" else "")
    if recipe.pretrained and recipe.task != "text to image":
        score = -0.1 - 0.5 * max(0.0, math.log10(max(1, number) / _MILLION))
        if number < 50 * _FEW:
            reasons.append(f"pretrained: {shown} are few to learn to see from")
        else:
            reasons.append(f"pretrained: a quick start, which {shown} do not need")
    else:
        missing = math.log10(max(1, number) / enough)
        score = min(0.0, missing) - 0.15 * max(0.0, missing - 1.0)
        if missing < -0.3:
            reasons.append(f"from scratch, for which {shown} are few: about {_round(enough):,} would do")
        elif missing > 1.5:
            reasons.append(f"from scratch: {shown} are enough for a larger network than this one")
        else:
            reasons.append(f"from scratch: {shown} are enough")
    found, reason = _size_fit(facts, recipe)
    score += found
    reasons += reason
    if recipe.task == "generate":
        found, reason = _maker_fit(facts, recipe)
        score += found
        reasons += reason
    return score, reasons


def _size_fit(facts: Facts, recipe: RecipeFacts) -> tuple[float, list[str]]:
    side, own = side_for(facts, recipe), facts.side
    if not side or not own:
        return 0.0, []
    octaves = math.log2(own / side)
    if octaves > 0.5:
        return -0.6 * octaves, [f"pictures of {own} pixels are seen at {side}: what is small in them is lost"]
    if octaves < -1:
        return 0.5 * octaves, [f"pictures of {own} pixels are enlarged to {side}, which costs time and adds nothing"]
    return -0.3 * abs(octaves), []


def _maker_fit(facts: Facts, recipe: RecipeFacts) -> tuple[float, list[str]]:
    """Judge the ways to make pictures against each other."""
    score, reasons = 0.0, []
    if facts.kind == "classes" and not facts.multi_label:
        score -= 0.0 if recipe.conditional else 0.2
        reasons.append(f"pictures of a class can{'' if recipe.conditional else 'not'} be asked for")
    if recipe.model_class == "Diffusion":
        reasons.append("diffusion: the best pictures, in many steps each")
    elif recipe.model_class == "GAN":
        score -= 0.2
        reasons.append("a GAN: pictures in one step, by a training that is less steady")
        if facts.num_train < _FEW:
            score -= 0.3
            reasons.append("its judge soon knows so few pictures by heart")
    else:
        score -= 0.4
        reasons.append("a VAE: a code and a likelihood for each picture, and blurred pictures")
    return score, reasons


def _photo_fit(facts: Facts) -> tuple[float, list[str]]:
    few = facts.num_train < 20
    text = f"{facts.num_train:,} photos are {'few, and overfit' if few else 'enough for crops of many kinds'}"
    return (-0.5 if few else 0.0), [text, "small pictures are made from them: nothing has to be labelled"]


# ---- text


def _text_fit(facts: Facts, recipe: RecipeFacts, parameters: int) -> tuple[float, list[str]]:
    """Compare how often a network sees a token for each of its weights with what is best for a given computation."""
    tokens = max(1, num_tokens(facts, recipe))
    passes = min(_MOST_PASSES, recipe.max_epochs or _MOST_PASSES)
    seen = tokens * passes / parameters
    score = -abs(math.log10(seen / _TOKENS_PER_PARAMETER))
    about = f"about {_round(tokens):,} tokens for {_round(parameters):,} weights"
    reasons = []
    if tokens / parameters < 1:
        reasons.append(f"{about}: little text, which a network of this size learns by heart")
        decay = float(((recipe.model.get("optimizer") or {}).get("init_args") or {}).get("weight_decay", 0.0))
        if decay >= 0.5:
            reasons.append(f"a weight decay of {decay:g}, made for little text, holds it back")
    elif seen > 10 * _TOKENS_PER_PARAMETER:
        reasons.append(f"{about}: there is text for a larger network")
    else:
        reasons.append(f"{about}, from scratch")
    return score, reasons


# ---- what to look at


def _cautions(facts: Facts, recipe: RecipeFacts) -> list[str]:
    cautions = []
    if recipe.untried:
        cautions.append("the recipe has not been run in full: what it reaches is not known")
    if recipe.task == "classify" and facts.imbalance > _IMBALANCE and not facts.multi_label:
        cautions.append(
            f"the largest class has {facts.imbalance:,.0f} times the examples of the smallest: accuracy hides the "
            f"small ones, so look at macro F1, or weigh classes{_weights(facts)}"
        )
    if recipe.task == "classify" and recipe.data.get("horizontal_flip", 0.5) and all(map(_is_sign, facts.classes)):
        cautions.append("training mirrors pictures: where they show letters or digits, add --data.horizontal_flip 0")
    if recipe.task == "detect" and facts.imbalance > _IMBALANCE:
        cautions.append(f"the most frequent object occurs {facts.imbalance:,.0f} times as often as the rarest")
    if recipe.task == "language model":
        cautions += _text_cautions(facts, recipe)
    if recipe.task == "text to image" and recipe.model.get("text_encoder") and facts.num_train < 100_000:
        cautions.append(
            "few pictures teach a pretrained pipeline better: set model.pretrained to one and model.lora, see "
            "docs/generative.md"
        )
    if recipe.pretrained or recipe.data.get("tokenizer"):
        cautions.append(f"fetches {_fetched(recipe)} when it starts")
    return cautions


def _is_sign(name: str) -> bool:
    return name.isdecimal() or len(name) == 1


def _weights(facts: Facts) -> str:
    counts = [count for count in facts.classes.values() if count]
    if len(counts) > 20 or len(counts) < len(facts.classes):
        return " by model.class_weights"
    # by the root, which is enough: the inverse itself lets a handful of examples rule
    raw = [count**-0.5 for count in counts]
    mean = sum(raw) / len(raw)
    return f": --model.class_weights '[{','.join(f'{weight / mean:.2f}' for weight in raw)}]'"


def _text_cautions(facts: Facts, recipe: RecipeFacts) -> list[str]:
    cautions = []
    block = int(recipe.data.get("block_size", 256))
    config = recipe.model.get("config") or {}
    longest = int(config.get("max_position_embeddings") or config.get("n_positions") or block)
    if facts.lengths and facts.lengths[0] > 4 * 4 * block and longest > block:
        cautions.append(
            f"documents of {facts.lengths[0]:,} characters are longer than rows of {block} tokens: up to "
            f"--data.block_size {longest} the network can look back further, for memory and time"
        )
    if num_tokens(facts, recipe) < _MILLION:
        cautions.append("so little text is learned better by a pretrained network: set model.pretrained, see README.md")
    return cautions


def _fetched(recipe: RecipeFacts) -> str:
    names = [recipe.data.get("tokenizer"), recipe.model.get("text_encoder"), recipe.model.get("autoencoder")]
    known = [str(name) for name in names if name]
    return " and ".join(known) if known else "weights of ImageNet"


def _round(number: float) -> int:
    """Return a number to two digits, since more would be a pretence."""
    digits = max(0, len(str(int(number))) - 2)
    return round(int(number), -digits)
