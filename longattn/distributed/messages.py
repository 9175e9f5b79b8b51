"""Messages between two ranks, sent while the caller computes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longattn.distributed.mesh import Group


class Messages:
    """What one rank sends and receives at a time; both sides name their messages in the same order."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._operations: list[dist.P2POp] = []
        self._requests: list[Any] = []

    def send(self, x: Tensor, to: int) -> None:
        self._post(dist.isend, x.contiguous(), to)

    def receive(self, x: Tensor, source: int) -> None:
        """Fill x, contiguous."""
        self._post(dist.irecv, x, source)

    def start(self) -> Messages:
        if self._operations:
            self._requests = dist.batch_isend_irecv(self._operations)
        return self

    def wait(self) -> None:
        """Until what was to come is here, and what was sent may be written to."""
        for request in self._requests:
            request.wait()
        self._operations, self._requests = [], []  # which held the buffers

    def _post(self, operation: Any, x: Tensor, peer: int) -> None:
        x = x.view(torch.uint8) if x.dtype == torch.bool else x
        self._operations.append(dist.P2POp(operation, x, self._group.global_rank(peer), self._group.group))
