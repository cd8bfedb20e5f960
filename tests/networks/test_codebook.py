"""The codebook: nearest codes, straight-through gradients, moving averages, restarts."""

import torch

from lightning_bigmodels.networks.codebook import Usage, VectorQuantizer


def filled(codes, **arguments):
    """Return a codebook with given codes, each in even use."""
    quantizer = VectorQuantizer(len(codes), codes.shape[1], **arguments)
    quantizer.codes.copy_(codes)
    quantizer.usage.fill_(2.0)
    quantizer.sums.copy_(2 * codes)
    quantizer.num_updates.fill_(10**6)
    return quantizer


def test_each_vector_becomes_the_nearest_code():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(7, 3)
    vectors = torch.randn(2, 3, 4, 5)
    rounded, chosen = quantizer(vectors)
    rows = vectors.permute(0, 2, 3, 1)
    expected = torch.cdist(rows.reshape(-1, 3), quantizer.codes).argmin(1).view(2, 4, 5)
    assert torch.equal(chosen, expected)
    assert torch.allclose(rounded, quantizer.codes[expected].permute(0, 3, 1, 2), atol=1e-6)
    assert torch.equal(quantizer.vectors_of(chosen), quantizer.codes[expected].permute(0, 3, 1, 2))


def test_gradients_pass_through_unchanged():
    vectors = torch.randn(2, 3, 4, 5, requires_grad=True)
    gradient = torch.randn(2, 3, 4, 5)
    VectorQuantizer(7, 3)(vectors)[0].backward(gradient)
    assert torch.equal(vectors.grad, gradient)


def test_codes_are_moving_averages():
    # equations 6 to 8 of van den Oord et al. 2017, by hand: two vectors 3 and 5 choose the first code
    quantizer = filled(torch.tensor([[4.0], [-1.0]]), decay=0.9)
    vectors = torch.tensor([3.0, 5.0, -2.0]).view(3, 1, 1, 1)
    _, chosen = quantizer(vectors)
    usage = quantizer.count(vectors, chosen, torch.ones(3))
    assert usage.counts.tolist() == [2, 1]
    assert usage.sums.flatten().tolist() == [8, -2]
    quantizer.update(usage, torch.zeros(1), torch.zeros(1, 1))
    assert torch.allclose(quantizer.usage, torch.tensor([0.9 * 2 + 0.1 * 2, 0.9 * 2 + 0.1 * 1]))
    expected = torch.tensor([[(0.9 * 8 + 0.1 * 8) / 2.0], [(0.9 * -2 + 0.1 * -2) / 1.9]])
    assert torch.allclose(quantizer.codes, expected)


def test_a_code_that_none_choose_moves_to_a_vector_of_least_key():
    quantizer = filled(torch.tensor([[0.0], [10.0], [20.0]]), decay=0.5)
    quantizer.usage[1] = 1e-4
    vectors = torch.tensor([0.0, 0.5, 20.0, 1.5]).view(4, 1, 1, 1)
    _, chosen = quantizer(vectors)
    keys, places = quantizer.candidates(vectors, torch.tensor([0.3, 0.9, 0.2, 0.1]).view(4, 1, 1), torch.ones(4))
    assert keys.tolist() == [0.1, 0.2, 0.3] or torch.allclose(keys, torch.tensor([0.1, 0.2, 0.3]))
    quantizer.update(quantizer.count(vectors, chosen, torch.ones(4)), keys, places)
    assert quantizer.codes[1].item() == 1.5
    # it has its share of the batch, and is not moved again at once
    assert quantizer.usage[1] > 1
    assert quantizer.codes[2].item() == 20


def test_a_new_codebook_is_made_of_the_first_batch():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 2)
    vectors = torch.randn(4, 2, 1, 1)
    _, chosen = quantizer(vectors)
    usage = quantizer.count(vectors, chosen, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    keys, candidates = quantizer.candidates(vectors, torch.rand(4, 1, 1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    before = quantizer.codes.clone()
    quantizer.update(usage, keys, candidates)
    used = usage.counts > 0
    assert torch.allclose(quantizer.codes[used], (usage.sums / usage.counts[:, None])[used])
    # three pictures count: as many codes lie on theirs, in the order of their keys, and the others wait
    unused = (~used).nonzero().flatten()
    assert torch.equal(quantizer.codes[unused[:3]], candidates[:3])
    assert torch.equal(quantizer.codes[unused[3:]], before[unused[3:]])
    assert not (quantizer.codes[unused] == vectors[3].flatten()).all(1).any()


def test_two_halves_of_a_batch_say_what_the_whole_says():
    torch.manual_seed(0)
    vectors, keys, counted = torch.randn(6, 2, 3, 3), torch.rand(6, 3, 3), torch.tensor([1.0, 1, 1, 1, 0, 1])
    codebooks = []
    for parts in (1, 2):
        torch.manual_seed(1)
        quantizer = VectorQuantizer(8, 2)
        _, chosen = quantizer(vectors)
        pieces = zip(*(x.chunk(parts) for x in (vectors, chosen, keys, counted)), strict=True)
        said = [(quantizer.count(v, c, w), *quantizer.candidates(v, k, w)) for v, c, k, w in pieces]
        usage = Usage(sum(u.counts for u, _, _ in said), sum(u.sums for u, _, _ in said))
        quantizer.update(usage, torch.cat([k for _, k, _ in said]), torch.cat([v for _, _, v in said]))
        codebooks.append(quantizer.codes.clone())
    assert torch.allclose(*codebooks, atol=1e-6)
