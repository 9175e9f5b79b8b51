"""attention_rows and attention_stats tell what the attention matrix of the oracle shows, in linear memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import longattn
import oracle
from helpers import random_qkv
from longattn import InvalidInput, Rope
from tolerances import assert_within_budget

F64 = torch.float64


@pytest.fixture(autouse=True)
def _one_thread(set_threads: Callable[[int], None]) -> None:
    set_threads(1)  # many small steps: threads only wait for each other


def random_call(seed: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """q, k in float64, and keywords of everything that shapes weights, each there or not."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads, nq, nk = (
        draw.choice((1, 2)),
        draw.choice(((2, 2), (4, 2), (3, 1))),
        draw.randint(1, 9),
        draw.randint(1, 12),
    )
    q, k, _ = random_qkv(batch, heads, (nq, nk), 8, F64)

    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape).int()

    several = {
        "causal": lambda: True,
        "window": lambda: draw.choice((1, 3, (2, 1), (-1, 2), (4, -1))),
        "sinks": lambda: draw.randint(1, 4),
        "align": lambda: draw.choice(("start", 2, -2, ints(-3, nk, batch))),
        "key_mask": lambda: torch.rand(batch, nk) < 0.7,
        "key_lens": lambda: ints(0, nk + 1, batch),
        "bounds": lambda: (ints(-1, 4, batch, nq), ints(2, nk + 2, batch, nq)),
        "bias": lambda: draw.choice((torch.randn(nq, nk), torch.randn(heads[0], 1, nk), torch.rand(nq, nk) < 0.7)),
        "scale": lambda: 0.7,
        "softcap": lambda: 1.5,
        "alibi_slopes": lambda: torch.rand(draw.choice(((heads[0],), (batch, heads[0])))),
        "sink_logits": lambda: torch.randn(heads[0]),
        "rope": lambda: Rope(draw.choice((4, 8)), interleaved=draw.random() < 0.5),
    }
    keywords: dict[str, Any] = {name: make() for name, make in several.items() if draw.random() < 0.3}
    if "rope" in keywords and draw.random() < 0.5:
        keywords["positions"] = (torch.rand(nq) * 9, torch.rand(batch, nk) * 9)
    for name in oracle.PARAMETERS:
        if name in keywords and keywords[name].is_floating_point():
            keywords[name] = keywords[name].to(F64)
    return q, k, keywords


def with_gradient(q: Tensor, k: Tensor, keywords: dict[str, Any]) -> list[Tensor]:
    """The differentiable inputs, which now ask for a gradient."""
    inputs = [q, k, *(keywords[name] for name in oracle.PARAMETERS if name in keywords)]
    return [x.requires_grad_() for x in inputs if x.is_floating_point()]


def exact_stats(weights: Tensor, q: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mass and entropy by their definitions. What a row's weights lack is a sink's."""
    sink = torch.zeros_like(weights[..., 0]) if sink_logits is None else 1.0 - weights.sum(-1)
    outcomes = torch.cat((weights, sink[..., None]), -1)
    logs = torch.where(outcomes > 1e-15, outcomes, 1.0).log()
    return weights.sum(2), -(outcomes * logs).sum(-1)


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed: int) -> None:
    q, k, keywords = random_call(seed)
    inputs = with_gradient(q, k, keywords)
    expected = oracle.weights(q, k, **keywords)
    rows = [0, -1, q.shape[2] // 2, 0]
    for given in (rows, torch.tensor(rows)):
        got = longattn.attention_rows(q, k, given, **keywords)
        torch.testing.assert_close(got, expected[:, :, rows], rtol=1e-9, atol=1e-11)
    by = torch.randn_like(got)
    grads = torch.autograd.grad((got * by).sum(), inputs, materialize_grads=True)
    wanted = torch.autograd.grad((expected[:, :, rows] * by).sum(), inputs, materialize_grads=True, retain_graph=True)
    torch.testing.assert_close(grads, wanted, rtol=1e-8, atol=1e-10)

    lse = oracle.results(q, k, k, **keywords)["lse"]
    for stats in (longattn.attention_stats(q, k, **keywords), longattn.attention_stats(q, k, lse, **keywords)):
        mass, entropy = exact_stats(expected, q, keywords.get("sink_logits"))
        torch.testing.assert_close(stats.mass, mass, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(stats.entropy, entropy, rtol=1e-9, atol=1e-10)
        check_top(stats, expected.detach(), visible(keywords, q, k), top_k=8)

    stats = longattn.attention_stats(q, k, top_k=0, **keywords)
    by_mass, by_entropy = torch.randn_like(stats.mass), torch.randn_like(stats.entropy)
    grads = torch.autograd.grad(
        (stats.mass * by_mass).sum() + (stats.entropy * by_entropy).sum(), inputs, materialize_grads=True
    )
    wanted = torch.autograd.grad((mass * by_mass).sum() + (entropy * by_entropy).sum(), inputs, materialize_grads=True)
    torch.testing.assert_close(grads, wanted, rtol=1e-7, atol=1e-8)


def visible(keywords: dict[str, Any], q: Tensor, k: Tensor) -> Tensor:
    names = ("causal", "window", "sinks", "align", "key_mask", "key_lens", "bounds")
    mask = {name: keywords[name] for name in names if name in keywords}
    allowed = oracle.visible(q.shape[0], q.shape[2], k.shape[2], **mask)[:, None].expand(-1, q.shape[1], -1, -1)
    bias = keywords.get("bias")
    return allowed & bias if bias is not None and bias.dtype == torch.bool else allowed


def check_top(stats: longattn.AttentionStats, weights: Tensor, allowed: Tensor, top_k: int) -> None:
    assert stats.top_keys.dtype == torch.int64 and stats.top_keys.shape == (*weights.shape[:3], top_k)
    found = stats.top_keys >= 0
    assert torch.equal(found.sum(-1), allowed.sum(-1).clamp(max=top_k))
    assert allowed.gather(-1, stats.top_keys.clamp(min=0))[found].all()
    ordered = weights.sort(-1, descending=True).values[..., :top_k]
    best = torch.zeros_like(stats.top_weights)
    best[..., : ordered.shape[-1]] = ordered
    torch.testing.assert_close(stats.top_weights, best, rtol=1e-9, atol=1e-11)
    at = weights.gather(-1, stats.top_keys.clamp(min=0)).masked_fill(~found, 0.0)
    torch.testing.assert_close(stats.top_weights, at, rtol=1e-9, atol=1e-11)


def test_finite_differences() -> None:
    q, k, _ = random_qkv(1, (2, 1), (4, 6), 4, F64)
    slopes, sinks = torch.tensor([0.5, 0.1], dtype=F64), torch.tensor([0.3, -0.2], dtype=F64)
    bias, lse = torch.randn(4, 6, dtype=F64), torch.randn(1, 2, 4, dtype=F64) + 2
    inputs = [x.requires_grad_() for x in (q, k, bias, slopes, sinks, lse)]

    def stats(q: Tensor, k: Tensor, bias: Tensor, slopes: Tensor, sinks: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        found = longattn.attention_stats(
            q,
            k,
            lse,
            bias=bias,
            alibi_slopes=slopes,
            sink_logits=sinks,
            causal=True,
            window=3,
            rope=Rope(4),
            softcap=2.0,
        )
        return found.mass, found.entropy

    def rows(q: Tensor, k: Tensor, bias: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
        return longattn.attention_rows(q, k, [1, 3], bias=bias, alibi_slopes=slopes, sink_logits=sinks, rope=Rope(4))

    assert gradcheck(stats, inputs)
    assert gradcheck(rows, inputs[:-1])


def test_a_given_lse_is_that_of_more_keys() -> None:
    """The mass of all keys is that of each part of them, given the whole's lse."""
    q, k, _ = random_qkv(2, (4, 2), (9, 20), 8, F64)
    whole = longattn.attention_stats(q, k)
    _, lse = longattn.attention(q, k, k, return_lse=True)
    parts = [longattn.attention_stats(q, part, lse) for part in k.split(7, 2)]
    torch.testing.assert_close(torch.cat([part.mass for part in parts], -1), whole.mass)
    torch.testing.assert_close(sum(part.entropy for part in parts), whole.entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    q, k, _ = random_qkv(2, (4, 2), (50, 70), 32, dtype)
    exact = oracle.weights(q, k, causal=True)
    rows = longattn.attention_rows(q, k, range(50), causal=True)
    stats = longattn.attention_stats(q, k, causal=True)
    assert {rows.dtype, stats.mass.dtype, stats.entropy.dtype, stats.top_weights.dtype} == {torch.float32}
    assert_within_budget(rows, exact, terms=1e-6)
    assert_within_budget(stats.mass, exact.sum(2), terms=1e-5)
    q.requires_grad_()
    (longattn.attention_stats(q, k).entropy.sum() + longattn.attention_rows(q, k, [3])[..., 0].sum()).backward()
    assert q.grad is not None and q.grad.dtype == dtype and q.grad.isfinite().all()


def test_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are cut, with and without a window, beside sequences of their own lengths."""
    monkeypatch.setattr("longattn.backends.eager._TILE_BYTES", 1 << 15)
    monkeypatch.setattr("longattn.backends.eager._TILE_ROWS", 8)
    q, k, _ = random_qkv(2, (2, 1), (100, 130), 8, F64)
    for keywords in (
        {"causal": True},
        {"causal": True, "window": 9, "sinks": 3},
        {"window": (13, 5), "key_lens": torch.tensor([130, 17])},
        {"window": (3, 3), "align": torch.tensor([-20, 100])},
    ):
        expected = oracle.weights(q, k, **keywords)
        stats = longattn.attention_stats(q, k, top_k=3, **keywords)
        mass, entropy = exact_stats(expected, q, None)
        torch.testing.assert_close(stats.mass, mass, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(stats.entropy, entropy, rtol=1e-9, atol=1e-10)
        check_top(stats, expected, visible(keywords, q, k), top_k=3)


def test_linear_memory() -> None:
    """The whole matrix would take 40 GB."""
    n = 100_000
    q, k = torch.randn(1, 1, n, 4), torch.randn(1, 1, n, 4)
    q.requires_grad_()
    stats = longattn.attention_stats(q, k, causal=True, window=32, sinks=2, top_k=1)
    assert stats.mass.sum().item() == pytest.approx(n, rel=1e-4)
    stats.entropy.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_nothing_to_see() -> None:
    q, k, _ = random_qkv(2, (2, 1), (3, 5), 8)
    q.requires_grad_()
    hidden = {"key_mask": torch.zeros(2, 5).bool()}
    rows = longattn.attention_rows(q, k, [0, 2], **hidden)
    stats = longattn.attention_stats(q, k, **hidden)
    for x in (rows, stats.mass, stats.entropy, stats.top_weights):
        assert torch.equal(x, torch.zeros_like(x))
    assert (stats.top_keys == -1).all()
    (rows.sum() + stats.mass.sum() + stats.entropy.sum()).backward()
    assert q.grad is not None and torch.equal(q.grad, torch.zeros_like(q))
    with_sinks = longattn.attention_stats(q, k, sink_logits=torch.randn(2), **hidden)
    assert torch.equal(with_sinks.entropy, torch.zeros(2, 2, 3))  # the sink for certain

    k[:] = torch.nan  # and whatever hidden keys hold
    k[:, :, 1] = 0.5
    seen = longattn.attention_stats(q, k, key_mask=torch.arange(5).expand(2, 5) == 1)
    assert torch.equal(seen.top_keys[..., 0], torch.ones(2, 2, 3).long()) and seen.mass.isfinite().all()


@pytest.mark.parametrize(("batch", "lengths"), [(0, (3, 5)), (2, (0, 5)), (2, (3, 0))])
def test_empty(batch: int, lengths: tuple[int, int]) -> None:
    q, k, _ = random_qkv(batch, (2, 1), lengths, 8)
    stats = longattn.attention_stats(q, k, top_k=2)
    assert stats.mass.shape == (batch, 2, lengths[1]) and stats.entropy.shape == (batch, 2, lengths[0])
    assert stats.top_keys.shape == stats.top_weights.shape == (batch, 2, lengths[0], 2)
    rows = list(range(lengths[0]))
    assert longattn.attention_rows(q, k, rows).shape == (batch, 2, lengths[0], lengths[1])
    assert longattn.attention_rows(q, k, []).shape == (batch, 2, 0, lengths[1])


Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)


@pytest.mark.parametrize(
    ("argument", "rows"),
    [
        ("rows", 3),
        ("rows", [5]),
        ("rows", [-6]),
        ("rows", [10**30]),
        ("rows", [True]),
        ("rows", [1.0]),
        ("rows", "12"),
        ("rows", None),
        ("rows", torch.tensor([[1]])),
        ("rows", torch.tensor([1.0])),
        ("rows", torch.tensor([0, 7])),
        ("rows", torch.tensor([True])),
        ("rows", torch.tensor([1], device="meta")),
    ],
)
def test_bad_rows(argument: str, rows: Any) -> None:
    with pytest.raises(InvalidInput) as raised:
        longattn.attention_rows(Q, K, rows)
    assert raised.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("q", {"q": Q[0]}),
        ("q", {"q": Q.int()}),
        ("q", {"q": Q.to("meta"), "k": K.to("meta")}),
        ("k", {"k": K[..., :7]}),
        ("k", {"k": K[..., :0]}),
        ("k", {"k": K[:1]}),
        ("k", {"k": K.double()}),
        ("window", {"window": 0}),
        ("key_mask", {"key_mask": torch.ones(2, 6).bool()}),
        ("bias", {"bias": torch.zeros(3, 7)}),
        ("positions", {"positions": torch.zeros(7)}),
        ("lse", {"lse": torch.zeros(2, 4, 6)}),
        ("lse", {"lse": torch.zeros(2, 4, 5).int()}),
        ("top_k", {"top_k": -1}),
        ("top_k", {"top_k": 2.0}),
        ("top_k", {"top_k": True}),
    ],
)
def test_bad_input(argument: str, call: dict[str, Any]) -> None:
    call = {"q": Q, "k": K} | call
    with pytest.raises(InvalidInput) as raised:
        longattn.attention_stats(**call)
    assert raised.value.argument == argument
    if argument not in ("lse", "top_k"):
        with pytest.raises(InvalidInput) as raised:
            longattn.attention_rows(rows=[0], **call)
        assert raised.value.argument == argument
