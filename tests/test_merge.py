"""merge_attention puts partial results over disjoint keys together, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import longattn
from helpers import backend_names, random_packed, random_qkv
from longattn import InvalidInput

F64 = torch.float64


def parts_of(
    q: Tensor, k: Tensor, v: Tensor, cuts: tuple[int, ...], backend: str = "auto"
) -> tuple[list[Tensor], list[Tensor]]:
    """Attention over k[cuts[0]:cuts[1]], k[cuts[1]:cuts[2]], ..."""
    parts = [
        longattn.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, backend=backend)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    return [out for out, _ in parts], [lse for _, lse in parts]


@pytest.mark.parametrize("cuts", [(0, 40), (0, 13, 40), (0, 1, 2, 40), (0, 0, 20, 20, 40)], ids=str)
@pytest.mark.parametrize("backend", backend_names())
def test_parts_make_the_whole(backend: str, cuts: tuple[int, ...]) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(2, (4, 2), (9, 40), (8, 5), F64))
    whole = longattn.attention(q, k, v, return_lse=True, backend=backend)
    merged = longattn.merge_attention(*parts_of(q, k, v, cuts, backend))
    for got, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

    grads = tuple(torch.randn_like(x) for x in whole)
    for got, expected in zip(
        torch.autograd.grad(merged, (q, k, v), grads), torch.autograd.grad(whole, (q, k, v), grads), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_near_and_far_keys() -> None:
    """A window, and what it leaves out."""
    q, k, v = random_qkv(1, (2, 2), (30, 30), 8, F64)
    near = longattn.attention(q, k, v, causal=True, window=8, return_lse=True)
    far = longattn.attention(q, k, v, causal=True, align=-8, return_lse=True)
    out, lse = longattn.merge_attention(*zip(near, far, strict=True))
    expected = longattn.attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close((out, lse), expected, rtol=1e-12, atol=1e-12)


def test_of_packed_sequences() -> None:
    q, k, v, *rest = random_packed((4, 9), (4, 9), dtype=F64)
    near = longattn.attention_varlen(q, k, v, *rest, causal=True, window=3, return_lse=True)
    far = longattn.attention_varlen(q, k, v, *rest, causal=True, align=-3, return_lse=True)
    outs, lses = [near[0].transpose(0, 1), far[0].transpose(0, 1)], [near[1], far[1]]
    out, lse = longattn.merge_attention(outs, lses)
    expected, expected_lse = longattn.attention_varlen(q, k, v, *rest, causal=True, return_lse=True)
    torch.testing.assert_close((out.transpose(0, 1), lse), (expected, expected_lse), rtol=1e-12, atol=1e-12)


def test_parts_that_see_nothing() -> None:
    seen, hidden = torch.randn(2, 3, 4, dtype=F64), torch.zeros(2, 3, 4, dtype=F64)
    lse, nothing = torch.randn(2, 3, dtype=F64), torch.full((2, 3), -torch.inf, dtype=F64)
    out, merged = longattn.merge_attention([hidden, seen], [nothing, lse])
    torch.testing.assert_close((out, merged), (seen, lse), rtol=1e-15, atol=1e-15)
    out, merged = longattn.merge_attention([hidden, hidden], [nothing, nothing])
    assert not out.any() and (merged == -torch.inf).all()


def test_gradients() -> None:
    outs = [torch.randn(2, 3, 4, dtype=F64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 3, dtype=F64, requires_grad=True) for _ in range(3)]
    assert gradcheck(lambda *x: longattn.merge_attention(x[:3], x[3:]), (*outs, *lses))


def test_gradients_where_nothing_is_seen() -> None:
    outs = [torch.randn(2, 4, dtype=F64, requires_grad=True) for _ in range(2)]
    lses = [torch.tensor(x, dtype=F64, requires_grad=True) for x in ([-torch.inf, -torch.inf], [-torch.inf, 0.5])]
    out, lse = longattn.merge_attention(outs, lses)
    grads = torch.autograd.grad((out, lse), (*outs, *lses), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0].any() and not grads[1][0].any() and grads[1][1].eq(1).all()
    assert not grads[2].any() and grads[3].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_lse(shift: float) -> None:
    outs = [torch.randn(5, 4) for _ in range(2)]
    lses = [torch.randn(5) for _ in range(2)]
    out, lse = longattn.merge_attention(outs, [x + shift for x in lses])
    expected, expected_lse = longattn.merge_attention(outs, [(x + shift).double() for x in lses])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(1, (1, 1), (4, 8), 8, dtype)
    out, lse = longattn.merge_attention(*parts_of(q, k, v, (0, 3, 8)))
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)


OUT, LSE = torch.zeros(2, 3, 4), torch.zeros(2, 3)
BAD = {
    "nothing": ([], []),
    "no lists": (5, 6),
    "no outs": ([], [LSE]),
    "fewer lses": ([OUT, OUT], [LSE]),
    "more lses": ([OUT], [LSE, LSE]),
    "no tensors": ([1.0], [2.0]),
    "no lse tensor": ([OUT], [2.0]),
    "outs of two shapes": ([OUT, OUT[:1]], [LSE, LSE[:1]]),
    "outs of two dtypes": ([OUT, OUT.double()], [LSE, LSE]),
    "lses of two dtypes": ([OUT, OUT], [LSE, LSE.double()]),
    "an lse of another shape": ([OUT], [LSE[:1]]),
    "integers": ([OUT.int()], [LSE]),
    "integer lses": ([OUT], [LSE.int()]),
    "two devices": ([OUT, OUT.to("meta")], [LSE, LSE.to("meta")]),
    "an lse elsewhere": ([OUT], [LSE.to("meta")]),
    "scalars": ([torch.tensor(1.0)], [torch.tensor(1.0)]),
    "sparse": ([OUT.to_sparse()], [LSE]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        longattn.merge_attention(*BAD[case])  # type: ignore[arg-type]
    assert raised.value.argument in ("outs", "lses")
