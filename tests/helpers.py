"""What the tests of attention share: the backends at hand, random calls, odd layouts, comparison with the oracle."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
import oracle
from longattn.backends import registry
from longattn.mask import Mask
from longattn.problem import Problem
from tolerances import assert_within_budget

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SLOW = {"reference"}  # computes in float64 whatever the dtype, so one dtype tells it all


def missing(backend: str) -> list[str]:
    """Why a backend cannot run the tests of all backends, which are on the CPU; empty if it can."""
    return registry.reasons(Problem(1, 1, 1, 1, 1, 8, 8, torch.float32, "cpu", Mask(), 1.0))[backend]


def backend_params(dtypes: Sequence[torch.dtype] = DTYPES, native: bool = False, slow: bool = True) -> list[Any]:
    """Values for parametrize("backend, dtype", ...): every backend that runs in this process.

    Which do not, and why, tests/backends/test_registry.py says: once, not at every test.

    Args:
        native: the test is small enough for a sanitizer.
        slow: take the slow backends in.
    """
    params = []
    for backend in registry.BACKENDS:
        if backend.name in _SLOW and not slow:
            continue
        if missing(backend.name):
            continue
        marks = [pytest.mark.native] if native and backend.name == "cpu" else []
        for dtype in dtypes[:1] if backend.name in _SLOW else dtypes:
            params.append(pytest.param(backend.name, dtype, marks=marks, id=f"{backend.name}-{str(dtype)[6:]}"))
    return params


def backend_names(native: bool = False) -> list[Any]:
    """Values for parametrize("backend", ...), as backend_params."""
    return [
        pytest.param(param.values[0], marks=param.marks, id=param.values[0])
        for param in backend_params((torch.float32,), native)
    ]


def drawn(*axes: Iterable[Any], rounds: int = 1) -> list[tuple[Any, ...]]:
    """In place of all combinations: random ones in which each value occurs, that of the longest axis `rounds` times."""
    values = [list(axis) for axis in axes]
    count = rounds * max(map(len, values))
    generator = random.Random(0)
    columns = []
    for axis in values:
        column = (axis * -(-count // len(axis)))[:count]
        columns.append(generator.sample(column, count))
    return list(zip(*columns, strict=True))


def require(backend: str, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> None:
    """Skip the test where the backend says that it cannot run the call. test_cpu.py holds what it must run."""
    reasons = longattn.explain(q, k, v, **keywords).reasons[backend]
    if reasons:
        pytest.skip("; ".join(reasons))


def random_qkv(
    batch: int = 2,
    heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, int] = (33, 47),
    widths: int | tuple[int, int] = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of (Hq, Hkv) heads, (Nq, Nk) tokens, (D, Dv) wide."""
    head_dim, v_head_dim = (widths, widths) if isinstance(widths, int) else widths
    (q_heads, kv_heads), (nq, nk) = heads, lengths
    q = torch.randn(batch, q_heads, nq, head_dim).to(dtype)
    k = torch.randn(batch, kv_heads, nk, head_dim).to(dtype)
    v = torch.randn(batch, kv_heads, nk, v_head_dim).to(dtype)
    return q, k, v


def random_packed(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    heads: tuple[int, int] = (2, 1),
    widths: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    outside: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """The positional arguments of attention_varlen, with `outside` tokens after the last sequence."""
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    q = torch.randn(int(cu_q[-1]) + outside, heads[0], widths[0]).to(dtype)
    k = torch.randn(int(cu_k[-1]) + outside, heads[1], widths[0]).to(dtype)
    v = torch.randn(int(cu_k[-1]) + outside, heads[1], widths[1]).to(dtype)
    return q, k, v, cu_q, cu_k, max(lengths_q, default=0), max(lengths_k, default=0)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an entry that nobody wrote shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """For the oracle's many small steps: on a busy machine, waiting for a second thread takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    **keywords: Any,
) -> oracle.Results:
    """The library's out, lse and, if `dout` is given, gradients, as oracle.results. The inputs keep their strides."""
    inputs = dict(zip("qkv", arguments, strict=False))
    inputs |= {name: keywords[name] for name in oracle.PARAMETERS if keywords.get(name) is not None}
    wanted = {}
    if dout is not None:
        for name, x in inputs.items():
            if x.is_floating_point():
                wanted[name] = inputs[name] = x.detach().requires_grad_()
    parameters = {name: inputs.pop(name) for name in oracle.PARAMETERS if name in inputs}
    with poisoned_memory():
        out, lse = function(*inputs.values(), *arguments[3:], **{**keywords, **parameters}, return_lse=True)
        found = {"out": out.detach(), "lse": lse.detach()}
        if dout is not None:
            outputs, grads = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
            found |= dict(zip(wanted, torch.autograd.grad(outputs, tuple(wanted.values()), grads), strict=True))
    return found


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    backward: bool = True,
    **keywords: Any,
) -> oracle.Results:
    """One call, forward and backward, against the oracle; returns what the library gave.

    Incoming gradients that are not given are random; both outputs have one.
    """
    require(backend, q, k, v, **keywords)
    if backward and dout is None:
        dout = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype)
        dlse = torch.randn(q.shape[:3]).to(torch.promote_types(q.dtype, torch.float32))
    got = run(longattn.attention, (q, k, v), dout, dlse, backend=backend, **keywords)
    with one_thread():
        exact = oracle.results(q, k, v, dout, dlse, **keywords)
        eager = None if q.dtype == torch.float64 else oracle.results(q, k, v, dout, dlse, dtype=q.dtype, **keywords)
        terms = oracle.rounding_terms(q, k, v, dout, dlse, dtype=q.dtype, **keywords)
        _compare(got, exact, eager, terms, q)
    return got


def check_varlen(
    arguments: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int],
    *,
    backend: str,
    backward: bool = True,
    **keywords: Any,
) -> oracle.Results:
    """check_attention for attention_varlen, given its positional arguments."""
    q, k, v, cu_q, cu_k, _, max_k = arguments
    require_packed(backend, arguments, **keywords)
    dout = dlse = None
    if backward:
        dout = torch.randn(*q.shape[:2], v.shape[2]).to(q.dtype)
        dlse = torch.randn(q.shape[1], q.shape[0]).to(torch.promote_types(q.dtype, torch.float32))
    got = run(longattn.attention_varlen, arguments, dout, dlse, backend=backend, **keywords)
    call = (q, k, v, cu_q, cu_k, dout, dlse)
    with one_thread():
        exact = oracle.by_sequence(oracle.results, *call, max_seqlen_k=max_k, **keywords)
        eager = None
        if q.dtype != torch.float64:
            eager = oracle.by_sequence(oracle.results, *call, max_seqlen_k=max_k, dtype=q.dtype, **keywords)
        terms = oracle.by_sequence(oracle.rounding_terms, *call, max_seqlen_k=max_k, dtype=q.dtype, **keywords)
        _compare(got, exact, eager, terms, q)
    return got


def require_packed(backend: str, arguments: Sequence[Any], **keywords: Any) -> None:
    """`require` for a packed call: its features are those of the dense call, and being packed."""
    q, k, v = (x.transpose(0, 1)[None] for x in arguments[:3])
    shared = ("softcap", "sink_logits", "rope", "dropout_p", "scale")
    features = {name: keywords[name] for name in shared if name in keywords}
    if keywords.get("alibi_slopes") is not None:
        features["alibi_slopes"] = keywords["alibi_slopes"].view(-1, q.shape[1])[0]
    require(backend, q, k, v, **features)


def _compare(
    got: oracle.Results, exact: oracle.Results, eager: oracle.Results | None, terms: oracle.Results, q: Tensor
) -> None:
    assert got["out"].dtype == q.dtype
    assert got["lse"].dtype == torch.promote_types(q.dtype, torch.float32)
    for name, value in got.items():
        assert_within_budget(value, exact[name], None if eager is None else eager[name], terms[name], name)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x [B, H, N, D] with the same entries, but other strides."""
    batch, heads, n, width = x.shape
    if layout == "bhnd":
        return x.contiguous()
    if layout == "bnhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "nbhd":
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if layout == "hnbd":
        return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    if layout == "gaps":  # every stride has a gap, which holds NaN, and the start is unaligned
        wide = torch.full((batch + 1, 2 * heads, n + 3, width + 5), torch.nan, dtype=x.dtype)
        inside = wide[1:, ::2, 2 : n + 2, 3 : width + 3]
        return inside.copy_(x)
    if layout == "bhdn":  # the last dimension has no unit stride
        return x.mT.contiguous().mT
    raise ValueError(layout)


LAYOUTS = ("bhnd", "bnhd", "nbhd", "hnbd", "gaps", "bhdn")


def memory_order(x: Tensor) -> list[int]:
    """The dimensions that have an extent, from the largest stride to the smallest."""
    return sorted((dim for dim in range(x.dim()) if x.shape[dim] > 1), key=lambda dim: -x.stride(dim))
