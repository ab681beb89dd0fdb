from __future__ import annotations

import pytest
import torch

from hpkernels.ops._philox import bernoulli, philox, seed_key

# philox4x32-10 of the known-answer file (kat_vectors) of the authors' Random123 distribution.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, expected):
    assert philox(words(counter), words(key)) == words(expected)


def test_counters_of_any_shape():
    columns = list(zip(*(words(counter) for counter, _, _ in KNOWN_ANSWERS), strict=True))
    keys = list(zip(*(words(key) for _, key, _ in KNOWN_ANSWERS), strict=True))
    found = philox(tuple(map(torch.stack, columns)), tuple(map(torch.stack, keys)))
    for position, (_, _, expected) in enumerate(KNOWN_ANSWERS):
        assert tuple(word[position] for word in found) == words(expected)


@pytest.mark.parametrize(
    ("seed", "low", "high"),
    [(0, 0, 0), (1, 1, 0), (2**32 + 5, 5, 1), (2**63 - 1, 0xFFFFFFFF, 0x7FFFFFFF), (-1, 0xFFFFFFFF, 0xFFFFFFFF)],
)
def test_seed_key(seed, low, high):
    assert seed_key(torch.tensor(seed)) == (torch.tensor(low), torch.tensor(high))


@pytest.mark.parametrize("seed", [0, 12345678901234, -7])
def test_layout_of_rows_and_columns(seed):
    """Column j of row i is word j % 4 at counter (j // 4, i, 0, 0), True below floor(rate * 2^32)."""
    rate = 0.3
    mask = bernoulli(torch.tensor(seed), 3, 11, rate)
    zero = torch.tensor(0)
    for i in range(3):
        for j in range(11):
            block = philox((torch.tensor(j // 4), torch.tensor(i), zero, zero), seed_key(torch.tensor(seed)))
            assert mask[i, j] == (block[j % 4] < int(rate * 2**32))


def test_an_entry_depends_on_nothing_but_seed_row_and_column():
    whole = bernoulli(torch.tensor(3), 40, 101, 0.5)
    for rows, columns in ((1, 1), (7, 4), (40, 5), (13, 98), (40, 100)):
        assert torch.equal(bernoulli(torch.tensor(3), rows, columns, 0.5), whole[:rows, :columns])


def test_seeds_rows_and_columns_differ():
    mask = bernoulli(torch.tensor(0), 64, 256, 0.5)
    for other in (bernoulli(torch.tensor(1), 64, 256, 0.5), bernoulli(torch.tensor(2**32), 64, 256, 0.5)):
        assert 0.45 < (mask != other).double().mean() < 0.55
    assert len({tuple(row) for row in mask.tolist()}) == 64
    assert len({tuple(column) for column in mask.T.tolist()}) == 256


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.5, 0.97])
def test_rate(rate):
    mask = bernoulli(torch.tensor(11), 512, 1024, rate).double()
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(mask.mean() - rate) < 4 * deviation / mask.numel() ** 0.5
    for along in (0, 1):  # the means of rows, and of columns, spread as those of independent entries do
        spread = mask.mean(dim=along).std() * mask.shape[along] ** 0.5
        assert 0.85 * deviation < spread < 1.15 * deviation
    # Neighbours are uncorrelated: within a block of four words, between blocks, and between rows.
    centred = mask - rate
    for other in (centred.roll(1, dims=1), centred.roll(4, dims=1), centred.roll(1, dims=0)):
        assert abs((centred * other).mean()) < 5 * deviation**2 / mask.numel() ** 0.5


def test_rates_are_nested_and_exact_at_the_ends():
    seed = torch.tensor(5)
    assert not bernoulli(seed, 30, 50, 0.0).any()
    assert bernoulli(seed, 30, 50, 1.0).all()
    masks = [bernoulli(seed, 30, 50, rate) for rate in (0.1, 0.4, 0.8)]
    assert all((small <= large).all() for small, large in zip(masks, masks[1:], strict=False))
