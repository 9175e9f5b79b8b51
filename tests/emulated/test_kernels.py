"""The kernels against the oracle, on random calls and under random engines."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
from emulator.engine import LATE, RANDOM, Engine, guarded
from helpers import check_attention, check_varlen, laid_out, random_packed, random_qkv, run

CASES = 300
LENGTHS = (1, 2, 7, 63, 64, 65, 113, 127, 128, 129, 176, 191, 193, 203, 256, 257, 300, 385)
HEADS = ((1, 1), (2, 1), (2, 2), (4, 2), (3, 1))
LAYOUTS = ("bhnd", "bnhd", "nbhd", "gaps")


def draw(rng: random.Random) -> dict[str, Any]:
    """Keywords of a call: some mask, some features."""
    keywords: dict[str, Any] = {}
    kind = rng.choice(("full", "causal", "window", "sides", "sinks"))
    if kind == "causal":
        keywords["causal"] = True
    elif kind == "window":
        keywords |= {"causal": True, "window": rng.randint(1, 300)}
    elif kind == "sides":
        keywords["window"] = rng.choice(((rng.randint(0, 200), rng.randint(0, 99)), (-1, 30), (70, -1), (0, 0)))
    elif kind == "sinks":
        keywords |= {"causal": True, "window": rng.randint(1, 90), "sinks": rng.choice((1, 4, 64, 150))}
    if rng.random() < 0.2:
        keywords["softcap"] = rng.choice((0.5, 5.0, 30.0))
    if rng.random() < 0.1:
        keywords["scale"] = rng.choice((-0.3, 0.0, 0.5))
    if rng.random() < 0.2:
        keywords["align"] = rng.choice(("start", -40, 33))
    return keywords


def drawn_bounds(rng: random.Random, batch: int, nq: int, nk: int) -> tuple[Tensor, Tensor]:
    """Documents, chunks with all before them, or anything; for each sequence, or for all."""
    starts = torch.tensor(sorted(rng.sample(range(nk), min(3, nk))))
    document = torch.searchsorted(starts, torch.arange(nq), right=True)
    edges = torch.cat((torch.tensor([-5]), starts, torch.tensor([nk + 7])))
    kind = rng.choice(("documents", "chunks", "any"))
    if kind == "any":
        lo = torch.randint(-9, nk + 1, (batch, nq))
        return lo.int(), (lo + torch.randint(0, nk + 9, (batch, nq))).int()
    hi = edges[document + 1].int()
    return (edges[document] if kind == "documents" else torch.zeros(nq)).int(), hi


def configured(engine: Engine, rng: random.Random) -> None:
    engine.configure(
        rng.randrange(3), rng.randrange(1, 1000), rng.randint(1, 3), 128 * rng.randrange(8), rng.randint(1, 4)
    )


@pytest.mark.parametrize("number", range(CASES))
def test_random_call(engine: Engine, number: int, request: pytest.FixtureRequest) -> None:
    rng = random.Random(number)
    torch.manual_seed(number)
    configured(engine, rng)
    if rng.random() < 0.3:
        request.getfixturevalue("deterministic")
    packed = rng.random() < 0.25
    dtype = rng.choice((torch.bfloat16, torch.bfloat16, torch.float16))
    widths = rng.choice((64, 64, 128, 128, 128, 96, (24, 100), (72, 64), 80, 192, 256, 250))
    keywords, heads, batch = draw(rng), rng.choice(HEADS), rng.randint(1, 2)
    if rng.random() < 0.25:
        keywords["sink_logits"] = torch.randn(heads[0])
    if packed:
        lengths = [[rng.choice((0, *LENGTHS)) for _ in range(rng.randint(1, 4))] for _ in range(1)][0]
        lengths_k = [rng.choice((0, 1, n, n + 60)) for n in lengths]
        both = (widths, widths) if isinstance(widths, int) else widths
        call = random_packed(lengths, lengths_k, heads, both, dtype, outside=rng.choice((0, 5)))
        keywords.pop("align", None)
        check_varlen(call, backend="cuda", **keywords)
        return
    nq, nk = rng.choice(LENGTHS), rng.choice(LENGTHS)
    q, k, v = (laid_out(x, rng.choice(LAYOUTS)) for x in random_qkv(batch, heads, (nq, nk), widths, dtype))
    if rng.random() < 0.2:
        keywords["key_mask"] = torch.rand(batch, nk) < rng.random()
    if rng.random() < 0.15:
        keywords["bounds"] = drawn_bounds(rng, batch, nq, nk)
        if keywords.get("softcap") or keywords.get("scale", 1.0) <= 0:
            keywords = {name: x for name, x in keywords.items() if name not in ("softcap", "scale")}
    if rng.random() < 0.2:
        keywords["key_lens"] = torch.randint(0, nk + 1, (batch,))
        if isinstance(keywords.get("align"), int):
            keywords["align"] = torch.randint(-9, 30, (batch,))
    check_attention(q, k, v, backend="cuda", **keywords)


@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_bounds_narrow_what_is_visited(engine: Engine, width: int) -> None:
    """Documents far from each other, in an order of their own: most tiles of keys are seen by few tiles of queries."""
    torch.manual_seed(5)
    q, k, v = random_qkv(1, (2, 1), (300, 500), width, torch.bfloat16)
    start = torch.tensor([400, 0, 250]).repeat_interleave(100).int()
    for keywords in ({}, {"window": (90, 90), "sinks": 5}):
        check_attention(q, k, v, backend="cuda", bounds=(start, start + 100), **keywords)


@pytest.mark.parametrize("seed", range(1, 13))
def test_deterministic_gradients_are_the_same_bits_under_every_engine(
    engine: Engine, deterministic: None, seed: int
) -> None:
    """Each seed starves something else; and without `deterministic` sums do come out in another order."""
    torch.manual_seed(0)
    width = (64, 128, 192, 256)[seed % 4]
    q, k, v = random_qkv(1, (2, 1), (200, 400), width, torch.bfloat16)
    dout = torch.randn_like(q)
    keywords: dict[str, Any] = {"backend": "cuda", "causal": True, "window": 200, "sinks": 130}
    engine.configure(LATE, 1, resident=4)
    expected = run(longattn.attention, (q, k, v), dout, **keywords)
    engine.configure(RANDOM if seed % 3 == 0 else LATE, seed, resident=4)
    got = run(longattn.attention, (q, k, v), dout, **keywords)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_nothing_outside_the_tensors_is_read(engine: Engine) -> None:
    """Pages without access lie behind the inputs."""
    torch.manual_seed(1)
    for width, nq, nk in ((64, 65, 129), (128, 1, 77), (96, 130, 40), (200, 70, 65)):
        q, k, v = (guarded(x) for x in random_qkv(1, (2, 1), (nq, nk), width, torch.bfloat16))
        key_mask = guarded(torch.rand(1, nk) < 0.5)
        check_attention(q, k, v, backend="cuda", causal=True, key_mask=key_mask)


def hidden(features: str, q: Tensor, nk: int) -> tuple[dict[str, Any], Tensor]:
    """Keywords, and which keys they hide from all: bool [B, Nk]."""
    batch = q.shape[0]
    if features == "key_lens":
        lens = torch.tensor([nk // 2, nk - 1][:batch])
        return {"key_lens": lens}, torch.arange(nk) >= lens[:, None]
    mask = torch.rand(batch, nk) < 0.5
    return {"key_mask": mask}, ~mask


@pytest.mark.parametrize("features", ["key_lens", "key_mask"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_what_hidden_keys_hold_does_not_matter(engine: Engine, features: str, width: int) -> None:
    torch.manual_seed(2)
    q, k, v = random_qkv(2, (2, 1), (100, 203), width, torch.bfloat16)
    keywords, unseen = hidden(features, q, 203)
    dout = torch.randn_like(q)
    expected = run(longattn.attention, (q, k, v), dout, backend="cuda", **keywords)
    for x, hole in ((k, torch.nan), (v, torch.inf)):
        x[unseen[:, None].expand(x.shape[:3])] = hole
    got = run(longattn.attention, (q, k, v), dout, backend="cuda", **keywords)
    for name in ("out", "lse", "q", "k", "v"):
        assert torch.allclose(got[name], expected[name], rtol=0.0, atol=1e-3), name


@pytest.mark.parametrize("width", [64, 192])
def test_tokens_of_other_sequences_do_not_matter(engine: Engine, width: int) -> None:
    """Tiles reach into the next sequence, whose tokens may hold anything."""
    torch.manual_seed(3)
    call = random_packed((100, 70), (90, 80), (2, 1), (width, width), torch.bfloat16)
    q, k, v, cu_q, cu_k = call[:5]
    dout = torch.randn_like(q)
    before = run(longattn.attention_varlen, call, dout, backend="cuda", causal=True)
    for x, start in ((q, 100), (k, 90), (v, 90)):
        x[start:] = torch.nan
    dout[100:] = torch.nan
    after = run(longattn.attention_varlen, call, dout, backend="cuda", causal=True)
    for name, stop in (("out", 100), ("q", 100), ("k", 90), ("v", 90)):
        assert torch.allclose(after[name][:stop], before[name][:stop], rtol=0.0, atol=1e-3), name


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_short(engine: Engine, shape: tuple[int, int]) -> None:
    check_attention(*random_qkv(1, (2, 1), shape, 64, torch.bfloat16), backend="cuda", sink_logits=torch.randn(2))


def test_nan_shows(engine: Engine) -> None:
    """A number that is none, in a key that is seen, is not hidden by a zero."""
    q, k, v = random_qkv(1, (1, 1), (3, 70), 64, torch.bfloat16)
    k[0, 0, 5, 7] = torch.nan
    out, lse = longattn.attention(q, k, v, backend="cuda", return_lse=True)
    assert out.isnan().all() and lse.isnan().all()
