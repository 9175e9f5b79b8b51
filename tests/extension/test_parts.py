"""Self-Extend, dual chunk attention and moving sinks: against every pair's score, packed, with caches, and training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from extension.dense import (
    Pair,
    dense_attention,
    pair_of_dual_chunk,
    pair_of_self_extend,
    pair_of_streaming,
)
from longattn import InvalidInput, KVCache, PagedKVCache, Rope, SlidingKVCache, Unsupported
from longattn.extension import DualChunk, LogN, SelfExtend, ShiftedGroups
from longattn.nn import Attention
from longattn.redirection import redirected
from longattn.scaling import DynamicNTK, YaRN

ROPE = Rope(8, 100.0)
METHODS: dict[str, tuple[Pair, dict[str, Any]]] = {
    "self-extend": (pair_of_self_extend(3, 7), {"methods": [SelfExtend(3, 7)]}),
    "self-extend, odd window": (pair_of_self_extend(4, 5), {"methods": [SelfExtend(4, 5)]}),
    "self-extend, window of one": (pair_of_self_extend(5, 1), {"methods": [SelfExtend(5, 1)]}),
    "dual chunk": (pair_of_dual_chunk(8, 11), {"methods": [DualChunk(8, 11)]}),
    "dual chunk without a margin": (pair_of_dual_chunk(6, 6), {"methods": [DualChunk(6, 6)]}),
    "dual chunk of one": (pair_of_dual_chunk(1, 3), {"methods": [DualChunk(1, 3)]}),
    "streaming": (pair_of_streaming(6, 3), {"window": 6, "sinks": 3, "window_positions": "cache"}),
}


class Shard:
    """The second half of a sequence of 14 tokens (`longattn.redirection.Elsewhere`); it keeps the queries."""

    def token_places(self, tokens: int, device: torch.device) -> torch.Tensor:
        return torch.arange(7, 7 + tokens, device=device)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> torch.Tensor:
        self.q = q
        return q


def layer(options: dict[str, Any], **changes: Any) -> Attention:
    return Attention(24, 4, 2, head_dim=8, **{"rope": ROPE, **options, **changes}, dtype=torch.float64).eval()


def heads_of(attention: Attention, x: torch.Tensor) -> list[torch.Tensor]:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [projection(x).unflatten(-1, (-1, 8)).transpose(1, 2) for projection in projections]


def expected(attention: Attention, x: torch.Tensor, pair: Pair, starts: list[int] | None = None) -> torch.Tensor:
    heads = (
        proj(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k, v = heads
    out = dense_attention(q, k, v, ROPE.frequencies(1)[0], pair, starts or [0] * x.shape[1])
    return attention.o_proj(out.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("name", METHODS)
def test_values_and_gradients_are_those_of_every_pair(name: str) -> None:
    pair, options = METHODS[name]
    attention, x = layer(options), torch.randn(2, 29, 24, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 29, 24, dtype=torch.float64)
    wanted = expected(attention, x, pair)
    got = attention(x)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)  # angles are products of float32 numbers
    inputs = (x, *attention.parameters())
    for ours, exact in zip(
        torch.autograd.grad(got, inputs, dout), torch.autograd.grad(wanted, inputs, dout), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_short_inputs(name: str, tokens: int) -> None:
    pair, options = METHODS[name]
    attention, x = layer(options), torch.randn(1, tokens, 24, dtype=torch.float64)
    torch.testing.assert_close(attention(x), expected(attention, x, pair), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_packed_documents_start_anew(name: str) -> None:
    pair, options = METHODS[name]
    attention, x = layer(options), torch.randn(30, 24, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 17, 20, 30], dtype=torch.int32)
    got = attention(x, cu_seqlens=cu_seqlens, max_seqlen=17)
    starts = [0] * 17 + [17] * 3 + [20] * 10
    torch.testing.assert_close(got, expected(attention, x[None], pair, starts)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_padding_and_bounds_hide_keys(name: str) -> None:
    _, options = METHODS[name]
    attention, x = layer(options), torch.randn(2, 25, 24, dtype=torch.float64)
    whole = attention(x)
    lens = torch.tensor([25, 14], dtype=torch.int32)
    key_mask = torch.arange(25) < lens[:, None]
    for hidden in ({"key_lens": lens}, {"key_mask": key_mask}):
        got = attention(x, **hidden)
        torch.testing.assert_close(got[0], whole[0])
        torch.testing.assert_close(got[1, :14], whole[1, :14])
    places = torch.arange(25, dtype=torch.int32)
    own = attention(x, bounds=(places, places + 1))
    alone = attention.o_proj(attention.v_proj(x).unflatten(-1, (2, 8)).repeat_interleave(2, -2).flatten(-2))
    torch.testing.assert_close(own, alone)


def make_cache(options: dict[str, Any], kind: str, dtype: torch.dtype = torch.float64) -> Any:
    if "window" in options:
        return SlidingKVCache(2, 2, 8, window=6, sinks=3, positions="cache", dtype=dtype)
    if kind == "paged":
        return PagedKVCache(2, 2, 8, num_pages=40, page_size=4, dtype=dtype)
    return KVCache(2, 2, 8, dtype=dtype)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_pieces_into_a_cache_give_what_the_whole_gives(name: str, kind: str) -> None:
    _, options = METHODS[name]
    attention, x = layer(options), torch.randn(2, 31, 24, dtype=torch.float64)
    whole, cache = attention(x), make_cache(options, kind)
    with torch.no_grad():
        first = attention(x[:, :13], cache=cache, lengths=[13, 9])
        torch.testing.assert_close(first[0], whole[0, :13], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(first[1, :9], whole[1, :9], rtol=1e-6, atol=1e-7)
        rest = attention(x[1:, 9:13], cache=cache, sequences=[1])
        torch.testing.assert_close(rest[0], whole[1, 9:13], rtol=1e-6, atol=1e-7)
        for start, stop in ((13, 14), (14, 22), (22, 23), (23, 31)):
            got = attention(x[:, start:stop], cache=cache)
            torch.testing.assert_close(got, whole[:, start:stop], rtol=1e-6, atol=1e-7)
    assert cache.lengths == (31, 31)


def test_what_is_near_is_untouched() -> None:
    x = torch.randn(1, 12, 24, dtype=torch.float64)
    plain = layer({})
    for options in ({"methods": [SelfExtend(4, 16)]}, {"methods": [DualChunk(12, 14)]}):
        same = layer(options)
        same.load_state_dict(plain.state_dict())
        torch.testing.assert_close(same(x), plain(x), rtol=1e-6, atol=1e-8)
    one_group = layer({"methods": [SelfExtend(1, 4)]})  # a group of one moves nothing
    one_group.load_state_dict(plain.state_dict())
    torch.testing.assert_close(one_group(x), plain(x), rtol=1e-6, atol=1e-8)


def test_layers_with_a_window_stay_as_they_are() -> None:
    x = torch.randn(1, 30, 24, dtype=torch.float64)
    plain, remapped = layer({"window": 5, "sinks": 2}), layer({"window": 5, "sinks": 2, "methods": [SelfExtend(4, 6)]})
    remapped.load_state_dict(plain.state_dict())
    torch.testing.assert_close(remapped(x), plain(x))


def test_learned_sinks_are_counted_once_and_dropout_drops_what_one_call_would() -> None:
    options = {"sink_logits": True, "dropout": 0.4}
    plain, grouped = layer(options), layer({**options, "methods": [SelfExtend(1, 6)]})
    torch.nn.init.normal_(plain.sink_logits)
    grouped.load_state_dict(plain.state_dict())
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(grouped(x), plain(x), rtol=1e-6, atol=1e-8)
    torch.manual_seed(3)
    dropped = plain.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(grouped.train()(x), dropped, rtol=1e-6, atol=1e-8)


def test_log_n_sharpens_the_softmax() -> None:
    plain, sharp = layer({}), layer({"methods": [LogN(8)]})
    sharp.load_state_dict(plain.state_dict())
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    q, k, v = heads_of(plain, x)
    scale = torch.tensor([max(1.0, math.log(p + 1) / math.log(8)) for p in range(20)], dtype=torch.float64)
    inv_freq = ROPE.frequencies(1)[0]
    out = dense_attention(q * scale[:, None], k, v, inv_freq, lambda p, j: (p, j), [0] * 20)
    wanted = plain.o_proj(out.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(sharp(x), wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sharp(x)[:, :8], plain(x)[:, :8])
    cache = KVCache(2, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        pieces = [sharp(part, cache=cache) for part in x.split(7, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=1e-6, atol=1e-7)
    rows = sharp.weights(x, [3, 19])
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))


def test_log_n_takes_the_position_of_the_query() -> None:
    attention, x = layer({"methods": [LogN(4)]}), torch.randn(2, 20, 24, dtype=torch.float64)
    far = torch.arange(20) + 100
    wanted = attention(x, positions=far)
    assert not torch.allclose(wanted, attention(x), atol=1e-3)
    torch.testing.assert_close(attention(x, positions=(far, far)), wanted)

    weights = attention.weights(x, [3, 19], positions=far)
    _, _, v = heads_of(attention, x)
    rows = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(attention.o_proj(rows), wanted[:, [3, 19]])

    for cache in (KVCache(2, 2, 8, dtype=torch.float64), SlidingKVCache(2, 2, 8, window=5, spare=4, dtype=x.dtype)):
        windowed = layer({"methods": [LogN(4)], "window": cache.window})
        with torch.no_grad():
            whole = windowed(x)
            pieces = [windowed(part, cache=cache) for part in x.split([7, 12, 1], dim=1)]
            again = windowed(x[:, 17:], cache=cache, append=False)
            uneven = windowed(x[:, 17:], cache=cache, append=False, lengths=[3, 3])
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(again, whole[:, 17:], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(uneven, again)

    for wrong in (torch.arange(3), torch.zeros(3, 20), (torch.arange(3), torch.arange(20))):
        with pytest.raises(InvalidInput, match="positions"):
            attention(x, positions=wrong)

    shard, half = Shard(), layer({"methods": [LogN(4)], "rope": None})
    with redirected(shard):  # type: ignore[arg-type]
        half(x[:, :7])
    scale = (torch.arange(8, 15).double().log() / math.log(4)).clamp(min=1)
    torch.testing.assert_close(shard.q, heads_of(half, x[:, :7])[0] * scale[:, None], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("heads", [(4, 2), (6, 3), (4, 1), (2, 1)], ids=str)
def test_shifted_groups_while_training(heads: tuple[int, int]) -> None:
    q_heads, kv_heads = heads
    group, tokens = 6, 22
    attention = Attention(24, q_heads, kv_heads, head_dim=8, rope=ROPE, methods=[ShiftedGroups(group)]).double()
    x = torch.randn(1, tokens, 24, dtype=torch.float64)
    q, k, v = heads_of(attention, x)
    k, v = (y.repeat_interleave(q_heads // kv_heads, 1) for y in (k, v))
    kept = q_heads - (kv_heads // 2) * (q_heads // kv_heads) if kv_heads > 1 else q_heads - q_heads // 2
    outs = []
    for head in range(q_heads):
        shift = group // 2 if head >= kept else 0
        one = slice(head, head + 1)

        def pair(p: int, j: int, shift: int = shift) -> tuple[float, float] | None:
            return (p, j) if (p + shift) // group == (j + shift) // group else None

        outs.append(dense_attention(q[:, one], k[:, one], v[:, one], ROPE.frequencies(1)[0], pair, [0] * tokens))
    wanted = attention.o_proj(torch.cat(outs, 1).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(attention.train()(x), wanted, rtol=1e-6, atol=1e-7)
    plain = Attention(24, q_heads, kv_heads, head_dim=8, rope=ROPE).double().eval()
    plain.load_state_dict(attention.state_dict())
    torch.testing.assert_close(attention.eval()(x), plain(x))  # reading is as ever


def test_bad_input() -> None:
    for options in (
        {"methods": [SelfExtend(2, 4), DualChunk(4, 4)]},
        {"methods": [LogN(8), LogN(9)]},
        {"methods": [SelfExtend(2, 4)], "rope": None},
        {"methods": [DualChunk(2, 4)], "rope": Rope(8, scaling=DynamicNTK(2, 8))},
        {"methods": [YaRN(2, 8)]},
        {"methods": [LogN(8)], "causal": False},
        {"window_positions": "cache"},
        {"window_positions": "there"},
    ):
        with pytest.raises(InvalidInput):
            layer(options)
    remapped = layer({"methods": [SelfExtend(2, 4)]})
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        for call in (
            {"cache": SlidingKVCache(1, 2, 8, window=4, dtype=torch.float64)},
            {"cache": KVCache(1, 2, 8, dtype=torch.float64), "tree": [-1, 0, 0, 1, 1]},
            {"context": x},
            {"positions": torch.arange(5)},
        ):
            with pytest.raises(InvalidInput):
                remapped(x, **call)
        with pytest.raises(InvalidInput, match="cache"):
            layer(METHODS["streaming"][1])(x, cache=SlidingKVCache(1, 2, 8, window=6, sinks=3, dtype=torch.float64))
        with pytest.raises(InvalidInput, match="methods"):
            remapped.weights(x, [1])
        with redirected(Shard()), pytest.raises(Unsupported, match="shards"):  # type: ignore[arg-type]
            remapped(x)
    with pytest.raises(InvalidInput, match="heads"):
        Attention(8, 1, rope=Rope(8), methods=[ShiftedGroups(4)]).train()(torch.randn(1, 5, 8))
