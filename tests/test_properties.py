"""Properties over random masks, shapes and strides: attention is the oracle's, and its symmetries hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

import longattn
from helpers import LAYOUTS, backend_names, check_attention, check_varlen, laid_out, random_qkv
from longattn import Rope

BACKENDS = pytest.mark.parametrize("backend", backend_names())
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtypes_of(backend: str) -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from((torch.float64,) if backend == "reference" else DTYPES)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def masks(draw: Any, batch: int, nq: int, nk: int, packed: bool = False) -> dict[str, Any]:
    """The keywords that say who sees whom."""
    generator = seeded(draw(st.integers(0, 2**32)))

    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).int()

    side = st.integers(-1, nk + 3)
    found: dict[str, Any] = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, nk + 3) | st.tuples(side, side)),
        "sinks": draw(st.integers(0, 5)),
        "align": draw(st.sampled_from(("end", "start")) | st.integers(-nq - 3, nk + 3)),
    }
    if draw(st.booleans()):
        found["align"] = ints(-nq, nk, batch)
    if draw(st.booleans()):
        found["key_lens"] = ints(-1, nk + 1, batch)
    if packed:
        return found
    if draw(st.booleans()):
        found["key_mask"] = torch.rand(batch, nk, generator=generator) < draw(st.floats(0, 1))
    if draw(st.booleans()):
        shape = (nq,) if draw(st.booleans()) else (batch, nq)
        found["bounds"] = ints(-2, nk, *shape), ints(0, nk + 2, *shape)
    return found


@st.composite
def scores(draw: Any, batch: int, q_heads: int, nq: int, nk: int) -> dict[str, Any]:
    """The keywords that change the scores, and dropout."""
    generator = seeded(draw(st.integers(0, 2**32)))
    dtypes = st.sampled_from(DTYPES)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(draw(dtypes))

    found: dict[str, Any] = {}
    if draw(st.booleans()):
        found["scale"] = draw(st.sampled_from((0.0, 1.0)) | st.floats(0.01, 1) | st.floats(-1, -0.01))
    if draw(st.integers(0, 3)) == 0:
        found["softcap"] = draw(st.floats(0.5, 20))
    if draw(st.integers(0, 3)) == 0:
        found["alibi_slopes"] = randn(*((q_heads,) if draw(st.booleans()) else (batch, q_heads))) / 8
    if draw(st.integers(0, 3)) == 0:
        found["sink_logits"] = randn(q_heads)
    if draw(st.integers(0, 3)) == 0:
        full = (batch, q_heads, nq, nk)
        shape = [draw(st.sampled_from((1, size))) for size in full][draw(st.integers(0, 3)) :]
        bias = randn(*shape)
        kind = draw(st.sampled_from(("added", "blocking", "bool")))
        blocked = torch.rand(shape, generator=generator) < 0.3
        found["bias"] = {"added": bias, "blocking": bias.masked_fill(blocked, -torch.inf), "bool": blocked}[kind]
    if draw(st.integers(0, 5)) == 0 and batch * q_heads * nq * nk < 3000:  # the oracle draws them one by one
        found |= {"dropout_p": draw(st.floats(0, 0.9)), "seed": draw(st.integers(-(2**63), 2**63 - 1))}
    return found


@st.composite
def calls(draw: Any, backend: str) -> dict[str, Any]:
    batch, nq, nk = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 70))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    head_dim, v_head_dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = seeded(draw(st.integers(0, 2**32)))
    dtype = draw(dtypes_of(backend))

    def tensor(heads: int, n: int, width: int) -> Tensor:
        x = torch.randn(batch, heads, n, width, generator=generator).to(dtype)
        return laid_out(x, draw(st.sampled_from(LAYOUTS)))

    found = draw(masks(batch, nq, nk)) | draw(scores(batch, kv_heads * group, nq, nk))
    found |= {
        "q": tensor(kv_heads * group, nq, head_dim),
        "k": tensor(kv_heads, nk, head_dim),
        "v": tensor(kv_heads, nk, v_head_dim),
        "dout": tensor(kv_heads * group, nq, v_head_dim),
        "dlse": torch.randn(batch, kv_heads * group, nq, generator=generator).to(
            torch.promote_types(dtype, torch.float32)
        ),
    }
    if draw(st.booleans()) and head_dim > 1:
        found["rope"] = Rope(2 * draw(st.integers(1, head_dim // 2)), interleaved=draw(st.booleans()))
    return found


@BACKENDS
def test_attention_is_the_oracles(backend: str) -> None:
    @settings(max_examples=150)
    @given(calls(backend))
    def check(call: dict[str, Any]) -> None:
        asked = {name: value for name, value in call.items() if name not in ("dout", "dlse")}
        if longattn.explain(**asked).reasons[backend]:
            reject()
        check_attention(**call, backend=backend)

    check()


@BACKENDS
def test_packed_attention_is_the_oracles(backend: str) -> None:
    lengths = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), min_size=1, max_size=4)

    @settings(max_examples=60)
    @given(lengths, st.integers(0, 3), dtypes_of(backend), st.integers(0, 2**32), st.booleans(), st.data())
    def check(
        pairs: list[tuple[int, int]], before: int, dtype: torch.dtype, seed: int, rope: bool, data: st.DataObject
    ) -> None:
        generator = seeded(seed)
        lengths_q, lengths_k = zip(*pairs, strict=True)
        cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() + before for lengths in (lengths_q, lengths_k))
        q = torch.randn(int(cu_q[-1]) + 2, 4, 8, generator=generator).to(dtype)
        k = torch.randn(int(cu_k[-1]) + 1, 2, 8, generator=generator).to(dtype)
        v = torch.randn(int(cu_k[-1]) + 1, 2, 5, generator=generator).to(dtype)
        keywords = data.draw(masks(len(pairs), max(lengths_q), max(lengths_k), packed=True))
        arguments = (q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k))
        check_varlen(arguments, backend=backend, rope=Rope(8) if rope else None, **keywords)

    check()


@BACKENDS
def test_the_order_of_keys_does_not_matter(backend: str) -> None:
    @settings(max_examples=20)
    @given(st.integers(1, 90), st.integers(0, 2**32))
    def check(nk: int, seed: int) -> None:
        q, k, v = random_qkv(1, (2, 1), (5, nk), 8, torch.float64)
        order = torch.randperm(nk, generator=seeded(seed))
        expected = longattn.attention(q, k, v, backend=backend)
        got = longattn.attention(q, k[:, :, order], v[:, :, order], backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)

    check()


@BACKENDS
def test_queries_do_not_know_each_other(backend: str) -> None:
    """Any subset of the queries gives the same rows, to the last digits."""

    @settings(max_examples=20)
    @given(st.integers(2, 150), st.integers(0, 149), st.integers(1, 30))
    def check(nq: int, first: int, height: int) -> None:
        q, k, v = random_qkv(1, (2, 1), (nq, nq), 8, torch.float64)
        first = first % nq
        rows = slice(first, first + height)
        everything = longattn.attention(q, k, v, causal=True, window=20, sinks=1, align="start", backend=backend)
        some = longattn.attention(q[:, :, rows], k, v, causal=True, window=20, sinks=1, align=first, backend=backend)
        torch.testing.assert_close(some, everything[:, :, rows], rtol=1e-12, atol=1e-13)

    check()


@BACKENDS
def test_every_way_to_say_a_mask_is_one(backend: str) -> None:
    """key_lens, a key_mask, bounds and a packed sequence can hide the same keys."""

    @settings(max_examples=20)
    @given(st.integers(1, 40), st.integers(1, 60), st.data())
    def check(nq: int, nk: int, data: st.DataObject) -> None:
        length = data.draw(st.integers(1, nk))
        q, k, v = random_qkv(1, (2, 1), (nq, nk), 8, torch.float64)
        expected = longattn.attention(
            q, k[:, :, :length], v[:, :, :length], causal=True, align="start", backend=backend
        )
        hidden: tuple[dict[str, Any], ...] = (
            {"key_lens": torch.tensor([length])},
            {"key_mask": torch.arange(nk)[None] < length},
            {"bounds": (torch.zeros(nq).int(), torch.full((nq,), length))},
        )
        for keywords in hidden:
            got = longattn.attention(q, k, v, causal=True, align="start", **keywords, backend=backend)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
        flat = (x[0].transpose(0, 1) for x in (q, k, v))
        cu_q, cu_k = torch.tensor([0, nq]), torch.tensor([0, length])
        got = longattn.attention_varlen(*flat, cu_q, cu_k, nq, nk, causal=True, align="start", backend=backend)
        torch.testing.assert_close(got.transpose(0, 1)[None], expected, rtol=1e-12, atol=1e-13)

    check()


@BACKENDS
def test_a_shift_of_all_scores_changes_only_lse(backend: str) -> None:
    @settings(max_examples=15)
    @given(st.floats(-300, 300), st.integers(1, 100))
    def check(shift: float, nk: int) -> None:
        q, k, v = random_qkv(1, (2, 1), (5, nk), 8, torch.float64)
        q[..., 0] = 1.0
        moved = k.clone()
        moved[..., 0] += shift
        out, lse = longattn.attention(q, k, v, scale=1.0, return_lse=True, backend=backend)
        out_moved, lse_moved = longattn.attention(q, moved, v, scale=1.0, return_lse=True, backend=backend)
        torch.testing.assert_close(out_moved, out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lse_moved, lse + shift, rtol=1e-12, atol=1e-10)

    check()


@BACKENDS
def test_outputs_stay_among_the_values(backend: str) -> None:
    """A softmax takes averages: each entry lies between the least and the largest value that its query sees."""

    @settings(max_examples=30)
    @given(st.integers(1, 100), st.integers(0, 60), dtypes_of(backend))
    def check(nk: int, spread: int, dtype: torch.dtype) -> None:
        q, k, v = random_qkv(1, (2, 2), (7, nk), 8, torch.float32)
        out = longattn.attention((spread * q).to(dtype), k.to(dtype), v.to(dtype), backend=backend).double()
        slack = 8 * torch.finfo(dtype).eps * v.abs().max()
        exact = v.to(dtype).double()
        assert (out <= exact.amax(2, keepdim=True) + slack).all()
        assert (out >= exact.amin(2, keepdim=True) - slack).all()

    check()
