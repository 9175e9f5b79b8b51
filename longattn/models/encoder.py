"""The reference encoder: every token sees every other, or those within a window on both sides.

BERT's (learned positions, token types, post-norm, LayerNorm, GELU) or one with what decoders have since learned
(rotary positions, pre-norm, RMSNorm, SwiGLU). Shapes: B sequences, N tokens, C model width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from longattn.errors import InvalidInput
from longattn.models.config import ENCODER, TransformerConfig
from longattn.models.stack import Stack, check_ids, draw_weights
from longattn.tracing import module_node

__all__ = ["Encoder"]


class Encoder(Stack):
    """A Transformer over token ids that sees both sides; longattn.models.heads make its output predictions.

    Args:
        config: its shape. Weights are drawn from torch's default generator.

    Raises:
        InvalidInput: the config of another architecture.
    """

    def __init__(self, config: TransformerConfig) -> None:
        if config.architecture != ENCODER:
            raise InvalidInput("architecture", repr(ENCODER), repr(config.architecture))
        super().__init__(config, config.layers, causal=False)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights, as `draw_weights` says."""
        draw_weights(self, self.config)

    def forward(
        self,
        tokens: Tensor,
        *,
        token_types: Tensor | None = None,
        key_mask: Tensor | None = None,
        key_lens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """What each token means among the others.

        Args:
            tokens: int [B, N], ids below V; with cu_seqlens [T].
            token_types: int, of tokens' shape; 0 by default.
            key_mask: bool [B, N], False = padding that no token sees.
            key_lens: int32 [B], tokens from there on are padding.
            cu_seqlens: int32 [sequences + 1], where each packed sequence starts and the last ends.

        Returns:
            [B, N, C], or [T, C]; what stands at padding means nothing.

        Raises:
            InvalidInput: tokens or types of another shape or dtype, an id out of range, or more tokens than learned
                positions.
        """
        if has_torch_function_variadic(tokens):
            traced = module_node(
                self,
                (tokens,),
                {"token_types": token_types, "key_mask": key_mask, "key_lens": key_lens, "cu_seqlens": cu_seqlens},
            )
            if traced is not None:
                return traced
        check_ids("tokens", tokens, self.config.vocab_size, 2 if cu_seqlens is None else 1)
        return self.run(
            self.embedding(tokens),
            token_types=token_types,
            key_mask=key_mask,
            key_lens=key_lens,
            cu_seqlens=cu_seqlens,
        )

    def attention_weights(
        self,
        tokens: Tensor,
        layer: int,
        rows: Sequence[int] | Tensor,
        *,
        token_types: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """What some tokens of one layer attend to: [B, Hq, R, N], as `Decoder.attention_weights`."""
        check_ids("tokens", tokens, self.config.vocab_size)
        return self.weights_of(layer, rows, self.embedding(tokens), token_types=token_types, key_mask=key_mask)
