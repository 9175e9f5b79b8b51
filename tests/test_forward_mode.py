"""Forward-mode derivatives: finite differences for every feature, PyTorch's own attention, and torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import longattn
from helpers import backend_names, random_packed, random_qkv, require
from longattn import InvalidInput, Rope, Unsupported, arguments
from longattn.backends import eager
from longattn.backends.base import Gradients
from test_double_backward import Largest, split
from test_gradients import F64, FEATURES, PARAMETERS, ints
from test_ops import DEFAULTS, sample

FORWARD = {"check_forward_ad": True, "check_backward_ad": False, "check_undefined_grad": False}  # of gradcheck


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


@pytest.mark.parametrize("feature", [*FEATURES, *PARAMETERS])
def test_features(feature: str) -> None:
    """The tangents of out and lse, then those of the gradients, against finite differences of both."""
    parameters, rest = split(FEATURES.get(feature, PARAMETERS.get(feature, {})))
    tensors = random_qkv(2, (2, 1), (4, 6), (4, 3), F64)
    names = ("q", "k", "v", *parameters)

    def call(*inputs: Tensor) -> Any:
        return longattn.attention(**dict(zip(names, inputs, strict=True)), **rest, return_lse=True)

    inputs = leaves(*tensors, *parameters.values())
    assert gradcheck(call, inputs, fast_mode=True, **FORWARD)
    assert gradgradcheck(
        call, inputs, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
    )


@pytest.mark.parametrize("backend", backend_names())
def test_of_every_backend(backend: str) -> None:
    q, k, v = random_qkv(2, (4, 2), (5, 7), (8, 6), F64)
    keywords = {"causal": True, "window": 3, "softcap": 2.0, "backend": backend}
    require(backend, q, k, v, causal=True, window=3, softcap=2.0)
    f = lambda q, k, v: longattn.attention(q, k, v, **keywords)  # noqa: E731
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    out, got = jvp(f, (q, k, v), tangents)
    expected = jvp(lambda *x: longattn.attention(*x, **(keywords | {"backend": "reference"})), (q, k, v), tangents)
    torch.testing.assert_close(out, f(q, k, v), rtol=0, atol=0)
    torch.testing.assert_close(got, expected[1], rtol=1e-9, atol=1e-9)


def test_rows_that_see_nothing() -> None:
    bias = torch.zeros(4, 6, dtype=F64)
    bias[1], bias[:, 4] = -torch.inf, -torch.inf
    q, k, v = random_qkv(2, (2, 1), (4, 6), (4, 3), F64)

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return longattn.attention(q, k, v, bias=bias, return_lse=True, causal=True, align=-2)

    (out, lse), (out_t, lse_t) = jvp(call, (q, k, v, bias), (q, k, v, torch.ones_like(bias)))
    blind = lse == -torch.inf
    assert blind.any() and (out_t[blind] == 0).all() and (lse_t[blind] == 0).all()
    assert out_t.isfinite().all() and lse_t.isfinite().all()


@pytest.mark.parametrize(
    "keywords",
    [
        {"causal": True, "rope": Rope(4), "alibi_slopes": torch.rand(3, 2, dtype=F64), "align": ints(0, 1, 2)},
        {"key_lens": ints(2, 1, 1), "sink_logits": torch.tensor([0.1, 0.2], dtype=F64), "softcap": 0.9},
        {"window": (1, 1), "sinks": 1, "align": "start", "dropout_p": 0.3, "seed": 5},
    ],
    ids=["rope, slopes, offsets", "key_lens, sinks, softcap", "window, dropout"],
)
def test_varlen(keywords: dict[str, Any]) -> None:
    q, k, v, *rest = random_packed((2, 0, 3), (3, 1, 4), widths=(4, 3), dtype=F64)
    parameters, others = split(keywords)

    def call(q: Tensor, k: Tensor, v: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(parameters, values, strict=True))
        return longattn.attention_varlen(q, k, v, *rest, **others, **named, return_lse=True)

    assert gradcheck(call, leaves(q, k, v, *parameters.values()), **FORWARD)


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "bias", "gqa"])
def test_as_pytorch(case: str) -> None:
    q, k, v = random_qkv(2, (4, 2 if case == "gqa" else 4), (6, 6), 8, F64)
    tangents = [torch.randn_like(x) for x in (q, k, v)]
    mask = {"mask": torch.ones(6, 6).tril().bool(), "bias": torch.randn(4, 6, 6, dtype=F64)}.get(case)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": case == "causal", "enable_gqa": case == "gqa"}

    def found() -> tuple[Tensor, Tensor]:
        return jvp(lambda *x: F.scaled_dot_product_attention(*x, **options), (q, k, v), tuple(tangents))

    with sdpa_kernel(SDPBackend.MATH):
        expected = found()
    with longattn.compat.use():
        got = found()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_torch_func() -> None:
    """Every way to a Jacobian or a Hessian gives the one that two reverse passes give."""
    q, k, v = random_qkv(1, (2, 1), (4, 5), (4, 3), F64)
    f = lambda x: longattn.attention(x, k, v, causal=True, softcap=2.0, rope=Rope(4))  # noqa: E731
    scalar = lambda x: f(x).square().sum()  # noqa: E731
    close = {"rtol": 1e-9, "atol": 1e-9}
    jacobian = jacrev(f)(q)
    torch.testing.assert_close(jacfwd(f)(q), jacobian, **close)
    torch.testing.assert_close(linearize(f, q)[1](q), jvp(f, (q,), (q,))[1], **close)
    second = jacrev(jacrev(scalar))(q)
    torch.testing.assert_close(hessian(scalar)(q), second, **close)
    torch.testing.assert_close(jacrev(jacfwd(scalar))(q), second, **close)
    product = jvp(grad(scalar), (q,), (q,))[1]  # a Hessian times a vector
    torch.testing.assert_close(product, torch.einsum("abcdefgh,efgh->abcd", second, q), **close)

    samples = torch.randn(3, *q.shape, dtype=F64)
    by_sample = vmap(lambda x, t: jvp(f, (x,), (t,))[1])(samples, samples)
    for got, x in zip(by_sample, samples, strict=True):
        torch.testing.assert_close(got, jvp(f, (x,), (x,))[1], **close)


def test_compiled() -> None:
    q, k, v = random_qkv(1, (2, 1), (4, 5), (4, 3), F64)

    def along(q: Tensor, t: Tensor) -> Any:
        return jvp(lambda q: longattn.attention(longattn.apply_rope(q, Rope(4)), k, v, causal=True), (q,), (t,))

    compiled = torch.compile(along, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, q + 1), along(q, q + 1), rtol=1e-12, atol=1e-12)


def test_reverse_over_forward() -> None:
    """The gradient of a directional derivative, with respect to the inputs and to the direction."""
    tensors = random_qkv(1, (2, 1), (4, 5), (4, 3), F64)
    bias, sink = torch.randn(4, 5, dtype=F64), torch.randn(2, dtype=F64)

    def along(*inputs: Tensor) -> Any:
        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor) -> Any:
            return longattn.attention(q, k, v, bias=bias, sink_logits=sink, causal=True, return_lse=True)

        return jvp(call, inputs[:5], inputs[5:])[1]

    inputs = leaves(*tensors, bias, sink)
    assert gradcheck(along, (*inputs, *leaves(*(torch.randn_like(x) for x in inputs))), fast_mode=True)


def test_dual_numbers_and_modules() -> None:
    q, k, v = random_qkv(1, (2, 1), (4, 5), (4, 3), F64)
    with forward_ad.dual_level():  # without a tangent
        assert torch.equal(longattn.attention(q, k, v), longattn.attention(q.clone(), k, v))
    with forward_ad.dual_level():
        out = longattn.attention(forward_ad.make_dual(q, k[:, :, :4].expand_as(q)), k, v)
        tangent = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(
        tangent, jvp(lambda q: longattn.attention(q, k, v), (q,), (k[:, :, :4].expand_as(q),))[1]
    )
    torch.manual_seed(0)
    ours = longattn.nn.MultiheadAttention(16, 2, batch_first=True, dtype=F64)
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    x, t = torch.randn(2, 2, 5, 16, dtype=F64)
    got = jvp(lambda x: ours(x, x, x, need_weights=False)[0], (x,), (t,))
    expected = jvp(lambda x: theirs(x, x, x)[0], (x,), (t,))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    layer = longattn.nn.Attention(16, 4, 2, rope=Rope(4), window=3, sink_logits=True, dtype=F64)
    assert gradcheck(layer, leaves(x), **FORWARD)


@pytest.mark.parametrize("interleaved", [False, True])
def test_apply_rope(interleaved: bool) -> None:
    x, t = torch.randn(2, 2, 3, 5, 8, dtype=F64)
    rope, positions = Rope(6, interleaved=interleaved), torch.tensor([4, 0, 1, 7, 2])
    f = lambda x: longattn.apply_rope(x, rope, positions)  # noqa: E731
    torch.testing.assert_close(jvp(f, (x,), (t,))[1], f(t), rtol=0, atol=0)
    assert gradcheck(f, leaves(x), check_batched_forward_grad=True, **FORWARD)
    assert hessian(lambda x: f(x).square().sum())(x[:1, :1]).shape == (1, 1, 5, 8) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    """Sums are in float32, and each result is rounded once."""
    q, k, v = (x.to(dtype) for x in random_qkv(2, (4, 2), (19, 23), (16, 9)))
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    call = lambda *x: longattn.attention(*x, causal=True, window=5, return_lse=True)  # noqa: E731
    got = jvp(call, (q, k, v), tangents)[1]
    exact = jvp(call, tuple(x.double() for x in (q, k, v)), tuple(x.double() for x in tangents))[1]
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(got[0].double(), exact[0], rtol=unit, atol=1e-5)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-5, atol=1e-5)


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_TILE_BYTES", 1 << 14)
    for n in (128, 512):
        tensors, problem = arguments.dense(*random_qkv(1, (2, 1), (n, n), 8), **(DEFAULTS | {"causal": True}))
        tangents = Gradients(*(torch.ones_like(x) for x in tensors[:3]))
        out, lse = torch.empty_like(tensors.q), torch.empty(1, 2, n)
        with Largest() as largest:
            eager.jvp(problem, tensors, tangents, out, lse, torch.float32)
        assert largest.numel <= 2 * max(1 << 12, 2 * n) + 2 * n * 8


@pytest.mark.parametrize("call, requires_grad", [("parameters", True), ("softcap, dropout", False)])
def test_opcheck(call: str, requires_grad: bool) -> None:
    args = sample(call, "cpu", requires_grad)
    tensors = dict(zip(longattn.problem.Tensors._fields, args, strict=False))
    tangents = [None if x is None else torch.randn_like(x) for x in (tensors[name] for name in Gradients._fields)]
    torch.library.opcheck(torch.ops.longattn.attention_jvp.default, (*args, *tangents))


def test_what_is_refused() -> None:
    """Derivatives that there are none of, by name, and never silently."""
    q, k, v = random_qkv(1, (2, 1), (4, 5), (4, 3), F64)
    f = lambda x: longattn.attention(x, k, v).square().sum()  # noqa: E731
    with pytest.raises(Unsupported, match="forward-mode derivative of longattn.attention_jvp"):
        jacfwd(jacfwd(f))(q)
    with pytest.raises(Unsupported, match="third derivative|double_backward"):
        jacfwd(jacrev(jacrev(f)))(q)
    positions = torch.arange(4.0)
    with pytest.raises(Unsupported, match="positions"):
        jvp(lambda p: longattn.apply_rope(q, Rope(4), p), (positions,), (positions,))
    cache = longattn.KVCache(1, 1, 4, v_head_dim=3, dtype=F64, device="cpu")
    with pytest.raises(InvalidInput, match="q"):
        jvp(lambda x: longattn.attention_with_cache(x, k[:, :, :4], v[:, :, :4], cache), (q,), (q,))
