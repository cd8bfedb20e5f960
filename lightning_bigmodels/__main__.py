"""The `bigmodels` command: what can be answered without torch is answered here, at once; `cli` does the rest."""

import os
import sys

from lightning_bigmodels import __version__
from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.recipe_files import list_recipes

VERBS = {
    "fit": "train a model",
    "validate": "measure a trained model on the validation data",
    "test": "measure a trained model on the test data",
    "predict": "apply a trained model: generate, classify, ...",
    "export": "write a trained model to a folder that other programs read",
    "recipes": "list the recipes that --config takes by name",
}

HELP = f"""usage: bigmodels VERB [--config RECIPE_OR_FILE ...] [--KEY VALUE ...]

Train, measure and use large models with PyTorch Lightning, from YAML recipes.

verbs:
{chr(10).join(f"  {verb:<10}{text}" for verb, text in VERBS.items())}

examples:
  bigmodels recipes
  bigmodels fit --config text/quickstart
  bigmodels fit --config text/quickstart --trainer.max_steps 100
  bigmodels predict --config text/quickstart --ckpt_path best

options:
  --version         print the version
  -h, --help        this text; 'bigmodels fit --help' lists every argument of a verb,
                    'bigmodels fit --model.help CLASS' those of a class
"""

RECIPES_HELP = """usage: bigmodels recipes

List the recipes: a name for --config, and what the recipe trains.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
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
        cause = _input_error(error)
        if cause is None:
            raise
        print(f"bigmodels: error: {' '.join(str(cause).split())}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("-h", "--help"):
        print(HELP, end="", flush=True)
    elif verb == "--version":
        print(f"bigmodels {__version__}", flush=True)
    elif verb == "recipes":
        _recipes(rest)
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


def _input_error(error: BaseException | None) -> InputError | None:
    """Find the user's error also where Lightning or jsonargparse has wrapped it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, InputError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    sys.exit(main())
