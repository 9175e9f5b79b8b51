"""Calls on DTensors: which shards a call keeps, the local call of a rank, and its results as DTensors again.

Sequences and heads are independent of each other, so each rank computes its own and nothing is communicated. A query
needs all keys of its sequence: shards along the sequence are refused (`longattn.distributed` is for them), never
gathered silently. Redistribution and its gradients are DTensor's own.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.problem import Origin, Problem, Tensors, present_features

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_PLAIN = (Tensor, torch.nn.Parameter)
_BATCH, _HEADS = 0, 1  # dimensions of q, k, v, out and lse

# Dimensions of the sequences and of the heads, None where a tensor has none, for tensors of other shapes.
_AXES: dict[str, tuple[int | None, int | None]] = {
    "key_mask": (0, None),
    "key_lens": (0, None),
    "offset": (0, None),
    "sink_logits": (None, 0),
}
_SHARED_WITH_ONE_DIM = ("lo", "hi", "positions_q", "positions_k")


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    if type(x) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there is no such tensor
    return module is not None and isinstance(x, module.DTensor)


class Shards(NamedTuple):
    """How a call is divided among the ranks of a mesh."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]  # of q, out and lse, one for each dimension of the mesh

    @classmethod
    def of(cls, **tensors: Tensor) -> Shards:
        """The shards of q, k and v together, where the first two dimensions are sequences and heads.

        Along a dimension of the mesh, one of them may be sharded and another replicated, which is then divided alike.

        Raises:
            InvalidInput: one is no DTensor, is on another mesh, or is sharded differently, or along tokens.
        """
        from torch.distributed.tensor import Replicate

        first = next(iter(tensors.values()))
        assert is_dtensor(first)
        mesh = first.device_mesh
        placements: list[Placement] = [Replicate()] * mesh.ndim
        for name, x in tensors.items():
            if not is_dtensor(x) or x.device_mesh != mesh:
                raise InvalidInput(name, f"a DTensor on q's {mesh}", f"a {type(x).__name__}")
            for at, placement in enumerate(x.placements):
                if placement.is_replicate() or placement.is_partial():
                    continue
                if not _is_shard(placement, _BATCH, _HEADS):
                    rule = "sharded along sequences or heads, or replicated (see longattn.distributed for shards of a "
                    raise InvalidInput(name, f"{rule}sequence)", f"placements {x.placements}")
                if placements[at] not in (Replicate(), placement):
                    raise InvalidInput(name, f"placements that fit {tuple(placements)}", f"{x.placements}")
                placements[at] = placement
        return cls(mesh, tuple(placements))

    def ranks(self, dim: int) -> int:
        """How many ranks divide a dimension of q."""
        sizes = [self.mesh.size(at) for at, placement in enumerate(self.placements) if _is_shard(placement, dim)]
        return math.prod(sizes)

    def first(self, dim: int, size: int) -> int:
        """The first index of this rank's shard of a dimension of q of that size."""
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise InvalidInput("q", "a DTensor on a mesh that this rank is part of", f"{self.mesh}")
        start = 0
        for at, placement in enumerate(self.placements):
            if _is_shard(placement, dim):
                chunk = -(-size // self.mesh.size(at))  # as torch.chunk
                before = min(size, chunk * coordinate[at])
                start, size = start + before, min(chunk, size - before)
        return start

    def local(self, name: str, x: Tensor, sequences: int | None, heads: int | None) -> Tensor:
        """This rank's part of a tensor; what is no DTensor is the same on all ranks.

        Args:
            sequences, heads: the dimensions of x that are divided as those of q; None: each rank reads all of x, whose
                gradient is then the sum over the ranks.

        Raises:
            InvalidInput: x is sharded along another dimension.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        placements: list[Placement] = []
        gradients: list[Placement] = []
        for placement in self.placements:
            if not _is_shard(placement, _BATCH, _HEADS):
                placements.append(Replicate())
                gradients.append(Replicate())
                continue
            axis = sequences if _is_shard(placement, _BATCH) else heads
            placements.append(Replicate() if axis is None else Shard(axis))
            gradients.append(Partial() if axis is None else Shard(axis))
        if not is_dtensor(x):
            whole = [Replicate() for _ in placements]
            x = DTensor.from_local(x, self.mesh, whole, run_check=name == "seed")  # drawn by each rank: the first one's
        assert is_dtensor(x)
        for given, wanted in zip(x.placements, placements, strict=True):
            if not (given.is_replicate() or given.is_partial() or given == wanted):
                raise InvalidInput(name, f"placements that fit {tuple(placements)}", f"{x.placements}")
        if x.device_mesh != self.mesh:
            raise InvalidInput(name, f"a DTensor on q's {self.mesh}", f"{x.device_mesh}")
        x = x.redistribute(placements=placements).to_local(grad_placements=gradients)
        return x if x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

    def whole(self, x: Tensor, batch: int, heads: int) -> Tensor:
        """A local result [B, H, ...] as a DTensor."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size((batch, heads, *x.shape[2:]))
        strides, step = [0] * len(shape), 1
        for dim in sorted(range(len(shape)), key=lambda dim: (x.stride(dim), -dim)):
            strides[dim], step = step, step * max(1, shape[dim])
        return DTensor.from_local(x, self.mesh, self.placements, run_check=False, shape=shape, stride=tuple(strides))


def local_call(tensors: Tensors, problem: Problem) -> tuple[Shards, Tensors, Problem]:
    """Divide a checked call on DTensors: the shards, and this rank's tensors and problem.

    Raises:
        InvalidInput: placements that do not fit each other, or heads that the ranks do not divide.
    """
    shards = Shards.of(q=tensors.q, k=tensors.k, v=tensors.v)
    ranks, q_heads, kv_heads = shards.ranks(_HEADS), problem.q_heads, problem.kv_heads
    if q_heads % ranks:
        raise InvalidInput("q", f"a number of heads that {ranks} ranks divide", f"{q_heads}")
    if kv_heads % ranks and ranks % kv_heads:
        raise InvalidInput("k", f"a number of heads that {ranks} ranks divide, or that divides them", f"{kv_heads}")
    parts: dict[str, Any] = {}
    for name, x in zip(Tensors._fields, tensors, strict=True):
        if x is not None:
            parts[name] = shards.local(name, x, *_axes(name, x, ranks))
    local = Tensors(**parts)
    first_head = shards.first(_HEADS, q_heads)
    if kv_heads % ranks:  # the ranks that share a head read it from a copy of all
        local = local._replace(**{name: parts[name][:, first_head // problem.group, None] for name in ("k", "v")})
    batch = local.q.shape[0] if not problem.varlen else problem.batch
    origin = problem.origin
    if problem.dropout_p:
        sequence = 0 if problem.varlen else shards.first(_BATCH, problem.batch)
        origin = Origin(origin.sequence + sequence, origin.head + first_head, origin.query, origin.key)
    problem = problem._replace(
        batch=batch,
        q_heads=local.q.shape[1],
        kv_heads=local.k.shape[1],
        origin=origin,
        features=present_features(local, problem.softcap, problem.dropout_p, origin),
    )
    return shards, local, problem


def _axes(name: str, x: Tensor, ranks: int) -> tuple[int | None, int | None]:
    """The dimensions of sequences and heads of a tensor of a call."""
    if name in ("k", "v"):
        return _BATCH, None if x.shape[_HEADS] % ranks else _HEADS
    if name == "q":
        return _BATCH, _HEADS
    if name == "bias":
        return _BATCH if x.shape[_BATCH] > 1 else None, _HEADS if x.shape[_HEADS] > 1 else None
    if name == "alibi_slopes":
        return (0, 1) if x.dim() == 2 else (None, 0)
    if name in _SHARED_WITH_ONE_DIM:
        return 0 if x.dim() == 2 else None, None
    return _AXES.get(name, (None, None))


def _is_shard(placement: Placement, *dims: int) -> bool:
    """Return whether it is Shard along one of these dimensions, and not one of its relatives that interleave."""
    from torch.distributed.tensor import Shard

    return type(placement) is Shard and placement.dim in dims
