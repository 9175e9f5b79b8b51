"""What a Transformer is stacked from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longattn.cache import Cache
from longattn.errors import InvalidInput
from longattn.models.config import TransformerConfig
from longattn.models.precision import product_dtype
from longattn.nn import Attention
from longattn.tracing import leaf_module

__all__ = ["Block", "FeedForward", "SwiGLU", "make_norm"]

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202).

    Args:
        dim: C, the width of inputs and outputs [..., C].
        hidden: the inner width.
        bias: of the three projections.
    """

    def __init__(self, dim: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FeedForward(nn.Module):
    """down(activation(up(x))) (Vaswani et al., arXiv 1706.03762, section 3.3).

    Args:
        dim: C, the width of inputs and outputs [..., C].
        hidden: the inner width.
        activation: "relu", "gelu" or "gelu_tanh".
        bias: of both projections.
    """

    def __init__(self, dim: int, hidden: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return self.down_proj(self.activation(self.up_proj(x)))


class Block(nn.Module):
    """Self-attention, attention to a memory if there is one, and the feed-forward layer, each added to what came in.

    Pre-norm: x + layer(norm(x)); post-norm: norm(x + layer(x)).

    Args:
        config: of the model.
        layer: the block's place, which decides between full and sliding attention.
        causal: no token sees a later one.
        cross_attention: attend to the output of an encoder, the memory.

    Attributes:
        feed_forward_tile: tokens that go through the feed-forward layer at once, forward and backward, which computes
            them again; None, the default: all of them, with what lies between its matrices kept.
    """

    feed_forward_tile: int | None = None

    def __init__(
        self, config: TransformerConfig, layer: int, *, causal: bool = True, cross_attention: bool = False
    ) -> None:
        super().__init__()
        sliding = config.is_sliding(layer)
        attend = partial(
            Attention,
            config.dim,
            config.heads,
            config.kv_heads,
            config.head_dim,
            bias=config.bias,
            dropout=config.attention_dropout,
        )
        self.norm_first = config.norm_first
        self.attention_norm = make_norm(config)
        self.attention = attend(
            causal=causal,
            rope=config.rope_of(layer),
            window=config.window if sliding else None,
            sinks=config.sinks if sliding else 0,
            window_positions=config.window_positions if sliding else "original",
            methods=config.methods_of(layer),
        )
        self.cross_attention_norm = make_norm(config) if cross_attention else None
        self.cross_attention = attend(causal=False) if cross_attention else None
        self.feed_forward_norm = make_norm(config)
        self.feed_forward: nn.Module
        if config.feed_forward == "swiglu":
            self.feed_forward = SwiGLU(config.dim, config.hidden, config.bias)
        else:
            self.feed_forward = FeedForward(config.dim, config.hidden, config.feed_forward, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    @leaf_module
    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        key_mask: Tensor | None = None,
        key_lens: Tensor | None = None,
        memory_mask: Tensor | None = None,
        memory_lens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        memory_cache: Cache | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        tree: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """[B, N, C] to [B, N, C]; packed sequences [T, C] to [T, C].

        Args:
            memory: [B, M, C], for the cross-attention; memory_mask and memory_lens: its key_mask and key_lens.
            memory_cache: that remembers it, in place of memory.
            key_mask, key_lens, cu_seqlens, max_seqlen, positions, cache, lengths, sequences, tree: of the
                self-attention, as in `longattn.nn.Attention`; a layer that rotates nothing has no use for positions.
        """
        x = self._attend_within(
            x,
            key_mask=key_mask,
            key_lens=key_lens,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            positions=None if self.attention.rope is None else positions,
            cache=cache,
            lengths=lengths,
            sequences=sequences,
            tree=tree,
        )
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            inner = self._before(x, self.cross_attention_norm)
            if memory_cache is None:
                attended = self.cross_attention(inner, context=memory, key_mask=memory_mask, key_lens=memory_lens)
            else:
                attended = self.cross_attention(
                    inner, cache=memory_cache, append=False, lengths=lengths, sequences=sequences
                )
            x = self._add(x, attended, self.cross_attention_norm)
        if self.feed_forward_tile is None or x.shape[-2] <= self.feed_forward_tile:
            return self._feed_forward(x)
        tiles = x.split(self.feed_forward_tile, dim=-2)
        if not torch.is_grad_enabled():
            return torch.cat([self._feed_forward(tile) for tile in tiles], dim=-2)
        return torch.cat([checkpoint(self._feed_forward, tile, use_reentrant=False) for tile in tiles], dim=-2)

    def weights(
        self,
        x: Tensor,
        rows: Sequence[int] | Tensor,
        *,
        cross: bool = False,
        memory: Tensor | None = None,
        key_mask: Tensor | None = None,
        key_lens: Tensor | None = None,
        memory_mask: Tensor | None = None,
        memory_lens: Tensor | None = None,
    ) -> Tensor:
        """The attention weights of some tokens, [B, Hq, R, N]; [B, Hq, R, M] of the memory if cross.

        Args:
            rows: the tokens wanted, R places; negative ones count from the end. The others as in `forward`.
        """
        if not cross:
            inner = self._before(x, self.attention_norm)
            return self.attention.weights(inner, rows, key_mask=key_mask, key_lens=key_lens)
        if self.cross_attention is None or self.cross_attention_norm is None:
            raise InvalidInput("cross", "False for a block without cross-attention", cross)
        inner = self._before(self._attend_within(x, key_mask=key_mask, key_lens=key_lens), self.cross_attention_norm)
        return self.cross_attention.weights(inner, rows, context=memory, key_mask=memory_mask, key_lens=memory_lens)

    def _attend_within(self, x: Tensor, **attention: Any) -> Tensor:
        attended = self.attention(self._before(x, self.attention_norm), **attention)
        return self._add(x, attended, self.attention_norm)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self._add(x, self.feed_forward(self._before(x, self.feed_forward_norm)), self.feed_forward_norm)

    def _before(self, x: Tensor, norm: nn.Module) -> Tensor:
        x = norm(x) if self.norm_first else x
        return x.to(product_dtype(x))

    def _add(self, x: Tensor, update: Tensor, norm: nn.Module) -> Tensor:
        x = x + self.dropout(update)
        return x if self.norm_first else norm(x)


def make_norm(config: TransformerConfig) -> nn.Module:
    """A norm over the residual stream."""
    if config.norm == "rms":
        return nn.RMSNorm(config.dim, eps=config.norm_eps)
    return nn.LayerNorm(config.dim, eps=config.norm_eps, bias=config.bias)
