"""Every batch of the package, declared once.

Legend: B rows of a batch, T tokens of a row.
"""

from typing import TypedDict

from torch import Tensor

IGNORED = -100
"""The label that no loss and no metric counts (`torch.nn.functional.cross_entropy`'s `ignore_index`)."""


class TokenBatch(TypedDict):
    """Rows of tokens for next-token prediction.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64; `labels[b, t]` is the token that follows `input_ids[b, t]`, or `IGNORED`. They are already
            shifted: compare them with the logits of the same position.
    """

    input_ids: Tensor
    labels: Tensor


class EvaluationTokenBatch(TokenBatch):
    """Rows of tokens of which each token of the text is counted exactly once.

    Attributes:
        num_bytes: (B,) int64; UTF-8 bytes of the text that the row's counted labels spell. Summed over an evaluation
            they are the size of the text: the denominator of bits per byte.
    """

    num_bytes: Tensor


class PromptBatch(TypedDict):
    """Texts to be continued; B is zero where a process has none left and others have.

    Attributes:
        prompts: B strings.
        indices: (B,) int64; place of each prompt in its file, from 0, blank lines not counted.
    """

    prompts: list[str]
    indices: Tensor
