"""explain tells what a query sees, what that costs and who runs it, without running or allocating anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import longattn
import oracle
from helpers import random_packed, random_qkv

INT32 = torch.int32


def told(name: str, text: object) -> str:
    """The row of the table that starts with `name`."""
    return next(line[len(name) :].strip() for line in str(text).splitlines() if line.startswith(name))


@pytest.mark.parametrize(
    ("keywords", "sees"),
    [
        ({}, "query i, at position p = i + 2, sees every key"),
        ({"causal": True}, "query i, at position p = i + 2, sees keys 0 .. p"),
        ({"causal": True, "align": "start"}, "query i, at position p = i, sees keys 0 .. p"),
        ({"window": 1, "align": -3}, "query i, at position p = i - 3, sees keys p .. p"),
        (
            {"causal": True, "window": 3, "sinks": 4},
            "query i, at position p = i + 2, sees keys p - 2 .. p and the first 4 keys",
        ),
        (
            {"window": (2, -1), "sinks": 1},
            "query i, at position p = i + 2, sees keys p - 2 .. the last and the first key",
        ),
        (
            {"causal": True, "sinks": 4, "key_lens": torch.tensor([7, 3])},
            "query i, at position p = i + key_lens[b] - Nq, sees keys 0 .. p, if allowed by key_lens",
        ),
        (
            {"align": torch.tensor([0, 4]), "key_mask": torch.ones(2, 7).bool(), "bias": torch.ones(5, 7).bool()},
            "query i, at position p = i + align[b], sees every key, if allowed by key_mask and bias",
        ),
    ],
)
def test_what_a_query_sees(keywords: dict[str, Any], sees: str) -> None:
    found = longattn.explain(*random_qkv(2, (4, 2), (5, 7), 8), **keywords)
    assert told("sees", found) == sees
    if not found.hides_more:
        mask = {name: value for name, value in keywords.items() if name != "bias"}
        assert found.visible_pairs == int(oracle.visible(2, 5, 7, **mask).sum())
    assert found.all_pairs == 2 * 5 * 7
    assert told("pairs", found).startswith("at most") == found.hides_more


def test_packed_sequences() -> None:
    arguments = random_packed((3, 0, 4), (5, 2, 6), (4, 2), (8, 6), outside=2)
    found = longattn.explain(*arguments, causal=True, key_lens=torch.tensor([5, 9, 2], dtype=INT32), alibi_slopes=None)
    assert "sees keys 0 .. p of its own sequence, if allowed by key_lens" in told("sees", found)
    pairs = [(3, 5, 5), (0, 2, 2), (4, 6, 2)]
    expected = [oracle.visible(1, lq, lk, causal=True, key_lens=torch.tensor([n])) for lq, lk, n in pairs]
    assert (found.all_pairs, found.visible_pairs) == (3 * 5 + 4 * 6, sum(int(x.sum()) for x in expected))
    assert found.backend == longattn.explain(*arguments[:3], *arguments[3:]).backend
    elsewhere = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    assert told("pairs", longattn.explain(*elsewhere)).startswith("unknown")
    assert told("work", longattn.explain(*elsewhere)) == "unknown"


def test_costs_are_those_of_the_definition() -> None:
    q = torch.zeros(128, dtype=torch.bfloat16).expand(1, 32, 4096, 128)
    k = torch.zeros(128, dtype=torch.bfloat16).expand(1, 8, 4096, 128)
    found = longattn.explain(q, k, k[..., :64], causal=True)
    pairs = 4096 * 4097 // 2
    assert found.visible_pairs == pairs
    assert found.forward_flops == 2 * 32 * pairs * (128 + 64)
    assert found.backward_flops == 2 * 32 * pairs * (3 * 128 + 2 * 64)
    assert found.input_bytes == 2 * 4096 * (32 * 128 + 8 * 192)
    assert found.output_bytes == 4096 * 32 * (2 * 64 + 4)
    assert told("work", found) == "forward 103 GFLOP, backward 275 GFLOP"
    assert told("memory", found).endswith("never made, 1.07 GB")
