"""Predictions that are many numbers each, as a Parquet file."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_bigmodels.errors import require

TABLE_NAME = "predictions.parquet"
_PARTS = "predictions.part{}.parquet"


class PredictionTable:
    """A Parquet file with a row for each prediction, written batch by batch by each process, and merged by `index`.

    Beside the tensors it has the rows' own `index` and, where there is one, `file`. A column of vectors or maps is a
    list of fixed length; its shape stands in the column's metadata.

    Args:
        folder: Where to; all processes see it.
        rank: This process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._part = folder / _PARTS.format(rank)
        self._writer: Any = None

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """Return what a run has left in a folder."""
        return [*folder.glob(TABLE_NAME), *folder.glob(_PARTS.format("*"))]

    def add(self, rows: list[dict[str, Any]], columns: dict[str, Tensor]) -> None:
        """Write a batch.

        Args:
            rows: What `predict_step` returned.
            columns: (B, ...) each, for B rows; none: nothing is written.
        """
        if not columns or not rows:
            return
        arrow, parquet = _arrow()
        arrays: dict[str, Any] = {
            key: arrow.array([row[key] for row in rows]) for key in ("index", "file") if key in rows[0]
        }
        fields = [arrow.field(name, array.type) for name, array in arrays.items()]
        for name, tensor in columns.items():
            array, field = _column(name, tensor)
            arrays[name] = array
            fields.append(field)
        table = arrow.Table.from_arrays(list(arrays.values()), schema=arrow.schema(fields))
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._part, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Finish this process's part."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def merge(self) -> None:
        """Make one file of all parts, which are finished; nothing where there are none."""
        parts = sorted(self._folder.glob(_PARTS.format("*")))
        if not parts:
            return
        arrow, parquet = _arrow()
        whole = arrow.concat_tables([parquet.read_table(part, memory_map=True) for part in parts])
        temporary = self._folder / f"{TABLE_NAME}.tmp"
        parquet.write_table(whole.sort_by("index") if "index" in whole.column_names else whole, temporary)
        temporary.replace(self._folder / TABLE_NAME)
        for part in parts:
            part.unlink()


def _column(name: str, tensor: Tensor) -> tuple[Any, Any]:
    """Return an array of lists of fixed length, or of numbers, and its field."""
    arrow, _ = _arrow()
    array = arrow.array(tensor.detach().cpu().flatten().numpy())
    shape = tuple(tensor.shape[1:])
    if not shape:
        return array, arrow.field(name, array.type)
    lists = arrow.FixedSizeListArray.from_arrays(array, tensor[0].numel())
    return lists, arrow.field(name, lists.type, metadata={"shape": ",".join(map(str, shape))})


def _arrow() -> tuple[Any, Any]:
    return require("pyarrow", extra="parquet"), require("pyarrow.parquet", extra="parquet")
