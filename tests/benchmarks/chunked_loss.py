"""Peak memory and speed of the chunked loss against the plain one: `python tests/benchmarks/chunked_loss.py`.

A step is forward and backward. Memory is what torch's allocator was asked for, weights and gradients included.
"""

import argparse
import inspect
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torch.nn.functional as F
from peak_memory import peak_bytes
from torch import Tensor, nn

from lightning_bigmodels.modules import CausalLanguageModel
from lightning_bigmodels.tasks.chunked_loss import chunked_cross_entropy

MEBIBYTE = 2**20


DEFAULT_CHUNK = inspect.signature(CausalLanguageModel).parameters["loss_chunk_size"].default


def head_step(head: nn.Linear, hidden: Tensor, labels: Tensor, chunk: int | None, bf16: bool) -> None:
    """Take the loss of an output layer and its gradients; `chunk` None is all logits at once."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if chunk is None:
            loss = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
        else:
            loss = chunked_cross_entropy(head, hidden, labels, list(head.parameters()), chunk)
    (loss / len(labels)).backward()


def model_step(module: CausalLanguageModel, ids: Tensor, labels: Tensor, plain: bool, bf16: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if plain:
            logits = module.network(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        else:
            loss, _ = module.summed_loss(ids, labels)
    (loss / labels.numel()).backward()


def fresh_peak(module: nn.Module, step: Callable[[], None]) -> float:
    module.zero_grad(set_to_none=True)
    weights = sum(p.nbytes for p in module.parameters())
    peak = peak_bytes(step, held=weights) / MEBIBYTE
    module.zero_grad(set_to_none=True)
    return peak


def print_memory(vocabulary: int, rows: int, length: int, width: int, bf16: bool) -> None:
    size = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": length}
    module = CausalLanguageModel("llama", {**size, **heads})
    module.configure_model()
    ids = torch.randint(vocabulary, (rows, length))
    head = nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(rows * length, width, requires_grad=True)
    labels = ids.flatten()
    chunk = DEFAULT_CHUNK

    def of_head(size: int | None) -> float:
        hidden.grad = None
        return fresh_peak(head, lambda: head_step(head, hidden, labels, size, bf16))

    def of_model(plain: bool) -> float:
        return fresh_peak(module, lambda: model_step(module, ids, ids, plain, bf16))

    for name, plain, chunked in (
        ("output layer and loss", of_head(None), of_head(chunk)),
        ("network of 2 layers", of_model(True), of_model(False)),
    ):
        ratio = chunked / plain
        print(
            f"  {'bf16' if bf16 else 'fp32'}  {name:<24}{plain:>10,.1f} MiB{chunked:>10,.1f} MiB{ratio:>8.2f}"
            f"   at most 0.60: {'PASS' if ratio <= 0.6 else 'MISSED'}"
        )


def print_speed(vocabulary: int, tokens: int, width: int, bf16: bool, chunks: list[int], repeats: int) -> None:
    """Print the step time of each chunk size relative to the plain loss; they take turns."""
    head = nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(tokens, width, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    sizes: list[int | None] = [None, *(chunk for chunk in chunks if chunk <= tokens)]
    times: dict[int | None, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats + 1):
        for size in sizes:
            head.zero_grad(set_to_none=True)
            hidden.grad = None
            start = time.perf_counter()
            head_step(head, hidden, labels, size, bf16)
            times[size].append(time.perf_counter() - start)
    plain = times.pop(None)[1:]
    ratios = {
        size: statistics.median(b / a for a, b in zip(plain, own[1:], strict=True)) for size, own in times.items()
    }
    print(
        f"  {'bf16' if bf16 else 'fp32'}  vocabulary {vocabulary:>6,}  plain {statistics.median(plain) * 1e3:>7.1f} ms;"
        f" default {DEFAULT_CHUNK}; " + "  ".join(f"{size}: {ratio:.2f}" for size, ratio in ratios.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=50257, help="Of the memory measurement.")
    parser.add_argument("--rows", type=int, default=4, help="Of the memory measurement.")
    parser.add_argument("--length", type=int, default=1024, help="Of the memory measurement, in tokens.")
    parser.add_argument("--width", type=int, default=320, help="Hidden width.")
    parser.add_argument("--repeats", type=int, default=7, help="Of each timing.")
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096], help="Sizes to time.")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"Peak tensor memory of a step, vocabulary {args.vocabulary:,}, {args.rows} x {args.length:,} tokens:")
    print(f"  {'':<30}{'plain':>14}{'chunked':>14}{'ratio':>8}")
    for bf16 in (False, True):
        print_memory(args.vocabulary, args.rows, args.length, args.width, bf16)
    print("\nTime of output layer and loss, 4,096 tokens, by chunk size, relative to the plain loss:")
    for vocabulary in (2048, 4096, 50257):
        repeats = args.repeats if vocabulary < 20_000 else max(1, args.repeats // 2)
        for bf16 in (False, True):
            print_speed(vocabulary, 4096, args.width, bf16, args.chunks, repeats)


if __name__ == "__main__":
    main()
