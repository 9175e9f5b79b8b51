"""The kernels against the oracle, in Triton's interpreter: every feature, small odd shapes and smaller tiles."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import longattn
from helpers import check_attention, check_varlen, laid_out, random_packed, random_qkv, run
from longattn import Rope, Unsupported, arguments, ops, scaling
from longattn.backends import registry
from longattn.backends.philox import uniform_bits
from longattn.backends.triton import architecture, attention, config
from longattn.backends.triton.config import Kernels, Tiles
from longattn.problem import Origin, Problem, present_features
from tolerances import assert_within_budget

SMALL = Kernels(*[Tiles(16, 16, 4, 1)] * 4)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "kernels", lambda *_: SMALL)


def ints(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape).int()


B, HQ, NQ, NK = 2, 2, 19, 37
FEATURES: dict[str, Any] = {
    "plain": dict,
    "causal": lambda: {"causal": True},
    "fewer keys": lambda: {"causal": True, "align": -9},
    "window and sinks": lambda: {"causal": True, "window": 6, "sinks": 3},
    "two sides": lambda: {"window": (5, 2), "align": "start"},
    "offsets": lambda: {"causal": True, "align": ints(-9, 30, B)},
    "key_mask": lambda: {"key_mask": torch.rand(B, NK) < 0.4, "causal": True},
    "key_lens": lambda: {"key_lens": torch.tensor([0, 23]), "window": 9},
    "bounds": lambda: {"bounds": (ints(0, 20, B, NQ), ints(10, 37, B, NQ)), "sinks": 2, "window": (11, -1)},
    "bias": lambda: {"bias": torch.randn(B, HQ, NQ, NK), "causal": True},
    "bias by head and key": lambda: {"bias": torch.randn(HQ, 1, NK).half(), "softcap": 2.0},
    "bias by query": lambda: {"bias": torch.randn(B, 1, NQ, 1)},
    "one bias": lambda: {"bias": torch.randn(1, 1, 1, 1)},
    "bias that blocks": lambda: {"bias": torch.randn(NQ, NK).masked_fill(torch.rand(NQ, NK) < 0.5, -torch.inf)},
    "bool bias": lambda: {"bias": torch.rand(HQ, NQ, NK) < 0.3},
    "softcap": lambda: {"softcap": 1.5, "causal": True},
    "slopes": lambda: {"alibi_slopes": torch.rand(HQ), "causal": True},
    "slopes by sequence": lambda: {"alibi_slopes": torch.rand(B, HQ), "window": (8, 8)},
    "sink_logits": lambda: {"sink_logits": torch.randn(HQ), "causal": True, "align": -4},
    "dropout": lambda: {"dropout_p": 0.3, "seed": 2**40 + 7, "causal": True},
    "rope": lambda: {"rope": Rope(8), "causal": True},
    "rope with positions": lambda: {
        "rope": Rope(6, scaling=scaling.YaRN(4.0, 16), interleaved=True),
        "positions": ints(0, 100, B, NK),
        "causal": True,
    },
    "negative scale": lambda: {"scale": -0.7, "window": 5},
    "no scale": lambda: {"scale": 0.0, "causal": True},
    "all scores": lambda: {
        "softcap": 2.0, "alibi_slopes": torch.rand(HQ), "bias": torch.randn(NQ, NK), "sink_logits": torch.randn(HQ),
        "dropout_p": 0.2, "seed": 3, "rope": Rope(10), "causal": True, "window": 9, "sinks": 2,
    },
}  # fmt: skip
KEYWORDS = {
    name: value for name, value in longattn.attention.__kwdefaults__.items() if name not in ("return_lse", "backend")
}
KV_HEADS = (2, 1)
WIDTHS = ((16, 16), (10, 7), (5, 20))


@pytest.mark.parametrize("huge", [-1e30, -1.1e30, torch.finfo(torch.float32).min])
def test_masks_of_huge_numbers(huge: float) -> None:
    """Instead of -inf, on the left of one sequence and all over another, which then has the mean of its values."""
    q, k, v = (x.requires_grad_() for x in random_qkv(2, (HQ, 1), (NQ, NK), 16))
    bias = torch.zeros(2, 1, 1, NK)
    bias[0, ..., :20] = bias[1] = huge
    out, lse = longattn.attention(q, k, v, bias=bias, return_lse=True, backend="triton")
    assert lse.isfinite().all()
    torch.testing.assert_close(out[1], v[1].mean(1, keepdim=True).expand_as(out[1]))
    dout = torch.randn_like(out)
    dout[1] = 0.0
    grads = torch.autograd.grad(out, (q, k, v), dout)
    expected = longattn.attention(q[:1], k[:1, :, 20:], v[:1, :, 20:], backend="triton")
    torch.testing.assert_close(out[:1], expected)
    for grad, x in zip(grads, torch.autograd.grad(expected, (q, k, v), dout[:1]), strict=True):
        torch.testing.assert_close(grad, x)


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str) -> None:
    at = list(FEATURES).index(feature)
    q, k, v = random_qkv(B, (HQ, KV_HEADS[at % 2]), (NQ, NK), (WIDTHS[at % 3] if "rope" not in feature else (12, 7)))
    check_attention(q, k, v, backend="triton", **FEATURES[feature]())


@pytest.mark.parametrize("feature", ["causal", "window and sinks", "all scores"])
def test_float16(feature: str) -> None:
    check_attention(*random_qkv(B, (HQ, 1), (NQ, NK), (16, 24), torch.float16), backend="triton", **FEATURES[feature]())


def test_bfloat16() -> None:
    """The interpreter truncates where a GPU rounds, which doubles the error of what is stored."""
    q, k, v = random_qkv(1, (2, 1), (NQ, NK), 16, torch.bfloat16)
    dout = torch.randn_like(q)
    got = run(longattn.attention, (q, k, v), dout, backend="triton", causal=True)
    wide = (x.float() for x in (q, k, v))
    exact = run(longattn.attention, tuple(wide), dout.float(), backend="reference", causal=True)
    for name, x in got.items():
        assert_within_budget(
            x.float(), exact[name].double(), terms=2**-6 * exact[name].double().abs() + 2**-6, name=name
        )


@pytest.mark.parametrize("widths", [(1, 3), (80, 33), (300, 512)])
def test_widths(widths: tuple[int, int]) -> None:
    check_attention(*random_qkv(1, (1, 1), (5, 19), widths), backend="triton", causal=True)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 33), (1, 1)])
def test_short(shape: tuple[int, int]) -> None:
    check_attention(*random_qkv(1, (2, 1), shape, 8), backend="triton", causal=True)


@pytest.mark.parametrize("layout", ["bnhd", "gaps"])
def test_layouts(layout: str) -> None:
    q, k, v = (laid_out(x, layout) for x in random_qkv(2, (2, 1), (NQ, NK), 12))
    check_attention(q, k, v, backend="triton", causal=True, rope=Rope(8))
    out = longattn.attention(q, k, v, backend="triton")
    assert out.stride()[1] > out.stride()[2] if layout == "gaps" else out.stride()[1] < out.stride()[2]


def test_broadcast_gradient() -> None:
    q, k, v = random_qkv(1, (1, 1), (NQ, NK), 16)
    check_attention(q, k, v, backend="triton", dout=torch.ones(()).expand(1, 1, NQ, 16), dlse=torch.randn(1, 1, NQ))


@pytest.mark.parametrize("feature", ["plain", "window", "lens", "scores", "rope"])
def test_packed(feature: str) -> None:
    keywords: dict[str, Any] = {
        "plain": {},
        "window": {"causal": True, "window": 7, "sinks": 2},
        "lens": {"causal": True, "key_lens": torch.tensor([3, 0, 20, 1])},
        "scores": {"alibi_slopes": torch.rand(4, 2), "sink_logits": torch.randn(2), "dropout_p": 0.2, "seed": 1},
        "rope": {"causal": True, "rope": Rope(8)},
    }[feature]
    check_varlen(random_packed((5, 0, 19, 1), (9, 4, 30, 1), outside=3), backend="triton", **keywords)


def test_hidden_keys_never_matter() -> None:
    q, k, v = random_qkv(1, (2, 2), (9, 40), 16)
    for keywords in ({"key_mask": torch.arange(40)[None] % 3 > 0}, {"key_lens": torch.tensor([21])}):
        hidden = ~keywords["key_mask"][0] if "key_mask" in keywords else torch.arange(40) >= 21
        dout = torch.randn_like(q)
        clean = run(longattn.attention, (q, k, v), dout, backend="triton", **keywords)
        bad = [x.masked_fill(hidden[:, None], torch.nan) for x in (k, v)]
        dirty = run(longattn.attention, (q, *bad), dout, backend="triton", **keywords)
        for name, x in clean.items():
            assert torch.equal(dirty[name], x), name
        assert not dirty["k"][:, :, hidden].any() and not dirty["v"][:, :, hidden].any()


def test_dropped_entries_are_those_of_every_backend() -> None:
    q, k = torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 16, 16)
    v = torch.eye(16).expand(2, 2, 16, 16)
    seed = torch.tensor([-(2**62) + 5])
    out = longattn.attention(q, k, v, dropout_p=0.5, seed=seed, backend="triton")
    b, h, i = torch.arange(2)[:, None, None], torch.arange(2)[:, None], torch.arange(5)
    kept = uniform_bits(seed, b, h, i, slice(0, 16)) >= 2**31
    assert torch.equal(out > 0, kept)


@pytest.mark.parametrize("key", [8, 5])
def test_a_block_drops_the_entries_of_the_whole(key: int) -> None:
    origin = Origin(3, 1, 7, key)
    tensors, problem = arguments.dense(
        *random_qkv(B, (HQ, 1), (NQ, NK), 16), **(KEYWORDS | {"dropout_p": 0.4, "seed": 5, "causal": True})
    )
    problem = problem._replace(origin=origin, features=present_features(tensors, 0.0, 0.4, origin))
    found = {}
    for backend in ("triton", "reference"):
        out, lse = ops.attention(tensors, problem, backend)
        dout = torch.linspace(-1, 1, out.numel()).view_as(out)
        call = tensors, problem, backend, out, lse, dout, None, [True] * 3 + [False] * 3
        found[backend] = out, lse, *ops.attention_backward(*call)[:3]
    for got, exact in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved: bool) -> None:
    rope = Rope(10, scaling=scaling.YaRN(4.0, 16), interleaved=interleaved)
    x = laid_out(torch.randn(2, 3, 19, 13), "bnhd").requires_grad_()
    for positions in (None, ints(0, 10**6, 19), ints(0, 10**6, 2, 19)):
        found = {}
        for backend in ("triton", "reference"):
            inv_freq, factor = rope.frequencies(19)
            place = torch.arange(19.0) if positions is None else positions.float()
            out = torch.ops.longattn.rope(x, inv_freq, place, factor, interleaved, False, backend)
            found[backend] = out, torch.autograd.grad(out, x, torch.ones_like(out))[0]
        for got, exact in zip(found["triton"], found["reference"], strict=True):
            torch.testing.assert_close(got, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("feature", ["window and sinks", "two sides"])
def test_descriptors(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tensor cores of 9.0 on read by descriptor, as far as the interpreter goes; and what no descriptor fits."""
    monkeypatch.setattr(config, "uses_descriptors", lambda problem, architecture: True)
    made = []
    descriptor = attention._Descriptor
    monkeypatch.setattr(attention, "_Descriptor", lambda *args: made.append(args[3]) or descriptor(*args))
    call = FEATURES[feature]()
    check_attention(*random_qkv(B, (HQ, 1), (NQ, 70), (16, 12), torch.float16), backend="triton", **call)
    assert made == [[1, 1, 16, 16]] * 6  # of k, v, then of q, dout, k, v
    made.clear()
    q, k, v = random_qkv(1, (HQ, 1), (NQ, 70), 16, torch.float16)
    check_attention(q, k.expand(1, HQ, 70, 16), v.expand(1, HQ, 70, 16), backend="triton", **call)
    assert not made


def test_what_it_refuses() -> None:
    q, k, v = random_qkv(1, (1, 1), (3, 3), 8)
    assert longattn.explain(q, k, v).backend == "cpu"  # the interpreter runs only where it is asked for
    for call, why in (
        ((q.double(), k.double(), v.double()), "float64"),
        (random_qkv(1, (1, 1), (3, 3), (513, 8)), "head_dim is at most 512, not 513"),
    ):
        with pytest.raises(Unsupported, match=why):
            longattn.attention(*call, backend="triton")


def test_the_table_covers_every_call() -> None:
    assert set(config._HALF[90]) == set(config.WIDTHS) == set(config._FLOAT)
    for table in (*config._HALF.values(), {width: config._FLOAT[width] for width in config.WIDTHS}):
        for kernels in table.values():
            for tiles in kernels:
                assert all(16 <= x <= config.LONGEST_TILE and x & (x - 1) == 0 for x in tiles[:2])


def test_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    big = Kernels(*[Tiles(128, 128, 4, 1)] * 4)
    monkeypatch.setattr(config, "kernels", lambda *_: big)
    assert architecture.self_check(torch.device("cpu")) is None
    right = attention.Call._query_tiles
    monkeypatch.setattr(attention.Call, "_query_tiles", lambda self, tiles: right(self, tiles) - 1)
    fault = architecture.self_check(torch.device("cpu"))
    assert fault is not None and "is off by" in fault


def test_auto_on_an_unproven_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One check and one warning; a failed check is a reason."""
    problem = Problem(1, 1, 1, 2, 2, 8, 8, torch.float16, "cuda", longattn.Mask(), 1.0)
    backend = registry.get("triton")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for result, expected in ((None, []), ("out is off", ["a check of the kernels on a GPU failed: out is off"])):
        check = Mock(return_value=result)
        monkeypatch.setattr(architecture, "self_check", check)
        architecture._fault.cache_clear()
        architecture._capability.cache_clear()
        if result is None:
            with pytest.warns(RuntimeWarning, match="not yet proven on a GPU"):
                assert backend.reasons(problem) == expected
        assert backend.reasons(problem) == backend.reasons(problem) == expected
        check.assert_called_once()
    architecture._fault.cache_clear()
    architecture._capability.cache_clear()
