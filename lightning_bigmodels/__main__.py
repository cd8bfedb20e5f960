"""The `bigmodels` command: what can be answered without torch is answered here, at once; `cli` does the rest."""

import argparse
import os
import sys
from typing import NoReturn

from lightning_bigmodels import __version__
from lightning_bigmodels.errors import InputError, RunError, known_error, near, require
from lightning_bigmodels.recipe_files import list_recipes

VERBS = {
    "fit": "train a model",
    "validate": "measure a trained model on the validation data",
    "test": "measure a trained model on the test data",
    "predict": "apply a trained model: generate, classify, ...",
    "explain": "show what made a trained classifier say so",
    "export": "write a trained model to a folder that other programs read",
    "check": "find broken files, copies, leaks and missing classes in the data",
    "prepare": "tokenize text into shards, in a folder or an object store",
    "consolidate": "turn a sharded checkpoint into one file",
    "plan": "tell memory, time and cost of a training before it runs",
    "batch-size": "find the largest batch that fits into memory on all processes",
    "advise": "look at your data and name the recipes that suit them",
    "recipes": "list the recipes that --config takes by name",
}

HELP = f"""usage: bigmodels VERB [--config RECIPE_OR_FILE ...] [--KEY VALUE ...]

Train, measure and use large models with PyTorch Lightning, from YAML recipes.

verbs:
{chr(10).join(f"  {verb:<13}{text}" for verb, text in VERBS.items())}

examples:
  bigmodels recipes
  bigmodels plan --config text/llama_8b --gpu h100
  bigmodels fit --config text/quickstart
  bigmodels fit --config text/quickstart --trainer.max_steps 100
  bigmodels predict --config text/quickstart --ckpt_path best
  bigmodels prepare --config text/quickstart --output s3://BUCKET/PREFIX

options:
  --version         print the version
  -h, --help        this text; 'bigmodels fit --help' lists every argument of a verb,
                    'bigmodels fit --model.help CLASS' those of a class
"""

CONSOLIDATE_HELP = """usage: bigmodels consolidate CHECKPOINT --output FILE

Turn a sharded checkpoint (a folder, or the link to it) into one plain file, with the states of its
optimizers, which every strategy loads and goes on from. All of it is held in memory: with Adam in
float32, 12 bytes for each parameter.

  CHECKPOINT        the sharded checkpoint, as runs/fit/version_0/checkpoints/last.ckpt
  --output FILE     the file to write; it must not exist
  -h, --help        this text
"""

RECIPES_HELP = """usage: bigmodels recipes

List the recipes: a name for --config, and what the recipe trains.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for a run that had to end, 2 for wrong input, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `bigmodels recipes | head -1`: Python would complain once more when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        cause = known_error(error)
        if cause is None:
            raise
        print(f"bigmodels: error: {_one_line(cause)}", file=sys.stderr)
        return 2 if isinstance(cause, InputError) else 1


def _run(argv: list[str]) -> int:
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("-h", "--help"):
        print(HELP, end="", flush=True)
    elif verb == "--version":
        print(f"bigmodels {__version__}", flush=True)
    elif verb == "recipes":
        _recipes(rest)
    elif verb == "consolidate":
        _consolidate(rest)
    elif verb == "advise":
        _advise(rest)
    elif verb.startswith("-"):
        raise InputError(f"{verb} comes before the verb; write: bigmodels fit {verb} ... (verbs: {', '.join(VERBS)})")
    elif verb not in VERBS:
        raise InputError(f"{verb!r} is not a verb of bigmodels{near(verb, VERBS)}")
    else:
        if verb == "fit" and os.environ.get("WANDB_MODE") != "disabled":
            # W&B searches every module that is loaded when it is first used: 1.5 s behind torch, 0.3 s before it
            import wandb.apis.public  # noqa: F401
        from lightning_bigmodels.cli import run

        run(argv)
    return 0


def _recipes(arguments: list[str]) -> None:
    if arguments and arguments[0] not in ("-h", "--help"):
        raise InputError(f"'bigmodels recipes' takes no argument, got {arguments[0]!r}")
    if arguments:
        print(RECIPES_HELP, end="", flush=True)
        return
    recipes = list_recipes()
    width = max((len(recipe.name) for recipe in recipes), default=0)
    for recipe in recipes:
        print(f"{recipe.name:<{width}}  {recipe.summary}".rstrip(), flush=True)


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; write: bigmodels consolidate CHECKPOINT --output FILE")


def _consolidate(arguments: list[str]) -> None:
    if "-h" in arguments or "--help" in arguments:
        print(CONSOLIDATE_HELP, end="", flush=True)
        return
    parser = _Arguments(add_help=False)
    parser.add_argument("checkpoint")
    parser.add_argument("--output", required=True)
    given = parser.parse_args(arguments)
    from lightning_bigmodels.strategies.checkpoint_io import consolidate

    print(f"consolidated to {consolidate(given.checkpoint, given.output)}", flush=True)


def _advise(arguments: list[str]) -> None:
    from lightning_bigmodels.advice.arguments import HELP as ADVISE_HELP
    from lightning_bigmodels.advice.arguments import parse

    if "-h" in arguments or "--help" in arguments:
        print(ADVISE_HELP, end="", flush=True)
        return
    given = parse(arguments)
    # whatever the data turn out to be, they may be pictures
    require("torchvision", extra="vision")
    from lightning_bigmodels.cli_advise import advise

    advise(given)


def _one_line(error: InputError | RunError) -> str:
    text = str(error)
    if text.startswith("Caught "):
        # torch raises what a loader's worker raised anew, with the worker's traceback as its text
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
