"""Transformer language models from transformers, trained from scratch or from a pretrained folder."""

import json
from collections.abc import Sequence
from typing import Any, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lightning_bigmodels.data.tokenizer import load_tokenizer, same_tokenizer, tokenizer_from_files, tokenizer_to_files
from lightning_bigmodels.errors import InputError
from lightning_bigmodels.modules import huggingface
from lightning_bigmodels.modules.decoding import sampler
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.tasks import LanguageModeling
from lightning_bigmodels.tasks.chunked_loss import chunked_cross_entropy


@final
class CausalLanguageModel(LanguageModeling):
    """A decoder-only Transformer language model of any architecture that transformers knows.

    From scratch (`architecture` and `config`) or from a pretrained folder or hub name, tokenizer included.

    Args:
        architecture: Model type in transformers, such as gpt2, llama, qwen3 or mixtral; random weights.
        config: Values of the architecture's configuration, under transformers' own names.
        pretrained: Local folder or hub name to start from, in place of `architecture`.
        optimizer: From parameter groups to an optimizer; None is AdamW with lr 1e-3 and weight decay 0.1.
        schedule: From optimizer and total steps to a scheduler, stepped after each optimizer step; None is constant.
        l1_penalty: Weight of the sum of absolute values of all decayed parameters, added to the training loss.
        activation_checkpointing: Recompute each block in the backward pass: less memory, about a third more time.
        compile: Run the Transformer's body through torch.compile in training and evaluation.
        loss_chunk_size: Tokens whose logits are held at a time.
        max_new_tokens: Longest completion in tokens.
        temperature: Divides the logits before sampling; 0 takes the likeliest token.
        top_k: Sample from the k likeliest tokens; None from all.
        top_p: Sample from the smallest set of tokens with this probability in sum; None from all.
        generation_seed: With a prompt's place it fixes the prompt's completion.

    Raises:
        InputError: Unknown architecture or configuration key, both or neither of `architecture` and `pretrained`, a
            value out of range.
    """

    network: PreTrainedModel | None
    predict_help = "generate text"

    def __init__(
        self,
        architecture: str | None = None,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        optimizer: OptimizerCallable | None = None,
        schedule: ScheduleCallable | None = None,
        l1_penalty: float = 0.0,
        activation_checkpointing: bool = False,
        compile: bool = False,
        loss_chunk_size: int = 512,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        generation_seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, schedule=schedule, l1_penalty=l1_penalty, compile=compile)
        if (architecture is None) == (pretrained is None):
            raise InputError("set either architecture (random weights) or pretrained (a folder or hub name)")
        if architecture is not None:
            huggingface.check_architecture(architecture, config or {})
        bounds = {
            "loss_chunk_size": loss_chunk_size >= 1,
            "max_new_tokens": max_new_tokens >= 1,
            "temperature": temperature >= 0,
            "top_k": top_k is None or top_k >= 1,
            "top_p": top_p is None or 0 < top_p <= 1,
        }
        for name, holds in bounds.items():
            if not holds:
                limit = {"temperature": "0 or more", "top_p": "above 0 and at most 1"}.get(name, "1 or more")
                raise InputError(f"{name} is {locals()[name]}; it must be {limit}")
        self.architecture = architecture
        self.config_overrides = dict(config or {})
        self.pretrained = pretrained
        self.activation_checkpointing = activation_checkpointing
        self.loss_chunk_size = loss_chunk_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.generation_seed = generation_seed
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._forward: huggingface.SplitForward | None = None
        self._flops: dict[tuple[int, int], int | None] = {}
        self._batch_shape: tuple[int, int] | None = None
        self.save_hyperparameters()

    # ---- the network

    def network_config(self) -> PreTrainedConfig:
        """Return the configuration of the network, with the values that a decoder needs.

        Raises:
            InputError: The configuration's values do not fit together, or `pretrained` holds none.
        """
        if self.pretrained is not None:
            return huggingface.pretrained_config(self.pretrained, self.config_overrides)
        assert self.architecture is not None
        return huggingface.scratch_config(self.architecture, self.config_overrides)

    @override
    def build_network(self) -> PreTrainedModel:
        config = self.network_config()
        if self.pretrained is None:
            network = huggingface.scratch_network(config)
        else:
            network = huggingface.pretrained_network(self.pretrained, config)
        if self.activation_checkpointing:
            # the name that transformers 6 will keep, where the release has it; the first argument is the same
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return network

    @override
    def configure_model(self) -> None:
        super().configure_model()
        if self._forward is None:
            assert self.network is not None
            self._forward = huggingface.SplitForward(self.network, compile=self.compile_network)

    @override
    def output_modules(self) -> list[nn.Module]:
        assert self.network is not None
        head = self.network.get_output_embeddings()
        return [] if head is None else [head]

    @override
    def blocks(self) -> list[nn.Module]:
        assert self.network is not None
        names = set(self.network._no_split_modules or ())
        return [module for module in self.network.modules() if type(module).__name__ in names]

    @override
    def tensor_parallel_plan(self, size: int) -> dict[str, ParallelStyle]:
        assert self.network is not None
        return huggingface.tensor_parallel_plan(self.network, size)

    # ---- data and tokenizer

    @override
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is None:
            return
        config = self.network_config().get_text_config()
        if len(tokenizer) > config.vocab_size:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens and the network's vocab_size is {config.vocab_size}; "
                f"set model.config.vocab_size to {len(tokenizer)} or more"
            )
        positions = getattr(config, "max_position_embeddings", None)
        block_size = getattr(data, "block_size", None)
        if positions is not None and block_size is not None and block_size > positions:
            raise InputError(
                f"data.block_size is {block_size} and the network has {positions} positions; lower block_size or "
                f"raise max_position_embeddings in model.config"
            )
        if self.pretrained is not None and self.tokenizer is None:
            own = load_tokenizer(self.pretrained)
            if not same_tokenizer(own, tokenizer):
                raise InputError(
                    f"the data's tokenizer is not the one of {self.pretrained!r}, so its token numbers mean other "
                    f"words to the network; set data.tokenizer to {self.pretrained!r}"
                )
        self.tokenizer = tokenizer

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.tokenizer is not None:
            checkpoint["tokenizer"] = tokenizer_to_files(self.tokenizer)

    @override
    def lasting_hyper_parameters(self) -> dict[str, Any]:
        if self.pretrained is None:
            return {}
        assert self.network is not None
        config = json.loads(self.network.config.to_json_string(use_diff=True))
        known = huggingface.known_keys(config["model_type"])
        return {
            "architecture": config["model_type"],
            "config": {key: value for key, value in config.items() if key in known},
            "pretrained": None,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        files = checkpoint.get("tokenizer")
        if files is None:
            return
        tokenizer = tokenizer_from_files(files)
        if self.tokenizer is not None and not same_tokenizer(self.tokenizer, tokenizer):
            raise InputError(
                f"the data's tokenizer ({len(self.tokenizer)} tokens) is not the one in the checkpoint "
                f"({len(tokenizer)} tokens); set data.tokenizer to the checkpoint's path to use the one inside"
            )
        self.tokenizer = tokenizer

    # ---- loss

    @override
    def summed_loss(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert self.network is not None
        assert self._forward is not None
        self._batch_shape = (input_ids.shape[0], input_ids.shape[1])
        hidden, outputs = self._forward.body(input_ids)
        nats = chunked_cross_entropy(
            self._forward.logits,
            hidden.flatten(0, 1),
            labels.flatten(),
            self._forward.head_parameters(),
            self.loss_chunk_size,
        )
        balance = getattr(outputs, "aux_loss", None)
        extra = nats.new_zeros(()) if balance is None else self.network.config.router_aux_loss_coef * balance
        return nats, extra

    @property
    def flops_per_batch(self) -> int | None:
        """Floating-point operations of forward and backward for the last batch's shape, without recomputation."""
        if self._batch_shape is None:
            raise RuntimeError("flops_per_batch is known after the first batch")
        if self._batch_shape not in self._flops:
            assert self.network is not None
            self._flops[self._batch_shape] = huggingface.count_flops(self.network.config, *self._batch_shape)
        return self._flops[self._batch_shape]

    # ---- generation

    @override
    @torch.no_grad()
    def generate(self, prompts: Sequence[str], indices: Sequence[int] | None = None) -> list[str]:
        network = self.network
        if network is None:
            raise RuntimeError("generate needs the network; call configure_model or load a checkpoint first")
        tokenizer = self._own_tokenizer()
        rows = self._encode(prompts)
        longest = max(len(row) for row in rows)
        end = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        places = range(len(prompts)) if indices is None else indices
        seeds = [self.generation_seed * 1_000_003 + place for place in places]
        was_training = network.training
        network.eval()
        output = network.generate(
            input_ids=ids,
            attention_mask=mask,
            logits_processor=sampler(seeds, self.temperature, self.top_k, self.top_p),
            generation_config=GenerationConfig(
                max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=pad
            ),
            # the processes of a sharded network answer each other's forward passes until the last has ended
            synced_gpus=self.device_mesh is not None,
        )
        network.train(was_training)
        new = output[:, longest:]
        return tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @override
    def check_prompts(self, prompts: Sequence[str]) -> None:
        self._encode(prompts)

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        assert self.network is not None
        tokenizer = self._own_tokenizer()
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        rows = [tokenizer(prompt)["input_ids"] or [start] for prompt in prompts]
        longest = max(len(row) for row in rows)
        positions = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and longest + self.max_new_tokens > positions:
            raise InputError(
                f"a prompt of {longest} tokens and max_new_tokens {self.max_new_tokens} exceed the network's "
                f"{positions} positions; lower max_new_tokens to {max(0, positions - longest)} or shorten the prompt"
            )
        return rows

    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None and self.pretrained is not None:
            self.tokenizer = load_tokenizer(self.pretrained)
        if self.tokenizer is None:
            raise InputError(
                "the model has no tokenizer; load one of its checkpoints (--ckpt_path) or fit it on Text first"
            )
        return self.tokenizer
