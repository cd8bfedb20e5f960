"""What transformers' networks and configurations need from outside: no training here."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_bigmodels.errors import InputError, near
from lightning_bigmodels.strategies.tensor_parallel import parallel_styles


class SplitForward:
    """A causal language model's own forward in two parts: the body once, the head on as many rows as wanted at a time.

    The head's part runs as its authors wrote it, with soft caps and scales where the architecture has them. An instance
    attribute hides the registered body meanwhile, so parameters, hooks and state dict stay as they are.

    Args:
        network: The network, which is neither copied nor changed.
        compile: Whether the body runs through torch.compile.
    """

    def __init__(self, network: PreTrainedModel, compile: bool = False) -> None:
        self.network = network
        decoder = network.get_decoder()
        path = next((name for name, module in network.named_modules() if module is decoder), "")
        holder, _, name = (path or network.base_model_prefix).rpartition(".")
        self._holder, self._name = network.get_submodule(holder), name
        body = getattr(self._holder, self._name)
        self._run: Callable[..., Any] = torch.compile(body) if compile else body
        inside = {id(p) for p in body.parameters()}
        outputs = network.get_output_embeddings()
        head = {id(p) for p in network.parameters() if id(p) not in inside}
        head |= set() if outputs is None else {id(p) for p in outputs.parameters()}  # tied ones are inside too
        # by owner and name, since sharding puts other tensors in their places
        self._head = [
            (module, name)
            for module in network.modules()
            for name, p in module.named_parameters(recurse=False)
            if id(p) in head
        ]
        self._body_outputs: Any = None

    def body(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """Return the last hidden states (B, T, D) of input_ids (B, T), and the network's outputs less most logits."""

        def run_body(*args: Any, **kwargs: Any) -> Any:
            self._body_outputs = self._run(*args, **kwargs)
            return self._body_outputs

        with self._body_hidden_by(run_body):
            outputs = self.network(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        made, self._body_outputs = self._body_outputs, None
        self._kind = type(made)
        return made[0], outputs

    def logits(self, rows: Tensor) -> Tensor:
        """Return logits (n, V) of last hidden states (n, D)."""
        given = self._kind(last_hidden_state=rows.unsqueeze(0))
        # forward itself, not the call: a sharded network's hooks have run once for this step
        with self._body_hidden_by(lambda *args, **kwargs: given):
            outputs = self.network.forward(input_ids=None, inputs_embeds=rows.unsqueeze(0), use_cache=False)
        logits: Tensor = outputs.logits
        return logits.squeeze(0)

    def head_parameters(self) -> list[nn.Parameter]:
        """Return what the head uses, an embedding tied to it included."""
        return list(dict.fromkeys(getattr(module, name) for module, name in self._head))

    @contextmanager
    def _body_hidden_by(self, function: Callable[..., Any]) -> Iterator[None]:
        self._holder.__dict__[self._name] = function
        try:
            yield
        finally:
            del self._holder.__dict__[self._name]


def scratch_config(architecture: str, overrides: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of an architecture as a decoder, with `overrides`.

    Raises:
        InputError: the values do not fit.
    """
    values = dict(overrides)
    fields = CONFIG_MAPPING[architecture].__dataclass_fields__
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
        return AutoConfig.for_model(architecture, **values)
    except Exception as error:  # transformers raises its own, unrelated classes for a value of the wrong kind
        raise InputError(f"config of {architecture}: {_line(error, -1)}; correct model.config") from error


def pretrained_config(source: str, overrides: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a pretrained folder or hub name, with `overrides`.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(source, **overrides)
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error


def scratch_network(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a network with random weights in the default dtype.

    Raises:
        InputError: the configuration's values do not fit together.
    """
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"config of {config.model_type}: {_line(error, 0)}; correct model.config") from error


def pretrained_network(source: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Return a network with the weights of a pretrained folder or hub name, in the default dtype.

    Raises:
        InputError: they cannot be read.
    """
    try:
        network = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.get_default_dtype())
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error
    return network.train()


def tensor_parallel_plan(network: PreTrainedModel, size: int) -> dict[str, ParallelStyle]:
    """Return transformers' own plan of how to split a network's layers over `size` processes.

    Raises:
        InputError: transformers has none, a style of it is not supported, or heads do not divide.
    """
    base = f"{network.base_model_prefix}."
    plan = {f"{base}{name}": style for name, style in (network.config.base_model_tp_plan or {}).items()}
    plan |= network.tp_plan or {}
    if not plan:
        name = type(network).__name__
        raise InputError(f"transformers has no tensor-parallel plan for {name}; use the strategy fsdp2")
    config = network.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads is not None and heads % size:
            raise InputError(
                f"{name} is {heads}, which does not divide over {size} tensor-parallel processes; choose a size that "
                f"divides it, or the strategy fsdp2"
            )
    styles = parallel_styles(plan, network)
    inputs, outputs = network.get_input_embeddings(), network.get_output_embeddings()
    if outputs is not None and inputs.weight is outputs.weight:
        # one weight, one layout: rows of the vocabulary
        names = {module: name for name, module in network.named_modules()}
        tied = {names[inputs]: "embedding_rowwise", names[outputs]: "colwise_gather_output"}
        styles |= parallel_styles(tied, network)
    return styles


def _unreadable(source: str, error: Exception) -> InputError:
    return InputError(
        f"pretrained {source!r} cannot be read: {_line(error, 0)}; "
        f"name a folder with config.json and weights, or a hub name"
    )


def count_flops(config: PreTrainedConfig, batch_size: int, length: int) -> int | None:
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


def known_keys(architecture: str) -> set[str]:
    """Return what an architecture's configuration may be given."""
    config = CONFIG_MAPPING[architecture]
    keys = set(config.__dataclass_fields__) - {"model_type", "transformers_version"} | set(config.attribute_map)
    if "rope_parameters" in keys:
        keys |= {"rope_theta", "rope_scaling"}
    return keys | {"attn_implementation"}


def check_architecture(architecture: str, config: dict[str, Any]) -> None:
    """Refuse an architecture or a configuration key that transformers does not know.

    Raises:
        InputError: the message names the near match.
    """
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"architecture {architecture!r} is no causal language model of transformers"
            f"{near(architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )
    known = known_keys(architecture)
    for key in config:
        if key not in known:
            raise InputError(f"model.config.{key} is not in the configuration of {architecture}{near(key, known)}")


def _line(error: Exception, number: int) -> str:
    return str(error).strip().splitlines()[number].strip().rstrip(".")
