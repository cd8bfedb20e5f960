"""What the data types of images share: loaders over parts, and the list of files that were left out."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_bigmodels.data.check import Inspector
from lightning_bigmodels.data.datamodule import DataModule
from lightning_bigmodels.data.loading import EpochSampler, ResumableDataLoader
from lightning_bigmodels.data.vision.examples import Examples, OnError
from lightning_bigmodels.data.vision.inspection import ExamplesReader
from lightning_bigmodels.errors import InputError, noting_refusals

SKIPPED_FILE = "skipped_files.txt"
PARTS = ("train", "val", "test")


class VisionData(DataModule, ABC):
    """A DataModule over pictures in files.

    Args:
        batch_size: Pictures of a training batch, per process.
        eval_batch_size: Pictures of an evaluation batch, per process; None: as `batch_size`.
        num_workers: Processes that load batches ahead; 0: none.
        seed: Chooses the order of the training pictures and what is drawn for each.
        on_error: Whether a file that cannot be read ends the run, or is left out, counted and listed.

    Attributes:
        parts: The examples of `train`, `val`, `test` and `predict`, as far as they are there; known after `setup`.
        skipped: What was wrong with each file that was left out in this process.
    """

    def __init__(
        self, batch_size: int, eval_batch_size: int | None, num_workers: int, seed: int, on_error: OnError
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if on_error not in ("error", "skip"):
            raise InputError(f"on_error is {on_error!r}; set it to error or skip")
        self.on_error: OnError = on_error
        self.parts: dict[str, Examples[Any]] = {}
        self.skipped: list[str] = []
        self._folder: Path | None = None

    @abstractmethod
    def make_parts(self, stage: str) -> dict[str, Examples[Any]]:
        """Return the parts that a stage (`fit`, `validate`, `test`, `predict`) needs, or more.

        Raises:
            InputError: the data are not there or do not fit together.
        """

    @override
    def setup(self, stage: str) -> None:
        self.parts |= self.make_parts(stage)
        if self.on_error == "skip" and self.trainer is not None and self.trainer.log_dir is not None:
            self._folder = Path(self.trainer.log_dir)  # on every process: it is a broadcast

    @property
    @override
    def num_train_samples(self) -> int:
        return len(self._part("train"))

    def train_dataloader(self) -> ResumableDataLoader:
        """Return batches of the training part in an order of this epoch's own."""
        return self.resumable_loader(self._part("train"), EpochSampler)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches of the validation part, in order; no loader where there is none."""
        return self.evaluation_loader(self.parts["val"]) if "val" in self.parts else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of the test part, in order."""
        return self.evaluation_loader(self._part("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of the pictures to predict, in order."""
        return self.evaluation_loader(self._part("predict"))

    def _part(self, name: str) -> Examples[Any]:
        if name not in self.parts:
            raise InputError(f"{type(self).__name__} has no {name} part; {self.part_remedy(name)}")
        return self.parts[name]

    def part_remedy(self, name: str) -> str:
        """Return how the user gives the part that is missing."""
        return f"name its files or a {name}_fraction above 0"

    @override
    def inspect(self, inspector: Inspector) -> None:
        given, self.on_error = self.on_error, "skip"  # what a file lacks is told when it is read
        missing: InputError | None = None
        try:
            with noting_refusals() as refused:
                for stage in ("fit", "test"):
                    try:
                        self.parts |= self.make_parts(stage)
                    except InputError as error:
                        missing = error
                        refused.append(str(error))
        finally:
            self.on_error = given
        if missing is not None and not self.parts:
            raise missing
        for message in dict.fromkeys(refused):
            inspector.note("error", "setup", message)
        inspector.class_names = list(getattr(self, "class_names", ()))
        for name in PARTS:
            if name in self.parts:
                reader = ExamplesReader(self.parts[name])
                inspector.take(name, reader, inspector.read(reader, name), left_out=given == "skip")

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        for error in batch.pop("errors", []):
            if error not in self.skipped:
                self._note(error)
        return batch

    def _note(self, error: str) -> None:
        self.skipped.append(error)
        if len(self.skipped) == 1:
            rank_zero_warn(f"left out: {error}; further files that cannot be read are listed in {SKIPPED_FILE}")
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # one write a line: the processes of a node may share the file
            with (self._folder / SKIPPED_FILE).open("a", encoding="utf-8") as file:
                file.write(error + "\n")

    @override
    def teardown(self, stage: str) -> None:
        if self.skipped:
            where = "" if self._folder is None else f", listed in {self._folder / SKIPPED_FILE}"
            print(f"{len(self.skipped)} files could not be read and were left out{where}", flush=True)
