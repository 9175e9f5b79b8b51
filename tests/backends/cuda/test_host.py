"""What the CUDA backend computes of shapes: maps of tensors, tables, schedules, tiles. No GPU, no nvcc."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import longattn
from longattn import Unsupported
from longattn.backends.cuda import architecture, native
from longattn.mask import Mask

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    made = tmp_path_factory.mktemp("cuda") / "host.so"
    flags = ("-std=c++17", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'tests/emulator'}", f"-I{ROOT / 'csrc/cuda'}")
    subprocess.run([compiler, *flags, str(ROOT / "tests/native/cuda_host.cpp"), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


def numbers(count: int, function: Any, *arguments: Any, kind: Any = ctypes.c_int) -> list[int]:
    """What a function writes to its last argument."""
    to = (kind * count)()
    function(*arguments, to)
    return list(to)


def test_maps_of_tensors(host: Any) -> None:
    def shape(strides: Sequence[int], sizes: Sequence[int], rows: int) -> list[int]:
        arguments = [ctypes.c_int64(x) for x in strides] + list(sizes) + [rows]
        return numbers(11, host.host_map_shape, *arguments, kind=ctypes.c_uint64)

    # [2, 3, 100, 96] laid out as [B, N, H, D]: strides in bytes, of tokens, heads, sequences.
    assert shape((28800, 96, 288), (2, 3, 100, 96), 128) == [96, 100, 3, 2, 576, 192, 57600, 64, 128, 1, 1]
    # Beyond 2^31 bytes.
    assert shape((2**40 // 4, 64, 2**33), (2, 1, 5, 64), 64)[4:7] == [2**34, 128, 2**39]
    # One of a kind: a stride that is legal; none: described as one.
    assert shape((0, 0, 0), (1, 1, 1, 40), 64) == [40, 1, 1, 1, 80, 80, 80, 64, 64, 1, 1]
    assert shape((0, 0, 64), (1, 1, 0, 64), 64)[:4] == [64, 1, 1, 1]


@pytest.mark.parametrize("longest_last", [False, True])
def test_a_schedule_is_a_permutation_that_keeps_groups_together(host: Any, longest_last: bool) -> None:
    for query_tiles, heads, together in ((1, 1, 1), (5, 7, 3), (4, 6, 6), (3, 8, 2)):
        order = [
            tuple(numbers(2, host.host_tile_at, query_tiles, heads, together, longest_last, t))
            for t in range(query_tiles * heads)
        ]
        assert sorted(order) == [(m, h) for m in range(query_tiles) for h in range(heads)]
        groups = [head // together for _, head in order]
        assert groups == sorted(groups)
        if longest_last:
            for group in set(groups):
                tiles = [m for m, head in order if head // together == group]
                assert tiles == sorted(tiles, reverse=True)


def test_heads_that_fit_the_cache_start_together(host: Any) -> None:
    def together(heads: int, group: int, size: int) -> int:
        return int(host.host_heads_together(heads, group, ctypes.c_int64(size)))

    assert together(64, 8, 8 << 20) == 32  # 4 heads of keys and values fit 32 MB
    assert together(64, 8, 1 << 40) == 8  # one at least
    assert together(16, 8, 1) == 16
    assert together(16, 8, 0) == 16


def test_tiles_of_keys_are_those_that_are_seen(host: Any) -> None:
    """Every visible pair is in a visited tile, each tile comes once, and what is called whole is seen whole."""
    rng = random.Random(0)
    for _ in range(2000):
        left, right = rng.choice((-1, 0, 1, 5, 30)), rng.choice((-1, 0, 3, 20))
        sinks, nk, shift, size = rng.choice((0, 1, 9)), rng.randint(1, 40), rng.randint(-20, 30), rng.choice((4, 8))
        first = rng.randint(0, 20)
        last = first + rng.randint(0, 9)
        to = (ctypes.c_int * 64)()
        count = host.host_key_tiles(left, right, sinks, shift, nk, first, last, size, to)
        visited, (full_first, full_end) = list(to[:count]), to[count : count + 2]
        assert len(set(visited)) == count and all(0 <= n * size < nk for n in visited) or not visited
        mask = Mask(None if left < 0 else left, None if right < 0 else right, sinks if left >= 0 else 0)
        positions, keys = torch.arange(shift + first, shift + last + 1)[:, None], torch.arange(nk)
        seen = mask.visible(positions, keys)
        for j in seen.any(0).nonzero().flatten().tolist():
            assert j // size in visited
        for n in range(full_first, full_end):
            if n in visited:
                assert (n + 1) * size <= nk and bool(seen[:, n * size : (n + 1) * size].all())


def test_bounds_leave_tiles_of_keys_out(host: Any) -> None:
    """Of those visited without bounds, the ones that have some key of [low, high), in the same order."""
    rng = random.Random(3)
    for _ in range(500):
        call = (rng.choice((-1, 1, 9)), rng.choice((-1, 0, 9)), rng.choice((0, 9)), rng.randint(-9, 20), 40, 0, 9, 8)
        low = rng.randint(0, 40)
        high = rng.randint(low, 40)
        to = (ctypes.c_int * 64)()
        every = list(to[: host.host_key_tiles(*call, to)])
        found = list(to[: host.host_key_tiles_within(*call, low, high, to)])
        kept = [n for n in every if n * 8 < high and low < (n + 1) * 8]
        assert found == kept or low == high


def test_bounds(host: Any) -> None:
    lo, hi = (ctypes.c_int32 * 4)(-5, 3, 8, 2), (ctypes.c_int32 * 4)(4, 99, 8, 2**31 - 1)

    def found(batch_stride: int, b: int, i: int) -> list[int]:
        return numbers(2, host.host_bounds, 2, 10, lo, hi, batch_stride, b, i)

    assert [found(0, 1, i) for i in range(3)] == [[0, 4], [3, 10], [3, 10]]  # cut to the keys; past the last query, its
    assert [found(2, 1, i) for i in range(2)] == [[8, 8], [2, 10]]
    assert numbers(2, host.host_bounds, 2, 10, None, None, 0, 0, 1) == [0, 10]


def test_workspaces_of_the_backward(host: Any) -> None:
    count = host.host_row_term_count
    count.restype = ctypes.c_int64
    assert count(3, 2, 100, 0, 64) == 3 * 2 * 2 * 64 * 2  # log-sums and deltas
    assert count(3, 2, 100, 1, 64) == 3 * 2 * 2 * 64 * 4 + 2 * 2 * 2  # and bounds, of queries and tiles


def test_tiles_of_queries_and_turns(host: Any) -> None:
    """Every visible pair is visited, and each visitor knows how many come before it in a deterministic backward."""
    rng = random.Random(1)
    for _ in range(1500):
        left, right = rng.choice((-1, 0, 2, 7, 30)), rng.choice((-1, 0, 3, 20))
        sinks = rng.choice((0, 1, 9)) if left >= 0 else 0
        nq, nk, shift, keys, size = rng.randint(1, 40), rng.randint(1, 40), rng.randint(-20, 30), 8, rng.choice((4, 8))
        call = (left, right, sinks, shift, nq, nk)
        visits = {}
        for n in range(-(-nk // keys)):
            first, end = numbers(2, host.host_query_tiles, *call, n, keys, size)
            visits[n] = range(first, end)
        mask = Mask(None if left < 0 else left, None if right < 0 else right, sinks)
        seen = mask.visible(torch.arange(nq)[:, None] + shift, torch.arange(nk))
        for i, j in seen.nonzero().tolist():
            assert i // size in visits[j // keys]
        for n, tiles in visits.items():
            for m in tiles:
                before = sum(m in visits[later] for later in visits if later > n)
                assert host.host_later_visitors(*call, n, m, keys, size) == before


def test_sequences(host: Any) -> None:
    def ints(*values: int) -> Any:
        return (ctypes.c_int32 * len(values))(*values)

    def fields(*arguments: Any) -> list[int]:
        return numbers(6, host.host_sequence, *arguments)

    assert fields(5, 9, 0, 1, None, None, None, 3) == [3, 0, 5, 0, 9, 4]
    assert fields(5, 9, 2, 0, None, None, None, 0) == [0, 0, 5, 0, 9, 2]
    assert fields(5, 9, 0, 1, ints(7, 100), None, None, 0) == [0, 0, 5, 0, 7, 2]
    assert fields(5, 9, 0, 1, ints(7, 100), None, None, 1) == [1, 0, 5, 0, 9, 95]
    assert fields(10, 12, 0, 1, None, ints(0, 4, 10), ints(0, 7, 12), 1) == [0, 4, 6, 7, 5, -1]
    # Whatever cu_seqlens hold, no token outside the tensors is touched.
    assert fields(10, 12, 0, 1, None, ints(-3, 99), ints(11, 5), 0)[:5] == [0, 0, 10, 11, 0]


def test_rows_of_packed_sequences_have_room(host: Any) -> None:
    rng = random.Random(2)
    for _ in range(200):
        lengths, size = [rng.randint(0, 20) for _ in range(rng.randint(1, 6))], 4
        start, end = 0, 0
        for b, length in enumerate(lengths):
            first, all_tiles = numbers(2, host.host_row_tiles, sum(lengths), len(lengths), start, b, size)
            assert first >= end
            end = first + -(-length // size)
            assert end <= all_tiles
            start += length


def test_tables(host: Any) -> None:
    widths = [host.host_padded_width(0, width) for width in (1, 64, 65, 96, 100, 130, 192, 256, 257)]
    assert widths == [64, 64, 96, 96, 128, 192, 192, 256, 0]
    assert [host.host_padded_width(1, width) for width in (64, 96, 129, 193, 257)] == [64, 128, 192, 256, 0]
    assert [host.host_padded_width(2, width) for width in (8, 96, 200)] == [64, 128, 256]


def test_pieces_of_pages_and_splits(host: Any) -> None:
    assert [host.host_cache_piece(9, size, 128) for size in (8, 16, 48, 256, 5, 100)] == [8, 16, 16, 128, 0, 0]
    assert host.host_cache_piece(1, 5, 128) == 128
    assert host.host_split_count(1, 8, 8, 1, 131072, -1, 132) == 16  # 8 blocks: 16 each fill 132 processors
    assert host.host_split_count(32, 32, 8, 1, 131072, -1, 132) == 1
    assert host.host_split_count(1, 1, 1, 1, 300, -1, 132) == 1  # too few keys to share
    assert host.host_split_count(1, 1, 1, 1, 131072, 1023, 132) == 4  # a window
    assert host.host_split_count(1, 1, 1, 1, 1 << 22, -1, 1000) == 128


def test_without_its_library_the_backend_says_why() -> None:
    q = torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match="cuda") as error:
        longattn.attention(q, q, q, backend="cuda")
    assert "CUDA kernels" in str(error.value) or "GPU" in str(error.value)
    assert longattn.explain(q, q, q).backend == "cpu"


def test_a_library_of_other_sources_is_not_loaded(tmp_path: Path) -> None:
    source, made = tmp_path / "old.c", tmp_path / "_cuda.so"
    source.write_text("int longattn_cuda_call_bytes() { return 12; }")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    found = native.load(made)
    assert isinstance(found, str) and "build again" in found


def test_nothing_is_proven_yet() -> None:
    assert architecture.PROVEN == {}
