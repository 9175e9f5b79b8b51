"""The ranks of a DeviceMesh that share one sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longattn.errors import InvalidInput
from longattn.problem import checks_enabled

_TEXT_BYTES = 2048  # what a call says of itself takes a few hundred


@dataclass(frozen=True)
class Group:
    """A process group, seen from this rank of it."""

    group: Any
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh, dim: int) -> Group:
        return cls(mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim))

    def gather(self, x: Tensor) -> list[Tensor]:
        """x of every rank, all of one shape and dtype."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self.group)
        return parts

    def global_rank(self, rank: int) -> int:
        """Its number among all processes."""
        return dist.get_global_rank(self.group, rank)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a mesh: `ring` of them cut the sequence by a layout, `ulysses` each of the ring's parts once more.

    A mesh of one dimension is a ring of parts.
    """

    groups: tuple[Group, ...]  # of each dimension of the mesh
    device: str

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Ranks:
        """
        Raises:
            InvalidInput: not a mesh of one or two dimensions, or one that this process is no part of.
        """
        if not isinstance(mesh, DeviceMesh) or mesh.ndim not in (1, 2):
            got = f"{mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
            raise InvalidInput("mesh", "a DeviceMesh of one dimension, or of two (ring, ulysses)", got)
        if mesh.get_coordinate() is None:
            raise InvalidInput("mesh", "a DeviceMesh that holds this rank", f"{mesh} on rank {dist.get_rank()}")
        return cls(tuple(Group.of(mesh, dim) for dim in range(mesh.ndim)), mesh.device_type)

    @property
    def ring(self) -> Group:
        return self.groups[0]

    @property
    def ulysses(self) -> Group | None:
        return self.groups[1] if len(self.groups) == 2 else None

    @property
    def size(self) -> int:
        return self.ring.size * (1 if self.ulysses is None else self.ulysses.size)

    @property
    def rank(self) -> int:
        """This rank's number in the mesh, row by row."""
        return self.ring.rank if self.ulysses is None else self.ring.rank * self.ulysses.size + self.ulysses.rank

    def gather_text(self, text: str) -> list[str] | None:
        """The text of every rank, in the order of `rank`; None where that would stop a GPU.

        It travels between CPUs. Groups that cannot do that (NCCL alone) send it from GPU to GPU, but only under
        LONGATTN_CHECK=1, as waiting for it empties the GPU's queue.
        """
        device = "cpu"
        if not all(_speaks_cpu(group.group) for group in self.groups):
            if not checks_enabled():
                return None
            device = self.device
        table = torch.tensor(
            list(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8, device="cpu"
        ).to(device)
        for group in reversed(self.groups):
            table = torch.cat(group.gather(table))
        rows = table.cpu().view(self.size, _TEXT_BYTES)
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]

    def largest(self, value: int, device: torch.device) -> int:
        """The largest of all ranks' values."""
        found = torch.tensor([value], device=device)
        for group in self.groups:
            found = torch.stack(group.gather(found)).amax(0)
        return int(found)

    def broadcast(self, x: Tensor) -> None:
        """Fill x with that of the first rank."""
        for dim, group in enumerate(self.groups):
            if all(other.rank == 0 for other in self.groups[dim + 1 :]):
                dist.broadcast(x, group=group.group, group_src=0)


def _speaks_cpu(group: Any) -> bool:
    return "cpu" in {device.partition(":")[0] for device in dist.get_backend_config(group).split(",")}
