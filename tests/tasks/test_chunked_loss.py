"""The chunked loss against the plain one: value, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_bigmodels.tasks.chunked_loss import chunked_cross_entropy

ROWS, WIDTH, VOCABULARY = 23, 8, 31


def make(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype))
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    labels[::5] = -100
    return hidden, head, labels


def capped(head):
    """A head with a soft cap behind it, as Gemma 2 has."""
    return lambda rows: 3 * torch.tanh(head(rows) / 3)


@pytest.mark.parametrize("chunk_size", [1, 7, ROWS, 1000])
@pytest.mark.parametrize("wrap", [lambda head: head, capped])
def test_value_and_gradients_equal_the_plain_loss(chunk_size, wrap):
    hidden, head, labels = make()
    parameters = list(head.parameters())
    plain = F.cross_entropy(wrap(head)(hidden).float(), labels, reduction="sum")
    expected = torch.autograd.grad(plain / 18, [hidden, *parameters])
    loss = chunked_cross_entropy(wrap(head), hidden, labels, parameters, chunk_size)
    found = torch.autograd.grad(loss / 18, [hidden, *parameters])
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_without_gradients_the_value_is_the_same():
    hidden, head, labels = make()
    with torch.no_grad():
        found = chunked_cross_entropy(head, hidden, labels, list(head.parameters()), 4)
    assert found.item() == pytest.approx(
        F.cross_entropy(head(hidden).float(), labels, reduction="sum").item(), rel=1e-6
    )


def test_a_frozen_head_still_passes_the_gradient_on():
    hidden, head, labels = make()
    head.requires_grad_(False)
    chunked_cross_entropy(head, hidden, labels, list(head.parameters()), 4).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_rows_that_do_not_count_get_no_gradient():
    hidden, head, labels = make()
    chunked_cross_entropy(head, hidden, labels, list(head.parameters()), 4).backward()
    assert hidden.grad[labels == -100].abs().max() == 0
    assert hidden.grad[labels != -100].abs().min() > 0


def test_never_more_than_a_chunk_of_logits():
    hidden, head, labels = make()
    sizes = []

    def logits_of(rows):
        sizes.append(len(rows))
        return head(rows)

    chunked_cross_entropy(logits_of, hidden, labels, list(head.parameters()), 10).backward()
    assert sizes == [10, 10, 3]


def test_a_second_backward_is_refused():
    hidden, head, labels = make()
    loss = chunked_cross_entropy(head, hidden, labels, list(head.parameters()), 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


def test_under_autocast_the_head_runs_in_bf16_and_the_sum_in_fp32():
    hidden, head, labels = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
        loss = chunked_cross_entropy(head, hidden, labels, list(head.parameters()), 7)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    expected = torch.autograd.grad(plain, head.weight)[0]
    found = torch.autograd.grad(loss, head.weight)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
