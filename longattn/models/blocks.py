"""What a Transformer is stacked from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from longattn.cache import Cache
from longattn.models.config import TransformerConfig
from longattn.nn import Attention

__all__ = ["Block", "SwiGLU"]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases (Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202).

    Args:
        dim: C, the width of inputs and outputs [..., C].
        hidden: the inner width.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the feed-forward layer, each added to what came in and fed its RMSNorm (pre-norm).

    Args:
        config: of the model.
        layer: the block's place, which decides between full and sliding attention.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        sliding = config.is_sliding(layer)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(
            config.dim,
            config.heads,
            config.kv_heads,
            config.head_dim,
            rope=config.rope,
            window=config.window if sliding else None,
            sinks=config.sinks if sliding else 0,
        )
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = SwiGLU(config.dim, config.hidden)

    def forward(
        self,
        x: Tensor,
        *,
        cache: Cache | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        tree: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """[B, N, C] to [B, N, C]. cache, lengths, sequences, tree: as in `longattn.nn.Attention`."""
        attended = self.attention(self.attention_norm(x), cache=cache, lengths=lengths, sequences=sequences, tree=tree)
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x))
