"""The reference decoder: a causal language model.

- Llama's blocks (RMSNorm, SwiGLU, no biases, rotary positions) or GPT-2's (LayerNorm, GELU, biases, learned positions)
- grouped query heads
- sliding and full layers by a pattern such as "SSSL"
- packed documents, none of which sees another
- a loss in chunks, so that no [N, vocab] logits are kept
- other position scalings and attention patterns over the same weights

Shapes: B sequences, N tokens, C model width, V token ids; T tokens of all packed documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from longattn.cache import Cache
from longattn.errors import InvalidInput
from longattn.models.config import DECODER, FULL, SLIDING, TransformerConfig
from longattn.models.losses import chunked_cross_entropy
from longattn.models.projection import Projection, project, projection_of, share_head
from longattn.models.stack import Stack, check_ids, draw_weights
from longattn.scaling import Scaling
from longattn.tracing import module_node

__all__ = ["Decoder"]


class Decoder(Stack):
    """A causal Transformer over token ids.

    Args:
        config: its shape. Weights are drawn from torch's default generator.

    Raises:
        InvalidInput: the config of another architecture.
    """

    def __init__(self, config: TransformerConfig) -> None:
        if config.architecture != DECODER:
            raise InvalidInput("architecture", repr(DECODER), repr(config.architecture))
        super().__init__(config, config.layers, causal=True)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights, as `draw_weights` says."""
        draw_weights(self, self.config)

    @property
    def output_weight(self) -> Tensor:
        """The weight of the output projection, [V, C]; what the head computes may be more (see `projection`)."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def projection(self) -> Projection:
        """What computes logits of hidden states: the head, or the weight of the embedding that it is tied to.

        Raises:
            InvalidInput: tied to an embedding that is more than its weight.
        """
        return projection_of(self.head, self.embedding)

    def forward(
        self,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        tree: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The logits of each next token.

        Args:
            tokens: int [B, N], ids below V; with cu_seqlens [T].
            key_mask: bool [B, N], False = padding that no token sees.
            cu_seqlens: int32 [documents + 1], where each packed document starts and the last ends. Positions start anew
                in each, and none sees another.
            caches: one a layer (see `longattn.models.make_caches`): the tokens continue what was read before. When
                this fails, the layers may have read different numbers of tokens.
            lengths, sequences, tree: with caches, as in `longattn.attention_with_cache`.

        Returns:
            [B, N, V], or [T, V]. At long N, `loss` does without them.

        Raises:
            InvalidInput: tokens of another shape or dtype, an id out of range, more tokens than learned positions, or
                caches of another model.
        """
        if has_torch_function_variadic(tokens):
            traced = module_node(
                self,
                (tokens,),
                {
                    "key_mask": key_mask,
                    "cu_seqlens": cu_seqlens,
                    "caches": caches,
                    "lengths": lengths,
                    "sequences": sequences,
                    "tree": tree,
                },
            )
            if traced is not None:
                return traced
        hidden = self.hidden_states(
            tokens,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            caches=caches,
            lengths=lengths,
            sequences=sequences,
            tree=tree,
        )
        return project(hidden, self.projection)

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        tree: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The normalised output of the last block, [B, N, C] or [T, C]: what the output projection reads.

        Arguments as in `forward`; positions as in `loss`.
        """
        check_ids("tokens", tokens, self.config.vocab_size, 2 if cu_seqlens is None else 1)
        if positions is not None and caches is not None:
            raise InvalidInput("positions", "None with caches", "a tensor")
        return self.run(
            self.embedding(tokens),
            positions=positions,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            caches=caches,
            lengths=lengths,
            sequences=sequences,
            tree=tree,
        )

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        reduction: str = "mean",
        chunk: int = 1024,
    ) -> Tensor:
        """The cross-entropy of targets given tokens, in nats, without ever holding the logits of all tokens.

        Args:
            tokens: int [B, N]; with cu_seqlens [T].
            targets: int64 of tokens' shape, for each token the one to predict; -100 is left out.
            cu_seqlens: as in `forward`.
            positions: int, [N] or [B, N], or [T], where tokens stand, in place of 0, 1, 2, ...; what they see is as
                ever. Not where a method of the config places tokens.
            reduction: "mean" (a scalar), or "none" (of tokens' shape, 0 where left out).
            chunk: how many tokens' logits are held at once.

        Returns:
            float32 (float64 for a float64 model).

        Raises:
            InvalidInput: as `forward`; also targets that do not fit.
        """
        hidden = self.hidden_states(tokens, cu_seqlens=cu_seqlens, positions=positions)
        return chunked_cross_entropy(hidden, self.projection, targets, reduction=reduction, chunk=chunk)

    def attention_weights(self, tokens: Tensor, layer: int, rows: Sequence[int] | Tensor) -> Tensor:
        """What some tokens of one layer attend to, without the N x N matrix.

        Args:
            tokens: int [B, N].
            layer: which, from 0.
            rows: the tokens wanted, R places; negative ones count from the end.

        Returns:
            weights [B, Hq, R, N], differentiable.

        Raises:
            InvalidInput: as `forward`; also a layer or rows that there are not.
        """
        check_ids("tokens", tokens, self.config.vocab_size)
        return self.weights_of(layer, rows, self.embedding(tokens))

    def extended(
        self,
        *,
        scaling: Scaling | None = None,
        pattern: str | None = None,
        window: int | None = None,
        sinks: int = 0,
    ) -> Decoder:
        """A decoder over these very weights (not copies) whose positions and attention reach further.

        Args:
            scaling: of the rotary frequencies, in place of the model's own; None keeps that.
            pattern, window, sinks: which layers see what, as in `TransformerConfig`; a window without a pattern makes
                every layer sliding. All left out: as the model's own.

        Returns:
            A new module; training it trains this one.

        Raises:
            InvalidInput: arguments that contradict each other or the model.
        """
        changes: dict[str, object] = {}
        if scaling is not None:
            changes["rope_scaling"] = scaling
        if pattern is not None or window is not None or sinks:
            if pattern is None:
                pattern = FULL if window is None else SLIDING
            changes |= {"pattern": pattern, "window": window, "sinks": sinks, "window_positions": "original"}
        with torch.device("meta"):
            decoder = Decoder(replace(self.config, **changes))  # type: ignore[arg-type]
        share_head(self, decoder)
        decoder.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        return decoder.train(self.training)
