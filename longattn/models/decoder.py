"""The reference decoder: a causal language model.

- pre-norm blocks with RMSNorm and SwiGLU, no biases
- grouped query heads, rotary positions
- sliding and full layers by a pattern such as "SSSL"
- a loss in chunks, so that no [N, vocab] logits are kept
- other position scalings and attention patterns over the same weights

Shapes: B sequences, N tokens, C model width, V token ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from longattn.cache import Cache
from longattn.errors import InvalidInput
from longattn.models.blocks import Block
from longattn.models.config import FULL, SLIDING, TransformerConfig
from longattn.models.losses import chunked_cross_entropy
from longattn.scaling import Scaling

__all__ = ["Decoder"]

_INIT_STD = 0.02  # GPT-2


class Decoder(nn.Module):
    """A causal Transformer over token ids.

    Args:
        config: its shape. Weights are drawn from torch's default generator.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: normal, 0.02 wide; narrower by sqrt(2 layers) where a block adds to the residual stream.

        Radford et al., Language Models are Unsupervised Multitask Learners (GPT-2), 2019, section 2.3.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=_INIT_STD)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=_INIT_STD / math.sqrt(2 * self.config.layers))

    @property
    def output_weight(self) -> Tensor:
        """The output projection, [V, C]."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        caches: Sequence[Cache] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        tree: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The logits of each next token.

        Args:
            tokens: int [B, N], ids below V.
            caches: one a layer (see `longattn.models.make_caches`): the tokens continue what was read before. When
                this fails, the layers may have read different numbers of tokens.
            lengths, sequences, tree: with caches, as in `longattn.attention_with_cache`.

        Returns:
            [B, N, V]. At long N, `loss` does without them.

        Raises:
            InvalidInput: tokens of another shape or dtype, an id out of range, or caches of another model.
        """
        hidden = self.hidden_states(tokens, caches=caches, lengths=lengths, sequences=sequences, tree=tree)
        return nn.functional.linear(hidden, self.output_weight)

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        caches: Sequence[Cache] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        tree: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The normalised output of the last block, [B, N, C]: what the output projection reads."""
        self._check_ids(tokens)
        if caches is not None and len(caches) != len(self.blocks):
            raise InvalidInput("caches", f"{len(self.blocks)}, one a layer", len(caches))
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            cache = None if caches is None else caches[layer]
            x = block(x, cache=cache, lengths=lengths, sequences=sequences, tree=tree)
        return self.norm(x)

    def loss(self, tokens: Tensor, targets: Tensor, *, reduction: str = "mean", chunk: int = 1024) -> Tensor:
        """The cross-entropy of targets given tokens, in nats, without ever holding the logits of all tokens.

        Args:
            tokens: int [B, N].
            targets: int64 [B, N], for each token the one to predict; -100 is left out.
            reduction: "mean" (a scalar), or "none" ([B, N], 0 where left out).
            chunk: how many tokens' logits are held at once.

        Returns:
            float32 (float64 for a float64 model).

        Raises:
            InvalidInput: as `forward`; also targets that do not fit.
        """
        hidden = self.hidden_states(tokens)
        return chunked_cross_entropy(hidden, self.output_weight, targets, reduction=reduction, chunk=chunk)

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
            changes |= {"pattern": pattern, "window": window, "sinks": sinks}
        with torch.device("meta"):
            decoder = Decoder(replace(self.config, **changes))  # type: ignore[arg-type]
        decoder.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        return decoder.train(self.training)

    def _check_ids(self, tokens: Tensor) -> None:
        expected = f"an int tensor [B, N] of ids in [0, {self.config.vocab_size})"
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise InvalidInput("tokens", expected, _describe(tokens))
        if torch.compiler.is_compiling() or not tokens.numel():
            return
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= self.config.vocab_size:
            raise InvalidInput("tokens", expected, f"ids {low}..{high}")


def _describe(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
