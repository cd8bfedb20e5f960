"""What jsonargparse says about a wrong argument, in one line.

jsonargparse answers with a tree: every key on the way down, every alternative of every type, every reason. The reader
needs the path of keys, the wrong word and the near match. A sentence that is not recognised here is passed on as it is.
"""

import builtins
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_bigmodels.errors import near

_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


class _Place(NamedTuple):
    """Where in the tree we are: the path of keys, the class whose arguments these are, the classes that would fit."""

    path: str = ""
    owner: str = ""
    bases: tuple[type, ...] = ()
    value: str = ""


class _Finding(NamedTuple):
    """A reason; of several alternatives the one with the highest rank is what the user meant."""

    rank: int
    message: str
    expected: str = ""


def explain(error: Exception, parser: LightningArgumentParser) -> str:
    """Return one line for what jsonargparse refused.

    Args:
        error: What jsonargparse raised.
        parser: The parser of the verb.
    """
    finding = _read(str(error), _Place(), parser)
    return " ".join(finding.message.split())


def _read(text: str, place: _Place, parser: LightningArgumentParser) -> _Finding:
    text = text.strip("\n")
    for pattern, reader in _READERS:
        match = re.match(pattern, text, re.DOTALL)
        if match:
            return reader(match, place, parser)
    # not one of ours: its first line is the reason, what follows is the value
    message = text.split("\n")[0]
    return _Finding(2, f"{place.path}: {message}" if place.path else message)


def _key(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    key = match[1].removeprefix(f"{_verb(parser)}.")
    path = f"{place.path}.{key}" if place.path else key
    bases = _CORE.get(path, ())
    return _read(textwrap.dedent(match[2]), _Place(path, place.owner, bases), parser)


def _class(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    place = place._replace(path=f"{place.path}.init_args", owner=match[1])
    finding = _read(textwrap.dedent(match[2]), place, parser)
    # a wrong value inside a class is the reason, not one of the types that the class competes with
    return finding._replace(rank=2, expected="") if finding.rank == 1 and finding.expected else finding


def _callable(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    owner = re.search(r"class_path='([^']+)'", match[2])
    reason = match[1]
    if owner:
        place = place._replace(path=f"{place.path}.init_args", owner=owner[1])
    return _read(reason, place, parser)


def _union(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    value = match[3].strip()
    given = re.search(r"'class_path': '([^']*)'", value)
    place = place._replace(bases=_classes(match[1]) or place.bases, value=given[1] if given else value)
    items = re.split(r"^- ", textwrap.dedent(match[2]), flags=re.MULTILINE)[1:]
    findings = [_read(textwrap.dedent("    " + item), place, parser) for item in items]
    best = max(findings, key=lambda finding: finding.rank)
    expected = [finding.expected for finding in findings if finding.expected]
    if best.rank > 1 or not best.expected:
        return best
    return _Finding(1, f"{place.path}: expected {' or '.join(dict.fromkeys(expected))}, got {value!r}")


def _type(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", match[1]).replace("NoneType", "null").replace("typing.", "")
    got, hint = (match[2] or place.value).strip(), ""
    if choices := re.fullmatch(r"Literal\[(.*)\]", name):
        name = f"one of {choices[1]}"
        hint = _near_only(got, re.findall(r"'([^']*)'", choices[1]))
    message = f"{place.path}: expected {name}, got {got!r}{hint}"
    return _Finding(2 if hint else 0 if name == "null" else 1, message, name)


def _path(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    return _Finding(-1, f"{place.path}: {match[0]}")


def _option(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    """A key that its class does not have."""
    name = match[1].split(".")[0]
    around = place.path.removesuffix(".init_args")
    if _load(place.owner) in place.bases:
        # no class was named, and the base class stands in for it
        if hint := _near_only(name, _CLASS_KEYS):
            return _Finding(3, f"{around}.{name} is not a key of a class{hint}")
        option = around.replace(".init_args", "")
        return _Finding(1, f"{around}.{name} belongs to no class; name the class first: --{option} CLASS")
    known = _arguments(place.owner)
    return _Finding(3, f"{place.path}.{name} is not an argument of {place.owner}{near(name, known)}")


def _no_class(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    """A short name that no class has."""
    name = match[1].strip()
    known = {found.__name__ for base in place.bases for found in _subclasses(base)}
    message = f"{place.path}: no class is named {name!r}{near(name, known) or '; name it by its import path'}"
    if name[:1].isupper() or not place.bases:
        return _Finding(2, message)
    return _Finding(1, message, " or ".join(base.__name__ for base in place.bases))


def _no_import(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    """A dotted path that leads to nothing."""
    path, reason = match[1], " ".join(match[2].split())
    message = f"{place.path}: cannot import {path}: {reason}"
    missing = re.match(r"module '([\w.]+)' has no attribute '(\w+)'", reason)
    if missing:
        module = importlib.import_module(missing[1])
        return _Finding(
            2, message + near(missing[2], [name for name, _ in inspect.getmembers(module, inspect.isclass)])
        )
    return _Finding(2, message + "; correct the path or put its folder on PYTHONPATH")


def _no_subclass(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    return _Finding(2, f"{place.path}: {match[1] or place.value} is not a {match[2]}; name a subclass of it")


def _subcommand_option(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    """A key of a file that leads nowhere: at the top, or below `trainer`."""
    return _Finding(3, _unknown(match[1], parser))


def _unrecognized(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    """A command-line option that leads nowhere."""
    option = match[1].split()[0].split("=")[0]
    if not option.startswith("-"):
        return _Finding(3, f"{option!r} stands alone; an argument is written --NAME VALUE")
    key = option.lstrip("-")
    return _Finding(3, _unknown(key, parser, dashes=option.removesuffix(key)))


def _unknown(key: str, parser: LightningArgumentParser, dashes: str = "") -> str:
    options = {action.dest for action in parser._actions}
    heads = {option.split(".")[0] for option in options}
    head, _, rest = key.partition(".")
    if not rest or head not in heads:
        return f"{dashes}{head} is not an argument of bigmodels {_verb(parser)}{near(head, heads)}"
    name = rest.split(".")[0]
    known = {option.removeprefix(f"{head}.") for option in options if option.startswith(f"{head}.")}
    return f"{dashes}{head}.{name} is not an argument of {head}{near(name, known)}"


def _required(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    names = match[1].replace(f"{_verb(parser)}.", "").strip()
    where = f"{place.path}." if place.path else ""
    keys = ", ".join(f"{where}{name.strip()}" for name in names.split(","))
    owner = f" of {place.owner}" if place.owner else ""
    return _Finding(3, f"{keys} is missing: a required argument{owner} without a default")


def _nested(match: re.Match[str], place: _Place, parser: LightningArgumentParser) -> _Finding:
    return _read(match[1], place, parser)


_CORE: dict[str, tuple[type, ...]] = {"model": (LightningModule,), "data": (LightningDataModule,)}
_Reader = Callable[[re.Match[str], _Place, LightningArgumentParser], _Finding]
_UNION = (
    r"Does not validate against any of the Union subtypes\nSubtypes: ([^\n]*)\nErrors:\n(.*)"
    r"\nGiven value type: [^\n]*\nGiven value: (.*)"
)
# the sentences of jsonargparse 4.53, outermost first
_READERS: list[tuple[str, _Reader]] = [
    (r'Parser key "([^"]+)":\s*?\n?(.*)', _key),
    (
        r"Problem with given class_path '([^']+)':\n\s*((?:No module|module '|cannot import|Unexpected import).*)",
        _no_import,
    ),
    (r"Problem with given class_path '([^']+)':\n(.*)", _class),
    (r"Type .* expects a function or a callable class: (.*?)\. Got value: (.*)", _callable),
    (rf"(?:- Expected a path but [^\n]*\n- )?{_UNION}", _union),
    (r"- Expected a path but [^\n]*\n- (.*)", _nested),
    (r"Expected a path but .*", _path),
    (r"Expected a dot import path string: ([^\n]*?)(?:\. Got value.*)?$", _no_class),
    (r"Expected an? ((?:<class|typing\.|list|dict|tuple|Literal)[^\n]*?)(?:\. Got value: (.*))?$", _type),
    (r"Import path (?:(\S+) )?does not correspond to a subclass of (\w+)", _no_subclass),
    (r"Option '([^']+)' is not accepted", _option),
    (r"Subcommand '[^']+' does not accept option '([^']+)'", _subcommand_option),
    (r"unrecognized arguments: (.*)", _unrecognized),
    (r"the following arguments are required: (.*)", _required),
]


def _verb(parser: LightningArgumentParser) -> str:
    return str(getattr(parser, "subcommand", ""))


def _load(path: str) -> object:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name) if module else getattr(builtins, name)
    except (ImportError, AttributeError):
        return None


def _near_only(name: str, known: Iterable[str]) -> str:
    hint = near(name, known)
    return hint if "did you mean" in hint else ""


def _arguments(path: str) -> list[str]:
    """Return the argument names of a class, without those that only code can give."""
    owner = _load(path)
    if not callable(owner):
        return []
    parser = ArgumentParser(exit_on_error=False)
    if isinstance(owner, type):
        names = parser.add_class_arguments(owner, fail_untyped=False)
    else:
        names = parser.add_function_arguments(owner, fail_untyped=False)
    return [name for name in names if name not in ("params", "optimizer")]


def _classes(subtypes: str) -> tuple[type, ...]:
    found = (_load(path) for path in re.findall(r"[A-Za-z_][\w]*(?:\.\w+)+", subtypes))
    return tuple(base for base in found if isinstance(base, type))


def _subclasses(base: type) -> Iterable[type]:
    children: list[type] = base.__subclasses__()
    for child in children:
        if not inspect.isabstract(child) and not child.__name__.startswith("_"):
            yield child
        yield from _subclasses(child)
