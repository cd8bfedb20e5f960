"""The planner against published measurements: `python tests/benchmarks/planner.py`.

Every row of planner_rows.csv is a run that somebody else has measured and that this package's strategies can express.
The planner traces it as rank 0 of all its processes, and its memory and speed, in tokens or pictures per second of a
device, are printed beside the published ones.
Which rows have set constants of the planner stands in the columns `time_use` and `memory_use`: the summary parts them
from those that it was only compared with. The programs that were measured are written anew in published.py and
litgpt_networks.py, as far as they keep other tensors than today's transformers. What was left out of their tables, and
why, is printed with `--left_out`.
"""

import argparse
import csv
import logging
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from published import Published, Tokens

from lightning_bigmodels import ImageClassifier, Images
from lightning_bigmodels.planner.hardware import Hardware, find_hardware
from lightning_bigmodels.planner.room import Room, estimate_room
from lightning_bigmodels.planner.setting import Setting
from lightning_bigmodels.planner.simulation import simulate
from lightning_bigmodels.planner.timing import StepTime, estimate_time

FOLDER = Path(__file__).parent
GIB = 2**30
BLOCK = 512
LEFT_OUT = """\
float8 and mxfp8 products (their time; of alike ones the memory too), pipeline or context parallelism, ZeRO-1
with tensor parallelism (all of nanotron), sequence parallelism and asynchronous tensor parallelism, weights of 4 bits,
offload of activations, Muon on a network of its own (modded-nanogpt), compilers other than torch's, a power limit,
rows of unlike lengths (their time), and what is not in print: checkpointed blocks (fms-fsdp's larger networks) or a
configuration (torchtune's table of 2025)"""


def llama(vocabulary: int, width: int, inner: int, layers: int, heads: int, groups: int, tied: bool = False) -> Any:
    return "llama", {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
    }


def litgpt(vocabulary: int, width: int, inner: int, layers: int, heads: int, **more: Any) -> Any:
    sizes = {"vocabulary": vocabulary, "width": width, "inner": inner, "layers": layers, "heads": heads}
    return "litgpt", sizes | more


NETWORKS = {
    "llama2-7b": llama(32000, 4096, 11008, 32, 32, 32),
    "llama2-13b": llama(32000, 5120, 13824, 40, 40, 40),
    "llama2-70b": llama(32000, 8192, 28672, 80, 64, 8),
    "llama3.1-8b": llama(128256, 4096, 14336, 32, 32, 8),
    "llama3.2-3b": llama(128256, 3072, 8192, 28, 24, 8, tied=True),
    "tinyllama": llama(32000, 2048, 5632, 22, 32, 4),
    "gpt2": ("gpt2", {"vocab_size": 50304, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "litgpt-tinyllama": litgpt(32000, 2048, 5632, 22, 32, groups=4),
    "litgpt-phi-1.5": litgpt(51200, 2048, 8192, 24, 32, kind="phi", rotated=0.5, rank=8),
    "litgpt-stablelm-3b": litgpt(50688, 4096, 16384, 16, 32, kind="neox", rotated=0.25, rank=8),
    "litgpt-llama2-7b": litgpt(32000, 4096, 11008, 32, 32, widened=False, rank=8),
    "litgpt-llama2-13b": litgpt(32000, 5120, 13824, 40, 40, widened=False, rank=8),
    "bert-large": (
        "bert",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "attn_implementation": "of_2022",
        },
    ),
}


class Prediction(NamedTuple):
    """What the planner says of a row."""

    row: dict[str, str]
    room: Room
    time: StepTime
    units_per_second: float

    @property
    def memory(self) -> float:
        """GiB of the kind that was published."""
        return {"allocated": self.room.allocated, "reserved": self.room.reserved, "used": self.room.used}[
            self.row["memory_kind"] or "reserved"
        ] / GIB

    @property
    def fits(self) -> str:
        """The verdict."""
        return "yes" if self.room.fits else "no" if self.room.spare < 0 else "maybe"

    @property
    def memory_error(self) -> float | None:
        published = self.row["memory_gib"]
        return None if not published or published.startswith(">") else self.memory / float(published) - 1

    @property
    def time_error(self) -> float | None:
        """Error of the time, not of its inverse."""
        published = self.row["units_per_s"]
        return float(published) / self.units_per_second - 1 if published else None


def setting_of(row: dict[str, str]) -> Setting:
    return Setting(
        strategy=row["strategy"],
        precision=row["precision"],
        devices=int(row["devices"]),
        num_nodes=int(row["nodes"]),
        batch_size=int(row["batch"]),
        accumulate_grad_batches=int(row["accumulate"]),
    )


def trace_of(row: dict[str, str]) -> Any:
    if row["network"] not in NETWORKS:
        classifier = ImageClassifier(row["network"], num_classes=1000, channels=3, image_size=int(row["length"]))
        pictures = Images("sklearn-digits", image_size=int(row["length"]), channels=3)
        return simulate(classifier, pictures, setting_of(row), BLOCK, like_cuda=True)
    architecture, config = NETWORKS[row["network"]]
    model = Published(
        architecture,
        config,
        checkpointing=row["checkpointing"],
        compile=row["compile"] == "yes",
        loss=row["loss"],
        optimizer=row["optimizer"],
        keep_gradients=row["gradients"] == "kept",
    )
    data = Tokens(int(row["length"]), classes=2 if architecture == "bert" else None)
    return simulate(model, data, setting_of(row), BLOCK, like_cuda=True)


def predict(row: dict[str, str], trace: Any, hardware: Hardware) -> Prediction:
    setting = setting_of(row)
    step = estimate_time(trace, setting, hardware, compiled=row["compile"] == "yes")
    units = int(row["length"]) if row["network"] in NETWORKS else 1
    units *= setting.batch_size * setting.accumulate_grad_batches
    return Prediction(row, estimate_room(trace, setting, hardware), step, units / step.seconds)


def print_table(predictions: list[Prediction]) -> None:
    print(f"{'row':<20}{'memory':>10}{'published':>11}{'error':>8}  {'kind':<10}{'fits':<6}", end="")
    print(f"{'units/s':>9}{'published':>11}{'error of time':>15}  bound by")
    for each in predictions:
        row = each.row
        memory, seconds = each.memory_error, each.time_error
        print(
            f"{row['id']:<20}{each.memory:>10.2f}{row['memory_gib'] or '-':>11}{_percent(memory):>8}  "
            f"{row['memory_kind'] or '-':<10}{each.fits:<6}"
            f"{each.units_per_second:>9.0f}{row['units_per_s'] or '-':>11}{_percent(seconds):>15}  {each.time.bound}"
        )


def print_summary(predictions: list[Prediction]) -> None:
    for use in ("calibration", "held-out"):
        memory = [each.memory_error for each in predictions if each.row["memory_use"] == use]
        seconds = [each.time_error for each in predictions if each.row["time_use"] == use]
        print(f"\n{use}")
        for name, errors in (("memory", memory), ("time", seconds)):
            sizes = sorted(abs(error) for error in errors if error is not None)
            if sizes:
                decile = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
                print(
                    f"  {name:<8}{len(sizes):>3} rows: median error {statistics.median(sizes):.1%}, "
                    f"ninth decile {decile:.1%}, largest {sizes[-1]:.1%}"
                )
    low = [each.row["id"] for each in predictions if each.room.fits and (each.memory_error or 0) < -0.05]
    print(f"\nmore than 5 % below the published memory where the verdict is that it fits: {', '.join(low) or 'none'}")
    ran = [each for each in predictions if not each.row["memory_gib"].startswith(">")]
    for verdict, words in (("no", "does not fit"), ("maybe", "may not fit")):
        found = [each.row["id"] for each in ran if each.fits == verdict]
        print(f"ran in print where the verdict is that it {words}: {', '.join(found) or 'none'}")
    over = [each.row["id"] for each in predictions if each.row["memory_gib"].startswith(">") and each.room.fits]
    print(f"out of memory in print where the verdict is that it fits: {', '.join(over) or 'none'}")


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", default=str(FOLDER / "planner_rows.csv"), help="CSV file of measured runs")
    parser.add_argument(
        "--hardware", default=str(FOLDER / "planner_hardware.csv"), help="devices besides the package's"
    )
    parser.add_argument("--only", nargs="+", metavar="ID", help="these rows alone")
    parser.add_argument("--left_out", action="store_true", help="say what cannot be expressed, and end")
    arguments = parser.parse_args()
    if arguments.left_out:
        print(LEFT_OUT)
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with Path(arguments.rows).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not arguments.only or row["id"] in arguments.only]
    start = time.perf_counter()
    traces: dict[tuple[str, ...], Any] = {}
    predictions = []
    for row in rows:
        key = tuple(value for name, value in row.items() if name in TRACED)
        if key not in traces:
            traces[key] = trace_of(row)
        predictions.append(predict(row, traces[key], find_hardware(row["gpu"], arguments.hardware)))
    print_table(predictions)
    print_summary(predictions)
    print(f"{len(traces)} steps traced in {time.perf_counter() - start:.0f} s")


TRACED = {
    *("network", "length", "batch", "accumulate", "devices", "nodes", "strategy", "precision"),
    *("checkpointing", "compile", "loss", "optimizer", "gradients"),
}
"""Columns on which a trace depends."""


if __name__ == "__main__":
    main()
