"""Transformer language models from transformers, trained from scratch or from a pretrained folder."""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typing_extensions import override

from lightning_bigmodels.data.tokenizer import load_tokenizer, same_tokenizer, tokenizer_from_files, tokenizer_to_files
from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.modules.decoding import sampler
from lightning_bigmodels.optim import ScheduleCallable
from lightning_bigmodels.tasks import LanguageModeling
from lightning_bigmodels.tasks.chunked_loss import chunked_cross_entropy

# enough rows of logits for full speed, few enough that they stay small: 2^23 float32 are 32 MiB
_CHUNK_ELEMENTS = 2**23


@final
class CausalLanguageModel(LanguageModeling):
    """A decoder-only Transformer language model of any architecture that transformers knows.

    From scratch (`architecture` and `config`) or from a pretrained folder or hub name, tokenizer included.

    Args:
        architecture: Model type in transformers, such as gpt2, llama, qwen3 or mixtral; random weights.
        config: Values of the architecture's configuration, under transformers' own names.
        pretrained: Local folder or hub name to start from, in place of `architecture`.
        optimizer: From parameter groups to an optimizer; None is AdamW with lr 1e-3 and weight decay 0.1.
        schedule: From optimizer and total steps to a learning-rate scheduler stepped after each optimizer step; None is constant.
        l1_penalty: Weight of the sum of absolute values of all decayed parameters, added to the training loss.
        activation_checkpointing: Recompute each block in the backward pass: less memory, about a third more time.
        compile: Run the Transformer's body through torch.compile in training and evaluation.
        loss_chunk_size: Tokens whose logits are held at a time; None chooses 32 MiB of them.
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
        loss_chunk_size: int | None = None,
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
            _check_architecture(architecture, config or {})
        bounds = {
            "loss_chunk_size": loss_chunk_size is None or loss_chunk_size >= 1,
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
        self._body: Any = None
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
            try:
                config = AutoConfig.from_pretrained(self.pretrained, **self.config_overrides)
            except (OSError, ValueError) as error:
                raise InputError(f"pretrained {self.pretrained!r} cannot be read: {_first_line(error)}") from error
            return config
        assert self.architecture is not None
        values = dict(self.config_overrides)
        fields = CONFIG_MAPPING[self.architecture].__dataclass_fields__
        # BERT and its kin attend in both directions unless told that they are decoders
        # a mixture of experts without its balancing loss collapses onto a few of them
        for name in ("is_decoder", "output_router_logits"):
            if name in fields:
                values.setdefault(name, True)
        # the numbers of another tokenizer's special tokens; as padding index one would even freeze an embedding
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if name in fields and "None" in str(fields[name].type):
                values.setdefault(name, None)
        try:
            return AutoConfig.for_model(self.architecture, **values)
        except Exception as error:  # transformers raises its own, unrelated classes for a value of the wrong kind
            raise InputError(f"config of {self.architecture}: {_last_line(error)}") from error

    @override
    def build_network(self) -> PreTrainedModel:
        config = self.network_config()
        dtype = torch.get_default_dtype()
        if self.pretrained is None:
            try:
                network = AutoModelForCausalLM.from_config(config, dtype=dtype)
            except (ValueError, RuntimeError, KeyError) as error:
                raise InputError(f"config of {config.model_type}: {_first_line(error)}") from error
        else:
            try:
                network = AutoModelForCausalLM.from_pretrained(self.pretrained, config=config, dtype=dtype)
            except (OSError, ValueError) as error:
                raise InputError(f"pretrained {self.pretrained!r} cannot be read: {_first_line(error)}") from error
            network.train()
        if self.activation_checkpointing:
            # the name that transformers 6 will keep, where the release has it; the first argument is the same
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return network

    @override
    def configure_model(self) -> None:
        super().configure_model()
        assert self.network is not None
        if self._body is None:
            holder, name = _find_body(self.network)
            body = getattr(holder, name)
            # held in a partial so that nn.Module does not register it: the checkpoint's keys stay clean
            self._body = partial(torch.compile(body) if self.compile_network else body)

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
        if self.pretrained is not None:
            # the checkpoint holds all weights: it must load where the folder it began from is gone
            assert self.network is not None
            config = json.loads(self.network.config.to_json_string(use_diff=True))
            known = _known_keys(config["model_type"])
            checkpoint["hyper_parameters"] = {
                **checkpoint.get("hyper_parameters", {}),
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
        network = self.network
        assert network is not None
        self._batch_shape = (input_ids.shape[0], input_ids.shape[1])
        seen: list[Any] = []

        def run_body(*args: Any, **kwargs: Any) -> Any:
            seen.append(self._body(*args, **kwargs))
            return seen[0]

        # the network's own forward, less all but one row of its logits: whatever it computes beside them is kept
        with _body_replaced(network, run_body):
            outputs = network(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        (body_outputs,) = seen
        hidden = body_outputs[0]

        def logits_of(rows: Tensor) -> Tensor:
            given = type(body_outputs)(last_hidden_state=rows.unsqueeze(0))
            # forward itself, not the call: a sharded network's hooks have run once for this step
            with _body_replaced(network, lambda *args, **kwargs: given):
                outputs = network.forward(input_ids=None, inputs_embeds=rows.unsqueeze(0), use_cache=False)
                logits: Tensor = outputs.logits
            return logits.squeeze(0)

        holder, name = _find_body(network)
        body = {id(p) for p in getattr(holder, name).parameters()}
        head = [p for p in network.parameters() if id(p) not in body]
        tied = [p for module in self.output_modules() for p in module.parameters() if id(p) in body]
        chunk_size = self.loss_chunk_size or max(1, _CHUNK_ELEMENTS // network.config.get_text_config().vocab_size)
        nats = chunked_cross_entropy(logits_of, hidden.flatten(0, 1), labels.flatten(), head + tied, chunk_size)
        balance = getattr(outputs, "aux_loss", None)
        extra = nats.new_zeros(()) if balance is None else network.config.router_aux_loss_coef * balance
        return nats, extra

    @property
    def flops_per_batch(self) -> int | None:
        """Floating-point operations of forward and backward for the last batch's shape, without recomputation."""
        if self._batch_shape is None:
            raise RuntimeError("flops_per_batch is known after the first batch")
        if self._batch_shape not in self._flops:
            assert self.network is not None
            self._flops[self._batch_shape] = _count_flops(self.network.config, *self._batch_shape)
        return self._flops[self._batch_shape]

    # ---- generation

    @override
    @torch.no_grad()
    def generate(self, prompts: Sequence[str], indices: Sequence[int] | None = None) -> list[str]:
        network = self.network
        if network is None:
            raise RuntimeError("generate needs the network; call configure_model or load a checkpoint first")
        tokenizer = self._own_tokenizer()
        end = tokenizer.eos_token_id
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
        rows = [tokenizer(prompt)["input_ids"] or [start] for prompt in prompts]
        longest = max(len(row) for row in rows)
        positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and longest + self.max_new_tokens > positions:
            raise InputError(
                f"a prompt of {longest} tokens and max_new_tokens {self.max_new_tokens} exceed the network's "
                f"{positions} positions; lower max_new_tokens to {max(0, positions - longest)} or shorten the prompt"
            )
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
        )
        network.train(was_training)
        new = output[:, longest:]
        return tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None and self.pretrained is not None:
            self.tokenizer = load_tokenizer(self.pretrained)
        if self.tokenizer is None:
            raise InputError(
                "the model has no tokenizer; load one of its checkpoints (--ckpt_path) or fit it on Text first"
            )
        return self.tokenizer


@contextmanager
def _body_replaced(network: PreTrainedModel, body: Any) -> Iterator[None]:
    """Let the network's forward call `body` in place of the Transformer below its head.

    The instance attribute hides the registered submodule, so parameters, hooks and state dict stay as they are. The
    head's part of forward runs as its authors wrote it, with soft caps and scales where the architecture has them.
    """
    holder, name = _find_body(network)
    holder.__dict__[name] = body
    try:
        yield
    finally:
        del holder.__dict__[name]


def _find_body(network: PreTrainedModel) -> tuple[nn.Module, str]:
    """Return the module that holds the Transformer below the head, and the attribute under which it does."""
    decoder = network.get_decoder()
    path = next((name for name, module in network.named_modules() if module is decoder), "")
    holder, _, name = (path or network.base_model_prefix).rpartition(".")
    return network.get_submodule(holder), name


def _count_flops(config: PreTrainedConfig, batch_size: int, length: int) -> int | None:
    """Count the matrix products of a step on fake tensors; None, with a warning, where the network will not run so."""
    # eager attention is plain matrix products, which the counter knows; experts multiply in groups in bfloat16 only
    try:
        with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
            # from_config writes into the configuration that it is given
            config = copy.deepcopy(config)
            network = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
            network(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    except (RuntimeError, ValueError, TypeError) as error:
        rank_zero_warn(f"FLOPs of {config.model_type} cannot be counted, so no utilisation is logged: {error}")
        return None
    # the backward pass multiplies each matrix twice
    return 3 * batch_size * counter.get_total_flops()


def _known_keys(architecture: str) -> set[str]:
    config = CONFIG_MAPPING[architecture]
    keys = set(config.__dataclass_fields__) - {"model_type", "transformers_version"} | set(config.attribute_map)
    if "rope_parameters" in keys:
        keys |= {"rope_theta", "rope_scaling"}
    return keys | {"attn_implementation"}


def _check_architecture(architecture: str, config: dict[str, Any]) -> None:
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"architecture {architecture!r} is no causal language model of transformers"
            f"{near(architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )
    known = _known_keys(architecture)
    for key in config:
        if key not in known:
            raise InputError(f"model.config.{key} is not in the configuration of {architecture}{near(key, known)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
