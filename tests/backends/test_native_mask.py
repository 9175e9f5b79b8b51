"""The native mirror of Mask (csrc/include/longattn/mask.h) says what longattn/mask.py says."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn import Mask

native = pytest.importorskip("longattn._C", reason="the C++ kernels are not built", exc_type=ImportError)
pytestmark = pytest.mark.native

SIDES = (None, 0, 1, 2, 5)
SINKS = (0, 1, 3, 9)


def sides(mask: Mask) -> tuple[int, int, int]:
    return -1 if mask.left is None else mask.left, -1 if mask.right is None else mask.right, mask.sinks


def test_allows() -> None:
    for left, right, sinks in itertools.product(SIDES, SIDES, SINKS):
        mask = Mask(left, right, sinks)
        for position, key in itertools.product(range(-7, 15), range(9)):
            assert native.mask_allows(*sides(mask), position, key) == mask.allows(position, key)


def test_kv_range() -> None:
    for left, right, sinks in itertools.product(SIDES, SIDES, SINKS):
        mask = Mask(left, right, sinks)
        for first, height, lk in itertools.product(range(-7, 13), (1, 2, 5), (0, 1, 4, 9)):
            last = first + height - 1
            assert native.mask_kv_range(*sides(mask), first, last, lk) == mask.kv_range(first, last, lk)


side = st.none() | st.integers(0, 2**31 - 1)
position = st.integers(-(2**41), 2**41)  # an offset of 32 bits and as many tokens as memory can hold


@settings(max_examples=500)
@given(
    left=side, right=side, sinks=st.integers(0, 2**31 - 1), first=position, height=st.integers(1, 2**20), lk=position
)
def test_numbers_of_any_size(left: int | None, right: int | None, sinks: int, first: int, height: int, lk: int) -> None:
    mask, last, lk = Mask(left, right, sinks), first + height - 1, abs(lk)
    assert native.mask_allows(*sides(mask), first, lk) == mask.allows(first, lk)
    assert native.mask_kv_range(*sides(mask), first, last, lk) == mask.kv_range(first, last, lk)
