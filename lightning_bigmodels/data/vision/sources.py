"""Sources of labelled pictures: what a name stands for."""

from pathlib import Path

from lightning_bigmodels.data.vision.labelled import Labelled
from lightning_bigmodels.data.vision.sources_arrays import read_digits
from lightning_bigmodels.data.vision.sources_folders import read_folder
from lightning_bigmodels.errors import InputError, near

DIGITS = "sklearn-digits"


def read_source(name: str) -> dict[str, Labelled]:
    """Return the parts of a source by their names; one that knows no parts is all `train`.

    Raises:
        InputError: there is no such source, or it is broken.
    """
    if name == DIGITS:
        return {"train": read_digits()}
    path = Path(name).expanduser()
    if path.is_dir():
        return read_folder(path)
    known = [DIGITS, *(file.name for file in path.parent.iterdir())] if path.parent.is_dir() else [DIGITS]
    hint = near(path.name, known)
    raise InputError(
        f"there is no source {name}{hint if 'did you mean' in hint else ''}; name a folder of pictures or {DIGITS}"
    )
