"""The Triton kernels on a GPU: the features, races, long tensors, memory, graphs. `make gpu-check` runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
import oracle
from helpers import _compare, drawn, one_thread, run
from longattn import InvalidInput, KVCache, PagedKVCache, Rope, SlidingKVCache, attention_with_cache, ops
from longattn.mask import Mask
from longattn.scaling import YaRN

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALF = (torch.bfloat16, torch.float16)
GB = 2**30


def moved(x: Any, device: str) -> Any:
    """x, and what is in it, on another device."""
    if isinstance(x, Tensor):
        return x.to(device)
    return type(x)(moved(item, device) for item in x) if isinstance(x, tuple) else x


def attention(*arguments: Any, **keywords: Any) -> Any:
    """longattn.attention, or attention_varlen if there is more than q, k and v, on the GPU, from the CPU and back."""
    function = longattn.attention if len(arguments) == 3 else longattn.attention_varlen
    keywords = {name: moved(x, DEVICE) for name, x in keywords.items()}
    return moved(function(*(moved(x, DEVICE) for x in arguments), **keywords), "cpu")


def check(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> None:
    """Forward and backward against the oracle: off by twice what the formula in q's dtype is off, and rounding."""
    dout = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype)
    dlse = torch.randn(q.shape[:3])
    got = run(attention, (q, k, v), dout, dlse, backend="triton", **keywords)
    with one_thread():
        exact = oracle.results(q, k, v, dout, dlse, **keywords)
        eager = oracle.results(q, k, v, dout, dlse, dtype=q.dtype, **keywords)
        terms = oracle.rounding_terms(q, k, v, dout, dlse, dtype=q.dtype, **keywords)
        _compare(got, exact, eager, terms, q)


def draw(
    heads: tuple[int, int], lengths: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    (hq, hkv), (nq, nk), (d, dv) = heads, lengths, widths
    shapes = ((hq, nq, d), (hkv, nk, d), (hkv, nk, dv))
    q, k, v = (torch.randn(batch, *shape).to(dtype) for shape in shapes)
    return q, k, v


def ints(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape).int()


SHAPES = (
    (1, 1), (1, 3), (3, 513), (64, 128), (239, 1), (799, 3), (113, 203), (128, 217), (108, 256), (384, 256), (640, 128),
    (1023, 1024), (1024, 1023),
)  # fmt: skip
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"causal": True, "window": 37},
    {"window": (20, 64)},
    {"causal": True, "window": 65, "sinks": 5},
)


@pytest.mark.parametrize(
    ("lengths", "mask", "heads", "width", "dtype"),
    drawn(SHAPES, MASKS, ((2, 2), (4, 2), (4, 1)), (64, 128), HALF, rounds=3),
)
def test_shapes(
    lengths: tuple[int, int], mask: dict[str, Any], heads: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    check(*draw(heads, lengths, (width, width), dtype), **mask)


@pytest.mark.parametrize(
    ("widths", "dtype"),
    [((d, dv), dtype) for (d, dv) in ((16, 16), (40, 72), (33, 64), (256, 256), (192, 128)) for dtype in HALF]
    + [((512, 512), torch.bfloat16), ((64, 64), torch.float32), ((256, 128), torch.float32)],
)
def test_widths(widths: tuple[int, int], dtype: torch.dtype) -> None:
    check(*draw((4, 2), (203, 317), widths, dtype), causal=True)


B, HQ, NQ, NK = 2, 4, 145, 301
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "offsets": lambda: {"causal": True, "align": ints(-40, 200, B)},
    "key_mask": lambda: {"key_mask": torch.rand(B, NK) < 0.4, "causal": True},
    "key_lens": lambda: {"key_lens": ints(0, NK + 1, B), "window": 90},
    "bounds": lambda: {"bounds": (ints(0, 150, B, NQ), ints(100, NK, B, NQ)), "sinks": 2, "window": (110, -1)},
    "bias": lambda: {"bias": torch.randn(B, HQ, NQ, NK), "causal": True},
    "bias by head and key": lambda: {"bias": torch.randn(HQ, 1, NK).half(), "softcap": 2.0},
    "bias by query": lambda: {"bias": torch.randn(B, 1, NQ, 1)},
    "bias that blocks": lambda: {"bias": torch.randn(NQ, NK).masked_fill(torch.rand(NQ, NK) < 0.5, -math.inf)},
    "bool bias": lambda: {"bias": torch.rand(HQ, NQ, NK) < 0.3},
    "softcap": lambda: {"softcap": 1.5, "causal": True},
    "slopes": lambda: {"alibi_slopes": torch.rand(B, HQ), "causal": True},
    "sink_logits": lambda: {"sink_logits": torch.randn(HQ), "causal": True, "align": -40},
    "dropout": lambda: {"dropout_p": 0.3, "seed": 2**40 + 7, "causal": True},
    "rope": lambda: {"rope": Rope(40, scaling=YaRN(4.0, 16), interleaved=True), "causal": True},
    "positions": lambda: {"rope": Rope(64), "positions": ints(0, 10**5, B, NK), "causal": True},
    "negative scale": lambda: {"scale": -0.3, "window": 50},
    "all scores": lambda: {
        "softcap": 2.0, "alibi_slopes": torch.rand(HQ), "bias": torch.randn(NQ, NK), "sink_logits": torch.randn(HQ),
        "dropout_p": 0.2, "seed": 3, "rope": Rope(64), "causal": True, "window": 90, "sinks": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("feature", "dtype"), drawn(FEATURES, (torch.bfloat16, torch.float16, torch.float32), rounds=2)
)
def test_features(feature: str, dtype: torch.dtype) -> None:
    check(*draw((HQ, 2), (NQ, NK), (64, 64), dtype, B), **FEATURES[feature]())


def test_packed() -> None:
    lengths = ((5, 9), (0, 4), (190, 301), (1, 1), (70, 70))
    cu_q, cu_k = (torch.tensor([0, *(pair[side] for pair in lengths)]).cumsum(0).int() for side in (0, 1))
    q, k, v = (torch.randn(n, h, 64).bfloat16() for n, h in ((269, 4), (390, 2), (390, 2)))
    for keywords in ({"causal": True}, {"causal": True, "window": 40, "sinks": 3, "rope": Rope(64)}):
        arguments = (q, k, v, cu_q, cu_k, 190, 301)
        dout, dlse = torch.randn_like(q), torch.randn(4, 269)
        got = run(attention, arguments, dout, dlse, backend="triton", **keywords)
        wide = [x.float() if x.is_floating_point() else x for x in arguments[:5]]
        exact = run(longattn.attention_varlen, (*wide, 190, 301), dout.float(), dlse, backend="reference", **keywords)
        for name, x in got.items():
            scale = float(exact[name].abs().max())
            torch.testing.assert_close(x.float(), exact[name].float(), atol=2e-2 * scale, rtol=2e-2, msg=name)


def test_lengths_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads them but where LONGATTN_CHECK asks for it; the kernels stay inside the tensors."""
    q, k, v = (torch.randn(90, 2, 64, device=DEVICE).bfloat16() for _ in range(3))
    for entries in ((0, 70, 30), (-5, 40, 1 << 30)):
        wrong = torch.tensor(entries, dtype=torch.int32, device=DEVICE)
        longattn.attention_varlen(q, k, v, wrong, wrong, 90, 90, backend="triton")
        torch.cuda.synchronize()
        with monkeypatch.context() as patch, pytest.raises(InvalidInput, match="cu_seqlens_q"):
            patch.setenv("LONGATTN_CHECK", "1")
            longattn.attention_varlen(q, k, v, wrong, wrong, 90, 90, backend="triton")


def test_rows_that_no_descriptor_fits() -> None:
    """The same numbers give the same bits, whichever way tiles are loaded; rows 65 numbers apart are 2 bytes off."""
    x = [torch.randn(1, 4, 513, 65, device=DEVICE).bfloat16()[..., :64] for _ in range(3)]
    found = []
    for q, k, v in (x, [y.contiguous() for y in x]):
        leaves = [y.detach().requires_grad_() for y in (q, k, v)]
        out = longattn.attention(*leaves, causal=True, backend="triton")
        found.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("width", [64, 128])
def test_races(mask: dict[str, Any], width: int) -> None:
    """200 times the same bits."""
    q, k, v = (x.to(DEVICE).requires_grad_() for x in draw((8, 2), (1111, 1300), (width, width), torch.bfloat16, 2))
    dout = torch.randn_like(q)
    first = None
    for _ in range(200):
        out, lse = longattn.attention(q, k, v, **mask, return_lse=True, backend="triton")
        found = (out, lse, *torch.autograd.grad(out, (q, k, v), dout))
        first = found if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def need(gigabytes: int) -> None:
    """Skip where less memory is free."""
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * GB:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, and {free / GB:.0f} GB are free")


def test_more_than_two_to_the_31_entries() -> None:
    """The last rows of huge tensors are those of small ones."""
    need(60)
    rows, width, seen = 2**31 // 128 + 300, 128, 700
    q, k, v, dout = (torch.randn(1, 1, rows, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    assert q.numel() > 2**31
    found = []
    places = torch.arange(rows, device=DEVICE, dtype=torch.float32)
    for part in (slice(None), slice(rows - seen, None)):
        leaves = [x[:, :, part].detach().requires_grad_() for x in (q, k, v)]
        call = {"causal": True, "window": 100, "rope": Rope(128), "positions": places[part]}
        out = longattn.attention(*leaves, **call, backend="triton")
        grads = torch.autograd.grad(out, leaves, dout[:, :, part])
        found.append([x[:, :, -300:].clone() for x in (out, *grads)])
        del out, grads, leaves
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_memory_is_linear() -> None:
    n = 65536
    q, k, v = (torch.randn(1, 1, n, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    longattn.attention(q[:, :, :64], k, v, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    longattn.attention(q, k, v, causal=True, backend="triton").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * q.nbytes


def test_hidden_keys_never_matter() -> None:
    q, k, v = (x.to(DEVICE) for x in draw((2, 2), (90, 400), (64, 64), torch.bfloat16))
    hidden = torch.arange(400, device=DEVICE) % 3 > 0
    clean = longattn.attention(q, k, v, key_mask=~hidden[None], backend="triton")
    bad = [x.masked_fill(hidden[:, None], torch.nan) for x in (k, v)]
    assert torch.equal(longattn.attention(q, *bad, key_mask=~hidden[None], backend="triton"), clean)


CACHES: dict[str, Callable[[torch.dtype], Any]] = {
    "contiguous": lambda dtype: KVCache(2, 2, 128, capacity=1700, dtype=dtype, device=DEVICE),
    "paged": lambda dtype: PagedKVCache(2, 2, 128, num_pages=400, page_size=16, dtype=dtype, device=DEVICE),
    "ring": lambda dtype: SlidingKVCache(2, 2, 128, window=200, sinks=4, dtype=dtype, device=DEVICE),
    "places in the ring": lambda dtype: SlidingKVCache(
        2, 2, 128, window=200, sinks=4, positions="cache", dtype=dtype, device=DEVICE
    ),
}


@pytest.mark.parametrize(("kind", "storage"), drawn(CACHES, (torch.bfloat16, torch.int8, torch.float16), rounds=2))
def test_caches(kind: str, storage: torch.dtype) -> None:
    """Prompts, single tokens and pieces, against the reference backend on a cache of its own."""
    dtype = torch.bfloat16 if storage == torch.int8 else storage
    caches = [CACHES[kind](storage) for _ in range(2)]
    slopes, sinks = torch.rand(8, device=DEVICE), torch.randn(8, device=DEVICE)
    for new, lengths in ((1500, None), (1, None), (33, [33, 5]), (1, None)):
        q, k, v = (torch.randn(2, heads, new, 128, device=DEVICE).to(dtype) for heads in (8, 2, 2))
        call = {"lengths": lengths, "rope": Rope(128), "alibi_slopes": slopes, "sink_logits": sinks, "return_lse": True}
        got, expected = (
            attention_with_cache(q, k, v, cache, backend=backend, **call)
            for cache, backend in zip(caches, ("triton", "reference"), strict=True)
        )
        # Keys round before they are stored, and a step of int8 is what one rounding may move.
        limit = 3e-2 if storage == torch.int8 else 1e-2
        torch.testing.assert_close(got[0].float(), expected[0].float(), atol=limit, rtol=limit)
        torch.testing.assert_close(got[1], expected[1], atol=limit, rtol=limit)


def test_few_queries_without_a_cache() -> None:
    q, k, v = (x.to(DEVICE) for x in draw((32, 8), (1, 70000), (128, 128), torch.bfloat16, 2))
    for mask in ({"causal": True}, {"causal": True, "window": 5000, "sinks": 3}):
        out, lse = longattn.attention(q, k, v, return_lse=True, backend="triton", **mask)
        seen = Mask.from_window(**mask).materialize(1, 70000, device=DEVICE)
        keys, values = (x.float().repeat_interleave(4, 1) for x in (k, v))
        scores = (q.float() @ keys.mT / math.sqrt(128)).masked_fill(~seen, -math.inf)
        torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(out.float(), scores.softmax(-1) @ values, atol=2e-3, rtol=2e-2)


def test_graphs_capture_calls() -> None:
    q, k, v = (x.to(DEVICE) for x in draw((4, 2), (300, 300), (64, 64), torch.bfloat16))
    call = {"causal": True, "window": 100, "backend": "triton", "rope": Rope(64)}
    longattn.attention(q, k, v, **call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = longattn.attention(q, k, v, **call)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, longattn.attention(q, k, v, **call))


def test_graphs_capture_gradients() -> None:
    leaves = [x.to(DEVICE).requires_grad_() for x in draw((4, 2), (300, 300), (64, 64), torch.bfloat16)]
    dout = torch.randn_like(leaves[0])

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(longattn.attention(*leaves, causal=True, backend="triton"), leaves, dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    dout.copy_(torch.randn_like(dout))
    graph.replay()
    for got, expected in zip(found, step(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["contiguous", "ring", "places in the ring"])
def test_graphs_capture_a_step_on_a_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One captured step serves those after it: lengths lie on the GPU, and nk is but the most that they may say."""
    caches = [CACHES[kind](torch.bfloat16) for _ in range(2)]
    calls: list[Any] = []
    run = ops.attention_with_cache
    monkeypatch.setattr(ops, "attention_with_cache", lambda *call: calls.append(call) or run(*call))
    for new in (1500, 1):
        x = [torch.randn(2, heads, new, 128, device=DEVICE).bfloat16() for heads in (8, 2, 2)]
        for cache in caches:
            attention_with_cache(*x, cache, rope=Rope(128), backend="triton")
    tensors, slots, problem, backend = calls[-2]
    problem = problem._replace(nk=1600)
    run(tensors, slots, problem, backend)  # the same again, so that all is compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = run(tensors, slots, problem, backend)
    for _ in range(4):
        x = [torch.randn_like(y) for y in tensors[:3]]
        for y, new in zip(tensors[:3], x, strict=True):
            y.copy_(new)
        tensors.key_lens.add_(1)
        graph.replay()
        expected = attention_with_cache(*x, caches[1], rope=Rope(128), backend="triton")
        torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)


def test_compiled() -> None:
    q, k, v = (x.to(DEVICE).requires_grad_() for x in draw((4, 2), (300, 300), (64, 64), torch.bfloat16))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return longattn.attention(q * 2, k, v, causal=True, rope=Rope(64), backend="triton").float().square()

    found = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        out = function(q, k, v)
        found.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_other_streams_and_current_device() -> None:
    q, k, v = (x.to(DEVICE) for x in draw((4, 2), (700, 700), (64, 64), torch.bfloat16))
    expected = longattn.attention(q, k, v, causal=True, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = longattn.attention(q, k, v, causal=True, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


def test_rope() -> None:
    x = torch.randn(2, 5, 777, 96, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2).transpose(1, 2)
    for rope in (Rope(96), Rope(64, interleaved=True)):
        for places in (None, ints(0, 10**6, 2, 777).to(DEVICE)):
            got = longattn.apply_rope(x, rope, places, backend="triton")
            expected = longattn.apply_rope(x.double(), rope, places, backend="reference")
            torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=1e-2)
