"""The same Llama trained in four ways, all of them watched by one clock that sits on the optimizer."""

import contextlib
import io
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_bigmodels.callbacks import Samples, Throughput
from lightning_bigmodels.data import Text
from lightning_bigmodels.modules import CausalLanguageModel
from lightning_bigmodels.optim import MuonWithAdamW, WarmupCosine

LOG_EVERY = 10
CLIP = 1.0


@dataclass(frozen=True)
class Size:
    """A Llama and its batches; the default has 10.6 M parameters."""

    hidden: int = 320
    intermediate: int = 960
    layers: int = 6
    heads: int = 5
    vocabulary: int = 4096
    rows: int = 16
    length: int = 256

    def llama(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": 1024,
        }


QUICK = Size(hidden=64, intermediate=192, layers=2, heads=2, vocabulary=512, rows=4, length=64)


@dataclass(frozen=True)
class Setting:
    """How a network is trained. `own` lets each contestant use the optimizer and schedule of its own recipe."""

    bf16: bool = False
    compile: bool = False
    own: bool = False
    lr: float = 1e-3
    recipe_callbacks: bool = False

    def __str__(self) -> str:
        return f"{'bf16' if self.bf16 else 'fp32'} {'compiled' if self.compile else 'eager'}"

    def optimizer(self, network: nn.Module) -> Optimizer:
        """Return AdamW with equal settings for all: matrices are decayed, embeddings and norms are not."""
        embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
        decayed = [p for p in network.parameters() if p.ndim == 2 and id(p) not in embeddings]
        chosen = {id(p) for p in decayed}
        rest = [p for p in network.parameters() if id(p) not in chosen]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        return AdamW(groups, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1)


@dataclass
class Clock:
    """Training seconds at the end of each optimizer step, without those that `probe` takes.

    The hook sits on the optimizer, so it is the same for every loop and outside of all compiled code.

    Args:
        probe: Measured after every `probe_every` steps.
    """

    probe: Callable[[], float] | None = None
    probe_every: int = 1
    ends: list[float] = field(default_factory=list)
    probes: list[tuple[int, float, float]] = field(default_factory=list)
    started: float = 0.0

    def start(self) -> None:
        self.started = time.perf_counter()

    def watch(self, optimizer: Optimizer) -> Optimizer:
        optimizer.register_step_post_hook(self._step_done)
        return optimizer

    def _step_done(self, *_: Any) -> None:
        now = time.perf_counter()
        self.ends.append(now - self.started)
        if self.probe is not None and len(self.ends) % self.probe_every == 0:
            self.probes.append((len(self.ends), self.ends[-1], self.probe()))
            self.started += time.perf_counter() - now

    def step_seconds(self, warmup: int) -> list[float]:
        return [b - a for a, b in zip(self.ends[warmup - 1 :], self.ends[warmup:], strict=False)]


class Data:
    """Python's language reference as batches, in the order that `Text` trains on."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.text = self.new_text()
        self.text.prepare_data()
        self.text.setup("fit")

    def new_text(self) -> Text:
        return Text(vocab_size=self.size.vocabulary, block_size=self.size.length, batch_size=self.size.rows)

    def batches(self, steps: int) -> list[dict[str, Tensor]]:
        batches: list[dict[str, Tensor]] = []
        loader = self.text.train_dataloader()
        epoch = 0
        while len(batches) < steps:
            loader.sampler.set_epoch(epoch)
            batches += loader
            epoch += 1
        return batches[:steps]

    def validation_loss(self, logits_of: Callable[[Tensor], Tensor], limit: int | None = None) -> float:
        """Return the mean loss in nats per token, in float32, of any network."""
        nats, tokens = 0.0, 0
        for batch in list(self.text.val_dataloader())[:limit]:
            labels = batch["labels"].flatten()
            with torch.no_grad():
                nats += F.cross_entropy(logits_of(batch["input_ids"]).flatten(0, 1), labels, reduction="sum").item()
            tokens += int((labels != -100).sum())
        return nats / tokens


class Contestant(ABC):
    """A network, and a loop that trains it; the network outlives `train`, so that it is compiled once."""

    name: str
    network: nn.Module

    def __init__(self, data: Data, setting: Setting) -> None:
        self.data = data
        self.size = data.size
        self.setting = setting

    def logits(self, ids: Tensor) -> Tensor:
        return self.network(input_ids=ids, use_cache=False).logits

    def load(self, llama_weights: dict[str, Tensor]) -> None:
        """Start from these weights, named as transformers' Llama names them."""
        self.network.load_state_dict(llama_weights)
        self.network.zero_grad(set_to_none=True)

    def train(self, steps: int, clock: Clock) -> None:
        """Train with a new optimizer for some steps, from the first batch on."""
        self.network.train()
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            batches = self.data.batches(steps)
            clock.start()
            self.run(batches, clock, folder)
        assert len(clock.ends) == steps, f"{self.name} did {len(clock.ends)} steps of {steps}"

    @abstractmethod
    def run(self, batches: list[dict[str, Tensor]], clock: Clock, folder: str) -> None:
        """Train on the batches; nothing but that is timed."""


def llama(size: Size, **values: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model("llama", **size.llama(), **values)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class OurFit(Contestant):
    """`Trainer.fit` of our module with our data, metrics, CSV log and Throughput callback."""

    name = "a  our fit"

    def __init__(self, data: Data, setting: Setting) -> None:
        super().__init__(data, setting)
        config = {**self.size.llama(), "attn_implementation": "eager" if setting.own else "sdpa"}
        self.module = CausalLanguageModel("llama", config, compile=setting.compile)
        self.module.configure_model()
        self.network = self.module.network
        if setting.own:
            # those of recipes/text/quickstart.yaml
            self.make_optimizer = partial(MuonWithAdamW, lr=0.02, adamw_lr=0.003, weight_decay=0.1)
            self.module.schedule = partial(WarmupCosine, warmup=0.05, final=0.0)
        else:
            self.make_optimizer = partial(AdamW, lr=setting.lr, betas=(0.9, 0.95), weight_decay=0.1)

    def run(self, batches: list[dict[str, Tensor]], clock: Clock, folder: str) -> None:
        self.module.optimizer = lambda groups: clock.watch(self.make_optimizer(groups))
        callbacks = [Throughput()]
        if self.setting.recipe_callbacks:
            callbacks += [
                ModelCheckpoint(monitor="val_bits_per_byte", mode="min", filename="best", save_last=True),
                LearningRateMonitor(),
                Samples(["A class definition", "The following", "If the"]),
            ]
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=len(batches),
            max_epochs=-1,
            precision="bf16-mixed" if self.setting.bf16 else "32-true",
            gradient_clip_val=CLIP,
            log_every_n_steps=LOG_EVERY,
            logger=CSVLogger(folder),
            callbacks=callbacks,
            default_root_dir=folder,
            val_check_interval=50,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if self.setting.recipe_callbacks else 0,
            enable_checkpointing=self.setting.recipe_callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # `fit` reads, sets up and orders the data itself; that the batches are the same is seen in the losses
        trainer.fit(self.module, datamodule=self.data.new_text())


class HandWritten(Contestant):
    """A PyTorch loop as one writes it, over batches that lie in memory."""

    name = "b  PyTorch loop"

    def __init__(self, data: Data, setting: Setting) -> None:
        super().__init__(data, setting)
        self.network = llama(self.size)
        self.forward = torch.compile(self.network) if setting.compile else self.network

    def run(self, batches: list[dict[str, Tensor]], clock: Clock, folder: str) -> None:
        optimizer = clock.watch(self.setting.optimizer(self.network))
        for step, batch in enumerate(batches, start=1):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.setting.bf16):
                logits = self.forward(input_ids=batch["input_ids"], use_cache=False).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % LOG_EVERY == 0:
                print(f"step {step}: loss {loss.item():.4f}")


class HuggingFace(Contestant):
    """transformers' Trainer; its own recipe is a linear decay after a warm-up, with its default fused AdamW."""

    name = "c  transformers"

    def __init__(self, data: Data, setting: Setting) -> None:
        super().__init__(data, setting)
        self.network = llama(self.size)

    def run(self, batches: list[dict[str, Tensor]], clock: Clock, folder: str) -> None:
        setting, network = self.setting, self.network

        class Watched(transformers.Trainer):
            def create_optimizer(self, *args: Any) -> Optimizer:
                self.optimizer = super().create_optimizer(*args) if setting.own else setting.optimizer(network)
                return clock.watch(self.optimizer)

        # the labels are shifted already: all tokens of a row are predicted, as in the other contestants
        rows = [
            {"input_ids": ids, "labels": labels, "shift_labels": labels}
            for batch in batches
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        ]
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=len(batches),
            per_device_train_batch_size=self.size.rows,
            train_sampling_strategy="sequential",
            learning_rate=setting.lr,
            weight_decay=0.1,
            adam_beta2=0.95,
            lr_scheduler_type="linear" if setting.own else "constant",
            warmup_steps=0.05 if setting.own else 0,
            max_grad_norm=CLIP,
            bf16=setting.bf16,
            torch_compile=setting.compile,
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        Watched(model=network, args=arguments, train_dataset=rows).train()


class LitGPT(Contestant):
    """litgpt's model under `litgpt.pretrain.fit`, its loss and Fabric; in eager mode unless told to compile."""

    name = "d  litgpt"

    def __init__(self, data: Data, setting: Setting) -> None:
        super().__init__(data, setting)
        from litgpt.config import Config
        from litgpt.model import GPT

        config = Config(
            block_size=self.size.length,
            n_layer=self.size.layers,
            n_head=self.size.heads,
            n_embd=self.size.hidden,
            padded_vocab_size=self.size.vocabulary,
            intermediate_size=self.size.intermediate,
            norm_class_name="RMSNorm",
            norm_eps=1e-6,
            mlp_class_name="LLaMAMLP",
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
        )
        self.network = GPT(config)
        self.forward = torch.compile(self.network) if setting.compile else self.network

    def logits(self, ids: Tensor) -> Tensor:
        return self.network(ids)

    def load(self, llama_weights: dict[str, Tensor]) -> None:
        super().load(dict(_litgpt_weights(llama_weights, self.size.layers)))

    def run(self, batches: list[dict[str, Tensor]], clock: Clock, folder: str) -> None:
        from litgpt.args import EvalArgs, TrainArgs
        from litgpt.pretrain import fit

        rows = [torch.cat([b["input_ids"], b["labels"][:, -1:]], dim=1) for b in batches]
        fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if self.setting.bf16 else "32-true")
        optimizer = fabric.setup_optimizers(clock.watch(self.setting.optimizer(self.network)))
        size, lr = self.size, self.setting.lr
        train = TrainArgs(
            global_batch_size=size.rows,
            micro_batch_size=size.rows,
            max_tokens=len(rows) * size.rows * size.length,
            log_interval=LOG_EVERY,
            lr_warmup_steps=0,
            min_lr=lr,
            max_norm=CLIP,
        )
        fit(
            fabric=fabric,
            devices=1,
            state={"model": fabric.setup_module(self.forward), "optimizer": optimizer, "iter_num": 0, "step_count": 0},
            train_dataloader=rows,
            val_dataloader=[rows[0][:1]],  # it insists on a look before it begins
            out_dir=Path(folder),
            tokenizer_dir=None,
            train=train,
            eval=EvalArgs(interval=len(rows) + 1, final_validation=False),
        )


CONTESTANTS: list[type[Contestant]] = [OurFit, HandWritten, HuggingFace, LitGPT]


def _litgpt_weights(weights: dict[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    """Rename the weights of transformers' Llama; litgpt holds query, key and value in one matrix."""
    yield "lm_head.weight", weights["lm_head.weight"]
    yield "transformer.wte.weight", weights["model.embed_tokens.weight"]
    yield "transformer.ln_f.weight", weights["model.norm.weight"]
    names = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    }
    for layer in range(layers):
        theirs, ours = f"transformer.h.{layer}", f"model.layers.{layer}"
        for new, old in names.items():
            yield f"{theirs}.{new}.weight", weights[f"{ours}.{old}.weight"]
        parts = [weights[f"{ours}.self_attn.{part}_proj.weight"] for part in "qkv"]
        yield f"{theirs}.attn.qkv.weight", torch.cat(parts)
