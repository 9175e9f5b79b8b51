"""apply_rope against the rotation by the book, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import longattn
import oracle
from helpers import LAYOUTS, backend_names, backend_params, laid_out, memory_order, poisoned_memory
from longattn import InvalidInput, Rope
from tolerances import accumulation_unit, assert_within_budget, rounding_unit

ROPES = {
    "whole": Rope(16),
    "part": Rope(6),
    "two": Rope(2, base=500.0),
    "interleaved": Rope(16, interleaved=True),
    "interleaved part": Rope(10, interleaved=True),
    "yarn": Rope(16, scaling=longattn.scaling.YaRN(8.0, 32)),
    "by length": Rope(16, scaling=longattn.scaling.DynamicNTK(2.0, 8)),
}


def check(x: Tensor, rope: Rope, positions: Tensor | None, backend: str) -> Tensor:
    with poisoned_memory():
        got = longattn.apply_rope(x, rope, positions, backend=backend)
    assert got.dtype == x.dtype and got.shape == x.shape
    x4 = x[(None,) * (4 - x.dim())]
    places = torch.arange(x4.shape[2]) if positions is None else positions
    exact, eager = (oracle.rotate(y, rope, places).view(x.shape) for y in (x4.double(), x4))
    # Two products and their sum, of table entries that were rounded themselves.
    terms = (rounding_unit(x.dtype) + 2 * accumulation_unit(x.dtype)) * oracle.rotate_terms(x4, rope, places).view(
        x.shape
    )
    assert_within_budget(got, exact, eager, terms)
    return got


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_rotation(backend: str, dtype: torch.dtype, rope: str) -> None:
    x = torch.randn(2, 3, 21, 16).to(dtype)
    for positions in (None, torch.randint(0, 999, (21,)), torch.randint(0, 999, (2, 21)), 50 * torch.rand(2, 21)):
        got = check(x, ROPES[rope], positions, backend)
        assert torch.equal(got[..., ROPES[rope].dim :], x[..., ROPES[rope].dim :])


@pytest.mark.parametrize("shape", [(7, 16), (3, 7, 16), (2, 3, 7, 16), (0, 3, 7, 16), (2, 3, 0, 16), (0, 16)], ids=str)
@pytest.mark.parametrize("backend", backend_names(native=True))
def test_shapes(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    check(x, Rope(16), None, backend)
    check(x, Rope(16), torch.randint(0, 99, (shape[-2],)), backend)


@pytest.mark.parametrize("width", [2, 3, 17, 31, 64, 111, 512])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend, dtype", backend_params((torch.float32, torch.bfloat16), native=True))
def test_widths(backend: str, dtype: torch.dtype, interleaved: bool, width: int) -> None:
    x = torch.randn(1, 2, 9, width).to(dtype)
    for dim in {2, width // 4 * 2, width // 2 * 2} - {0}:
        check(x, Rope(dim, interleaved=interleaved), None, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend, dtype", backend_params(native=True))
def test_strides(backend: str, dtype: torch.dtype, layout: str) -> None:
    x = laid_out(torch.randn(2, 3, 21, 16).to(dtype), layout)
    got = check(x, Rope(16), None, backend)
    if layout != "bhdn":
        assert memory_order(got) == memory_order(x)
    expanded = x[:, :1].expand(-1, 3, -1, -1)
    check(expanded, Rope(8), torch.randint(0, 99, (21, 2)).T, backend)


@pytest.mark.parametrize("backend", backend_names())
def test_far_positions(backend: str) -> None:
    """The angle is float32(position) times float32 inv_freq, even where float32 cannot hold the position."""
    positions = torch.tensor([10**6, 2**24 + 1, 2**31 - 1, -5])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check(torch.randn(1, 1, 4, 16).to(dtype), Rope(16), positions, backend)


@pytest.mark.parametrize("backend", backend_names())
def test_scores_depend_on_distances_only(backend: str) -> None:
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)
    rope = Rope(16, base=10.0)

    def score(at_q: int, at_k: int) -> float:
        turned = (longattn.apply_rope(x, rope, torch.tensor([at]), backend=backend) for x, at in ((q, at_q), (k, at_k)))
        left, right = turned
        return float((left * right).sum())

    for distance in (0, 3, 40):
        assert score(distance, 0) == pytest.approx(score(100 + distance, 100), rel=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", backend_names(native=True))
def test_derivatives_of_every_order(backend: str, interleaved: bool) -> None:
    x = torch.randn(2, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    rope = Rope(4, scaling=longattn.scaling.YaRN(4.0, 2), interleaved=interleaved)
    for positions in (None, torch.tensor([[3, 1, 4], [1, 5, 9]])):
        call = lambda x: longattn.apply_rope(x, rope, positions, backend=backend)  # noqa: B023, E731
        assert gradcheck(call, (x,))
        assert gradgradcheck(lambda x: call(x).square(), (x,))  # noqa: B023


@pytest.mark.parametrize("backend", backend_names())
def test_incoming_gradients_of_any_strides(backend: str) -> None:
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    turned = longattn.apply_rope(x, Rope(6), backend=backend)
    ones = torch.ones((), dtype=torch.float64).expand_as(turned)
    (expected,) = torch.autograd.grad(turned, x, ones.contiguous(), retain_graph=True)
    (expanded,) = torch.autograd.grad(turned, x, ones, retain_graph=True)
    (strided,) = torch.autograd.grad(turned, x, ones.mT.contiguous().mT)
    assert torch.equal(expanded, expected) and torch.equal(strided, expected)


@pytest.mark.parametrize("backend", backend_names(native=True))
def test_nan_stays_in_its_token(backend: str) -> None:
    x = torch.randn(1, 2, 9, 16)
    clean = longattn.apply_rope(x, Rope(16), backend=backend)
    x[0, 1, 4, 3] = torch.nan
    got = longattn.apply_rope(x, Rope(16), backend=backend)
    harmed = torch.zeros(1, 2, 9, 16, dtype=torch.bool)
    harmed[0, 1, 4, [3, 11]] = True
    assert got[harmed].isnan().all() and torch.equal(got[~harmed], clean[~harmed])


@pytest.mark.parametrize("backend", backend_names())
def test_out_of_place(backend: str) -> None:
    x = torch.randn(1, 2, 9, 16)
    before = x.clone()
    assert longattn.apply_rope(x, Rope(16), backend=backend).data_ptr() != x.data_ptr()
    assert torch.equal(x, before)


X = torch.zeros(2, 3, 5, 8)
BAD: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "no tensor": ("x", (3.0, Rope(4)), {}),
    "one dimension": ("x", (X[0, 0, 0], Rope(4)), {}),
    "five dimensions": ("x", (X[None], Rope(4)), {}),
    "integers": ("x", (X.int(), Rope(4)), {}),
    "complex": ("x", (X.cfloat(), Rope(4)), {}),
    "float8": ("x", (X.to(torch.float8_e4m3fn), Rope(4)), {}),
    "sparse": ("x", (X.to_sparse(), Rope(4)), {}),
    "no rope": ("rope", (X, None), {}),
    "a number for rope": ("rope", (X, 4), {}),
    "too wide a rope": ("rope", (X, Rope(10)), {}),
    "positions of another length": ("positions", (X, Rope(4), torch.arange(4)), {}),
    "positions of another batch": ("positions", (X, Rope(4), torch.zeros(3, 5)), {}),
    "positions by sequence without a batch": ("positions", (X[0], Rope(4), torch.zeros(3, 5)), {}),
    "bool positions": ("positions", (X, Rope(4), torch.ones(5, dtype=torch.bool)), {}),
    "float64 positions": ("positions", (X, Rope(4), torch.ones(5, dtype=torch.float64)), {}),
    "a list of positions": ("positions", (X, Rope(4), [0, 1, 2, 3, 4]), {}),
    "sparse positions": ("positions", (X, Rope(4), torch.ones(5).to_sparse()), {}),
    "positions elsewhere": ("positions", (X, Rope(4), torch.arange(5, device="meta")), {}),
    "an unknown backend": ("backend", (X, Rope(4)), {"backend": "tpu"}),
    "a backend that is no name": ("backend", (X, Rope(4)), {"backend": None}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    argument, arguments, keywords = BAD[case]
    with pytest.raises(InvalidInput) as raised:
        longattn.apply_rope(*arguments, **keywords)
    assert raised.value.argument == argument


def test_every_small_size() -> None:
    for heads, n, width in itertools.product(range(3), range(4), range(2, 6)):
        check(torch.randn(1, heads, n, width), Rope(2), None, "auto")


@pytest.mark.parametrize("backend", backend_names())
def test_what_the_backward_reads_is_saved(backend: str) -> None:
    """Positions changed in place are noticed, and hooks on saved tensors see them."""
    x, positions = torch.randn(1, 2, 9, 8, requires_grad=True), torch.arange(9.0)
    seen: list[tuple[int, ...]] = []

    def pack(saved: Tensor) -> Tensor:
        seen.append(tuple(saved.shape))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        longattn.apply_rope(x, Rope(8), positions, backend=backend)
    assert seen == [(4,), (9,)]
    out = longattn.apply_rope(x, Rope(8), positions, backend=backend)
    positions.add_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), x)
