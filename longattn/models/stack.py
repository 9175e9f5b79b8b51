"""From embedded tokens to the output of the last block: what encoders and decoders have in common.

Shapes: B sequences, N tokens, M tokens of an encoder's output, C model width, V token ids; T tokens of all packed
sequences, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from longattn.arguments import new_lengths
from longattn.cache import Cache
from longattn.errors import InvalidInput
from longattn.models.blocks import Block, make_norm
from longattn.models.config import TransformerConfig
from longattn.problem import checkable, readable
from longattn.redirection import token_places, whole_length
from longattn.tracing import leaf

__all__ = ["Stack", "check_ids", "draw_weights", "sinusoids"]

_INIT_STD = 0.02  # GPT-2 and BERT
_ADD_TO_THE_STREAM = ("o_proj.weight", "down_proj.weight")


class Stack(nn.Module):
    """Positions, token types, blocks and the last norm; the token embeddings are the caller's.

    Args:
        config: of the model.
        layers: how many blocks.
        causal, cross_attention: of each `Block`.

    Attributes:
        recompute: keep the input of every so many-th block only, and compute these blocks again in the backward (Chen
            et al., Sublinear Memory Cost, arXiv 1604.06174); 0, the default: keep everything.
        offload: keep those inputs in the host's memory until the backward. Of no effect on the CPU.
    """

    recompute: int = 0
    offload: bool = False

    def __init__(self, config: TransformerConfig, layers: int, *, causal: bool, cross_attention: bool = False) -> None:
        super().__init__()
        self.config = config
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_length, config.dim) if learned else None
        self.type_embedding = nn.Embedding(config.token_types, config.dim) if config.token_types else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, layer, causal=causal, cross_attention=cross_attention) for layer in range(layers)
        )
        self.norm: nn.Module = make_norm(config) if config.norm_first else nn.Identity()

    def run(
        self,
        x: Tensor,
        *,
        token_types: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        memory_caches: Sequence[Cache] | None = None,
        **attention: Any,
    ) -> Tensor:
        """The output of the last block, normalised: [B, N, C], or [T, C] if packed.

        Args:
            x: token embeddings [B, N, C]; with cu_seqlens [T, C].
            token_types: int, x's shape without C; all 0 by default, where the model has types.
            caches: one a layer: the tokens continue what was read before.
            memory_caches: one a layer, of the memory that the layers attend to (see `Stack.remember`).
            attention: what `Block.forward` takes.

        Raises:
            InvalidInput: more tokens than learned positions, token types out of range, or caches of another model.
        """
        self._check_caches("caches", caches)
        self._check_caches("memory_caches", memory_caches)
        x, attention = self._enter(x, token_types, attention, caches)
        if self.recompute and torch.is_grad_enabled() and caches is None and memory_caches is None:
            return self.norm(self._recomputed(x, attention))
        for layer, block in enumerate(self.blocks):
            x = block(
                x,
                cache=None if caches is None else caches[layer],
                memory_cache=None if memory_caches is None else memory_caches[layer],
                **attention,
            )
        return self.norm(x)

    def _recomputed(self, x: Tensor, attention: dict[str, Any]) -> Tensor:
        """Through all blocks, `recompute` of them at a time."""

        def through(x: Tensor, blocks: Sequence[nn.Module]) -> Tensor:
            for block in blocks:
                x = block(x, **attention)
            return x

        for first in range(0, len(self.blocks), self.recompute):
            away = self.offload and x.device.type != "cpu"
            with save_on_cpu(pin_memory=True) if away else nullcontext():
                x = checkpoint(through, x, list(self.blocks[first : first + self.recompute]), use_reentrant=False)
        return x

    def remember(
        self,
        memory: Tensor,
        caches: Sequence[Cache],
        *,
        lengths: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
    ) -> None:
        """Append the keys and values that each layer's cross-attention makes of a memory [B, M, C].

        Args:
            caches: one a layer. lengths, sequences: as in `longattn.attention_with_cache`.
        """
        self._check_caches("caches", caches)
        for block, cache in zip(self.blocks, caches, strict=True):
            cross_attention = cast(Block, block).cross_attention
            if cross_attention is None:
                raise InvalidInput("memory", "none for blocks without cross-attention", "a tensor")
            cross_attention.remember(memory, cache, lengths=lengths, sequences=sequences)

    def _check_caches(self, name: str, caches: Sequence[Cache] | None) -> None:
        if caches is not None and len(caches) != len(self.blocks):
            raise InvalidInput(name, f"{len(self.blocks)}, one a layer", len(caches))

    def weights_of(
        self,
        layer: int,
        rows: Sequence[int] | Tensor,
        x: Tensor,
        *,
        cross: bool = False,
        token_types: Tensor | None = None,
        **attention: Any,
    ) -> Tensor:
        """The attention weights of some tokens in one layer, [B, Hq, R, N]; of the memory, [B, Hq, R, M], if cross.

        Other arguments as in `run`, but packed sequences.
        """
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(self.blocks):
            raise InvalidInput("layer", f"an int in [0, {len(self.blocks)})", repr(layer))
        x, attention = self._enter(x, token_types, attention)
        for block in self.blocks[:layer]:
            x = block(x, **attention)
        block = cast(Block, self.blocks[layer])
        return block.weights(x, rows, cross=cross, **attention)

    def _enter(
        self,
        x: Tensor,
        token_types: Tensor | None,
        attention: dict[str, Any],
        caches: Sequence[Cache] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the first block takes."""
        config, cu_seqlens = self.config, attention.get("cu_seqlens")
        longest = attention.get("max_seqlen")
        if cu_seqlens is not None and longest is None:
            longest = _longest(cu_seqlens, config)
            attention = {**attention, "max_seqlen": x.shape[-2] if longest is None else longest}
        if config.scale_embeddings:
            x = x * math.sqrt(config.dim)
        if config.positions != "rope":
            places = token_places(x.shape[-2], x.device)
            length: int | None = longest or whole_length(x.shape[-2])
            given = attention.get("positions")
            if given is not None:
                places = given
                length = int(given.max()) + 1 if checkable(given) and given.numel() else None
                attention = {**attention, "positions": None}
            elif cu_seqlens is not None:
                places, length = _places_in_sequences(places, cu_seqlens), longest
            elif caches is not None:
                places, length = _places_after(caches[0], x, attention)
            x = x + self._position_vectors(places, length).to(x.dtype)
        if self.type_embedding is not None:
            if token_types is None:
                token_types = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
            else:
                check_ids("token_types", token_types, config.token_types, x.dim() - 1)
            x = x + self.type_embedding(token_types)
        elif token_types is not None:
            raise InvalidInput("token_types", "None for a model without token types", "a tensor")
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return self.dropout(x), attention

    def _position_vectors(self, places: Tensor, length: int | None) -> Tensor:
        """The vectors of positions; length: one more than the largest, None where it is not known."""
        if self.position_embedding is None:
            return sinusoids(places, self.config.dim)
        if length is not None and length > self.config.max_length:
            raise InvalidInput("tokens", f"at most max_length {self.config.max_length} (learned positions)", length)
        return self.position_embedding(places)


@leaf
def sinusoids(places: Tensor, dim: int) -> Tensor:
    """The sinusoidal positions of Vaswani et al. (arXiv 1706.03762, section 3.5), interleaved as there.

        PE[p, 2i] = sin(p / 10000^(2i / dim)),   PE[p, 2i + 1] = cos of the same

    Args:
        places: int or floating [...].
        dim: even.

    Returns:
        float32 [..., dim].
    """
    # In float32 an angle of a far place would be off by thousandths of a turn.
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=places.device) / dim
    angles = places[..., None].double() * torch.pow(10000.0, -exponents)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).float()


def draw_weights(model: nn.Module, config: TransformerConfig) -> None:
    """Draw a model's weights: normal, 0.02 wide; biases 0.

    Pre-norm: narrower by the square root of how many layers add to the residual stream, where one does (Radford et al.,
    Language Models are Unsupervised Multitask Learners (GPT-2), 2019, section 2.3). Scaled token embeddings:
    1 / sqrt(dim) wide, so that they enter with a variance of 1.
    """
    for kind in (nn.Embedding, nn.Linear):  # an order that does not hang on how a model is put together
        for module in model.modules():
            if isinstance(module, kind):
                nn.init.normal_(module.weight, std=_INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    if config.norm_first:
        for stack in model.modules():
            if isinstance(stack, Stack):
                sums = sum(3 if block.cross_attention is not None else 2 for block in stack.blocks)
                for name, weight in stack.blocks.named_parameters():
                    if name.endswith(_ADD_TO_THE_STREAM):
                        nn.init.normal_(weight, std=_INIT_STD / math.sqrt(sums))
    if config.scale_embeddings:
        for name, weight in model.named_parameters():
            if name in ("embedding.weight", "source_embedding.weight"):
                nn.init.normal_(weight, std=config.dim**-0.5)


def check_ids(name: str, ids: Tensor, count: int, dims: int = 2) -> None:
    """Raise InvalidInput unless these are ids below `count`, [B, N], or [T] for dims 1.

    The ids themselves are read on the CPU, and with LONGATTN_CHECK=1 on a GPU, where that waits for them. Elsewhere,
    and under a transform or a trace, the embedding that looks them up reports what is out of range.
    """
    expected = f"an int tensor {'[B, N]' if dims == 2 else '[T]'} of ids in [0, {count})"
    if isinstance(ids, Proxy):
        return
    if not isinstance(ids, Tensor) or ids.dim() != dims or ids.dtype not in (torch.int32, torch.int64):
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise InvalidInput(name, expected, got)
    if not checkable(ids) or not ids.numel():
        return
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= count:
        raise InvalidInput(name, expected, f"ids {low}..{high}")


def _longest(cu_seqlens: Tensor, config: TransformerConfig) -> int | None:
    """The length of the longest packed sequence; None where that cannot be read, and nothing but a bound is needed."""
    by_length = config.rope is not None and config.rope.depends_on_length
    if not by_length and not readable(cu_seqlens):
        return None
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0


def _places_after(cache: Cache, x: Tensor, attention: dict[str, Any]) -> tuple[Tensor, int]:
    """Where x's tokens stand behind what a cache holds, [B, N], and how long the longest sequence becomes."""
    sequences, tree = attention.get("sequences"), attention.get("tree")
    places = cache.next_positions(x.shape[1], sequences=sequences, tree=tree)
    counts = new_lengths(attention.get("lengths"), places.shape[0], x[:, None])
    if tree is None:
        rows = range(cache.batch) if sequences is None else sequences
        after = [cache.lengths[row] + count for row, count in zip(rows, counts, strict=True) if count]
        length = max(after, default=0)
    else:
        counted = places[torch.arange(x.shape[1], device=x.device) < torch.tensor(counts, device=x.device)[:, None]]
        length = int(counted.max()) + 1 if counted.numel() else 0
    return places.clamp(max=max(0, length - 1)), length  # padding may reach past the last


def _places_in_sequences(places: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Where each packed token stands in its own sequence."""
    sequence = torch.searchsorted(cu_seqlens.to(torch.int64), places, right=True) - 1
    inside = sequence < len(cu_seqlens) - 1
    return torch.where(inside, places - cu_seqlens[sequence], 0)
