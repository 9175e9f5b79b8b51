"""DTensors and parallelize_module on two gloo processes: results and gradients are those of plain tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.distributed.tensor import Replicate, Shard

import distributed_dtensors as cases
from distributed_world import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(2) as world:
        yield world


def test_everything(world: World) -> None:
    """One test, as processes take seconds to start."""
    number = 0
    for shape, placements in (
        ((2,), [Shard(1)]),
        ((2,), [Shard(0)]),
        ((2,), [Replicate()]),
        ((1, 2), [Shard(0), Shard(1)]),
        ((2, 1), [Shard(0), Shard(1)]),
    ):
        for heads in ((4, 4), (4, 2), (4, 1)):
            for of in range(number % 2, 6, 2):
                world.run(cases.attention, shape, placements, heads, of)
            number += 1
    world.run(cases.varlen_and_rope)
    world.run(cases.placements_are_aligned)
    assert world.run(cases.refusals) == [["q", "k", "k", "q", "bias", "x", "q"]] * 2
    world.run(cases.modules)
    world.run(cases.modules_on_dtensors)
    assert world.run(cases.misaligned) == ["k_proj"] * 2
