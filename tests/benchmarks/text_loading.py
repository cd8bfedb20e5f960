"""Measures how fast text becomes tokens and tokens become batches: `python tests/benchmarks/text_loading.py`."""

import argparse
import random
import tempfile
import time
from pathlib import Path

from lightning_bigmodels.data.datamodule import DataModule
from lightning_bigmodels.data.sources import Corpus
from lightning_bigmodels.data.text import Text
from lightning_bigmodels.data.token_cache import prepare
from lightning_bigmodels.data.tokenizer import train_tokenizer


def write_text(path: Path, megabytes: float) -> None:
    """Fill a file with the paragraphs of the Python language reference, shuffled anew until it is large enough."""
    paragraphs = [paragraph for topic in Corpus("python-docs").documents() for paragraph in topic.split("\n\n")]
    generator = random.Random(0)
    with path.open("w") as file:
        while file.tell() < megabytes * 1e6:
            generator.shuffle(paragraphs)
            file.write("\n\n".join(paragraphs) + "\n\n")


def epoch_seconds(text: DataModule, epochs: int) -> tuple[int, float]:
    """Return the tokens of some epochs and the seconds they took, workers running already."""
    loader = text.train_dataloader()
    next(iter(loader))
    tokens, start = 0, time.perf_counter()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        tokens += sum(batch["input_ids"].numel() for batch in loader)
    return tokens, time.perf_counter() - start


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        write_text(file, args.megabytes)
        size = file.stat().st_size / 1e6
        tokenizer = train_tokenizer(Corpus("python-docs").documents(), args.vocab_size)
        tokenizer.save_pretrained(f"{folder}/tokenizer")
        options = {
            "sources": str(file),
            "tokenizer": f"{folder}/tokenizer",
            "block_size": args.block_size,
            "batch_size": args.batch_size,
            "cache_dir": f"{folder}/cache",
        }
        text = Text(**options)
        start = time.perf_counter()
        prepare(text.cache_dir, text.text, tokenizer, args.vocab_size, lambda sentence: None)
        seconds = time.perf_counter() - start
        text.setup()
        tokens = sum(text.splits.values())
        print(f"{'what':<24}{'tokens':>12}{'seconds':>10}{'tokens/s':>14}{'MB/s':>8}")
        print(f"{'tokenize one file':<24}{tokens:>12,}{seconds:>10.2f}{tokens / seconds:>14,.0f}{size / seconds:>8.2f}")
        for number in args.num_workers:
            text = Text(num_workers=number, **options)
            text.setup()
            tokens, seconds = epoch_seconds(text, 3)
            print(f"{f'load, {number} workers':<24}{tokens:>12,}{seconds:>10.2f}{tokens / seconds:>14,.0f}")


if __name__ == "__main__":
    main()
