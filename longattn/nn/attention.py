"""The attention layer of new models: grouped heads, rotary positions, sliding windows, sinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longattn.arguments import Positions, Window, flag, new_lengths
from longattn.cache import Cache, attention_with_cache
from longattn.dtensors import is_dtensor
from longattn.errors import InvalidInput
from longattn.extension import (
    LogN,
    Method,
    Part,
    Places,
    Remapping,
    ShiftedGroups,
    attend_in_parts,
    attend_in_shifted_groups,
    check_layer_methods,
    window_parts,
)
from longattn.functional import attention, attention_varlen
from longattn.inspect import attention_rows
from longattn.nn.checks import check_dropout, check_positive_int, check_structure
from longattn.rope import Rope
from longattn.tracing import leaf_module


class Attention(nn.Module):
    """Projections around `longattn.attention`, named as in Llama: q_proj, k_proj, v_proj, o_proj.

    Args:
        embed_dim: C, the width of the inputs and outputs.
        num_heads: Hq, query heads.
        num_kv_heads: Hkv, a divisor of num_heads; num_heads by default. 1: multi-query attention.
        head_dim: D; embed_dim / num_heads by default.
        bias: of the four projections.
        causal, window, sinks, softcap, rope: as in `longattn.attention`.
        scale: of the scores; 1 / sqrt(D) by default.
        qk_norm: RMSNorm over D of each query and key, before the rotation (q_norm, k_norm; Henry et al., Query-Key
            Normalization for Transformers, arXiv 2010.04245; RMSNorm as in Qwen3).
        sink_logits: learn one score per head that takes part in the softmax without a value (gpt-oss); starts at 0.
        dropout: probability of dropping a weight while training.
        window_positions: where the sinks of a window stand in the rotation, "original" or "cache", as in
            `longattn.SlidingKVCache`; with and without a cache. With "cache" a rope whose frequencies depend on the
            length takes those of window + sinks tokens, which is all that a query sees.
        methods: of a causal layer, any of `longattn.extension`'s LogN, ShiftedGroups (in training only), and SelfExtend
            or DualChunk, which leave a layer with a window as it is.

    Raises:
        InvalidInput: sizes or options that do not fit each other.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        causal: bool = True,
        window: Window = None,
        sinks: int = 0,
        rope: Rope | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        qk_norm: bool = False,
        sink_logits: bool = False,
        dropout: float = 0.0,
        window_positions: str = "original",
        methods: Sequence[Method] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("embed_dim", embed_dim)
        check_positive_int("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_positive_int("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise InvalidInput("num_kv_heads", f"a divisor of num_heads {num_heads}", num_kv_heads)
        if head_dim is None:
            if embed_dim % num_heads:
                raise InvalidInput("embed_dim", f"a multiple of num_heads {num_heads}, or head_dim", embed_dim)
            head_dim = embed_dim // num_heads
        check_positive_int("head_dim", head_dim)
        check_structure(window, sinks, rope, head_dim)
        check_dropout(dropout)
        if window_positions not in ("original", "cache"):
            raise InvalidInput("window_positions", "'original' or 'cache'", repr(window_positions))
        check_layer_methods(methods, rope)
        if (methods or window_positions == "cache") and not causal:
            raise InvalidInput("causal", "True with methods or window_positions 'cache'", causal)
        if window_positions == "cache" and (rope is None or not isinstance(window, int)):
            raise InvalidInput("window_positions", "'original' without a rotation and a window", window_positions)

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.causal = causal
        self.window = window
        self.sinks = sinks
        self.rope = rope
        self.softcap = softcap
        self.scale = scale
        self.dropout = dropout
        self.window_positions = window_positions
        self.methods = tuple(methods)
        self._rotation = rope
        if window_positions == "cache" and rope is not None and isinstance(window, int):
            self._rotation = rope.at_length(window + sinks)
        self._log_n = next((method for method in methods if isinstance(method, LogN)), None)
        on_full = [] if window is not None else list(methods)
        self._groups = next((method.group for method in on_full if isinstance(method, ShiftedGroups)), None)
        self._remapping = next((method for method in on_full if isinstance(method, Remapping)), None)

        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias, **where)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, **where)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, **where)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, bias, **where)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6, **where) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6, **where) if qk_norm else None
        self.sink_logits = nn.Parameter(torch.empty(num_heads, **where)) if sink_logits else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what is not a child module's."""
        if self.sink_logits is not None:
            nn.init.zeros_(self.sink_logits)

    @leaf_module
    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        key_mask: Tensor | None = None,
        key_lens: Tensor | None = None,
        bounds: tuple[Tensor, Tensor] | None = None,
        positions: Positions = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: Cache | None = None,
        append: bool = True,
        lengths: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        tree: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Attend within x, or from x to context; with a cache, from x to all that came before, x included.

        Args:
            x: [B, N, C]; or with cu_seqlens [T, C], the sequences one after another.
            context: [B, M, C], in place of x for keys and values. The last query then stands at the last key.
            key_mask: bool [B, M], True = visible.
            key_lens: int32 [B], keys from there on are padding. Within x, token i stands at i whatever the padding.
            bounds: (lo, hi), int32 [N] or [B, N]: token i sees keys lo[i] <= j < hi[i] only.
            positions: for the rotation, in place of the tokens' places: [M] or [B, M], [T] if packed, or a pair (for
                queries, for keys).
            cu_seqlens: int32 [batch + 1], where each packed sequence starts and the last ends; max_seqlen: at least the
                length of the longest. Packed sequences take no context, key_mask or bounds.
            cache: of this layer's heads: x holds the next tokens, which are appended. Takes no context, key_mask,
                key_lens, bounds or packed sequences, and no gradient; positions [N] or [B, N].
            append: False: attend to what the cache holds, such as a context (see `remember`), and leave it as it is.
            lengths, sequences, tree: as in `longattn.attention_with_cache`.

        Returns:
            Of x's shape.

        Raises:
            InvalidInput: an argument breaks the contract.
        """
        if (cu_seqlens is None) != (max_seqlen is None):
            raise InvalidInput("max_seqlen", "an int with cu_seqlens, None without", max_seqlen)
        flag("append", append)
        if cache is not None:
            unwanted = {"context": context, "key_mask": key_mask, "key_lens": key_lens, "bounds": bounds}
            unwanted |= {"cu_seqlens": cu_seqlens}
            return self._with_cache(x, cache, append, unwanted, positions, lengths, sequences, tree)
        for name, value in (("lengths", lengths), ("sequences", sequences), ("tree", tree)):
            if value is not None:
                raise InvalidInput(name, "None without a cache", type(value).__name__)
        if not append:
            raise InvalidInput("append", "True without a cache", append)
        if cu_seqlens is not None and context is not None:
            raise InvalidInput("context", "None with packed sequences", "a tensor")
        for name, tensor in (("x", x), ("context", x if context is None else context)):
            self._check_input(name, tensor, packed=cu_seqlens is not None)
        q, k, v = self._project(x, x if context is None else context)
        if self.methods or self._moves_sinks:
            if context is not None:
                raise InvalidInput("context", "None for a layer with methods", "a tensor")
            places = Places.at_end(x.shape[-2], x.shape[-2], x.device)
            if cu_seqlens is not None:
                places = Places.packed(cu_seqlens, x.shape[-2])
            q = self._scaled(q, places.in_sequence, positions)
            if self._moves_sinks or self._remapping is not None or (self._groups and self.training):
                return self.o_proj(self._attend_placed(q, k, v, places, positions, bounds, key_mask, key_lens))
        call: dict[str, Any] = {
            "causal": self.causal,
            "window": self.window,
            "sinks": self.sinks,
            # Within x, a token is at one place as query and as key, however much padding key_lens cuts off.
            "align": "start" if context is None else "end",
            "key_mask": key_mask,
            "key_lens": key_lens,
            "bounds": bounds,
            "softcap": self.softcap,
            "scale": self.scale,
            "sink_logits": self._sink_logits_of(q),
            "rope": self._rotation,
            "positions": positions,
            "dropout_p": self.dropout if self.training else 0.0,
        }
        out: Any
        if cu_seqlens is not None and max_seqlen is not None:
            out = attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **call)
        else:
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            out = attention(q, k, v, **call)
            out = out.transpose(1, 2)
        return self.o_proj(out.flatten(-2))

    @property
    def _moves_sinks(self) -> bool:
        return self.window_positions == "cache" and self.sinks > 0

    def _scaled(self, q: Tensor, places: Tensor, positions: Positions) -> Tensor:
        """Return q [..., N, H, D] under LogN, at places [N] or [B, N] unless the caller gave other positions."""
        if self._log_n is None:
            return q
        if positions is not None:
            places = positions if isinstance(positions, Tensor) else positions[0]
            tokens = tuple(q.shape[:-2])
            if not isinstance(places, Tensor) or tuple(places.shape) not in (tokens, tokens[-1:]):
                got = tuple(places.shape) if isinstance(places, Tensor) else type(places).__name__
                raise InvalidInput("positions", f"shape {tokens[-1:]} or {tokens} for the queries of LogN", got)
        return self._log_n.scaled(q.transpose(-3, -2), places).transpose(-3, -2)

    def _attend_placed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        places: Places,
        positions: Positions,
        bounds: tuple[Tensor, Tensor] | None,
        key_mask: Tensor | None,
        key_lens: Tensor | None,
    ) -> Tensor:
        """Attention where tokens stand as a method says: q [B, N, Hq, D], or [T, Hq, D] packed, to [..., N, Hq D]."""
        if positions is not None:
            raise InvalidInput("positions", "None for a layer whose method places tokens", type(positions).__name__)
        packed = q.dim() == 3
        q, k, v = ((x[None] if packed else x).transpose(1, 2) for x in (q, k, v))
        call: dict[str, Any] = {
            "rope": self._rotation,
            "standing": (places.in_sequence, places.keys),
            "key_mask": key_mask,
            "key_lens": key_lens,
            "scale": self.scale,
            "softcap": self.softcap,
            "sink_logits": self._sink_logits_of(q),
            "dropout_p": self.dropout if self.training else 0.0,
        }
        if self._groups and self.training:
            if bounds is not None:
                raise InvalidInput("bounds", "None with shifted groups", "a pair")
            out = attend_in_shifted_groups(q, k, v, places, self._groups, **call)
        else:
            parts = self._parts(places)
            if bounds is not None:
                lo, hi = bounds
                parts = [part._replace(lo=part.lo.maximum(lo), hi=part.hi.minimum(hi)) for part in parts]
            out = attend_in_parts(q, k, v, parts, **call)
        out = out.transpose(1, 2).flatten(-2)
        return out.squeeze(0) if packed else out

    def _parts(self, places: Places) -> list[Part]:
        if self._remapping is not None:
            return self._remapping.parts(places)
        assert isinstance(self.window, int)
        return window_parts(places, self.window, self.sinks, at_cache=True)

    def _with_cache(
        self,
        x: Tensor,
        cache: Cache,
        append: bool,
        unwanted: dict[str, Any],
        positions: Positions,
        lengths: Tensor | Sequence[int] | None,
        sequences: Sequence[int] | None,
        tree: Tensor | Sequence[int] | None,
    ) -> Tensor:
        for name, value in unwanted.items():
            if value is not None:
                raise InvalidInput(name, "None with a cache", type(value).__name__)
        if self.training and self.dropout:
            raise InvalidInput("cache", "None while dropout is on (see Module.eval)", type(cache).__name__)
        if positions is not None and not isinstance(positions, Tensor):
            raise InvalidInput("positions", "one tensor with a cache", type(positions).__name__)
        if self._moves_sinks and not cache.cache_positions:
            raise InvalidInput("cache", "a SlidingKVCache with positions='cache'", type(cache).__name__)
        self._check_input("x", x, packed=False)
        q = self._project_queries(x)
        if self._log_n is not None:
            places = cache.next_positions(x.shape[1], sequences=sequences, tree=tree)
            if not append:  # these queries are at the newest tokens that the cache holds
                counts = new_lengths(lengths, x.shape[0], q.transpose(1, 2))
                places = places - torch.tensor(counts, device=places.device)[:, None]
            q = self._scaled(q, places, positions)
        q = q.transpose(1, 2)
        k, v = [tensor.transpose(1, 2) for tensor in self._project_keys(x)] if append else (None, None)
        if self._remapping is not None:
            for name, value in (("positions", positions), ("tree", tree), ("append", None if append else False)):
                if value is not None:
                    raise InvalidInput(name, f"its default with {self._remapping}", type(value).__name__)
            assert k is not None and v is not None
            return self.o_proj(self._remapped_with_cache(q, k, v, cache, lengths, sequences))
        out: Any = attention_with_cache(
            q,
            k,
            v,
            cache,
            causal=self.causal,
            window=self.window,
            sinks=None if self.window is None else self.sinks,
            softcap=self.softcap,
            scale=self.scale,
            sink_logits=self._sink_logits_of(q),
            rope=self._rotation,
            positions=positions,
            lengths=lengths,
            sequences=sequences,
            tree=tree,
        )
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def _remapped_with_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Cache,
        lengths: Tensor | Sequence[int] | None,
        sequences: Sequence[int] | None,
    ) -> Tensor:
        """Append unrotated keys, as each call turns them two ways, and attend to all of each sequence: [B, T, Hq D]."""
        assert self._remapping is not None
        if cache.window is not None:
            raise InvalidInput("cache", f"one that keeps all keys, with {self._remapping}", type(cache).__name__)
        counts = new_lengths(lengths, q.shape[0], q)
        cache.append(k, v, lengths=lengths, sequences=sequences)
        out = q.new_zeros(q.shape)
        for row, sequence in enumerate(range(cache.batch) if sequences is None else sequences):
            _, keys, values = (part[None] for part in cache.read(sequence))
            places = Places.at_end(counts[row], keys.shape[2], q.device)
            out[row : row + 1, :, : counts[row]] = attend_in_parts(
                q[row : row + 1, :, : counts[row]],
                keys.to(q.dtype),
                values.to(q.dtype),
                self._remapping.parts(places),
                rope=self._rotation,
                standing=(places.in_sequence, places.keys),
                scale=self.scale,
                softcap=self.softcap,
                sink_logits=self._sink_logits_of(q),
            )
        return out.transpose(1, 2).flatten(-2)

    def remember(
        self,
        context: Tensor,
        cache: Cache,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
    ) -> None:
        """Append the keys and values of a context [B, M, C] to a cache, for queries of later calls.

        Args:
            lengths, sequences: as in `longattn.attention_with_cache`.

        Raises:
            InvalidInput: an argument breaks the contract.
        """
        self._check_input("context", context, packed=False)
        k, v = (tensor.transpose(1, 2) for tensor in self._project_keys(context))
        cache.append(k, v, rope=self._rotation, lengths=lengths, sequences=sequences)

    def weights(
        self,
        x: Tensor,
        rows: Sequence[int] | Tensor,
        *,
        context: Tensor | None = None,
        key_mask: Tensor | None = None,
        key_lens: Tensor | None = None,
        bounds: tuple[Tensor, Tensor] | None = None,
        positions: Positions = None,
    ) -> Tensor:
        """The attention weights of some tokens, before dropout, in memory linear in the keys; differentiable.

        Args:
            x: [B, N, C].
            rows: the tokens of x wanted, R places; negative ones count from the end.
            context, key_mask, key_lens, bounds, positions: as in `forward`.

        Returns:
            [B, Hq, R, M], in float32 (float64 for float64 inputs).

        Raises:
            InvalidInput: an argument breaks the contract.
        """
        for name, tensor in (("x", x), ("context", x if context is None else context)):
            self._check_input(name, tensor, packed=False)
        if self._remapping is not None or self._moves_sinks:
            raise InvalidInput(
                "methods", "none that places tokens, to have weights", self.methods or "window_positions"
            )
        q, k, _ = self._project(x, x if context is None else context)
        first = 0 if context is None else k.shape[1] - q.shape[1]
        q = self._scaled(q, torch.arange(first, first + q.shape[1], device=q.device), positions)
        return attention_rows(
            q.transpose(1, 2),
            k.transpose(1, 2),
            rows,
            causal=self.causal,
            window=self.window,
            sinks=self.sinks,
            align="start" if context is None else "end",
            key_mask=key_mask,
            key_lens=key_lens,
            bounds=bounds,
            softcap=self.softcap,
            scale=self.scale,
            sink_logits=self._sink_logits_of(q),
            rope=self._rotation,
            positions=positions,
        )

    def extra_repr(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads}"
        seen = f"causal={self.causal}, window={self.window}, sinks={self.sinks}"
        return f"heads={heads}, {seen}, rope={self.rope}, methods={list(self.methods)}"

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., N, Hq, D], k and v [..., M, Hkv, D]; of a tensor-parallel layer those of this rank's heads."""
        q, k, v = self._project_queries(x), *self._project_keys(context)
        heads, kv_heads = q.shape[-2], k.shape[-2]
        if heads * self.num_kv_heads != kv_heads * self.num_heads and not kv_heads == self.num_kv_heads == 1:
            expected = f"{self.num_kv_heads} heads, or as large a part of them as q_proj has of its {self.num_heads}"
            raise InvalidInput("k_proj", expected, f"{kv_heads} heads beside {heads} of q_proj")
        return q, k, v

    def _sink_logits_of(self, q: Tensor) -> Tensor | None:
        """The logits of q's heads: where q is this rank's own, its shard of them."""
        logits = self.sink_logits
        return logits.to_local() if is_dtensor(logits) and not is_dtensor(q) else logits

    def _project_queries(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        return q if self.q_norm is None else self.q_norm(q)

    def _project_keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        k = self.k_proj(context).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(context).unflatten(-1, (-1, self.head_dim))
        return k if self.k_norm is None else self.k_norm(k), v

    def _check_input(self, name: str, x: Tensor, packed: bool) -> None:
        if not isinstance(x, Tensor) or x.is_nested or x.dim() != (2 if packed else 3) or x.shape[-1] != self.embed_dim:
            axes = f"[T, {self.embed_dim}] with cu_seqlens" if packed else f"[B, N, {self.embed_dim}]"
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) and not x.is_nested else type(x).__name__
            raise InvalidInput(name, f"a tensor {axes}", got)
