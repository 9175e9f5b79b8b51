"""A plain Python model of a cache: lists of tokens, and attention over them by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import longattn
import oracle
from helpers import one_thread
from longattn import KVCache, PagedKVCache, Rope, SlidingKVCache
from longattn.cache import Cache
from tolerances import assert_within_budget

KINDS = ("contiguous", "paged", "sliding")
WINDOW, SINKS = 9, 2


def make_cache(
    kind: str, batch: int, kv_heads: int, widths: tuple[int, int], dtype: torch.dtype, **options: Any
) -> Cache:
    """A cache small enough that it grows, wraps round and runs over pages within a few calls."""
    common: dict[str, Any] = {"v_head_dim": widths[1], "dtype": dtype}
    if kind == "contiguous":
        return KVCache(batch, kv_heads, widths[0], **common, **options)
    if kind == "paged":
        return PagedKVCache(batch, kv_heads, widths[0], **common, **{"num_pages": 128, "page_size": 5, **options})
    return SlidingKVCache(batch, kv_heads, widths[0], **common, **{"window": WINDOW, "sinks": SINKS, **options})


class Token(NamedTuple):
    k: Tensor  # [Hkv, D]
    v: Tensor  # [Hkv, Dv]
    position: float  # in the rotation


class Model:
    """Sequences as lists of tokens. Nothing is ever evicted: what a query sees is left to the mask."""

    def __init__(self, batch: int, window: int | None = None, sinks: int = 0, frame: bool = False) -> None:
        self.tokens: list[list[Token]] = [[] for _ in range(batch)]
        self.window, self.sinks, self.frame = window, sinks, frame

    def append(self, sequence: int, k: Tensor, v: Tensor, positions: Sequence[float] | None = None) -> None:
        """k, v: [Hkv, n, D or Dv]."""
        held = self.tokens[sequence]
        first = len(held)
        for i in range(k.shape[1]):
            held.append(Token(k[:, i], v[:, i], float(first + i if positions is None else positions[i])))

    def attend(
        self,
        sequence: int,
        q: Tensor,
        got: Tensor,
        lse: Tensor,
        dtype: torch.dtype,
        parents: Sequence[int] | None = None,
        rope: Rope | None = None,
        **keywords: Any,
    ) -> None:
        """Check got [Hq, n, Dv] and lse [Hq, n]: the last n tokens' queries q [Hq, n, D].

        Args:
            dtype: the narrowest that numbers went through.
        """
        n = q.shape[1]
        if n == 0:
            return
        held = self.tokens[sequence]
        k, v = (torch.stack([getattr(token, name) for token in held], 1) for name in "kv")
        positions = torch.tensor([token.position for token in held])
        call = {"causal": True, "window": self.window, "sinks": self.sinks, **keywords}
        if rope is not None:
            call |= {"rope": rope, "rope_length": len(held), "positions": (positions[len(held) - n :], positions)}
        if parents is not None:
            call |= {"causal": False, "window": None, "sinks": 0, "bias": self._branches(len(held), parents)}
        if self.frame:
            for i in range(n):
                stop = len(held) - n + i + 1
                kept = sorted({*range(min(self.sinks, stop)), *range(max(0, stop - self.window), stop)})
                place = torch.arange(len(kept))
                call |= {"window": None, "rope_length": self.window + self.sinks, "positions": (place[-1:], place)}
                self._compare(
                    q[:, i : i + 1], k[:, kept], v[:, kept], got[:, i : i + 1], lse[:, i : i + 1], dtype, call
                )
            return
        self._compare(q, k, v, got, lse, dtype, call)

    def _branches(self, length: int, parents: Sequence[int]) -> Tensor:
        """Which key each draft sees, one by one: bool [drafts, keys]."""
        before = length - len(parents)
        sees = torch.zeros(len(parents), length, dtype=torch.bool)
        for i in range(len(parents)):
            line = [i]
            while parents[line[-1]] >= 0:
                line.append(parents[line[-1]])
            stands = before + len(line) - 1
            for distance, draft in enumerate(line):
                if self._allows(stands, stands - distance):
                    sees[i, before + draft] = True
            for j in range(before):
                sees[i, j] = self._allows(stands, j)
        return sees

    def _allows(self, position: int, key: int) -> bool:
        return self.window is None or key > position - self.window or key < self.sinks

    def _compare(
        self, q: Tensor, k: Tensor, v: Tensor, got: Tensor, lse: Tensor, dtype: torch.dtype, call: dict[str, Any]
    ) -> None:
        with one_thread():
            exact = oracle.results(q[None], k[None], v[None], **call)
            terms = oracle.rounding_terms(q[None], k[None], v[None], dtype=dtype, **call)
            assert_within_budget(got[None], exact["out"], None, 2 * terms["out"], "out")
            assert_within_budget(lse[None], exact["lse"], None, 2 * terms["lse"], "lse")


def narrowest(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


class Stream:
    """Random tokens for a cache and its model, appended and attended to together."""

    def __init__(
        self,
        cache: Cache,
        model: Model,
        q_heads: int,
        dtype: torch.dtype,
        backend: str,
        **keywords: Any,
    ) -> None:
        self.cache, self.model, self.q_heads, self.dtype, self.backend = cache, model, q_heads, dtype, backend
        self.keywords = keywords

    def step(
        self,
        new: int,
        lengths: Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        check: bool = True,
        layout: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        cache = self.cache
        rows = list(range(cache.batch)) if sequences is None else list(sequences)
        counts = [new] * len(rows) if lengths is None else list(lengths)
        shapes = ((self.q_heads, cache.head_dim), (cache.kv_heads, cache.head_dim), (cache.kv_heads, cache.v_head_dim))
        q, k, v = (layout(torch.randn(len(rows), heads, new, width).to(self.dtype)) for heads, width in shapes)
        before = [cache.lengths[row] for row in rows]
        out, lse = longattn.attention_with_cache(
            q,
            k,
            v,
            cache,
            lengths=lengths,
            sequences=sequences,
            tree=parents,
            return_lse=True,
            backend=self.backend,
            **self.keywords,
        )
        assert out.dtype == self.dtype and out.shape == (len(rows), self.q_heads, new, cache.v_head_dim)
        for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
            places = None
            if parents is not None:
                depths: list[int] = []
                for parent in parents[:count]:
                    depths.append(0 if parent < 0 else depths[parent] + 1)
                places = [before[b] + depth for depth in depths]
            self.model.append(row, k[b, :, :count], v[b, :, :count], places)
            assert not out[b, :, count:].any() and (lse[b, :, count:] == -torch.inf).all()
            if check:
                dtype = narrowest(self.dtype, cache.dtype)
                given = None if parents is None else parents[:count]
                found = out[b, :, :count], lse[b, :, :count]
                self.model.attend(row, q[b, :, :count], *found, dtype, given, **self.keywords)
        assert [cache.lengths[row] for row in rows] == [len(self.model.tokens[row]) for row in rows]
