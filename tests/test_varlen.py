"""attention_varlen against the oracle, sequence by sequence."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
from helpers import backend_names, backend_params, check_varlen, memory_order, random_packed, random_qkv, run
from longattn import Rope

LENGTHS = {
    "one": ((23,), (31,)),
    "many": ((5, 1, 40, 17), (9, 30, 40, 3)),
    "with empty ones": ((0, 12, 7, 0, 9), (4, 12, 0, 0, 20)),
    "all empty": ((0, 0), (0, 0)),
    "no keys": ((3, 4), (0, 0)),
    "no sequences": ((), ()),
    "long and short": ((1, 300, 2), (150, 300, 1)),
}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "causal, start": {"causal": True, "align": "start"},
    "window": {"causal": True, "window": 6, "sinks": 2},
    "both sides": {"window": (4, 2), "align": 1},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_lengths(backend: str, dtype: torch.dtype, lengths: str, mask: str) -> None:
    check_varlen(
        random_packed(*LENGTHS[lengths], heads=(4, 2), widths=(16, 9), dtype=dtype), backend=backend, **MASKS[mask]
    )


@pytest.mark.parametrize("backend", backend_names(native=True))
def test_tokens_without_a_sequence(backend: str) -> None:
    q, k, v = (torch.randn(3, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    slopes, none = torch.zeros(0, 4, requires_grad=True), ints(0)
    out = longattn.attention_varlen(q, k, v, none, none, 0, 0, alibi_slopes=slopes, backend=backend)
    grads = torch.autograd.grad(out, (q, k, v, slopes), torch.ones_like(out))
    assert not any(x.any() for x in (out, *grads)) and grads[3].shape == (0, 4)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


SINKS = torch.linspace(-1.0, 2.0, 4)
# Lengths 5, 1, 40, 17 of queries and 9, 30, 40, 3 of keys; 4 query heads.
FEATURES: dict[str, dict[str, Any]] = {
    "offsets": {"align": ints(3, -1, 0, 7), "causal": True},
    "int64 offsets": {"align": ints(3, -1, 0, 7).long(), "window": (8, 2)},
    "key_lens": {"key_lens": ints(9, 11, 0, 2), "causal": True},
    "key_lens, start": {"key_lens": ints(1, 30, 25, 3), "align": "start", "window": 5},
    "scale": {"scale": -0.3},
    "rope": {"rope": Rope(16), "causal": True},
    "rope of a part, interleaved": {"rope": Rope(6, interleaved=True), "window": (9, 9)},
    "rope, offsets": {"rope": Rope(16), "align": ints(3, -1, 0, 7), "causal": True},
    "rope, key_lens": {"rope": Rope(16), "key_lens": ints(9, 11, 20, 2), "causal": True},
    "rope, positions": {"rope": Rope(16), "positions": 3 * torch.arange(82) % 50, "causal": True},
    "rope, pair of positions": {"rope": Rope(16), "positions": (torch.arange(63) % 7, torch.arange(82).float() / 4)},
    "rope by length": {"rope": Rope(16, scaling=longattn.scaling.DynamicNTK(2.0, 16)), "causal": True},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.linspace(0.0, 0.4, 4), "causal": True},
    "alibi by sequence": {"alibi_slopes": torch.linspace(0.0, 0.4, 16).view(4, 4)},
    "learned sinks": {"sink_logits": SINKS, "causal": True, "window": 3},
    "dropout": {"dropout_p": 0.4, "seed": 11},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend, dtype", backend_params((torch.float64, torch.bfloat16), native=True))
def test_features(backend: str, dtype: torch.dtype, feature: str) -> None:
    arguments = random_packed(*LENGTHS["many"], heads=(4, 2), dtype=dtype)
    check_varlen(arguments, backend=backend, **FEATURES[feature])


@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_tokens_outside_all_sequences_never_matter(backend: str, dtype: torch.dtype) -> None:
    """They hold NaN, and give 0 and a zero gradient."""
    lengths = (5, 0, 20), (9, 4, 20)
    q, k, v, cu_q, cu_k, max_q, max_k = random_packed(*lengths, dtype=dtype, outside=6)
    cu_q, cu_k = cu_q + 2, cu_k + 3  # some before the first sequence as well
    before, after = (slice(0, 2), slice(0, 3)), (slice(27, None), slice(36, None))
    for at_q, at_k in (before, after):
        q[at_q], k[at_k], v[at_k] = torch.nan, torch.nan, torch.nan
    got = check_varlen((q, k, v, cu_q, cu_k, max_q, max_k), backend=backend, causal=True, rope=Rope(8))
    for at_q, at_k in (before, after):
        assert not got["out"][at_q].any() and (got["lse"][:, at_q] == -torch.inf).all()
        assert not got["q"][at_q].any() and not got["k"][at_k].any() and not got["v"][at_k].any()


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", backend_names(native=True))
def test_keys_past_key_lens_may_hold_anything(backend: str, junk: float) -> None:
    q, k, v, *rest = random_packed((5, 20), (9, 20))
    key_lens = ints(4, 11)
    dout = torch.randn_like(q)
    clean = run(longattn.attention_varlen, (q, k, v, *rest), dout, backend=backend, key_lens=key_lens, align="start")
    for at in (slice(4, 9), slice(20, 29)):
        k[at], v[at] = junk, junk
    got = run(longattn.attention_varlen, (q, k, v, *rest), dout, backend=backend, key_lens=key_lens, align="start")
    for name, expected in clean.items():
        assert torch.equal(got[name], expected), name


@pytest.mark.parametrize("backend", backend_names(native=True))
def test_a_bad_sequence_spoils_no_other(backend: str) -> None:
    q, k, v, *rest = random_packed((30, 33, 8), (30, 33, 8))
    clean = longattn.attention_varlen(q, k, v, *rest, causal=True, backend=backend)
    for x in (q, k, v):
        x[30:63] = torch.nan
    out = longattn.attention_varlen(q, k, v, *rest, causal=True, backend=backend)
    assert out[30:63].isnan().all()
    assert torch.equal(out[:30], clean[:30]) and torch.equal(out[63:], clean[63:])


@pytest.mark.parametrize("backend, dtype", backend_params((torch.float32, torch.bfloat16)))
def test_equal_lengths_are_a_batch(backend: str, dtype: torch.dtype) -> None:
    """[B, N, H, D] of equal lengths, flattened, is the same computation, bit by bit."""
    dense = random_qkv(3, (4, 2), (20, 26), 16, dtype)
    dout = torch.randn(3, 4, 20, 16).to(dtype)
    expected = run(longattn.attention, dense, dout, backend=backend, causal=True)
    q, k, v, packed_dout = (x.transpose(1, 2).flatten(0, 1) for x in (*dense, dout))
    cu_q, cu_k = (n * torch.arange(4, dtype=torch.int32) for n in (20, 26))
    got = run(longattn.attention_varlen, (q, k, v, cu_q, cu_k, 20, 26), packed_dout, backend=backend, causal=True)
    for name in ("out", "q", "k", "v"):
        assert torch.equal(got[name], expected[name].transpose(1, 2).flatten(0, 1)), name
    assert torch.equal(got["lse"], expected["lse"].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("backend", backend_names())
def test_strides(backend: str) -> None:
    """Views of one fused projection [T, H, 3, D], heads first, and a shared token: all read in place."""
    q, k, v, *rest = random_packed((5, 12), (5, 12), heads=(2, 2))
    fused = torch.stack((q, k, v), 2)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    shared = [x[:1].expand(17, -1, -1) for x in (q, k, v)]
    for tensors in (fused.unbind(2), heads_first, shared, [x.mT.contiguous().mT for x in (q, k, v)]):
        check_varlen((*tensors, *rest), backend=backend, causal=True)


@pytest.mark.parametrize("backend", backend_names())
def test_results_are_laid_out_as_their_inputs(backend: str) -> None:
    q, k, v, *rest = random_packed((5, 12), (5, 12), heads=(2, 2))
    for heads_first in (False, True):
        tensors = [x.transpose(0, 1).contiguous().transpose(0, 1) if heads_first else x for x in (q, k, v)]
        got = run(longattn.attention_varlen, (*tensors, *rest), torch.randn_like(q), backend=backend)
        for name in ("out", "q", "k", "v"):
            assert memory_order(got[name]) == memory_order(tensors[0]), name
        assert got["lse"].shape == (2, 17)


@pytest.mark.parametrize("backend", backend_names())
def test_int64_cu_seqlens_and_generous_maxima(backend: str) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k = random_packed((5, 12), (7, 12))
    expected = longattn.attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=True, backend=backend)
    got = longattn.attention_varlen(q, k, v, cu_q.long(), cu_k.long(), 100, 1000, causal=True, backend=backend)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", backend_names())
def test_exhaustive_small_lengths(backend: str) -> None:
    """Every pair of sequences of up to 3 queries and keys, forward."""
    for lengths_q, lengths_k in itertools.product(itertools.product(range(4), repeat=2), repeat=2):
        check_varlen(
            random_packed(lengths_q, lengths_k, widths=(4, 3), dtype=torch.float64),
            backend=backend,
            backward=False,
            causal=True,
            window=2,
            sinks=1,
        )
