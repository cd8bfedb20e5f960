"""Networks trained as the programs did whose measurements were published, for the planner to plan."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from litgpt_networks import Decoder
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.optimization import Adafactor

from lightning_bigmodels.optim import AdamW8bit
from lightning_bigmodels.tasks import Task

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Tokens(LightningDataModule):
    """Batches of token numbers."""

    def __init__(self, length: int, classes: int | None = None) -> None:
        super().__init__()
        self.length, self.classes = length, classes

    def example_batch(self, batch_size: int) -> dict[str, Tensor]:
        ids = torch.zeros(batch_size, self.length, dtype=torch.int64)
        labels = ids.clone() if self.classes is None else torch.zeros(batch_size, dtype=torch.int64)
        return {"input_ids": ids, "labels": labels}


def optimizer_of(kind: str, keep: bool) -> Callable[[Any], Optimizer]:
    """Return what makes an optimizer that lets go of gradients after each update, as hand-written loops do.

    Args:
        kind: `fused`, `foreach` or `loop`, which are AdamW in one kernel, of all parameters at once and of one after
            the other; `adafactor`, which is of the last sort; or `adamw8bit`, this package's.
        keep: Gradients stay: Lightning lets go of them before the next backward pass.
    """

    def make(parameters: Any) -> Optimizer:
        optimizer: Optimizer
        if kind == "adafactor":
            optimizer = Adafactor(parameters, lr=5e-5, scale_parameter=False, relative_step=False)
        elif kind == "adamw8bit":
            optimizer = AdamW8bit(parameters)
        else:
            optimizer = AdamW(parameters, fused=kind == "fused", foreach=kind == "foreach")
        if not keep:
            optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        return optimizer

    return make


class Published(Task):
    """A network of transformers with its whole logits at once, sharded and checkpointed as torchtitan does.

    Args:
        architecture: Model type in transformers, or `litgpt`.
        config: Its configuration.
        checkpointing: `none`, `full`, `layer` (every second block) or `operation` (within each block every second
            product and attention are kept).
        compile: Whether the blocks are compiled.
        loss: `plain`, of float32 logits; `held`, where these are in chunks of 128 and stay until the step is over;
            `compiled`, which keeps the logits in their own format alone, or `chunked`, which does so for an eighth of
            them at a time.
        optimizer: As for `optimizer_of`.
        keep_gradients: Whether gradients are set to zero, as torch 1 did, instead of let go of.
    """

    def __init__(
        self,
        architecture: str,
        config: dict[str, Any],
        checkpointing: str = "none",
        compile: bool = False,
        loss: str = "plain",
        optimizer: str = "fused",
        keep_gradients: bool = False,
    ) -> None:
        super().__init__(optimizer=optimizer_of(optimizer, keep_gradients), compile=compile)
        self.architecture, self.config, self.checkpointing = architecture, config, checkpointing
        self.activation_checkpointing = checkpointing != "none"
        self.loss, self.keep_gradients = loss, keep_gradients

    def build_network(self) -> nn.Module:
        network: Any
        if self.architecture == "litgpt":
            network = Decoder(**self.config)
        else:
            config = AutoConfig.for_model(self.architecture, use_cache=False, **self.config)
            auto = AutoModelForSequenceClassification if self.architecture == "bert" else AutoModelForCausalLM
            network = auto.from_config(config, dtype=torch.get_default_dtype())
        self.network = network
        every = {"none": 0, "layer": 2}.get(self.checkpointing, 1)
        for number, block in enumerate(self.blocks()):
            if every and number % every == 0:
                contexts = {"context_fn": _every_second_product} if self.checkpointing == "operation" else {}
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)
        return network

    def blocks(self) -> list[nn.Module]:
        names = set(self.network._no_split_modules or ())
        return [module for module in self.network.modules() if type(module).__name__ in names]

    def configure_model(self) -> None:
        if self.device_mesh is None:
            super().configure_model()
            return
        if self.network is not None:
            return
        network = self.build_network()
        # parameters in float32 are gathered in bfloat16
        narrow = torch.get_default_dtype() == torch.bfloat16
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16 if narrow else torch.float32)
        options = {"mesh": self.device_mesh["data_parallel"], "mp_policy": policy}
        parts = [*self.blocks(), network.get_input_embeddings(), network.get_output_embeddings()]
        for part in parts:
            fully_shard(part, **options)
        fully_shard(network, **options)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=not self.keep_gradients)

    def step(self, phase: Any, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"].flatten()
        if self.loss == "plain":
            return _cross_entropy(self.network(input_ids=batch["input_ids"]).logits.flatten(0, -2), labels)
        logits = self.network(input_ids=batch["input_ids"]).logits.flatten(0, -2)
        if self.loss == "held":
            self.logits = [rows.float() for rows in logits.split(128)]
            losses = [
                F.cross_entropy(rows, targets, reduction="none")
                for rows, targets in zip(self.logits, labels.split(128), strict=True)
            ]
            return torch.cat(losses).mean()
        chunks = 8 if self.loss == "chunked" else 1
        parts = zip(logits.chunk(chunks), labels.chunk(chunks), strict=True)
        losses = [_FusedCrossEntropy.apply(rows, targets) for rows, targets in parts]
        return torch.stack(losses).mean()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


class _SoftmaxOfTorch1(torch.autograd.Function):
    """Keeps its input besides its result.

    Before 1.11, torch's formula of the gradient took the input for the sake of its format alone.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        result = scores.softmax(dim=-1)
        ctx.save_for_backward(scores, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        scores, result = ctx.saved_tensors
        return torch._softmax_backward_data(gradients[0], result, -1, scores.dtype)


def attention_of_2022(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention written out, as in the BERT of transformers 4.15: a mask in the parameters' format is always added."""
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    everything = torch.zeros(query.shape[0], 1, 1, key.shape[2], dtype=torch.float32)
    weights = F.dropout(_SoftmaxOfTorch1.apply(scores + everything), kwargs["dropout"], module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("of_2022", attention_of_2022)


class _FusedCrossEntropy(torch.autograd.Function):
    """Reads, writes and keeps what a compiled loss does; its values are none."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.sum(dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradients[0].to(ctx.saved_tensors[0].dtype), None


def _every_second_product() -> Any:
    counts = {True: 0, False: 0}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator is torch.ops.aten.mm.default:
            counts[context.is_recompute] += 1
            kept = counts[context.is_recompute] % 2 == 1
        else:
            kept = operator is _ATTENTION
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
