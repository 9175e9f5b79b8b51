"""The meta device: every call returns tensors without data, of the shapes, strides and dtypes of those on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import longattn
from helpers import laid_out, random_packed, random_qkv
from longattn import InvalidInput, Rope, Unsupported, scaling
from longattn.models import Decoder, Encoder, EncoderDecoder, TransformerConfig
from test_ops import CALLS


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    """Nothing runs, so that nothing is slow."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def to_meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) else x


def check(call: Callable[..., Any], *args: Any, **keywords: Any) -> None:
    """The results of a call on the CPU and on the meta device are alike, and so are its gradients."""
    found = []
    for place in (lambda x: x, to_meta):
        leaves = [place(x).requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        leaves = [place(x) if isinstance(x, Tensor) and not x.is_floating_point() else x for x in leaves]
        out = [x for x in tree_flatten(call(*leaves, **tree_map(place, keywords)))[0] if isinstance(x, Tensor)]
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        if any(x.requires_grad for x in out):
            out += torch.autograd.grad(sum(x.sum() for x in out), wanted, create_graph=True)
        found.append(out)
    for real, meta in zip(*found, strict=True):
        assert meta.is_meta and (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_attention(call: str, layout: str) -> None:
    tensors = [laid_out(x, layout) for x in random_qkv(2, (4, 2), (5, 7), (8, 6))]
    check(longattn.attention, *tensors, **CALLS[call], return_lse=True)


def test_varlen_and_faces() -> None:
    packed = random_packed((3, 0, 2), (4, 1, 3), (4, 2), (8, 8))
    check(longattn.attention_varlen, *packed, causal=True, rope=Rope(8), return_lse=True)
    check(longattn.compat.flash_attn.flash_attn_varlen_func, *packed, causal=True)
    q, k, v = random_qkv(2, (4, 4), (5, 7), 8)
    check(longattn.compat.sdpa.scaled_dot_product_attention, q, k, v, is_causal=True)
    with longattn.compat.use():
        check(F.scaled_dot_product_attention, q, k, v)


@pytest.mark.parametrize("of", [None, scaling.YaRN(4, 64), scaling.DynamicNTK(2, 32)], ids=str)
def test_rope(of: scaling.Scaling | None) -> None:
    x, positions = torch.randn(2, 3, 5, 8), torch.arange(5)
    rope = Rope(6, scaling=of)
    check(longattn.apply_rope, x, rope)
    check(longattn.apply_rope, x, rope, positions)
    check(rope.rotate, x, positions)
    with torch.device("meta"):  # its frequencies have values all the same
        made = Rope(6, scaling=of)
    torch.testing.assert_close(longattn.apply_rope(x, made), longattn.apply_rope(x, rope))


def test_derivatives_and_transforms() -> None:
    q, k, v = (x.to("meta") for x in random_qkv(2, (4, 2), (5, 7), 8))
    q.requires_grad_()
    (dq,) = torch.autograd.grad(longattn.attention(q, k, v).square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(dq.square().sum(), q)
    tangent = torch.func.jvp(lambda q: longattn.attention(q, k, v), (q,), (q,))[1]
    by_sample = torch.func.vmap(lambda q: longattn.attention(q, k, v))(torch.stack([q, q]))
    assert second.is_meta and second.shape == tangent.shape == q.shape and by_sample.shape == (2, *q.shape)


CACHES: dict[str, Callable[[str], Any]] = {
    "contiguous": lambda device: longattn.KVCache(2, 2, 8, dtype=torch.float32, device=device),
    "int8": lambda device: longattn.KVCache(2, 2, 8, dtype=torch.int8, device=device),
    "sliding": lambda device: longattn.SlidingKVCache(2, 2, 8, window=4, sinks=1, dtype=torch.float32, device=device),
    "paged": lambda device: longattn.PagedKVCache(
        2, 2, 8, num_pages=6, page_size=4, dtype=torch.float32, device=device
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_caches(kind: str) -> None:
    q, k, v = random_qkv(2, (4, 2), (3, 3), 8)
    found = []
    for device in ("cpu", "meta"):
        cache = CACHES[kind](device)
        for tokens in (slice(0, 3), slice(0, 1)):
            new = [x[:, :, tokens].to(device) for x in (q, k, v)]
            found.append(longattn.attention_with_cache(*new, cache, rope=Rope(8), window=4))
        assert list(cache.lengths) == [4, 4]
    assert [x.shape for x in found[:2]] == [x.shape for x in found[2:]] and all(x.is_meta for x in found[2:])


def test_modules() -> None:
    with torch.device("meta"):
        x = torch.randn(2, 5, 32, requires_grad=True)
        rope = Rope(8, scaling=scaling.YaRN(4, 64))
        layer = longattn.nn.Attention(32, 4, 2, rope=rope, window=3, sink_logits=True, qk_norm=True)
        layer(x).sum().backward()
        ours = longattn.nn.MultiheadAttention(32, 4, batch_first=True)
        hidden = torch.zeros(2, 5).bool()
        for mask in (hidden, torch.zeros(2, 5)):
            for need_weights in (False, True):
                assert ours(x, x, x, key_padding_mask=mask, need_weights=need_weights)[0].shape == x.shape
    assert x.grad is not None and x.grad.is_meta and layer.sink_logits.grad.is_meta


def test_models() -> None:
    sizes: dict[str, Any] = {"vocab_size": 17, "dim": 32, "layers": 2, "heads": 4, "max_length": 16}
    with torch.device("meta"):
        ids = torch.zeros(2, 5, dtype=torch.long)
        decoder = Decoder(TransformerConfig(**sizes))
        decoder.loss(ids, ids).backward()
        encoder = Encoder(TransformerConfig(architecture="encoder", **sizes))
        both = EncoderDecoder(TransformerConfig(architecture="encoder-decoder", **sizes))
        results = decoder(ids), encoder(ids), both(ids, ids)
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in decoder.parameters())
    assert [(x.device.type, x.shape) for x in results] == [("meta", (2, 5, width)) for width in (17, 32, 17)]


def test_what_is_refused() -> None:
    q, k, v = (x.to("meta") for x in random_qkv(2, (4, 2), (5, 7), 8))
    with pytest.raises(Unsupported, match="meta"):
        longattn.attention(q, k, v, backend="cpu")  # a named backend runs the call itself
    with pytest.raises(InvalidInput, match="seed"):
        longattn.attention(*random_qkv(2, (4, 2), (5, 7), 8), dropout_p=0.1, seed=torch.zeros(1, device="meta").long())
    with pytest.raises(InvalidInput, match="k"):
        longattn.attention(q, torch.randn(2, 2, 7, 8), v)
