"""torch.set_default_device moves what a user makes, not what the library makes for itself."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

import longattn
from longattn import Rope, compat
from longattn.scaling import DynamicNTK, YaRN

ROOT = Path(longattn.__file__).parent
FACTORIES = {function.__name__ for function in _device_constructors()}
COMMANDS = {"cli", "bench"}  # processes of their own, in which nobody sets a default device


def factory_calls() -> Iterator[str]:
    """Where the package makes a tensor on the default device. Parameters of a module are made there on purpose."""
    for path in sorted(ROOT.rglob("*.py")):
        if COMMANDS & set(path.relative_to(ROOT).parts):
            continue
        tree = ast.parse(path.read_text())
        parameters = {
            id(argument)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Parameter")
            for argument in call.args
        }
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or id(call) in parameters:
                continue
            if ast.unparse(call.func.value) != "torch" or call.func.attr not in FACTORIES:
                continue
            if not {keyword.arg for keyword in call.keywords} & {"device", None}:  # None: **keywords
                yield f"{path.relative_to(ROOT)}:{call.lineno}: torch.{call.func.attr} without a device"


def test_every_factory_call_names_a_device() -> None:
    assert list(factory_calls()) == []


def calls() -> dict[str, Callable[[], Any]]:
    """Calls on tensors of the CPU, made before a default device is set."""
    q = torch.randn(2, 4, 9, 8)
    flash = q.transpose(1, 2)
    packed, cu = torch.randn(9, 4, 8), torch.tensor([0, 4, 9], dtype=torch.int32, device="cpu")
    layer = longattn.nn.Attention(32, 4, window=4, sinks=1, rope=Rope(8))
    module = longattn.nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True)
    x = torch.randn(2, 9, 32)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)

    def cached(new: Any, tree: Any = (-1, 0), n: int = 9, **keywords: Any) -> Any:
        cache = new(2, 4, 8, dtype=torch.float32, device="cpu", **keywords)
        part = q[:, :, :n]
        longattn.attention_with_cache(part, part, part, cache, causal=True, rope=Rope(8))
        cache.truncate(0, n - 1)
        cache.reorder([1, 0])
        drafts = q[:, :, :2]
        longattn.attention_with_cache(drafts, drafts, drafts, cache, rope=Rope(8), tree=tree)
        cache.accept(0, cache.lengths[0] - 2, [0])
        return cache.read(0)[1]

    return {
        "dropout": lambda: longattn.attention(q, q, q, dropout_p=0.5),
        "seed": lambda: longattn.attention(q, q, q, dropout_p=0.5, seed=1),
        "rope": lambda: longattn.attention(q, q, q, rope=Rope(8, scaling=YaRN(2.0, 4)), causal=True),
        "dynamic rope": lambda: longattn.apply_rope(q, Rope(8, scaling=DynamicNTK(2.0, 4))),
        "varlen": lambda: longattn.attention_varlen(packed, packed, packed, cu, cu, 5, 5, dropout_p=0.5),
        "reference": lambda: longattn.attention(q, q, q, causal=True, key_lens=cu[1:], backend="reference"),
        "merge": lambda: longattn.merge_attention([q, q], [q[..., 0], q[..., 0]])[0],
        "rows": lambda: longattn.attention_rows(q, q, [0, -1]),
        "stats": lambda: longattn.attention_stats(q, q, longattn.attention(q, q, q, return_lse=True)[1])[0],
        "flash": lambda: compat.flash_attn.flash_attn_func(flash, flash, flash, dropout_p=0.5, return_attn_probs=True)[
            2
        ],
        "flash cache": lambda: compat.flash_attn.flash_attn_with_kvcache(flash, flash, flash, cache_seqlens=3),
        "sdpa": lambda: compat.sdpa.scaled_dot_product_attention(q, q, q, dropout_p=0.5, is_causal=True),
        "layer": lambda: layer(x),
        "module": lambda: module(x, x, x, need_weights=False)[0],
        "module, weights": lambda: module(x, x, x, is_causal=True, attn_mask=hidden)[1],
        "KVCache": lambda: cached(longattn.KVCache),
        "SlidingKVCache": lambda: cached(longattn.SlidingKVCache, window=4, sinks=1, spare=4),
        "SlidingKVCache, positions": lambda: cached(
            longattn.SlidingKVCache, None, window=4, sinks=1, spare=4, positions="cache"
        ),
        "PagedKVCache": lambda: cached(longattn.PagedKVCache, num_pages=20, page_size=2),
    }


@pytest.mark.parametrize("name", calls())
def test_calls(name: str) -> None:
    """A tensor on the meta device would be refused, or have no data."""
    call = calls()[name]
    with torch.device("meta"):  # what set_default_device enters for good
        out = call()
    assert out.device.type == "cpu" and out.isfinite().all()


def test_gradients() -> None:
    q = torch.randn(2, 4, 9, 8, requires_grad=True)
    bias = torch.randn(1, 1, 9, 9, requires_grad=True)
    with torch.device("meta"):
        out = longattn.attention(q, q, q, causal=True, bias=bias, rope=Rope(8))
        first = torch.autograd.grad(out.square().sum(), (q, bias), create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), (q, bias))
    assert all(x.device.type == "cpu" for x in (*first, *second))
