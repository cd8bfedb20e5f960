"""What the family contract needs to know of recipes on `Text`: a tiny version, a baseline, and what can be broken."""

import math
from collections import Counter

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lightning_bigmodels import Text
from tests import contract


class Contract(contract.Contract):
    metric = "val_bits_per_byte"
    steps = 60
    short_steps = 6

    def tiny(self, recipe, folder):
        overrides = tiny_text(recipe["model"]["init_args"]["architecture"], folder)
        if recipe["trainer"].get("accumulate_grad_batches", 1) > 1:
            # an even number of batches in each epoch, so that the last step comes with a validation
            overrides["trainer"] |= {"accumulate_grad_batches": 2, "limit_train_batches": 40}
            overrides["data"]["init_args"]["batch_size"] //= 2
        return overrides

    def baseline(self, data_args):
        return no_context(Text(**data_args))

    def better(self, found, baseline):
        return min(found) < 0.97 * baseline

    def predictions(self, folder, scratch):
        texts = ["The class", "If", "A name"]
        prompts = scratch / "prompts.txt"
        prompts.write_text("\n".join(texts), encoding="utf-8")

        def three(rows, folder):
            assert len(rows) == 3

        def ours(rows, folder):
            assert [row["prompt"] for row in rows] == texts

        return [([], three), (["--data.prompts", str(prompts)], ours)]

    def answers(self, model):
        return model.generate(["The class"]) != [""]

    def check_export(self, folder, checkpoint):
        expected = torch.load(checkpoint, weights_only=True)["state_dict"]
        for key, value in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
            assert torch.equal(value, expected[f"network.{key}"]), key

    def broken(self, folder):
        return broken_text(folder)

    def without_randomness(self, recipe):
        names = CONFIG_MAPPING[recipe["model"]["init_args"]["architecture"]].__dataclass_fields__
        dropouts = [name for name in names if name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")]
        return [f"--model.config.{name}=0" for name in dropouts]


def tiny_text(architecture, folder):
    """Return the overrides that make any recipe on `Text` train within seconds; its source is `folder`/text.txt."""
    config = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    config |= {positions: 64}
    if architecture != "gpt2":
        config |= {"intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 2}
    return {
        "trainer": {
            "val_check_interval": Contract.steps // 2,
            "check_val_every_n_epoch": None,
            "max_steps": Contract.steps,
            "max_epochs": -1,
        },
        "model": {
            "init_args": {
                "config": config,
                "compile": False,
                "max_new_tokens": 8,
                "optimizer": {"init_args": {"lr": 0.02}},
                "schedule": {"init_args": {"warmup": 2}},
            }
        },
        "data": {
            "init_args": {
                "sources": str(folder / "text.txt"),
                "encoding": "utf-8",
                "val_fraction": 0.1,
                "test_fraction": 0.1,
                "tokenizer": None,
                "vocab_size": 300,
                "block_size": 32,
                "eval_stride": None,
                "batch_size": 16,
                "num_workers": 0,
                "num_prompts": 3,
                "cache_dir": str(folder / "cache"),
            }
        },
    }


def no_context(data):
    """Return the bits per byte of the best model that ignores context: the tokens' own frequencies."""
    data.prepare_data()
    data.setup("fit")
    counts = Counter(t for batch in data.train_dataloader() for t in batch["labels"].flatten().tolist())
    total, nats, num_bytes = counts.total() + data.vocab_size, 0.0, 0
    for batch in data.val_dataloader():
        num_bytes += int(batch["num_bytes"].sum())
        counted = batch["labels"][batch["labels"] != -100]
        nats -= sum(math.log((counts[t] + 1) / total) for t in counted.tolist())
    return nats / math.log(2) / num_bytes


def broken_text(folder):
    """Return what can be wrong with text: overrides, and what the one line must say."""
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1") * 100)
    (folder / "short.txt").write_text("Too short.")
    (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (folder / "other.jsonl").write_text('{"txt": "one"}\n')

    def source(file):
        return ["--data.sources", str(folder / file)]

    return [
        (source("gone.txt"), ["gone.txt"]),
        (source("empty.txt"), ["empty.txt", "empty"]),
        (source("latin.txt"), ["latin.txt", "byte 3", "encoding"]),
        (source("short.txt"), ["short.txt", "block_size"]),
        (source("rows.jsonl"), ["rows.jsonl", "line 2"]),
        (source("other.jsonl"), ["other.jsonl", "line 1", "no column 'text'", "'txt'"]),
        (["--data.block_size", "99"], ["block_size is 99", "64 positions"]),
        (["--data.vocab_size", "320"], ["320 tokens", "vocab_size is 300"]),
    ]
