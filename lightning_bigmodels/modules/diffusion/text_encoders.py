"""Text encoders of transformers with their tokenizers: what a network that makes pictures is told."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from lightning_bigmodels.data.tokenizer import load_tokenizer, train_tokenizer
from lightning_bigmodels.errors import InputError, near, require

MODEL_TYPE = "model_type"
"""Key of a configuration: transformers' name of the architecture."""

# where the class that encodes texts is not the one that AutoModel takes
_CLASSES = {"clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
_MOST_TOKENS = 300  # of encoders whose positions have no end, as PixArt has it
_SHOWN = 40


class Tokens(NamedTuple):
    """Captions as a text encoder takes them.

    Attributes:
        ids: (B, T) int64, filled up to T.
        mask: (B, T) int64, 1 where there is a token of the caption.
        cut: Places in the batch of those that were longer, and are cut.
    """

    ids: Tensor
    mask: Tensor
    cut: list[int]


class CaptionTokenizer:
    """Turns captions into rows of one length.

    Args:
        tokenizer: Of transformers; it has a token to fill rows with.
        length: Tokens of a row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.tokenizer = tokenizer
        self.length = length

    def __call__(self, captions: Sequence[str], device: torch.device) -> Tokens:
        """Return the tokens of some captions; longer ones are cut."""
        texts = list(captions)
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        rows = self.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(device)
        cut = [place for place, ids in enumerate(whole) if len(ids) > self.length]
        return Tokens(rows["input_ids"], rows["attention_mask"], cut)


def describe_cut(caption: str, length: int) -> str:
    """Return what to say of the first caption that is cut."""
    some = caption if len(caption) <= _SHOWN else caption[: _SHOWN - 3] + "..."
    return (
        f"the caption {some!r} has more than {length} tokens, which are all that the text encoder takes: what is "
        f"beyond them is cut, here and in others; how many captions are cut is logged as train_cut_captions"
    )


def check_encoder_config(config: dict[str, Any]) -> None:
    """Refuse a configuration of an unknown architecture, or with an unknown key.

    Raises:
        InputError: with the near match.
    """
    if MODEL_TYPE not in config:
        raise InputError(
            f"text_encoder_config names no {MODEL_TYPE}; set it to transformers' name of the architecture, such as "
            f"clip_text_model or t5"
        )
    architecture = config[MODEL_TYPE]
    if architecture not in CONFIG_MAPPING:
        raise InputError(f"transformers knows no {MODEL_TYPE} {architecture!r}{near(architecture, CONFIG_MAPPING)}")
    kind = CONFIG_MAPPING[architecture]
    known = set(kind.__dataclass_fields__) | set(kind.attribute_map)
    for key in config:
        if key != MODEL_TYPE and key not in known:
            raise InputError(
                f"model.text_encoder_config.{key} is not in the configuration of {architecture}{near(key, known)}"
            )


def encoder_config(source: str | None, subfolder: str, values: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a text encoder.

    Args:
        source: A folder or hub name with its weights; None: it is made from scratch.
        subfolder: Where in it; empty: at the top.
        values: The configuration, or none where a source has it.

    Raises:
        InputError: there is none, or its values do not fit.
    """
    try:
        if values:
            # the numbers of another tokenizer's special tokens; ours, trained on the captions, has a single one
            ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
            given = {key: value for key, value in values.items() if key != MODEL_TYPE}
            return AutoConfig.for_model(values[MODEL_TYPE], **{**({} if source else ends), **given})
        config = AutoConfig.from_pretrained(source, subfolder=subfolder)
        return getattr(config, "text_config", config)  # of CLIP, which is told with its eyes
    except Exception as error:  # transformers raises its own, unrelated classes for a value of the wrong kind
        raise _unreadable(source, error) from error


def build_encoder(source: str | None, subfolder: str, config: PreTrainedConfig) -> nn.Module:
    """Return a text encoder, with the weights of a folder or hub name where there is one.

    Raises:
        InputError: the weights cannot be read, or the configuration's values do not fit together.
    """
    transformers = require("transformers", extra="generative")
    cls = getattr(transformers, _CLASSES.get(config.model_type, "AutoModel"))
    dtype = torch.get_default_dtype()
    try:
        if source is None or torch.empty(0).device.type == "meta":
            make = cls.from_config if cls.__name__ == "AutoModel" else cls._from_config
            return make(config, dtype=dtype)
        return cls.from_pretrained(source, subfolder=subfolder, config=config, dtype=dtype).train()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreadable(source, error) from error


def config_values(network: nn.Module) -> dict[str, Any]:
    """Return a text encoder's configuration as plain values."""
    config: Any = network.config
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    known = set(CONFIG_MAPPING[config.model_type].__dataclass_fields__)
    return {key: value for key, value in values.items() if key in known or key == MODEL_TYPE}


def num_positions(config: PreTrainedConfig, given: int | None) -> int:
    """Return how many tokens of a caption count: as many as are given, or as the encoder has positions.

    Raises:
        InputError: more are given than there are.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if given is not None and positions is not None and given > positions:
        raise InputError(f"max_caption_tokens is {given}, and the text encoder has {positions} positions; lower it")
    return given or positions or _MOST_TOKENS


def find_tokenizer(
    given: str | None, source: str | None, subfolder: str, captions: Sequence[str], vocab_size: int
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a run that has none yet.

    Args:
        given: A tokenizer.json, folder or hub name; None: that of the text encoder's weights, or else one that is
            trained on the captions.
        source: A folder or hub name that the text encoder's weights come from.
        subfolder: Where in it the tokenizer lies; empty: at the top.
        captions: The captions of training.
        vocab_size: Tokens that the text encoder knows.

    Raises:
        InputError: it cannot be loaded, or has more tokens than the text encoder.
    """
    if given is not None:
        tokenizer = load_tokenizer(given)
    elif source is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, subfolder=subfolder)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{source} holds no tokenizer that can be read ({_line(error)}); set model.tokenizer to a folder or "
                f"hub name"
            ) from error
    else:
        tokenizer = train_tokenizer(captions, vocab_size)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the text encoder's vocab_size is {vocab_size}; set "
            f"vocab_size in model.text_encoder_config to {len(tokenizer)} or more"
        )
    return tokenizer


def encoder_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of a text encoder."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()), default=[]))


def _unreadable(source: str | None, error: Exception) -> InputError:
    if source is None:
        return InputError(f"text_encoder_config: {_line(error)}; correct model.text_encoder_config")
    return InputError(
        f"text_encoder {source!r} cannot be read: {_line(error)}; name a folder with config.json and weights, or a hub "
        f"name"
    )


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).strip().rstrip(".")
