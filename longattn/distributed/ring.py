"""Ring attention: keys and values travel from rank to rank while each attends to those that it holds.

Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv 2310.01889. Here a
rank's keys travel only as far as some rank still sees them, which a window or a causal mask makes shorter than the
ring. In the backward they travel once more; the sums of their gradients follow, and go home from their last stop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.distributed.geometry import hops
from longattn.distributed.mesh import Group
from longattn.distributed.messages import Messages
from longattn.distributed.partial import KeyGradients, Outputs, QueryGradients
from longattn.distributed.whole import Keys, Whole


@dataclass(frozen=True)
class Route:
    """How many hops each rank's keys make."""

    hops: tuple[int, ...]

    @property
    def steps(self) -> int:
        return max(self.hops)

    def held(self, rank: int, step: int) -> int | None:
        """Whose keys a rank holds at a step; None: nobody's."""
        source = (rank - step) % len(self.hops)
        return source if step <= self.hops[source] else None

    def sends(self, rank: int) -> int:
        """How many times a rank passes somebody's keys on."""
        return sum(self.held(rank + 1, step) is not None for step in range(1, self.steps + 1))

    def gradient_sends(self, rank: int) -> int:
        """How many times a rank sends somebody's gradients on or home."""
        return sum(self.held(rank, step) is not None for step in range(1, self.steps + 1))


class Ring:
    """The schedule of one call."""

    def __init__(self, whole: Whole, group: Group) -> None:
        self._whole, self._group = whole, group
        self._route = Route(hops(whole.geometry))

    def forward(self, outputs: Outputs, own: list[Tensor]) -> list[Tensor]:
        """Attend to all keys. own: k, v and perhaps key_mask. Returns what the backward needs beside it: nothing."""
        held: list[Tensor] | None = own
        for step in range(self._route.steps + 1):
            arriving, messages = self._pass_on(held, step, own)
            if held is not None:
                for keys in self._keys(held, step):
                    outputs.attend(keys)
            messages.wait()
            held = arriving
        return []

    def backward(self, gradients: QueryGradients, own: list[Tensor], _: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(dk, dv) of the own keys, in the dtype of sums."""
        held: list[Tensor] | None = own
        sums = self._zeros(own, gradients)
        home = self._empty(sums) if self._route.hops[self._group.rank] else None
        travelling: list[Tensor] | None = None
        sum_messages = Messages(self._group)
        for step in range(self._route.steps + 1):
            arriving, messages = self._pass_on(held, step, own)
            share = None
            if held is not None:
                share = sums if step == 0 else self._zeros(own, gradients)
                for keys, into in zip(self._keys(held, step), self._keys(share, step), strict=True):
                    gradients.attend(keys, KeyGradients(into.span, into.k, into.v))
            sum_messages.wait()
            if share is not None and travelling is not None:
                for mine, others in zip(share, travelling, strict=True):
                    mine += others
            if step:
                travelling, sum_messages = self._pass_sums(share, step, sums, home)
            messages.wait()
            held = arriving
        sum_messages.wait()
        if home is not None:
            for mine, others in zip(sums, home, strict=True):
                mine += others
        return sums[0], sums[1]

    def _keys(self, held: list[Tensor], step: int) -> list[Keys]:
        """What is held at a step, span by span."""
        source = (self._group.rank - step) % self._group.size
        found, start = [], 0
        for span in self._whole.geometry.keys_of(source):
            rows = slice(start, start + span.length)
            mask = held[2][:, rows] if len(held) > 2 else None
            found.append(Keys(span, held[0][:, :, rows], held[1][:, :, rows], mask))
            start += span.length
        return found

    def _pass_on(self, held: list[Tensor] | None, step: int, own: list[Tensor]) -> tuple[list[Tensor] | None, Messages]:
        """Start to send what is held at this step to the next rank, and to receive what is held at the next step."""
        rank, messages, arriving = self._group.rank, Messages(self._group), None
        if step < self._route.steps:
            if held is not None and self._route.held(rank + 1, step + 1) is not None:
                self._send(messages, held, rank + 1)
            if self._route.held(rank, step + 1) is not None:
                arriving = self._receive(messages, own, rank - 1)
        return arriving, messages.start()

    def _pass_sums(
        self, share: list[Tensor] | None, step: int, sums: list[Tensor], home: list[Tensor] | None
    ) -> tuple[list[Tensor] | None, Messages]:
        """Start to send the gradients of what was held at this step along with it, or home if it goes no further."""
        rank, route, messages, arriving = self._group.rank, self._route, Messages(self._group), None
        if share is not None:
            further = step < route.steps and route.held(rank + 1, step + 1) is not None
            self._send(messages, share, rank + 1 if further else rank - step)
        if step < route.steps and route.held(rank, step + 1) is not None:
            arriving = self._receive(messages, sums, rank - 1)
        if home is not None and route.hops[rank] == step:
            for x in home:
                messages.receive(x, (rank + step) % self._group.size)
        return arriving, messages.start()

    def _send(self, messages: Messages, tensors: list[Tensor], to: int) -> None:
        for x in tensors:
            messages.send(x, to % self._group.size)

    def _receive(self, messages: Messages, like: list[Tensor], source: int) -> list[Tensor]:
        arriving = self._empty(like)
        for x in arriving:
            messages.receive(x, source % self._group.size)
        return arriving

    @staticmethod
    def _empty(like: list[Tensor]) -> list[Tensor]:
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like]

    @staticmethod
    def _zeros(own: list[Tensor], gradients: QueryGradients) -> list[Tensor]:
        return [torch.zeros(x.shape, dtype=gradients.dq.dtype, device=x.device) for x in own[:2]]
