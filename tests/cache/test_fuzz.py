"""Random calls on a cache beside a plain Python model of it; and what faults leave behind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
from cache_model import KINDS, SINKS, WINDOW, make_cache
from longattn import CacheFull, InvalidInput, KVCache, PagedKVCache, SlidingKVCache, attention_with_cache
from longattn.backends import registry
from longattn.cache import Cache

BATCH, KV_HEADS, WIDTHS = 4, 2, (6, 5)


class Fault(Exception):
    pass


class Fuzz:
    """A cache, and for each of its sequences the list of its tokens: numbers, that k and v spell out."""

    def __init__(self, cache: Cache, seed: int) -> None:
        self.cache, self.random = cache, random.Random(seed)
        self.sequences: list[list[int] | None] = [[] for _ in range(BATCH)]  # None: given back
        self.next_token = 1

    def run(self, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        actions = [self.append] * 6 + [self.fail, self.fork, self.free, self.allocate, self.truncate, self.accept]
        actions += [self.reorder, self.misuse, self.look, self.look]
        for _ in range(steps):
            self.random.choice(actions)()
            self.check()

    def tokens(self, count: int) -> Tensor:
        """[count, 1, 1], whole numbers that float32 and float64 hold exactly."""
        start, self.next_token = self.next_token, self.next_token + count
        return torch.arange(start, start + count, dtype=torch.float32)[:, None, None]

    def rows(self, numbers: Tensor, width: int) -> Tensor:
        """[Hkv, count, width] out of [count, 1, 1]: tells token, head and entry apart."""
        return (numbers * 16 + torch.arange(KV_HEADS)[:, None] * 8 + torch.arange(width)).transpose(0, 1)

    def call(self, attends: bool = False) -> tuple[list[int], list[int], list[list[int]], Any]:
        used = [row for row, tokens in enumerate(self.sequences) if tokens is not None]
        rows = self.random.sample(used, self.random.randint(1, len(used)))
        new = self.random.choice((1, 1, 2, 5, 14))
        counts = [self.random.randint(0, new) for _ in rows]
        numbers = [self.tokens(new) for _ in rows]
        k, v = (torch.stack([self.rows(x, width) for x in numbers]) for width in WIDTHS)
        added = [x[:count, 0, 0].int().tolist() for x, count in zip(numbers, counts, strict=True)]
        keywords = {"lengths": counts, "sequences": rows}
        if self.random.random() < 0.5:
            q = torch.randn(len(rows), KV_HEADS, new, WIDTHS[0])
            return rows, counts, added, lambda: attention_with_cache(q, k, v, self.cache, **keywords)
        return rows, counts, added, lambda: self.cache.append(k, v, **keywords)

    def append(self) -> None:
        if all(tokens is None for tokens in self.sequences):
            return
        rows, _, added, call = self.call()
        try:
            call()
        except CacheFull:
            assert not isinstance(self.cache, SlidingKVCache)
            return
        for row, numbers in zip(rows, added, strict=True):
            self.sequences[row] = [*(self.sequences[row] or []), *numbers]

    def fail(self) -> None:
        """A fault after everything was written."""
        if all(tokens is None for tokens in self.sequences):
            return
        backend = next(backend for backend in registry.BACKENDS if backend.unavailable() is None)

        def faulty(name: str) -> Any:
            original = getattr(backend, name)

            def function(*arguments: Any) -> None:
                original(*arguments)
                raise Fault

            return function

        rows, _, _, call = self.call()
        with self.monkeypatch.context() as patch:
            for name in ("append", "decode"):
                patch.setattr(backend, name, faulty(name))
            with pytest.raises((Fault, CacheFull)):
                call()

    def pick(self, condition: Any = lambda tokens: tokens is not None) -> int | None:
        rows = [row for row, tokens in enumerate(self.sequences) if condition(tokens)]
        return self.random.choice(rows) if rows else None

    def fork(self) -> None:
        source, target = self.pick(), self.pick(lambda tokens: not tokens)
        if source is None or target is None or source == target:
            return
        tokens = self.sequences[source]
        length = self.random.choice((None, self.random.randint(0, len(tokens))))
        try:
            assert self.cache.fork(source, target, length=length) == target
        except InvalidInput:
            assert isinstance(self.cache, SlidingKVCache) and length is not None
            return
        self.sequences[target] = tokens[:length]

    def free(self) -> None:
        row = self.pick()
        if row is not None:
            self.cache.free(row)
            self.sequences[row] = None

    def allocate(self) -> None:
        if None in self.sequences:
            self.sequences[self.cache.allocate()] = []

    def truncate(self) -> None:
        row = self.pick()
        if row is None:
            return
        tokens = self.sequences[row]
        length = max(0, len(tokens) - self.random.choice((0, 1, 3, 100)))
        try:
            self.cache.truncate(row, length)
        except InvalidInput:
            assert isinstance(self.cache, SlidingKVCache) and len(tokens) - length > self.cache.spare
            return
        self.sequences[row] = tokens[:length]

    def accept(self) -> None:
        row = self.pick()
        if row is None:
            return
        tokens = self.sequences[row]
        drafts = min(len(tokens), self.random.randint(0, 4))
        length = len(tokens) - drafts
        branch = sorted(self.random.sample(range(drafts), self.random.randint(0, drafts)))
        try:
            self.cache.accept(row, length, branch)
        except InvalidInput as error:
            assert not isinstance(self.cache, KVCache), error
            return
        self.sequences[row] = tokens[:length] + [tokens[length + i] for i in branch]

    def reorder(self) -> None:
        used = [row for row, tokens in enumerate(self.sequences) if tokens is not None]
        if used and self.random.random() < 0.5:
            index = [self.random.choice(used) for _ in range(BATCH)]
            self.cache.reorder(index)
            self.sequences = [list(self.sequences[row]) for row in index]

    def look(self) -> None:
        """Attend without appending: queries of 0 give the mean of the values that they see, or are refused."""
        row = self.pick()
        if row is None:
            return
        tokens, new = self.sequences[row], self.random.choice((1, 2, 6))
        q = torch.zeros(1, KV_HEADS, new, WIDTHS[0])
        try:
            out = attention_with_cache(q, None, None, self.cache, sequences=[row])
        except InvalidInput as error:
            assert isinstance(self.cache, SlidingKVCache) and error.argument == "window"
            first = max(SINKS, len(tokens) - new - WINDOW + 1)
            assert first < self.cache._oldest[row] <= len(tokens) + 14
            return
        for i in range(new):
            at = len(tokens) - new + i
            seen = [token for j, token in enumerate(tokens[: at + 1]) if self.sees(at, j)] if at >= 0 else []
            rows = self.rows(torch.tensor(seen, dtype=torch.float32)[:, None, None], WIDTHS[1])
            wanted = rows.mean(1) if seen else torch.zeros(KV_HEADS, WIDTHS[1])
            torch.testing.assert_close(out[0, :, i], wanted, rtol=1e-5, atol=1e-3)

    def sees(self, at: int, key: int) -> bool:
        return not isinstance(self.cache, SlidingKVCache) or key < SINKS or key > at - WINDOW

    def misuse(self) -> None:
        for row, tokens in enumerate(self.sequences):
            if tokens is None:
                for call in (self.cache.free, self.cache.read, lambda row: self.cache.truncate(row, 0)):
                    with pytest.raises(InvalidInput):
                        call(row)
            else:
                with pytest.raises(InvalidInput):
                    self.cache.truncate(row, len(tokens) + 1)
        for row in (-1, BATCH, True, None):
            with pytest.raises(InvalidInput):
                self.cache.free(row)

    def check(self) -> None:
        cache = self.cache
        assert cache.lengths == tuple(len(tokens or []) for tokens in self.sequences)
        for row, tokens in enumerate(self.sequences):
            if tokens is None:
                continue
            positions, k, v = cache.read(row)
            expected = list(range(len(tokens)))
            if isinstance(cache, SlidingKVCache):
                missing = set(expected) - set(positions.tolist())
                needed = {j for j in expected if j < SINKS or j > len(tokens) - WINDOW}
                assert not missing & needed
                expected = sorted(positions.tolist())
            assert positions.tolist() == expected
            numbers = torch.tensor([tokens[j] for j in expected], dtype=torch.float32)[:, None, None]
            assert torch.equal(k.float(), self.rows(numbers, WIDTHS[0]).reshape(k.shape))
            assert torch.equal(v.float(), self.rows(numbers, WIDTHS[1]).reshape(v.shape))
        if isinstance(cache, PagedKVCache):
            held = {page for pages in cache._pages for page in pages}
            assert cache.free_pages == cache.num_pages - len(held) == len(set(cache._free))
            assert not held & set(cache._free)
            for row, pages in enumerate(cache._pages):
                assert cache._table[row, : len(pages)].tolist() == pages
                assert len(pages) == -(-len(self.sequences[row] or []) // cache.page_size)


@pytest.mark.native
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [*KINDS, "contiguous, full", "paged, full", "sliding, spare"])
def test_random_calls(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {
        "contiguous, full": {"capacity": 30},
        "paged, full": {"num_pages": 12},
        "sliding, spare": {"spare": 4},
    }.get(kind, {"num_pages": 2000} if kind == "paged" else {})
    cache = make_cache(kind.split(",")[0], BATCH, KV_HEADS, WIDTHS, torch.float64, **options)
    Fuzz(cache, seed).run(60, monkeypatch)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("change", ["truncate", "fork", "accept", "reorder"])
def test_a_ring_never_reads_what_was_taken_back(dtype: torch.dtype, positions: str, change: str) -> None:
    rope, sinks, tokens, keep = longattn.Rope(16), 1, 14, 11
    q, k, v = (torch.randn(1, 2, tokens, 16) for _ in range(3))
    v[:, :, keep:] = 1000.0
    ring = {"window": 8, "sinks": sinks, "spare": 4, "positions": positions, "dtype": dtype}
    cache, alone = (SlidingKVCache(2, 2, 16, **ring) for _ in range(2))
    attention_with_cache(q, k, v, cache, rope=rope, sequences=[0])
    attention_with_cache(q[:, :, :keep], k[:, :, :keep], v[:, :, :keep], alone, rope=rope, sequences=[0])
    row = 0
    if change == "truncate":
        cache.truncate(0, keep)
    elif change == "fork":
        row = cache.fork(0, 1, length=keep)
    elif change == "accept":
        cache.accept(0, keep, [])
    else:
        cache.truncate(0, keep)
        cache.reorder([1, 0])
        row = 1

    def read(cache: SlidingKVCache, row: int, new: int) -> Tensor:
        return attention_with_cache(q[:, :, keep - new : keep], None, None, cache, rope=rope, sequences=[row])

    for new in (1, 2):  # tokens 2 on are held, and the first of two queries sees tokens from 2 on
        torch.testing.assert_close(read(cache, row, new), read(alone, 0, new))
    for new in (3, 4, 11):
        with pytest.raises(InvalidInput, match="window: expected keys that the ring still holds"):
            read(cache, row, new)
    for window in (7, 6):  # a narrower window lets older queries see enough
        assert (
            attention_with_cache(
                q[:, :, keep - 3 : keep], None, None, cache, rope=rope, sequences=[row], window=window, causal=True
            )
            .isfinite()
            .all()
        )
    both = attention_with_cache(
        torch.zeros(2, 2, 3, 16), None, None, cache, rope=rope, lengths=[2, 0] if row == 0 else [0, 2]
    )
    assert both.abs().max() < 100  # only queries that count are checked

    for step in (slice(11, 12), slice(12, 14)):
        pieces = [
            attention_with_cache(q[:, :, step], k[:, :, step], k[:, :, step], ring, rope=rope, sequences=[at])
            for ring, at in ((cache, row), (alone, 0))
        ]
        torch.testing.assert_close(*pieces)


def test_a_fork_below_the_sinks_keeps_what_comes_next() -> None:
    """The source's overwritten slots say nothing about a target that shares its sinks only."""
    cache, alone = (SlidingKVCache(2, 1, 4, window=5, sinks=3, dtype=torch.float32) for _ in range(2))
    x, more = torch.randn(1, 1, 40, 4), torch.randn(1, 1, 12, 4)
    cache.append(x, x, sequences=[0])
    alone.append(x[:, :, :2], x[:, :, :2], sequences=[1])
    cache.fork(0, 1, length=2)
    for ring in (cache, alone):
        ring.append(more, more, sequences=[1])
    for got, wanted in zip(cache.read(1), alone.read(1), strict=True):
        assert torch.equal(got, wanted)


def test_pages_are_shared_until_written() -> None:
    cache = PagedKVCache(3, 1, 4, num_pages=8, page_size=4)
    cache.free(1)
    x = torch.randn(1, 1, 10, 4)
    cache.append(x, x, sequences=[0])
    assert cache.free_pages == 5
    assert cache.fork(0) == 1 and cache.fork(0, 2, length=8) == 2
    assert cache.free_pages == 5
    cache.append(x[:, :, :1], x[:, :, :1], sequences=[1])  # copies the third page
    assert cache.free_pages == 4
    cache.append(x[:, :, :1], x[:, :, :1], sequences=[0])  # which is now its own
    cache.append(x[:, :, :1], x[:, :, :1], sequences=[2])  # takes a page, as it shares full ones only
    assert cache.free_pages == 3
    for sequence in range(3):
        cache.free(sequence)
    assert cache.free_pages == 8


def test_a_full_cache_says_so_and_stays_as_it_was() -> None:
    x = torch.randn(2, 1, 9, 4)
    for cache in (KVCache(2, 1, 4, capacity=8), PagedKVCache(2, 1, 4, num_pages=4, page_size=4)):
        cache.append(x[:, :, :7], x[:, :, :7])
        before = [part for row in range(2) for part in cache.read(row)]
        for call in (
            lambda cache=cache: cache.append(x, x, lengths=[1, 2]),
            lambda cache=cache: attention_with_cache(x, x, x, cache, lengths=[1, 9]),
        ):
            with pytest.raises(CacheFull, match="cache"):
                call()
            assert cache.lengths == (7, 7)
            assert all(map(torch.equal, before, [part for row in range(2) for part in cache.read(row)]))
        cache.append(x, x, lengths=[1, 1])
        assert cache.lengths == (8, 8)


@pytest.mark.native
@pytest.mark.skipif(registry.get("cpu").unavailable() is not None, reason="needs the CPU kernels")
def test_the_native_boundary_checks_pages() -> None:
    """Whoever fills the table, no kernel leaves the pool."""
    for entry in (-1, 4, 2**31 - 1):
        cache = PagedKVCache(1, 1, 4, num_pages=4, page_size=4)
        x = torch.randn(1, 1, 6, 4)
        cache.append(x, x)
        cache._table[0, 1] = entry
        with pytest.raises(InvalidInput, match="block_table"):
            attention_with_cache(x[:, :, :1], None, None, cache)
        with pytest.raises(InvalidInput, match="block_table"):
            cache.append(x[:, :, :1], x[:, :, :1])
        assert cache.lengths == (6,)


def test_rings_stay_small_however_long_the_stream() -> None:
    cache = SlidingKVCache(1, 1, 4, window=6, sinks=2, dtype=torch.float32)
    x = torch.randn(1, 1, 50, 4)
    size, places = cache.nbytes, cache._storage.k.shape[2]
    assert places == 8
    for new in (50, 1, 1, 50, 3):
        cache.append(x[:, :, :new], x[:, :, :new])
        assert cache.nbytes == size
    with pytest.raises(InvalidInput, match="length"):
        cache.truncate(0, 100)
    cache.truncate(0, 2)
    cache.truncate(0, 0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: KVCache(0, 1, 4), "batch"),
        (lambda: KVCache(1, 1, True), "head_dim"),
        (lambda: KVCache(1, 1, 4, capacity=0), "capacity"),
        (lambda: KVCache(1, 1, 4, dtype=torch.int32), "dtype"),
        (lambda: SlidingKVCache(1, 1, 4, window=0), "window"),
        (lambda: SlidingKVCache(1, 1, 4, window=4, sinks=-1), "sinks"),
        (lambda: SlidingKVCache(1, 1, 4, window=4, positions="place"), "positions"),
        (lambda: PagedKVCache(1, 1, 4, num_pages=0, page_size=4), "num_pages"),
        (lambda: PagedKVCache(1, 1, 4, num_pages=4, page_size=2.0), "page_size"),
        (lambda: KVCache(1, 1, 4).fork(0, 0, length=1), "length"),
        (lambda: KVCache(1, 1, 4).allocate(), "cache"),
        (lambda: KVCache(2, 1, 4).reorder([0]), "index"),
        (lambda: KVCache(2, 1, 4).reorder(1), "index"),
        (lambda: KVCache(2, 1, 4).reorder([0, 2]), "index"),
        (lambda: KVCache(2, 1, 4).fork(2), "source"),
        (lambda: KVCache(2, 1, 4).accept(0, 0, [0]), "branch"),
        (lambda: KVCache(2, 1, 4).accept(0, 0, "first"), "branch"),
        (lambda: KVCache(2, 1, 4).next_positions(-1), "new"),
    ],
)
def test_bad_arguments(make: Any, name: str) -> None:
    with pytest.raises(InvalidInput) as error:
        make()
    assert error.value.argument == name
