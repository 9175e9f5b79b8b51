"""Problem: the metadata of a call, as arguments.py derives it."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

import longattn
from helpers import random_packed, random_qkv
from longattn import Mask, Rope, arguments
from longattn.problem import FEATURES, OUT_OF_RANGE, Origin, Problem, Tensors, present_features

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(longattn.attention).parameters.items()
    if parameter.default is not inspect.Parameter.empty and name not in ("return_lse", "backend")
}


def dense(*qkv: torch.Tensor, **keywords: Any) -> tuple[Tensors, Problem]:
    return arguments.dense(*qkv, **(DEFAULTS | keywords))


def test_of_a_dense_call() -> None:
    q, k, v = random_qkv(3, (4, 2), (5, 7), (8, 6), torch.bfloat16)
    tensors, problem = dense(q, k, v, causal=True, window=3, sinks=1)
    assert problem == Problem(
        batch=3,
        q_heads=4,
        kv_heads=2,
        nq=5,
        nk=7,
        head_dim=8,
        v_head_dim=6,
        dtype=torch.bfloat16,
        device="cpu",
        mask=Mask(2, 0, 1),
        scale=1 / math.sqrt(8),
    )
    assert problem.group == 2 and not problem.varlen and problem.accumulate_dtype == torch.float32
    assert hash(problem) == hash(problem._replace())
    assert all(x is y for x, y in zip(tensors[:3], (q, k, v), strict=True))
    assert not any(x is not None for x in tensors[3:])


def test_of_a_packed_call() -> None:
    packed = random_packed((3, 4), (5, 6), (4, 2), (8, 6))
    tensors, problem = arguments.packed(*packed, **DEFAULTS)
    assert problem.varlen and problem.features == ("varlen",)
    assert (problem.batch, problem.nq, problem.nk) == (2, 7, 11)
    assert (problem.max_seqlen_q, problem.max_seqlen_k) == (4, 6)
    assert tensors.q.shape == (1, 4, 7, 8) and tensors.v.shape == (1, 2, 11, 6)
    assert tensors.q.data_ptr() == packed[0].data_ptr()


GIVEN: dict[str, dict[str, Any]] = {
    "key_mask": {"key_mask": torch.ones(2, 7).bool()},
    "key_lens": {"key_lens": torch.tensor([3, 7])},
    "bounds": {"bounds": (torch.zeros(5).int(), torch.ones(5).int())},
    "bias": {"bias": torch.zeros(7)},
    "softcap": {"softcap": 2.0},
    "alibi_slopes": {"alibi_slopes": torch.ones(4)},
    "sink_logits": {"sink_logits": torch.ones(4)},
    "rope": {"rope": Rope(8)},
    "dropout": {"dropout_p": 0.1},
}


@pytest.mark.parametrize("feature", GIVEN)
def test_features(feature: str) -> None:
    tensors, problem = dense(*random_qkv(2, (4, 2), (5, 7), 8), **GIVEN[feature])
    assert problem.features == (feature,)
    assert present_features(tensors, problem.softcap, problem.dropout_p) == (feature,)


def test_an_origin_counts_where_dropout_does() -> None:
    tensors, _ = dense(*random_qkv(2, (4, 2), (5, 7), 8))
    assert present_features(tensors, 0.0, 0.1, Origin(key=8)) == ("dropout", "origin")
    assert present_features(tensors, 0.0, 0.0, Origin(key=8)) == ()


def test_features_keep_their_order() -> None:
    keywords = {name: value for options in reversed(GIVEN.values()) for name, value in options.items()}
    _, problem = dense(*random_qkv(2, (4, 2), (5, 7), 8), **keywords)
    assert problem.features == tuple(name for name in FEATURES if name in GIVEN)


def test_what_counts_as_absent() -> None:
    _, problem = dense(*random_qkv(2, (4, 2), (5, 7), 8), softcap=0.0, dropout_p=0, seed=3, align=torch.tensor([1, 2]))
    assert problem.features == ()


def test_needs_grad() -> None:
    q, k, v = random_qkv(1, (2, 2), (5, 7), 8)
    assert not dense(q, k, v)[1].needs_grad
    assert dense(q, k, v, sink_logits=torch.zeros(2, requires_grad=True))[1].needs_grad
    v.requires_grad_()
    assert dense(q, k, v)[1].needs_grad
    with torch.no_grad():
        assert not dense(q, k, v)[1].needs_grad


def test_integers_become_int32() -> None:
    q, k, v = random_qkv(2, (2, 2), (5, 7), 8)
    far = torch.tensor([2**40, -(2**40)])
    tensors, _ = dense(q, k, v, key_lens=far, align=far, bounds=(far[:1].expand(5), far[1:].expand(5)))
    for x in (tensors.key_lens, tensors.offset, tensors.lo, tensors.hi):
        assert x is not None and x.dtype == torch.int32
    for x in (tensors.key_lens, tensors.offset):  # the operator refuses these
        assert x is not None and x.tolist() == [OUT_OF_RANGE, OUT_OF_RANGE]
    assert tensors.lo is not None and tensors.lo.tolist() == [2**31 - 1] * 5


def test_the_last_dimension_gets_unit_stride_and_nothing_else_is_copied() -> None:
    q, k, v = random_qkv(2, (2, 2), (5, 7), 8)
    turned = q.mT.contiguous().mT
    tensors, _ = dense(turned, k.transpose(1, 2).contiguous().transpose(1, 2), v)
    assert tensors.q.stride(-1) == 1 and torch.equal(tensors.q, q)
    assert tensors.k.stride() == (112, 8, 16, 1)
    narrow = torch.randn(2, 2, 5, 3)[..., 1:2]  # one wide: any stride will do
    tensors, _ = dense(narrow, narrow, narrow)
    assert tensors.q is narrow


def test_says_what_a_call_is() -> None:
    _, problem = dense(*random_qkv(3, (4, 2), (5, 7), (8, 6)), causal=True, window=4, sinks=2, rope=Rope(8))
    text = str(problem)
    for part in ("B 3", "H 4/2", "Nq 5", "Nk 7", "D 8/6", "float32", "cpu", "left 3", "right 0", "sinks 2", "rope"):
        assert part in text
    assert "needs" not in text and "gradient" not in text
    _, problem = dense(*(x.requires_grad_() for x in random_qkv(3, (2, 2), (5, 7), 8)), deterministic=True)
    assert "H 2," in str(problem) and "with gradient" in str(problem) and "deterministic" in str(problem)
