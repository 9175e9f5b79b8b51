"""The CPU backend's own: instruction sets, threads, processes, addresses, and the checks at the native boundary."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import longattn
from helpers import check_attention, random_packed, random_qkv, run
from longattn import InvalidInput, Rope, arguments
from longattn.backends import cpu
from longattn.problem import Problem, Tensors

MISSING = cpu.CpuBackend().unavailable()
pytestmark = [pytest.mark.native, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

PACKAGE = Path(longattn.__file__).resolve().parent.parent


def test_the_widest_instruction_set_is_taken() -> None:
    assert cpu.native().isa() == os.environ.get("LONGATTN_CPU_ISA", cpu.native().isas()[0])


SUPPORTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 4), "sinks": 2, "align": 3},
    "offsets": {"align": torch.tensor([1, 2])},
    "key_mask": {"key_mask": torch.ones(2, 7).bool()},
    "key_lens": {"key_lens": torch.tensor([3, 7])},
    "bounds": {"bounds": (torch.zeros(5).int(), torch.ones(5).int())},
    "rope": {"rope": Rope(8), "positions": torch.arange(7)},
    "bias": {"bias": torch.zeros(5, 7)},
    "softcap": {"softcap": 2.0},
    "alibi_slopes": {"alibi_slopes": torch.ones(4)},
    "sink_logits": {"sink_logits": torch.ones(4)},
    "dropout": {"dropout_p": 0.1},
}


@pytest.mark.parametrize("case", SUPPORTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_it_must_run(dtype: torch.dtype, case: str) -> None:
    """Other tests skip what a backend says it cannot run; not these."""
    for heads in ((4, 4), (4, 2), (4, 1)):
        q, k, v = (x.requires_grad_() for x in random_qkv(2, heads, (5, 7), (8, 6), dtype))
        assert longattn.explain(q, k, v, **SUPPORTED[case]).reasons["cpu"] == []
        assert longattn.explain(q, k, v, **SUPPORTED[case]).backend == "cpu"
    wide = random_qkv(2, (4, 4), (5, 7), 512, dtype)
    assert longattn.explain(*wide, **SUPPORTED[case]).reasons["cpu"] == []


Call = Callable[[], dict[str, Tensor]]


def several_tiles(dtype: torch.dtype, **keywords: Any) -> Call:
    """A call, forward and backward, of more tiles than threads."""
    tensors = random_qkv(2, (4, 2), (300, 330), 32, dtype)
    dout, dlse = (
        torch.randn(2, 4, 300, 32).to(dtype),
        torch.randn(2, 4, 300).to(torch.promote_types(dtype, torch.float32)),
    )
    return lambda: run(longattn.attention, tensors, dout, dlse, backend="cpu", **keywords)


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keywords", [{"causal": True}, {"window": (40, 9)}], ids=["causal", "window"])
def test_the_same_bits_for_any_number_of_threads(
    set_threads: Callable[[int], None], dtype: torch.dtype, keywords: dict[str, Any]
) -> None:
    call = several_tiles(dtype, rope=Rope(32), **keywords)
    set_threads(1)
    expected = call()
    for threads in (1, 2, 3, 16, 2):
        set_threads(threads)
        assert_same_bits(call(), expected)


def test_the_same_bits_packed(set_threads: Callable[[int], None]) -> None:
    packed = random_packed((3, 200, 0, 90), (70, 200, 4, 90), dtype=torch.bfloat16)
    dout = torch.randn_like(packed[0])
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        found.append(run(longattn.attention_varlen, packed, dout, backend="cpu", causal=True))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


def test_the_same_bits_from_run_to_run(set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    call = several_tiles(torch.float32, causal=True)
    expected = call()
    for _ in range(25):
        assert_same_bits(call(), expected)


def test_a_batch_is_its_sequences_bit_by_bit() -> None:
    """What else is computed beside it never changes a sequence."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = random_qkv(3, (4, 2), (90, 130), 32, dtype)
        whole = longattn.attention(q, k, v, causal=True, backend="cpu")
        for b in range(3):
            one = longattn.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True, backend="cpu")
            assert torch.equal(one[0], whole[b])


def test_calls_from_several_python_threads() -> None:
    calls = [
        several_tiles(dtype, causal=True) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    ]
    expected = [call() for call in calls]
    failures: list[str] = []
    start = threading.Barrier(len(calls))

    def work(index: int) -> None:
        try:
            start.wait()
            for _ in range(5):
                assert_same_bits(calls[index](), expected[index])
        except Exception as error:
            failures.append(repr(error))

    # Memory is poisoned through a switch of the whole process, which must not be flipped by four threads.
    torch.use_deterministic_algorithms(True)
    try:
        workers = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.use_deterministic_algorithms(False)
    assert failures == []


def test_blocks_outside_the_band_are_never_read() -> None:
    """NaN may reach whoever shares a tile with it; far from the band it reaches nobody."""
    q, k, v = random_qkv(1, (2, 2), (4, 4000), 16)
    expected = longattn.attention(q, k, v, causal=True, window=8, sinks=2, backend="cpu")
    k[:, :, 1000:3000], v[:, :, 1000:3000] = torch.nan, torch.nan
    out = longattn.attention(q, k, v, causal=True, window=8, sinks=2, backend="cpu")
    assert torch.equal(out, expected)

    q, k, v = random_qkv(1, (2, 2), (3000, 3000), 16)
    dout = torch.randn_like(q)
    dout[:, :, 2000:] = 0
    clean = run(longattn.attention, (q, k, v), dout, backend="cpu", causal=True)
    q[:, :, 2500:], k[:, :, 2500:], v[:, :, 2500:] = torch.nan, torch.nan, torch.nan
    got = run(longattn.attention, (q, k, v), dout, backend="cpu", causal=True)
    for name in ("out", "lse", "q"):
        assert torch.equal(got[name][:, :, :1500], clean[name][:, :, :1500]), name


def test_addresses_beyond_32_bits(tmp_path: Path) -> None:
    """Strides of more than 2^31 elements, in a file with holes."""
    far = 2**31 + 8
    storage = torch.from_file(str(tmp_path / "holes"), shared=True, size=far + 4096, dtype=torch.bfloat16)
    q, k, v = (storage[at:].as_strided((1, 2, 20, 16), (0, far, 16, 1)) for at in (0, 1024, 2048))
    for x in (q, k, v):
        x.copy_(torch.randn(1, 2, 20, 16))
    check_attention(q, k, v, backend="cpu", causal=True)
    check_attention(*(x.transpose(0, 1) for x in (q, k, v)), backend="cpu", causal=True)


# ---- The native boundary. ----


@pytest.fixture
def call() -> tuple[Any, list[Tensor]]:
    """Right parameters of a dense call, to be made wrong; and what they point to."""
    q, k, v = random_qkv(2, (4, 2), (5, 7), (8, 6))
    tensors = Tensors(
        q,
        k,
        v,
        key_mask=torch.ones(2, 7).bool(),
        lo=torch.zeros(5).int(),
        hi=torch.full((5,), 7).int(),
        inv_freq=torch.ones(4),
        bias=torch.zeros(2, 4, 5, 7),
        alibi_slopes=torch.ones(2, 4),
        sink_logits=torch.ones(4),
    )
    return parameters(tensors)


@pytest.fixture
def packed_call() -> tuple[Any, list[Tensor]]:
    q, k, v, cu_q, cu_k, max_q, max_k = random_packed((3, 4), (5, 6), (4, 2), (8, 6))
    defaults = {
        name: value
        for name, value in (longattn.attention_varlen.__kwdefaults__ or {}).items()
        if name not in ("return_lse", "backend")
    }
    tensors, problem = arguments.packed(q, k, v, cu_q, cu_k, max_q, max_k, **defaults)
    return parameters(tensors, problem)


def parameters(tensors: Tensors, problem: Problem | None = None) -> tuple[Any, list[Tensor]]:
    q, k, v = tensors[:3]
    if problem is None:
        problem = Problem(
            batch=q.shape[0],
            q_heads=q.shape[1],
            kv_heads=k.shape[1],
            nq=q.shape[2],
            nk=k.shape[2],
            head_dim=q.shape[3],
            v_head_dim=v.shape[3],
            dtype=q.dtype,
            device="cpu",
            mask=longattn.Mask(),
            scale=1.0,
        )
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    params, keep = cpu._params(problem, tensors, out, lse)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    delta, dq_sum, dout = torch.zeros_like(lse), torch.zeros_like(q), torch.zeros_like(out)
    params.dq, params.dk, params.dv = (cpu._view(x) for x in grads)
    params.dout, params.dq_sum, params.delta = cpu._view(dout), cpu._view(dq_sum), delta.data_ptr()
    return params, [*(x for x in tensors if x is not None), *keep, out, lse, *grads, delta, dq_sum, dout]


HUGE = 2**62
BAD: list[tuple[str, Any]] = [
    *((name, value) for name in ("batch", "q_heads", "kv_heads", "nq", "nk") for value in (-1, -(2**63), HUGE)),
    *((name, value) for name in ("head_dim", "v_head_dim") for value in (-1, 0, 513, HUGE)),
    ("kv_heads", 0),
    ("kv_heads", 3),
    ("dtype", -1),
    ("dtype", 4),
    ("dtype", 99),
    ("threads", 0),
    ("threads", -1),
    ("threads", 10**6),
    *((name, value) for name in ("left", "right") for value in (-2, HUGE)),
    ("sinks", -1),
    ("sinks", HUGE),
    ("offset", HUGE),
    ("offset", -HUGE),
    *((name, (0, 1, 1, 1)) for name in ("q", "k", "v", "out")),
    *((name, (4096, HUGE, HUGE, HUGE)) for name in ("q", "k", "v", "out")),
    *((name, (4096, -8, 8, 8)) for name in ("q", "k", "v", "out")),
    *((name, (4096, 8, 8, -1)) for name in ("q", "k", "v", "out")),
    ("lse", 0),
    ("lo", 0),
    ("hi", 0),
    ("bounds_batch", -5),
    *((name, value) for name in ("scale", "softcap", "dropout_p") for value in (math.nan, math.inf)),
    ("softcap", -1.0),
    ("dropout_p", -0.1),
    ("dropout_p", 1.0),
    ("slopes_batch", -4),
    *(("bias", (4096, *strides)) for strides in ((-1, 1, 1, 1, 0), (1, 1, 1, -1, 0), (HUGE, HUGE, HUGE, HUGE, 0))),
    ("bias", (4096, 1, 1, 1, 1, 5)),
    ("bias", (4096, 1, 1, 1, 1, -1)),
    ("rotated", -2),
    ("rotated", 3),
    ("rotated", 10),
    *((name, value) for name in ("q_angles", "k_angles") for value in ((0, 4096, 0), (4096, 0, 0), (4096, 4096, -1))),
]
BAD_BACKWARD: list[tuple[str, Any]] = [
    ("dout", (0, 1, 1, 1)),
    ("dout", (4096, -1, 1, 1)),
    ("dq", (4096, HUGE, HUGE, HUGE)),
    ("dq_sum", (0, 1, 1, 1)),
    ("dk", (4096, 1, -1, 1)),
    ("dv", (4096, 1, 1, -1)),
    ("delta", 0),
    ("dbias", (4096, -1, 1, 1, 1, 0)),
    ("dbias", (4096, HUGE, HUGE, HUGE, HUGE, 0)),
]


def test_right_parameters_pass(call: tuple[Any, list[Tensor]], packed_call: tuple[Any, list[Tensor]]) -> None:
    for params, _ in (call, packed_call):
        cpu.native().attention_forward(params)
        cpu.native().attention_backward(params)


@pytest.mark.parametrize("name, value", BAD, ids=str)
def test_bad_parameters(call: tuple[Any, list[Tensor]], name: str, value: Any) -> None:
    params, _ = call
    setattr(params, name, value)
    for function in (cpu.native().attention_forward, cpu.native().attention_backward):
        with pytest.raises(InvalidInput):
            function(params)


@pytest.mark.parametrize("name, value", BAD_BACKWARD, ids=str)
def test_bad_parameters_of_the_backward(call: tuple[Any, list[Tensor]], name: str, value: Any) -> None:
    params, _ = call
    setattr(params, name, value)
    with pytest.raises(InvalidInput):
        cpu.native().attention_backward(params)


@pytest.mark.parametrize(
    "entries", [(0, 5, 3), (-1, 3, 7), (0, 3, 8), (0, 3, 2**31 - 1), (-(2**31), 0, 7), (3, 2, 1)], ids=str
)
@pytest.mark.parametrize("side", ["q", "k"])
def test_bad_cu_seqlens(packed_call: tuple[Any, list[Tensor]], side: str, entries: tuple[int, ...]) -> None:
    params, _ = packed_call
    cu_seqlens = torch.tensor(entries, dtype=torch.int32) * (2 if side == "k" and entries == (0, 3, 8) else 1)
    setattr(params, f"cu_seqlens_{side}", cu_seqlens.data_ptr())
    for function in (cpu.native().attention_forward, cpu.native().attention_backward):
        with pytest.raises(InvalidInput) as raised:
            function(params)
        assert raised.value.argument == f"cu_seqlens_{side}"


def test_a_bias_beside_packed_sequences(packed_call: tuple[Any, list[Tensor]]) -> None:
    params, _ = packed_call
    bias = torch.zeros(1)
    params.bias = (bias.data_ptr(), 0, 0, 0, 0, 0)
    with pytest.raises(InvalidInput, match="bias"):
        cpu.native().attention_forward(params)


def test_half_packed(packed_call: tuple[Any, list[Tensor]]) -> None:
    params, _ = packed_call
    params.cu_seqlens_k = 0
    with pytest.raises(InvalidInput):
        cpu.native().attention_forward(params)


def test_untouched_parameters() -> None:
    for params, function in (
        (cpu.native().AttentionParams(), cpu.native().attention_forward),
        (cpu.native().AttentionParams(), cpu.native().attention_backward),
        (cpu.native().RopeParams(), cpu.native().rope),
    ):
        with pytest.raises(InvalidInput):
            function(params)


@pytest.mark.parametrize("name", ["batch", "threads", "dtype", "q", "lse", "q_angles"])
@pytest.mark.parametrize("value", ["x", None, (1, 2), 2**70, [], object()], ids=lambda x: type(x).__name__)
def test_wrong_types(name: str, value: Any) -> None:
    with pytest.raises(TypeError):
        setattr(cpu.native().AttentionParams(), name, value)


ROPE_BAD: list[tuple[str, Any]] = [
    *((name, value) for name in ("batch", "heads", "tokens", "width") for value in (-1, HUGE)),
    ("width", 0),
    ("dtype", 7),
    ("threads", 0),
    ("rotated", 3),
    ("rotated", 10),
    ("rotated", -2),
    ("x", (0, 1, 1, 1)),
    ("x", (4096, -1, 1, 1)),
    ("out", (0, 1, 1, 1)),
    ("out", (4096, HUGE, HUGE, HUGE)),
    ("positions", 0),
    ("inv_freq", 0),
    ("positions_batch", -1),
]


@pytest.mark.parametrize("name, value", ROPE_BAD, ids=str)
def test_bad_rope_parameters(name: str, value: Any) -> None:
    x, out, positions, inv_freq = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 8), torch.zeros(5), torch.zeros(4)
    params = cpu.native().RopeParams()
    params.batch, params.heads, params.tokens, params.width = x.shape
    params.rotated = 8
    params.x, params.out = cpu._view(x), cpu._view(out)
    params.positions, params.inv_freq = positions.data_ptr(), inv_freq.data_ptr()
    cpu.native().rope(params)
    setattr(params, name, value)
    with pytest.raises(InvalidInput):
        cpu.native().rope(params)


@pytest.mark.parametrize("name, value", [("tokens", -1), ("half", HUGE), ("threads", 0), ("dtype", 2), ("cos", 0)])
def test_bad_angle_parameters(name: str, value: Any) -> None:
    positions, inv_freq, tables = torch.zeros(5), torch.zeros(4), torch.zeros(2, 5, 4)
    params = cpu.native().AngleParams()
    params.tokens, params.half = 5, 4
    params.positions, params.inv_freq = positions.data_ptr(), inv_freq.data_ptr()
    params.cos, params.sin = tables[0].data_ptr(), tables[1].data_ptr()
    cpu.native().angles(params)
    setattr(params, name, value)
    with pytest.raises(InvalidInput):
        cpu.native().angles(params)


# ---- How sums are rounded. ----


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [160, 192, 256])
def test_wide_heads_round_as_pytorch_does(width: int, causal: bool) -> None:
    """The mean error against float64 over 20 inputs, next to that of PyTorch's fused kernel."""
    ours = theirs = 0.0
    for _ in range(20):
        q, k, v = random_qkv(1, (1, 1), (512, 512), width)
        exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
        ours += (longattn.attention(q, k, v, causal=causal, backend="cpu") - exact).abs().mean().item()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        theirs += (out - exact).abs().mean().item()
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("heads, queries", [((8, 1), 1), ((8, 1), 2), ((1, 1), 5), ((3, 1), 86), ((2, 1), 130)])
def test_the_backward_computes_weights_that_sum_to_1(heads: tuple[int, int], queries: int) -> None:
    """Each row of dout marks a column of its own, in which dv then holds the row's weights."""
    q, k, v = random_qkv(1, heads, (queries, 128), 192)
    v.requires_grad_()
    out = longattn.attention(q, k, v, scale=1.0, backend="cpu")
    rows = heads[0] * queries
    last = torch.arange(max(0, rows - 192), rows)  # those of the last tile among them
    dout = torch.zeros(queries * heads[0], 192)  # by query, then by head
    dout[last, torch.arange(len(last))] = 1.0
    dout = dout.view(1, queries, heads[0], 192).transpose(1, 2)
    (dv,) = torch.autograd.grad(out, v, dout)
    assert (dv[0, 0].double().sum(0)[: len(last)] - 1.0).abs().max() < 4e-6


# ---- Processes. ----

# Each function runs in a fork of a process that has loaded the library and not used it.
SCENARIOS = """
import multiprocessing, os, resource, sys, torch
import longattn

def call(*shape):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    q, k, v = (torch.randn(*shape, requires_grad=True) for _ in range(3))
    out = longattn.attention(q, k, v, causal=True, backend="cpu")
    return out, *torch.autograd.grad(out.sum(), (q, k, v))

def same(expected):
    return all(torch.equal(x, y) for x, y in zip(call(2, 4, 96, 16), expected))

def in_a_fork(work):
    child = os.fork()
    if child == 0:
        done = False
        try:
            done = work()
        finally:
            os._exit(0 if done else 3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def forks_compute():  # whose parent has threads that run when it forks
    expected = call(2, 4, 96, 16)
    return in_a_fork(lambda: same(expected) and same(expected) and in_a_fork(lambda: same(expected))) and same(expected)

def forks_of_an_unused_library_compute():
    return in_a_fork(lambda: same(call(2, 4, 96, 16))) and same(call(2, 4, 96, 16))

def total(index):
    return call(2, 4, 64, 16)[0].sum().item()

def multiprocessing_workers_compute():
    expected = total(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(total, range(6)) == [expected] * 6

def an_unknown_instruction_set_is_refused():
    os.environ["LONGATTN_CPU_ISA"] = "mmx"
    try:
        call(1, 1, 2, 8)
    except longattn.InvalidInput as error:
        return "LONGATTN_CPU_ISA: expected one of" in str(error)

def memory_is_linear():  # a row block of scores fits, the matrix takes 1.1 GB
    call(1, 1, 128, 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(1, 1, 16384, 16)
    risen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return risen < 100 * 1024  # KiB

def forks_of_threads_that_torch_used_compute():
    torch.set_num_threads(2)
    shape = 1, 4, 160, 64  # PyTorch cuts what has more than 32768 numbers
    q, k, v, g = (torch.randn(shape) for _ in range(4))
    qkv = [x.clone().requires_grad_() for x in (q, k, v)]
    bias = torch.randn(1, 1, 160, 160, requires_grad=True)
    slopes, sinks = (torch.rand(4, requires_grad=True) for _ in range(2))
    packed = [x[0].transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(160, 4, 64)
    starts = torch.tensor([0, 70, 160])
    rope, positions = longattn.Rope(64), torch.arange(40000)

    def gradients(*parameters, **keywords):
        out = longattn.attention(*qkv, backend="cpu", **keywords)
        return torch.autograd.grad(out, [*qkv, *parameters], g)

    def cached(cache):
        with torch.no_grad():
            first = longattn.attention_with_cache(q, k, v, cache, rope=rope)
            cache.reorder([0])
            return first, longattn.attention_with_cache(q, k, v, cache, rope=rope)

    strided = [x.mT.contiguous().mT for x in (q, k, v)]

    def work():
        out, lse = longattn.attention(*qkv, return_lse=True)
        dq = torch.autograd.grad(longattn.attention(*qkv, causal=True), qkv[0], g.requires_grad_(), create_graph=True)
        return [
            *gradients(causal=True),
            *gradients(key_lens=torch.tensor([100]), dropout_p=0.2, seed=1),
            *gradients(bias, slopes, sinks, bias=bias, alibi_slopes=slopes, sink_logits=sinks, rope=rope),
            *torch.autograd.grad(lse, qkv, torch.ones(1, 4, 160)),
            *torch.autograd.grad(dq, qkv, q),
            *torch.autograd.grad(
                longattn.attention_varlen(*packed, starts, starts, 90, 90, causal=True, rope=rope), packed, dout
            ),
            longattn.attention(*strided),
            longattn.apply_rope(q[:, :1, :1].expand(1, 1, 40000, 64), rope, positions),
            *longattn.attention_stats(q, k)[:2],
            longattn.merge_attention([q, k], [lse.detach(), lse.detach()])[0],
            *cached(longattn.KVCache(1, 4, 64)),
            *cached(longattn.SlidingKVCache(1, 4, 64, window=100)),
        ]

    def again():
        import signal

        signal.alarm(200)
        found = work()
        torch.set_num_threads(1)  # comparing is PyTorch's own
        return all(torch.allclose(x, y, 1e-4, 1e-5) for x, y in zip(found, expected, strict=True))

    expected = work()
    torch.sin(torch.randn(1 << 20))  # in both threads
    return in_a_fork(again)

def torch_lends_its_threads():
    torch.set_num_threads(2)
    x = torch.randn(256, 256)
    threads = len(os.listdir("/proc/self/task"))
    x @ x
    torch.sin(torch.randn(1 << 20))
    with_torch = len(os.listdir("/proc/self/task"))
    call(2, 4, 96, 16)
    return with_torch == threads + 1 == len(os.listdir("/proc/self/task"))

if sys.argv[1] == "alone":
    print(globals()[sys.argv[2]]())
else:
    print([name for name in sys.argv[1:] if not in_a_fork(globals()[name])])
"""


def scenarios(*names: str) -> str:
    path = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCENARIOS, *names]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts memory in Linux's units")
def test_processes() -> None:
    names = [
        "forks_compute",
        "forks_of_threads_that_torch_used_compute",
        "forks_of_an_unused_library_compute",
        "multiprocessing_workers_compute",
        "an_unknown_instruction_set_is_refused",
    ]
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # it keeps memory of its own
        names.append("memory_is_linear")
    assert scenarios(*names) == "[]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc, and shares torch's on Linux alone")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch is built without OpenMP")
def test_torch_lends_its_threads() -> None:
    assert scenarios("alone", "torch_lends_its_threads") == "True\n"
