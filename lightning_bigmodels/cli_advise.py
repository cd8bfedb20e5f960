"""`bigmodels advise`: the look, the ranking and the plans put together, with recipes built as `fit` builds them."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_bigmodels.advice import report
from lightning_bigmodels.advice.arguments import Arguments
from lightning_bigmodels.advice.facts import Facts
from lightning_bigmodels.advice.length import device_options, length_of, length_options, rate_options
from lightning_bigmodels.advice.look import look
from lightning_bigmodels.advice.options import num_training
from lightning_bigmodels.advice.recipe_facts import RecipeFacts, read_recipes
from lightning_bigmodels.advice.report import Planned
from lightning_bigmodels.advice.suit import Candidate, rank, tasks_of
from lightning_bigmodels.cli import ConfigAction
from lightning_bigmodels.cli_errors import explain
from lightning_bigmodels.errors import InputError, known_error
from lightning_bigmodels.planner.flags import setting_from_lines
from lightning_bigmodels.planner.hardware import Hardware, find_hardware
from lightning_bigmodels.planner.plan import Plan, make_plan
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.trainer import Trainer

_COMPARABLE = 1.5
"""How much worse a recipe may be than the best of its task and still be planned."""
_WORTH_A_PLAN = -2.0
"""The least score of a recipe for a task that the data were not made for."""
_MOST_TRIES = 3


def advise(given: Arguments) -> None:
    """Print the advice.

    Raises:
        InputError: the data, the hardware or an option is wrong.
    """
    hardware = find_hardware(given.gpu, given.gpu_table)
    facts = look(given.data)
    tasks = tasks_of(facts, given.task)
    recipes = [recipe for recipe in read_recipes() if recipe.task in tasks]
    builder = Builder()
    sizes = {recipe.name: builder.num_parameters(recipe) for recipe in recipes if recipe.task == "language model"}
    ranked = rank(facts, recipes, tasks, sizes)
    planned = _plan_best(ranked, facts, hardware, given, builder)
    names = {each.candidate.recipe.name for each in planned}
    others = [each for each in ranked if each.recipe.name not in names]
    if given.json:
        print(json.dumps(report.values(facts, hardware.name, given.hours, planned, others), indent=1))
        return
    shown = f"{given.devices} x {hardware.name}" if given.devices > 1 else hardware.name
    print(report.text(facts, shown, hardware.memory, given.hours, planned, others))


class Builder:
    """Builds the model and the data module of a command line, as `fit` would."""

    def __init__(self) -> None:
        # Lightning 2.6 calls what jsonargparse 4.53 deprecates
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        self._parser = LightningArgumentParser(exit_on_error=False, allow_abbrev=False)
        self._parser.add_argument("--config", action=ConfigAction)
        self._parser.add_argument("--seed_everything", type=bool | int, default=0)
        self._parser.add_lightning_class_args(Trainer, "trainer")
        self._parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        self._parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)

    def build(self, command: list[str]) -> tuple[LightningModule, Any, Mapping[str, Any]]:
        """Return model, data module and the Trainer's arguments; no network is built and no data are read.

        Args:
            command: What stands behind `bigmodels fit`.

        Raises:
            InputError: an option is wrong.
        """
        try:
            config = self._parser.parse_args(command)
        except ArgumentError as error:
            raise InputError(explain(error, self._parser)) from error
        lines = config.trainer.as_dict()
        try:
            built = self._parser.instantiate_classes(Namespace(model=config.model, data=config.data))
        except ValueError as error:
            # jsonargparse wraps what a class refuses
            cause = known_error(error)
            if cause is None:
                raise
            raise cause from error
        return built.model, built.data, lines

    def num_parameters(self, recipe: RecipeFacts) -> int:
        """Return how many weights a recipe's network has."""
        model, _, _ = self.build(["--config", recipe.name])
        with torch.device("meta"):
            model.configure_model()
        return sum(parameter.numel() for parameter in model.parameters())


def _plan_best(
    ranked: list[Candidate], facts: Facts, hardware: Hardware, given: Arguments, builder: Builder
) -> list[Planned]:
    """Plan the best of each task, those of the first before the others, until one fits and there are enough."""
    if not ranked:
        return []
    chosen = _choose(ranked, given.plans)
    planned = []
    for number, candidate in enumerate(chosen, start=1):
        _say(f"planning {candidate.recipe.name} ({number} of {len(chosen)})")
        planned.append(_plan(candidate, facts, hardware, given, builder))
    rest = [each for each in ranked if each not in chosen and each.recipe.task == ranked[0].recipe.task]
    while rest and not any(each.fits for each in planned):
        _say(f"planning {rest[0].recipe.name}, since nothing fits so far")
        planned.append(_plan(rest.pop(0), facts, hardware, given, builder))
    _say("")
    return report.in_order(planned)


def _choose(ranked: list[Candidate], number: int) -> list[Candidate]:
    """Return those of the first task that are nearly as good as its best one, and the best ones of other tasks."""
    best: dict[str, Candidate] = {}
    for candidate in ranked:
        best.setdefault(candidate.recipe.task, candidate)
    first, *others = best.values()
    chosen = [
        each for each in ranked if each.recipe.task == first.recipe.task and each.score >= first.score - _COMPARABLE
    ]
    return [*chosen[:number], *(each for each in others if each.score >= _WORTH_A_PLAN)][:number]


def _plan(candidate: Candidate, facts: Facts, hardware: Hardware, given: Arguments, builder: Builder) -> Planned:
    recipe, options = candidate.recipe, dict(candidate.options)
    rows = num_training(facts, recipe, options)
    options |= device_options(recipe, options, given.devices, hardware.name == "cpu", rows)
    options |= rate_options(recipe, options, given.devices)
    try:
        model, data, lines = builder.build(["--config", recipe.name, *report.words(options)])
        plan, setting = _fitting(model, data, setting_from_lines(lines, data), hardware)
    except InputError as error:
        return Planned(candidate, options, remark=f"cannot be planned: {error}")
    if setting.batch_size != data.batch_size:
        options["data.batch_size"] = setting.batch_size
        options["trainer.accumulate_grad_batches"] = setting.accumulate_grad_batches
    length = length_of(recipe, options, given.devices, rows, plan.time.seconds, given.hours)
    named = {"gpu": hardware.name} if given.gpu_table is None else {"gpu": hardware.name, "gpu_table": given.gpu_table}
    if plan.room.fits:
        options |= length_options(recipe, length, setting.accumulate_grad_batches)
    return Planned(candidate, options, plan.to_dict(), length, hardware=named)


def _fitting(model: LightningModule, data: Any, setting: Setting, hardware: Hardware) -> tuple[Plan, Setting]:
    """Return the plan with the recipe's batches, or with as many more smaller ones as fit."""
    plan = make_plan(model, data, setting, hardware)
    for _ in range(_MOST_TRIES):
        if plan.room.fits or setting.batch_size == 1 or not model.automatic_optimization:
            break
        smaller = max(1, setting.batch_size // _factor(plan))
        batches = setting.accumulate_grad_batches * setting.batch_size // smaller
        setting = replace(setting, batch_size=smaller, accumulate_grad_batches=batches)
        plan = make_plan(model, data, setting, hardware)
    return plan, setting


def _factor(plan: Plan) -> int:
    """Return the power of two by which a batch is to be divided, by what grows with it."""
    growing = sum(plan.peak.held.get(kind, 0) for kind in ("activations", "temporary", "inputs"))
    room = growing + plan.room.spare - plan.room.uncertainty
    factor = 2
    while factor < plan.setting.batch_size and growing / factor > room:
        factor *= 2
    return factor


def _say(message: str) -> None:
    """Show how far the plans are, on a terminal alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)
