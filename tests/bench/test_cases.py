"""The cases: which there are, and their arithmetic."""

from __future__ import annotations

import itertools
import json
import pickle

import pytest
import torch

from longattn.bench.cases import (
    DTYPES,
    SETS,
    AttentionCase,
    BlockCase,
    RopeCase,
    from_dict,
    make_cases,
    quarters,
)
from longattn.errors import InvalidInput
from longattn.models import Block

_EVERY = [case for device in ("cpu", "cuda") for case in make_cases(device=device)] + make_cases(quick=True)


def _attention(**changes: object) -> AttentionCase:
    arguments = {"set": "dense", "dtype": "float32", "nk": 32, "nq": 32, "q_heads": 6, "kv_heads": 2, "head_dim": 16}
    return AttentionCase(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({}, 32 * 33 // 2),
        ({"causal": False}, 32 * 32),
        ({"batch": 3}, 3 * 32 * 33 // 2),
        ({"window": 4}, 32 * 4 - 6),
        ({"window": 4, "causal": False}, 32 * 7 - 12),
        ({"nq": 1}, 32),
        ({"nq": 8}, 8 * 24 + 36),
        ({"documents": (16, 10, 6)}, 136 + 55 + 21),
        ({"documents": (16, 10, 6), "window": 4}, 16 * 4 - 6 + 10 * 4 - 6 + 6 * 4 - 6),
    ],
)
def test_pairs_of_a_case(changes: dict[str, object], pairs: int) -> None:
    case = _attention(**changes)
    assert case.pairs == pairs
    assert case.flops == 4 * pairs * case.q_heads * case.head_dim
    both = _attention(**changes, backward=True)
    assert both.flops == case.flops + 5 * case.flops // 2


def test_work_is_counted_in_what_bounds_it() -> None:
    prefill = _attention()
    assert (prefill.bound, prefill.work) == ("arithmetic", prefill.flops)
    decode = _attention(nq=1, dtype="bfloat16")
    assert (decode.bound, decode.work) == ("bandwidth", 2 * 2 * 32 * 16 * 2)  # k and v of two heads
    rope = RopeCase(set="rope", dtype="float32", n=10, heads=3, head_dim=8)
    assert (rope.bound, rope.work) == ("bandwidth", 2 * 10 * 3 * 8 * 4)


def test_a_block_counts_its_matrices_and_its_attention() -> None:
    forward = BlockCase(set="module", dtype="float32", n=24, dim=32, q_heads=4, kv_heads=2)
    weights = sum(x.numel() for x in Block(forward.config, 0).parameters() if x.dim() == 2)
    attention = 4 * (24 * 25 // 2) * 4 * 8
    assert forward.work == 2 * weights * 24 + attention
    both = BlockCase(set="module", dtype="float32", n=24, dim=32, q_heads=4, kv_heads=2, backward=True)
    assert both.work == 3 * 2 * weights * 24 + 7 * attention // 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_names_tell_the_cases_apart(device: str, quick: bool) -> None:
    names = [case.name for case in make_cases(dtypes=DTYPES, device=device, quick=quick)]
    assert len(set(names)) == len(names)


def test_curves_differ_in_length_only() -> None:
    for _, group in itertools.groupby(make_cases(), key=lambda case: (case.set, case.curve)):
        cases = list(group)
        lengths = [case.length for case in cases]
        assert sorted(set(lengths)) == lengths
        kept = [{k: v for k, v in c.to_dict().items() if k not in ("n", "nk", "nq", "documents")} for c in cases]
        assert all(fields == kept[0] for fields in kept)


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_made_alone(name: str) -> None:
    cases = make_cases([name], ["bfloat16"])
    assert cases
    assert {(case.set, case.dtype, case.device) for case in cases} == {(name, "bfloat16", "cpu")}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidInput, match="sets"):
        make_cases(["sparse"])
    with pytest.raises(InvalidInput, match="dtypes"):
        make_cases(dtypes=["int8"])


def test_a_case_survives_json_and_pickle() -> None:
    for case in _EVERY:
        assert from_dict(json.loads(json.dumps(case.to_dict()))) == case
        assert pickle.loads(pickle.dumps(case)) == case


def test_a_small_case_is_the_same_computation() -> None:
    for case in _EVERY:
        small = case.small()
        assert small.length <= 64
        assert (small.curve, small.bound) == (case.curve, case.bound)


@pytest.mark.parametrize("name", SETS)
def test_inputs_are_the_same_each_time(name: str) -> None:
    for case in make_cases([name], quick=True):
        first = case.inputs()
        state = torch.get_rng_state()
        second = case.inputs()
        assert torch.equal(torch.get_rng_state(), state)
        assert (first.dout is None) == (not case.backward)
        assert bool(first.wanted) == case.backward
        for a, b in zip(first.wanted, second.wanted, strict=True):
            assert a.requires_grad and a.is_leaf
            assert torch.equal(a, b)


@pytest.mark.parametrize(("changes", "nothing"), [({}, False), ({"nq": 1}, True), ({"causal": False}, True)])
def test_a_mask_that_hides_nothing(changes: dict[str, object], nothing: bool) -> None:
    assert _attention(**changes).hides_nothing == nothing
    assert not _attention(**changes, window=4).hides_nothing
    assert not _attention(**{**changes, "nq": 32}, documents=(16, 16)).hides_nothing


@pytest.mark.parametrize("tokens", [32, 256, 8192])
def test_documents_share_the_tokens_in_quarters(tokens: int) -> None:
    lengths = quarters(tokens)
    assert len(lengths) == 15
    for size in (4, 8, 16, 32):
        assert sum(n for n in lengths if n == tokens // size) == tokens // 4
