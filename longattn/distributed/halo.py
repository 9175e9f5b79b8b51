"""The halo exchange of a window: each rank gets from the others exactly the keys that its queries see, and no more.

How much travels follows from the window, not from the length of the sequence. The first keys that stay visible as sinks
go to all ranks in one broadcast; sinks of packed documents, which stand anywhere, travel with the halo.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longattn.distributed.geometry import broadcast_sinks, halo
from longattn.distributed.mesh import Group
from longattn.distributed.messages import Messages
from longattn.distributed.partial import KeyGradients, Outputs, QueryGradients
from longattn.distributed.spans import Span, without
from longattn.distributed.whole import Keys, Whole


class Halo:
    """The schedule of one call."""

    def __init__(self, whole: Whole, group: Group) -> None:
        self._whole, self._group = whole, group
        self._sinks = broadcast_sinks(whole.geometry)
        ranks = range(group.size)
        self._wanted = {source: halo(whole.geometry, source, group.rank) for source in ranks if source != group.rank}
        self._given = {to: halo(whole.geometry, group.rank, to) for to in ranks if to != group.rank}

    def forward(self, outputs: Outputs, own: list[Tensor]) -> list[Tensor]:
        """Attend to all keys. own: k, v and perhaps key_mask. Returns what came from other ranks."""
        mine, messages = self._own(own), Messages(self._group)
        for to, spans in self._given.items():
            for span in spans:
                for x in _tensors(_find(mine, span)):
                    messages.send(x, to)
        came = []
        for source, spans in self._wanted.items():
            for span in spans:
                came += [_empty(x, span.length) for x in own]
                for x in came[-len(own) :]:
                    messages.receive(x, source)
        messages.start()
        sinks, work = self._broadcast(own, mine)
        for keys in mine:
            outputs.attend(keys)
        messages.wait()
        for request in work:
            request.wait()
        came += sinks
        for keys in self._others(came, len(own)):
            outputs.attend(keys)
        return came

    def backward(self, gradients: QueryGradients, own: list[Tensor], came: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(dk, dv) of the own keys, in the dtype of sums."""
        mine, messages = self._own(own), Messages(self._group)
        dtype = gradients.dq.dtype
        others = []
        for keys in self._others(came, len(own)):
            others.append(KeyGradients.zeros(keys, dtype))
            gradients.attend(keys, others[-1])
        found = iter(others)
        for source, spans in self._wanted.items():
            for _, share in zip(spans, found, strict=False):
                for x in (share.k, share.v):
                    messages.send(x, source)
        returned = []
        for to, spans in self._given.items():
            for span in spans:
                shares = [_empty(x, span.length, dtype) for x in own[:2]]
                returned.append(KeyGradients(span, *shares))
                for x in shares:
                    messages.receive(x, to)
        messages.start()
        sinks, work = self._reduce(own, list(found), dtype)

        sums = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in own[:2]]
        into = [KeyGradients(keys.span, keys.k, keys.v) for keys in self._own(sums)]
        for keys, share in zip(mine, into, strict=True):
            gradients.attend(keys, share)
        messages.wait()
        for request in work:
            request.wait()
        if sinks is not None and self._group.rank == 0:
            returned.append(sinks)
        for share in returned:
            next(place for place in into if place.span.holds(share.span)).add(*share)
        return sums[0], sums[1]

    def _own(self, own: list[Tensor]) -> list[Keys]:
        found, start = [], 0
        for span in self._whole.geometry.keys_of(self._group.rank):
            rows = slice(start, start + span.length)
            found.append(Keys(span, own[0][:, :, rows], own[1][:, :, rows], own[2][:, rows] if len(own) > 2 else None))
            start += span.length
        return found

    def _others(self, came: list[Tensor], each: int) -> list[Keys]:
        """What came from other ranks: the halo, then the sinks if they are not own."""
        border = [span for spans in self._wanted.values() for span in spans]
        found = [_as_keys(span, came[each * at : each * (at + 1)]) for at, span in enumerate(border)]
        if self._sinks.length:
            sinks = _as_keys(self._sinks, came[each * len(border) :])
            found += [
                sinks.cut(span) for span in without([self._sinks], self._whole.geometry.keys_of(self._group.rank))
            ]
        return found

    def _broadcast(self, own: list[Tensor], mine: list[Keys]) -> tuple[list[Tensor], list[Any]]:
        """Start to send the sinks, which the first rank holds, to all."""
        if not self._sinks.length:
            return [], []
        if self._group.rank == 0:
            sinks = [x.contiguous() for x in _tensors(mine[0].cut(self._sinks))]
        else:
            sinks = [_empty(x, self._sinks.length) for x in own]
        sent = [x.view(torch.uint8) if x.dtype == torch.bool else x for x in sinks]
        return sinks, [dist.broadcast(x, group=self._group.group, group_src=0, async_op=True) for x in sent]

    def _reduce(
        self, own: list[Tensor], shares: list[KeyGradients], dtype: torch.dtype
    ) -> tuple[KeyGradients | None, list[Any]]:
        """Start to sum all ranks' shares in the sinks' gradients at the first."""
        if not self._sinks.length:
            return None, []
        total = KeyGradients(self._sinks, *(_empty(x, self._sinks.length, dtype).zero_() for x in own[:2]))
        for share in shares:
            total.add(*share)
        group = self._group.group
        return total, [dist.reduce(x, group=group, group_dst=0, async_op=True) for x in (total.k, total.v)]


def _tensors(keys: Keys) -> list[Tensor]:
    return [keys.k, keys.v] if keys.key_mask is None else [keys.k, keys.v, keys.key_mask]


def _as_keys(span: Span, tensors: list[Tensor]) -> Keys:
    return Keys(span, tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None)


def _find(mine: list[Keys], span: Span) -> Keys:
    return next(keys for keys in mine if keys.span.holds(span)).cut(span)


def _empty(x: Tensor, tokens: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor like k or v [B, H, N, D], or key_mask [B, N], with so many tokens."""
    shape = list(x.shape)
    shape[2 if x.dim() == 4 else 1] = tokens
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
