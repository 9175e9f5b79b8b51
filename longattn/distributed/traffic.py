"""How much a rank sends, read off PyTorch's own operators, whoever calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CountBytes(TorchDispatchMode):
    """Counts what this rank puts into torch.distributed while the mode is on, backward included.

    Of a message all of it; of an all-to-all and a scatter all but the own share; of a gather the own part once for
    every other rank; of a broadcast what its root puts in; of a reduction to one what the others put in, to all what a
    ring sends, 2 (ranks - 1) / ranks times the tensor, and to parts half of that.

    by_operator: bytes by the operator's name; total: of all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_operator.values())

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name in _SENT:
            self.by_operator[name] += int(_SENT[name](args))
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Tensor | Sequence[Tensor]) -> int:
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    return sum(x.numel() * x.element_size() for x in tensors)


def _group(boxed: Any) -> dist.ProcessGroup:
    if isinstance(boxed, str):
        return torch._C._distributed_c10d._resolve_process_group(boxed)  # type: ignore[arg-type]
    return boxed if isinstance(boxed, dist.ProcessGroup) else dist.ProcessGroup.unbox(boxed)


def _others(boxed: Any) -> float:
    """(ranks - 1) / ranks."""
    return 1.0 - 1.0 / _group(boxed).size()


_SENT: dict[str, Callable[[tuple[Any, ...]], float]] = {
    "c10d::send": lambda args: _bytes(args[0]),
    "c10d::alltoall_base_": lambda args: _bytes(args[1]) * _others(args[2]),
    "c10d::alltoall_": lambda args: _bytes(args[1]) * _others(args[2]),
    "c10d::allgather_": lambda args: _bytes(args[1]) * (_group(args[2]).size() - 1),
    "c10d::_allgather_base_": lambda args: _bytes(args[1]) * (_group(args[2]).size() - 1),
    "c10d::scatter_": lambda args: _bytes(args[1][0] if args[1] else []) * _others(args[2]),
    "c10d::broadcast_": lambda args: _bytes(args[0]) * (_group(args[1]).rank() == args[2]),
    "c10d::reduce_": lambda args: _bytes(args[0]) * (_group(args[1]).rank() != args[3]),
    "c10d::allreduce_": lambda args: 2 * _bytes(args[0]) * _others(args[1]),
    "c10d::_reduce_scatter_base_": lambda args: _bytes(args[1]) * _others(args[2]),
    "_c10d_functional::all_gather_into_tensor": lambda args: _bytes(args[0]) * (args[1] - 1),
    "_c10d_functional::all_to_all_single": lambda args: _bytes(args[0]) * _others(args[3]),
    "_c10d_functional::all_reduce": lambda args: 2 * _bytes(args[0]) * _others(args[2]),
    "_c10d_functional::reduce_scatter_tensor": lambda args: _bytes(args[0]) * (1.0 - 1.0 / args[2]),
}
