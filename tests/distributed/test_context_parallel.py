"""Context parallelism on gloo: 2, 3 and 4 processes against one, in float64, for every schedule, layout and mask."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import distributed_cases
import distributed_faults
from distributed_world import World
from longattn import distributed

SCHEDULES = ("ring", "ulysses")


@pytest.fixture(scope="module", params=(2, 3, 4))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with World(request.param) as world:
        yield world


def test_everything_with_so_many_ranks(world: World) -> None:
    """One test for a world, as its processes take seconds to start: a worker of xdist may run any test."""
    size = world.size
    world.run(distributed_cases.check, distributed_cases.cases(size), False)
    world.run(distributed_cases.check, distributed_cases.cases(size, packed=True), True)
    world.run(distributed_faults.shards, size, (size,))
    for schedule in SCHEDULES:
        if 4 % size == 0:
            assert all(world.run(distributed_faults.same_dropout, size, schedule))
    faults(world)
    traffic(world)
    memory(world)


def faults(world: World) -> None:
    """All ranks raise the same error, that names the argument and the rank."""
    for kind, argument, rank in (
        ("shape", "q", "rank 1"),
        ("empty", "q", "rank 1"),
        ("empty everywhere", "q", ""),
        ("dtype", "q", "rank 1"),
        ("heads", "schedule", f"{world.size} ranks of the mesh do not divide the 5 heads"),
        ("window", "causal, window", "rank 1"),
        ("schedule", "schedule", "rank 1"),
        ("seed", "seed", "rank 1"),
        ("slopes", "alibi_slopes", "rank 1"),
    ):
        for error in world.run(distributed_faults.error_of, world.size, kind):
            assert error is not None and error.startswith(f"{argument}: ") and rank in error, (kind, error)
    errors = world.run(distributed_faults.error_of, world.size, "bad argument")
    assert errors[1].startswith("softcap: ") and all("rank 1" in error for error in errors[:1] + errors[2:])
    assert world.run(distributed_faults.error_of, world.size, "none") == [None] * world.size


def traffic(world: World) -> None:
    """Bytes that ranks send, against the formulas of docs/distributed.md."""
    size, tokens = world.size, 24 * world.size
    key, text = 4 * (8 + 8) * 4, distributed_cases.TEXT_BYTES * (size - 1)  # bytes of a key and value of 4 heads
    full = world.run(distributed_faults.sent, size, tokens, "ring", {})
    assert full == [((size - 1) * 24 * key, 2 * (size - 1) * 24 * key, text)] * size
    causal = world.run(distributed_faults.sent, size, tokens, "ring", {"causal": True})
    assert [forward for forward, _, _ in causal] == [(rank + 1) * 24 * key for rank in range(size - 1)] + [0]
    window = {"causal": True, "window": 10, "sinks": 2}
    expected = [(9 + 2 * (rank == 0)) * key for rank in range(size - 1)] + [0]
    for length in (tokens, 4 * tokens):  # independent of the length
        halo = world.run(distributed_faults.sent, size, length, "halo", window)
        assert [forward for forward, _, _ in halo] == expected
        assert [backward for _, backward, _ in halo] == [0] + [(9 + 2) * key] * (size - 1)
    if size != 3:
        rows = 24 * 4 * (2 * 8 * 8 + 2 * 4 * 8)  # q and out of 8 heads, k and v of 4, 8 wide
        heads = world.run(distributed_faults.sent, size, tokens, "ulysses", {})
        expected_heads = (rows + 24 * 8 * 4) * (size - 1) // size, rows * (size - 1) // size, text
        assert heads == [expected_heads] * size


def memory(world: World) -> None:
    """What a rank needs follows its share of the tokens: a fixed number of shards, whatever the number of ranks."""
    if world.size == 3 or not os.access("/proc/self/clear_refs", os.W_OK):
        return
    for schedule, tokens, mask, most in (
        ("ring", 1024, {"causal": True}, 22),
        ("halo", 4096, {"causal": True, "window": 64, "sinks": 4}, 14),
        ("ulysses", 1024, {"causal": True}, 24),
    ):
        shards = world.run(distributed_faults.peak_of, world.size, schedule, tokens, mask)
        assert max(shards) < most, (schedule, shards)


def test_a_rank_that_dies() -> None:
    """The others get an error long before the timeout of their group, whether it dies before a call or within it."""
    for while_travelling in (False, True):
        with World(3) as world:
            answers = world.outcomes(distributed_faults.die, 3, 1, while_travelling)
            assert [good for good, _ in answers] == [True, False, True], answers
            assert answers[1] == (False, "ended")


def test_outside_a_mesh() -> None:
    with pytest.raises(distributed_faults.InvalidInput, match="mesh"):
        distributed.shard(torch.zeros(4), None, dim=0)  # type: ignore[arg-type]
