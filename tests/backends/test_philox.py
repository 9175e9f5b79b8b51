"""Dropout's generator: the published vectors, and the layout that every backend shares."""

from __future__ import annotations

import pytest
import torch

import oracle
from longattn.backends.philox import philox4x32, uniform_bits

# Of Random123, the authors' library (tests/kat_vectors): counter, key, output.
VECTORS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def as_int64(low: int, high: int) -> int:
    seed = low | high << 32
    return seed - 2**64 if seed >= 2**63 else seed


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), torch.tensor([as_int64(*key)]))  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == expected
    assert oracle.philox4x32(counter, as_int64(*key)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("nk", [1, 3, 4, 9])
def test_layout(seed: int, nk: int) -> None:
    b, h, i = torch.tensor([0, 3])[:, None, None], torch.tensor([0, 1])[:, None], torch.tensor([0, 5, 70000])
    bits = uniform_bits(torch.tensor([seed]), b, h, i, slice(0, nk))
    assert bits.shape == (2, 2, 3, nk) and bits.dtype == torch.int64
    for at_b, at_h, at_i, j in ((0, 0, 0, 0), (1, 1, 1, nk - 1), (1, 0, 2, nk // 2)):
        counter = (j // 4, int(i[at_i]), int(h.flatten()[at_h]), int(b.flatten()[at_b]))
        assert int(bits[at_b, at_h, at_i, j]) == oracle.philox4x32(counter, seed)[j % 4]
    for start in range(nk):
        assert torch.equal(uniform_bits(torch.tensor([seed]), b, h, i, slice(start, nk)), bits[..., start:])


def test_numbers_look_uniform() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    bits = uniform_bits(torch.tensor([7]), zero, zero, torch.arange(400), slice(0, 400)).double() / 2**32
    assert abs(bits.mean().item() - 0.5) < 5 * (1 / 12 / bits.numel()) ** 0.5
    counts = torch.histc(bits, 16, 0, 1)
    expected = bits.numel() / 16
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square, 15 degrees: beyond 40 in one of 2000
