"""The reference encoder-decoder: the first Transformer, or one of rotary positions and pre-norm blocks.

Shapes: B pairs, M source tokens, N target tokens, C model width, V token ids, of source and target alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from longattn.cache import Cache
from longattn.errors import InvalidInput
from longattn.models.config import ENCODER_DECODER, TransformerConfig
from longattn.models.losses import chunked_cross_entropy
from longattn.models.projection import Projection, project, projection_of
from longattn.models.stack import Stack, check_ids, draw_weights
from longattn.tracing import leaf_module

__all__ = ["EncoderDecoder"]


class EncoderDecoder(nn.Module):
    """An encoder of a source, and a causal decoder of the target that attends to it.

    Args:
        config: its shape. Weights are drawn from torch's default generator.

    Raises:
        InvalidInput: the config of another architecture.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.architecture != ENCODER_DECODER or config.encoder_layers is None:
            raise InvalidInput("architecture", repr(ENCODER_DECODER), repr(config.architecture))
        self.config = config
        tied = config.tie_embeddings
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.source_embedding = None if tied else nn.Embedding(config.vocab_size, config.dim)
        self.encoder = Stack(config, config.encoder_layers, causal=False)
        self.decoder = Stack(config, config.layers, causal=True, cross_attention=True)
        self.head = None if tied else nn.Linear(config.dim, config.vocab_size, bias=False)
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

    @leaf_module
    def forward(
        self,
        source: Tensor,
        tokens: Tensor,
        *,
        source_mask: Tensor | None = None,
        source_lens: Tensor | None = None,
    ) -> Tensor:
        """The logits of each next target token, given the source and the target so far (teacher forcing).

        Args:
            source: int [B, M], ids below V.
            tokens: int [B, N], the target shifted right: its first token is a start token.
            source_mask: bool [B, M], False = padding; source_lens: int32 [B], tokens from there on are padding.

        Returns:
            [B, N, V]. At long N, `loss` does without them.

        Raises:
            InvalidInput: ids of another shape or dtype, or out of range, or more than there are learned positions.
        """
        memory = self.encode(source, source_mask=source_mask, source_lens=source_lens)
        hidden = self.decode(tokens, memory, source_mask=source_mask, source_lens=source_lens)
        return project(hidden, self.projection)

    def encode(self, source: Tensor, *, source_mask: Tensor | None = None, source_lens: Tensor | None = None) -> Tensor:
        """The memory [B, M, C] that the decoder attends to; arguments as `forward`."""
        check_ids("source", source, self.config.vocab_size)
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        return self.encoder.run(embedding(source), key_mask=source_mask, key_lens=source_lens)

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor | None = None,
        *,
        source_mask: Tensor | None = None,
        source_lens: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        memory_caches: Sequence[Cache] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
    ) -> Tensor:
        """The decoder's hidden states [B, N, C], given a memory; arguments as `forward`.

        Args:
            memory: [B, M, C]; None with memory_caches, that remember it.
            caches: of the decoder's self-attention, one a layer: the tokens continue what was read before.
            memory_caches: one a layer (see `remember`), with caches.
            lengths, sequences: with caches, as in `longattn.attention_with_cache`.
        """
        check_ids("tokens", tokens, self.config.vocab_size)
        if (caches is None) != (memory_caches is None):
            raise InvalidInput("memory_caches", "some exactly with caches", "None" if caches else "caches")
        if memory_caches is not None:
            for name, x in (("memory", memory), ("source_mask", source_mask), ("source_lens", source_lens)):
                if x is not None:
                    raise InvalidInput(name, "None with memory_caches", "a tensor")
            return self.decoder.run(
                self.embedding(tokens),
                caches=caches,
                memory_caches=memory_caches,
                lengths=lengths,
                sequences=sequences,
            )
        for name, value in (("lengths", lengths), ("sequences", sequences)):
            if value is not None:
                raise InvalidInput(name, "None without caches", type(value).__name__)
        batch, width = tokens.shape[0], self.config.dim
        if memory is None or memory.dim() != 3 or (memory.shape[0], memory.shape[2]) != (batch, width):
            got = None if memory is None else f"shape {tuple(memory.shape)}"
            raise InvalidInput("memory", f"[{batch}, M, {width}]", got)
        return self.decoder.run(self.embedding(tokens), memory=memory, memory_mask=source_mask, memory_lens=source_lens)

    def remember(
        self,
        memory: Tensor,
        memory_caches: Sequence[Cache],
        *,
        source_lens: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
    ) -> None:
        """Append what the decoder's layers attend to of a memory [B, M, C] to caches, one a layer.

        Args:
            source_lens: tokens of each source, M by default; sequences: of the caches, all in order by default.
        """
        self.decoder.remember(memory, memory_caches, lengths=source_lens, sequences=sequences)

    def loss(
        self,
        source: Tensor,
        tokens: Tensor,
        targets: Tensor,
        *,
        source_mask: Tensor | None = None,
        source_lens: Tensor | None = None,
        reduction: str = "mean",
        chunk: int = 1024,
    ) -> Tensor:
        """The cross-entropy of targets given source and tokens, in nats, without the logits of all tokens.

        Args:
            source, tokens, source_mask, source_lens: as in `forward`.
            targets: int64 [B, N], for each token the one to predict; -100 is left out.
            reduction, chunk: as in `chunked_cross_entropy`.

        Raises:
            InvalidInput: as `forward`; also targets that do not fit.
        """
        memory = self.encode(source, source_mask=source_mask, source_lens=source_lens)
        hidden = self.decode(tokens, memory, source_mask=source_mask, source_lens=source_lens)
        return chunked_cross_entropy(hidden, self.projection, targets, reduction=reduction, chunk=chunk)

    def cross_attention_weights(
        self,
        source: Tensor,
        tokens: Tensor,
        layer: int,
        rows: Sequence[int] | Tensor,
        *,
        source_mask: Tensor | None = None,
        source_lens: Tensor | None = None,
    ) -> Tensor:
        """Which source tokens some target tokens of one layer attend to.

        Args:
            layer: which, from 0.
            rows: the target tokens wanted, R places; negative ones count from the end. The others as in `forward`.

        Returns:
            weights [B, Hq, R, M], differentiable.

        Raises:
            InvalidInput: as `forward`; also a layer or rows that there are not.
        """
        memory = self.encode(source, source_mask=source_mask, source_lens=source_lens)
        check_ids("tokens", tokens, self.config.vocab_size)
        return self.decoder.weights_of(
            layer,
            rows,
            self.embedding(tokens),
            cross=True,
            memory=memory,
            memory_mask=source_mask,
            memory_lens=source_lens,
        )
