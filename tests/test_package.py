"""What is installed: the files of wheel and sdist, what they depend on, and what importing the package costs."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

import lightning_bigmodels

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_bigmodels"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FILES = sorted(path for folder in ("lightning_bigmodels", "tests") for path in (ROOT / folder).rglob("*.py"))


def built(builder_name, folder):
    """Return the archive that hatchling builds; tests/test_recipe_files.py does it through `build`."""
    from hatchling.builders import sdist, wheel

    builder = {"wheel": wheel.WheelBuilder, "sdist": sdist.SdistBuilder}[builder_name](str(ROOT))
    return Path(next(builder.build(directory=str(folder), versions=["standard"])))


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    with zipfile.ZipFile(built("wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
        (folder,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = wheel.read(f"{folder}/METADATA").decode()
        entry_points = wheel.read(f"{folder}/entry_points.txt").decode()
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    recipes = {f"lightning_bigmodels/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("recipes/*/*.yaml")}
    assert len(modules) > 20
    assert len(recipes) >= 3
    package = {name for name in names if not name.startswith(f"{folder}/")}
    others = {"py.typed", "planner/hardware.csv", "planner/memory.html"}
    assert package == modules | recipes | {f"lightning_bigmodels/{name}" for name in others}
    assert f"{folder}/licenses/LICENSE" in names
    assert "bigmodels = lightning_bigmodels.__main__:main" in entry_points
    assert f"\nVersion: {lightning_bigmodels.__version__}\n" in metadata
    assert "\n# lightning_bigmodels\n" in metadata  # the README


def test_the_sdist_holds_what_the_wheel_is_built_from(tmp_path):
    with tarfile.open(built("sdist", tmp_path)) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for path in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "lightning_bigmodels/py.typed"):
        assert path in names
    for folder in ("lightning_bigmodels", "recipes", "tests"):
        files = [path for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".yaml")]
        assert {path.relative_to(ROOT).as_posix() for path in files} <= names


def test_every_dependency_has_a_reason_beside_it():
    lines = re.search(r"^dependencies = \[\n(.*?)^\]", PYPROJECT, flags=re.M | re.S)[1].splitlines()
    needed = [(line.strip(), before.strip()) for before, line in zip(["", *lines], lines, strict=False)]
    needed = [(line, before) for line, before in needed if not line.startswith("#")]
    assert len(needed) >= 10
    assert [line for line, before in needed if not before.startswith("# ")] == []
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", PYPROJECT, flags=re.M | re.S)[1].splitlines()
    groups = [
        (line, before) for before, line in zip(["", *extras], extras, strict=False) if re.match(r"\w+ = \[", line)
    ]
    assert len(groups) >= 6
    assert [line for line, before in groups if not before.startswith("# ")] == []


def test_every_import_is_declared():
    """Or is required by lightning itself, whose own names for these two the package shares."""
    declared = {name(text) for text in re.findall(r'^\s*(?:\w+ = \[)?"([^"]+)"', PYPROJECT, flags=re.M) if text}
    declared |= {name(text) for text in requires("lightning") if "extra ==" not in text} & {
        "typing-extensions",
        "lightning-utilities",
    }
    distributions = packages_distributions()
    missing = {}
    for path in FILES:
        if PACKAGE not in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {module.partition(".")[0] for module in modules}:
                owners = {name(owner) for owner in distributions.get(module, [module])}
                if module not in sys.stdlib_module_names and module != PACKAGE.name and not owners & declared:
                    missing[module] = path.relative_to(ROOT).as_posix()
    assert missing == {}


def name(requirement):
    """Return the name of a distribution as pip compares it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_every_file_is_one_idea_under_400_lines():
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert len(lines) > 40
    assert {path: count for path, count in lines.items() if count >= 400} == {}


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, lightning_bigmodels as package; print(dir(package), package.__version__);"
        "assert not {'torch', 'lightning', 'transformers', 'wandb'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{sorted(lightning_bigmodels.__all__)} {lightning_bigmodels.__version__}\n"


def test_every_public_name_is_there():
    for public in lightning_bigmodels.__all__:
        assert getattr(lightning_bigmodels, public) is not None
    with pytest.raises(AttributeError, match="module 'lightning_bigmodels' has no attribute 'Txt'"):
        _ = lightning_bigmodels.Txt


def test_the_changelog_knows_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = lightning_bigmodels.__version__
    assert re.findall(r"^## (.*)$", text, flags=re.M)[0] == "[Unreleased]"
    assert f"\n## [{version}] - " in text or f"\nTo become {version}.\n" in text
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, flags=re.M)) <= kinds
