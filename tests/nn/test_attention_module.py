"""longattn.nn.Attention against PyTorch's own attention, on projections taken from the module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import longattn
from longattn import InvalidInput, Rope
from longattn.nn import Attention

WIDTH, HEADS, KV_HEADS = 12, 4, 2
BATCH, LENGTH = 2, 9

pytestmark = pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning")


@pytest.fixture(autouse=True)
def _one_thread(set_threads: Callable[[int], None]) -> None:
    set_threads(1)


def make(**options: Any) -> Attention:
    return Attention(WIDTH, HEADS, KV_HEADS, 6, dtype=torch.float64, **options)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (BATCH, LENGTH)), WIDTH, dtype=torch.float64)


def expected(module: Attention, x: Tensor, visible: Tensor, context: Tensor | None = None) -> Tensor:
    """The module by PyTorch alone, rope at 0, 1, ...; visible: bool, broadcastable to [B, Hq, N, M]."""
    context = x if context is None else context
    q = module.q_proj(x).unflatten(-1, (HEADS, 6)).transpose(1, 2)
    k = module.k_proj(context).unflatten(-1, (KV_HEADS, 6)).transpose(1, 2)
    v = module.v_proj(context).unflatten(-1, (KV_HEADS, 6)).transpose(1, 2)
    if module.q_norm is not None:
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.q_norm.weight
        k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.k_norm.weight
    if module.rope is not None:
        q, k = (module.rope.rotate(part, torch.arange(part.shape[2])) for part in (q, k))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=module.scale, enable_gqa=True)
    return module.o_proj(out.transpose(1, 2).flatten(2))


def distance(queries: int = LENGTH, keys: int = LENGTH) -> Tensor:
    """How far key j lies before query i."""
    return torch.arange(queries)[:, None] - torch.arange(keys)


@pytest.mark.parametrize(
    ("options", "visible"),
    [
        ({}, distance() >= 0),
        ({"causal": False}, distance() == distance()),
        ({"bias": True, "scale": 0.3}, distance() >= 0),
        ({"rope": Rope(4)}, distance() >= 0),
        ({"rope": Rope(6), "qk_norm": True}, distance() >= 0),
        ({"window": 3}, (distance() >= 0) & (distance() < 3)),
        ({"window": 3, "causal": False}, distance().abs() < 3),
        ({"window": 3, "sinks": 2}, (distance() >= 0) & ((distance() < 3) | (torch.arange(LENGTH) < 2))),
    ],
    ids=str,
)
def test_agrees_with_pytorch(options: dict[str, Any], visible: Tensor) -> None:
    module = make(**options)
    x = tokens().requires_grad_()
    found, wanted = module(x), expected(module, x, visible)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    parameters = [x, *module.parameters()]
    dout = torch.randn_like(found)
    grads = (torch.autograd.grad(out, parameters, dout) for out in (found, wanted))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_defaults_are_multi_head() -> None:
    module = Attention(12, 3)
    assert (module.num_kv_heads, module.head_dim) == (3, 4)
    assert list(module.state_dict()) == ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
    assert module(torch.randn(1, 0, 12)).shape == (1, 0, 12)


def test_key_mask_and_bounds() -> None:
    module = make()
    x = tokens()
    key_mask = torch.rand(BATCH, LENGTH) < 0.6
    key_mask[:, 0] = True
    visible = (distance() >= 0) & key_mask[:, None, None, :]
    torch.testing.assert_close(module(x, key_mask=key_mask), expected(module, x, visible), rtol=1e-12, atol=1e-12)

    prefix = make(causal=False)  # the first 4 tokens see each other, the rest is causal
    hi = torch.arange(1, LENGTH + 1, dtype=torch.int32).clamp(min=4)
    visible = torch.arange(LENGTH) < hi[:, None]
    found = prefix(x, bounds=(torch.zeros_like(hi), hi))
    torch.testing.assert_close(found, expected(prefix, x, visible), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"window": 3, "sinks": 1}, {"causal": False}], ids=str)
def test_padding_and_packing_change_nothing(options: dict[str, Any]) -> None:
    module = make(rope=Rope(6), **options)
    sequences = [tokens(length) for length in (5, 1, LENGTH)]
    alone = [module(x[None])[0] for x in sequences]

    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=7.0)
    lens = torch.tensor([5, 1, LENGTH], dtype=torch.int32)
    out = module(padded, key_lens=lens)
    for row, wanted in zip(out, alone, strict=True):
        torch.testing.assert_close(row[: len(wanted)], wanted, rtol=1e-12, atol=1e-12)

    cu_seqlens = torch.tensor([0, 5, 6, 6 + LENGTH], dtype=torch.int32)
    out = module(torch.cat(sequences), cu_seqlens=cu_seqlens, max_seqlen=LENGTH)
    torch.testing.assert_close(out, torch.cat(alone), rtol=1e-12, atol=1e-12)

    left = torch.stack([F.pad(x, (0, 0, LENGTH - len(x), 0), value=7.0) for x in sequences])
    key_mask = torch.arange(LENGTH) >= LENGTH - lens[:, None]
    out = module(left, key_mask=key_mask, positions=(key_mask.cumsum(1) - 1).clamp(min=0))
    if not module.sinks:  # sinks are the first places, which are padding here
        for row, wanted in zip(out, alone, strict=True):
            torch.testing.assert_close(row[-len(wanted) :], wanted, rtol=1e-12, atol=1e-12)


def test_cross_attention() -> None:
    module = make(causal=False)
    x, context = tokens(BATCH, 4), tokens()
    key_mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [3]])
    wanted = expected(module, x, key_mask[:, None, None, :], context)
    torch.testing.assert_close(module(x, context=context, key_mask=key_mask), wanted, rtol=1e-12, atol=1e-12)

    latest = make(rope=Rope(6))  # the last queries of a causal sequence: they stand at its end
    torch.testing.assert_close(
        latest(context[:, -4:], context=context), latest(context)[:, -4:], rtol=1e-12, atol=1e-12
    )


def test_positions_rotate() -> None:
    module = make(rope=Rope(6))
    x = tokens()
    torch.testing.assert_close(module(x, positions=torch.arange(LENGTH) + 1000), module(x), rtol=1e-4, atol=1e-6)
    stretched = module(x, positions=torch.arange(LENGTH) * 2)
    assert not torch.allclose(stretched, module(x))
    pair = torch.arange(LENGTH) * 2
    torch.testing.assert_close(module(x, positions=(pair, pair)), stretched)


def test_softcap_and_sink_logits() -> None:
    module = make(softcap=2.0, sink_logits=True)
    with torch.no_grad():
        module.sink_logits.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    x = tokens()
    q = module.q_proj(x).unflatten(-1, (HEADS, 6)).transpose(1, 2)
    k, v = (
        proj(x).unflatten(-1, (KV_HEADS, 6)).transpose(1, 2).repeat_interleave(2, 1)
        for proj in (module.k_proj, module.v_proj)
    )
    scores = 2.0 * torch.tanh(q @ k.mT / 6**0.5 / 2.0)
    scores = scores.masked_fill(distance() < 0, -torch.inf)
    sink = module.sink_logits[:, None, None].expand(BATCH, HEADS, LENGTH, 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    wanted = module.o_proj((weights @ v).transpose(1, 2).flatten(2))
    found = module(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), module.sink_logits)[0] for out in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    module.reset_parameters()
    assert not module.sink_logits.any()


def test_dropout_is_for_training() -> None:
    module = make(dropout=0.5)
    x = tokens()
    assert not torch.equal(module(x), module(x))
    torch.manual_seed(3)
    first = module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)
    module.eval()
    torch.testing.assert_close(module(x), expected(module, x, distance() >= 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_to_one_graph(packed: bool) -> None:
    module = make(rope=Rope(6), window=3, sinks=1, qk_norm=True)
    keywords: dict[str, Any] = {}
    if packed:
        keywords = {"cu_seqlens": torch.tensor([0, 4, LENGTH], dtype=torch.int32), "max_seqlen": LENGTH}
    x = (tokens(LENGTH) if packed else tokens()).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(x, **keywords), module(x, **keywords)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_compiles_for_any_length() -> None:
    module = make(dropout=0.1).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 8):
        x = tokens(BATCH, length)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_copies_pickles_and_autocasts() -> None:
    module = make(rope=Rope(6), window=3, sink_logits=True, qk_norm=True)
    x = tokens()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    module = module.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x.float()), rtol=0.05, atol=0.05)


def test_can_be_made_without_memory() -> None:
    module = Attention(WIDTH, HEADS, sink_logits=True, qk_norm=True, device="meta")
    assert all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("embed_dim", {"embed_dim": 10}),
        ("embed_dim", {"embed_dim": -4}),
        ("num_heads", {"num_heads": 0}),
        ("num_kv_heads", {"num_kv_heads": 3}),
        ("num_kv_heads", {"num_kv_heads": 0}),
        ("head_dim", {"head_dim": 0}),
        ("window", {"window": -3}),
        ("sinks", {"sinks": 1.5}),
        ("rope", {"rope": Rope(8)}),
        ("rope", {"rope": 10000.0}),
        ("dropout", {"dropout": -0.1}),
        ("methods", {"methods": None}),
    ],
    ids=str,
)
def test_bad_constructor_arguments(argument: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as error:
        Attention(**{"embed_dim": WIDTH, "num_heads": HEADS, **arguments})
    assert error.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": torch.randn(BATCH, LENGTH, WIDTH + 1)}),
        ("x", {"x": torch.randn(LENGTH, WIDTH)}),
        ("x", {"x": [[1.0]]}),
        ("x", {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32), "max_seqlen": 3}),
        ("context", {"context": torch.randn(BATCH, WIDTH)}),
        ("k", {"context": torch.randn(BATCH + 1, 3, WIDTH)}),
        ("key_mask", {"key_mask": torch.ones(BATCH, LENGTH)}),
        ("key_lens", {"key_lens": torch.ones(LENGTH, dtype=torch.int32)}),
        ("positions", {"positions": torch.arange(LENGTH)}),  # the module has no rope
        ("append", {"append": None}),
        ("max_seqlen", {"max_seqlen": 3}),
        ("max_seqlen", {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}),
        (
            "context",
            {"x": torch.randn(3, WIDTH), "context": torch.randn(3, WIDTH), "max_seqlen": 3}
            | {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_inputs(argument: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as error:
        Attention(WIDTH, HEADS)(**{"x": torch.randn(BATCH, LENGTH, WIDTH), **change})
    assert error.value.argument == argument


def test_the_package_finds_its_modules() -> None:
    assert longattn.nn.Attention is Attention


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 4, "sinks": 1, "rope": Rope(6)}, {"rope": Rope(4), "qk_norm": True, "sink_logits": True}],
    ids=["plain", "window", "norm"],
)
def test_with_a_cache_it_continues(options: dict[str, Any]) -> None:
    module, x = make(**options).eval(), tokens()
    caches = [longattn.KVCache(BATCH, KV_HEADS, 6, dtype=torch.float64)]
    if "window" in options:
        caches.append(longattn.SlidingKVCache(BATCH, KV_HEADS, 6, window=4, sinks=1, dtype=torch.float64))
    with torch.no_grad():
        full = module(x)
        for cache in caches:
            parts = [module(x[:, at : at + n], cache=cache) for at, n in ((0, 5), (5, 1), (6, 3))]
            torch.testing.assert_close(torch.cat(parts, 1), full)


def test_a_cache_takes_no_other_mask_and_no_dropout() -> None:
    module, x = make(dropout=0.5), tokens()
    cache = longattn.KVCache(BATCH, KV_HEADS, 6, dtype=torch.float64)
    with torch.no_grad():
        with pytest.raises(InvalidInput, match="cache"):
            module(x, cache=cache)
        module.eval()
        for name, value in (("context", x), ("key_lens", torch.tensor([1, 2])), ("positions", (x, x))):
            with pytest.raises(InvalidInput, match=name):
                module(x, cache=cache, **{name: value})
        with pytest.raises(InvalidInput, match="lengths"):
            module(x, lengths=[1, 2])
    with pytest.raises(InvalidInput, match="gradient"):
        module(x, cache=cache)
    assert cache.lengths == (0, 0)
