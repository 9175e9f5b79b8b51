"""Calls on a cache in eager float64, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from longattn.backends import eager
from longattn.problem import CacheTensors, Problem, Slots


def append(problem: Problem, tensors: CacheTensors, slots: Slots) -> None:
    for b in range(problem.batch):
        _Sequence(problem, tensors, slots, b).append()


def decode(problem: Problem, tensors: CacheTensors, slots: Slots, out: Tensor, lse: Tensor) -> None:
    out.zero_()
    lse.fill_(-torch.inf)
    for b in range(problem.batch):
        sequence = _Sequence(problem, tensors, slots, b)
        if tensors.k is not None:
            sequence.append()
        sequence.attend(out[b], lse[b])


class _Sequence:
    """One sequence of a call on a cache."""

    def __init__(self, problem: Problem, tensors: CacheTensors, slots: Slots, b: int) -> None:
        self.problem, self.tensors, self.slots, self.b = problem, tensors, slots, b
        self.keys, self.queries = int(tensors.key_lens[b]), int(tensors.query_lens[b])
        self.shift = self.keys - self.queries
        self.device = slots.k.device

    def append(self) -> None:
        tensors, n = self.tensors, self.queries
        assert tensors.k is not None and tensors.v is not None
        k, v = (x[self.b, :, :n].double() for x in (tensors.k, tensors.v))
        if tensors.inv_freq is not None and tensors.cos is None:
            k = self._rotate(k, self._rotary_positions())
        pages, slots = self._places(torch.arange(self.shift, self.keys, device=self.device))
        for x, stored, scales in ((k, self.slots.k, self.slots.k_scales), (v, self.slots.v, self.slots.v_scales)):
            x = x.transpose(0, 1)  # [n, Hkv, D]
            if scales is None:
                stored[pages, :, slots] = x.to(stored.dtype)
                continue
            scale = (x.abs().amax(-1) / 127.0).float()
            scales[pages, :, slots] = torch.where(scale.isfinite(), scale, torch.nan)
            scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.inf).double()
            steps = (x.nan_to_num() / scale[..., None]).nan_to_num().round()
            stored[pages, :, slots] = steps.clamp(-127, 127).to(torch.int8)

    def attend(self, out: Tensor, lse: Tensor) -> None:
        problem, tensors, n = self.problem, self.tensors, self.queries
        if not n:
            return
        assert tensors.q is not None
        j = self._held()
        p = self.shift + (self._own(tensors.depths, 1)[:n].long() if tensors.depths is not None else self._new())
        visible = problem.mask.visible(p[:, None], j)
        if tensors.tree is not None:
            branches = self._own(tensors.tree, 2)[:n]
            visible = visible & ((j < self.shift) | branches[:, (j - self.shift).clamp(min=0)])
        q = tensors.q[self.b, :, :n].double().unflatten(0, (problem.kv_heads, problem.group))
        k, v = self._read(j, self.slots.k, self.slots.k_scales), self._read(j, self.slots.v, self.slots.v_scales)
        hidden = ~visible.any(0)[:, None]  # what nobody sees may hold anything
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        scores = problem.scale * self._products(q, k, p, j)
        if problem.softcap:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
        if tensors.alibi_slopes is not None:
            slopes = self._own(tensors.alibi_slopes, 1).double().view(problem.kv_heads, problem.group, 1, 1)
            scores = scores - slopes * (p[:, None] - j).abs().double()
        scores = scores.masked_fill(~visible, -torch.inf)
        total = (
            torch.logsumexp(scores, -1)
            if len(j)
            else torch.full(scores.shape[:-1], -torch.inf, device=scores.device).to(scores)
        )
        if tensors.sink_logits is not None:
            total = torch.logaddexp(total, tensors.sink_logits.double().view(problem.kv_heads, problem.group, 1))
        weights = torch.exp(scores - torch.where(total == -torch.inf, 0.0, total)[..., None])
        out[:, :n] = (weights @ v[:, None]).flatten(0, 1).to(out.dtype)
        lse[:, :n] = total.flatten(0, 1).to(lse.dtype)

    def _products(self, q: Tensor, k: Tensor, p: Tensor, j: Tensor) -> Tensor:
        """q . k, rotated: [Hkv, group, queries, keys]."""
        problem, tensors = self.problem, self.tensors
        if problem.frame:
            last = problem.frame + self.slots.sinks - 1
            near = self._rotate(q, p - self.shift) @ self._rotate(k, j - self.shift)[:, None].mT
            far = self._rotate(q, p.clamp(max=last)) @ self._rotate(k, j)[:, None].mT
            return torch.where(j < problem.mask.sinks, far, near)
        if tensors.inv_freq is not None:
            q = self._rotate(q, self._rotary_positions())
        if tensors.cos is not None:
            k = self._rotate(k, j)
        return q @ k[:, None].mT

    def _held(self) -> Tensor:
        """The keys that have a slot: int64 [keys]."""
        ring, sinks = self.slots.ring, self.slots.sinks
        if not ring or self.keys <= sinks + ring:
            return torch.arange(self.keys, device=self.device)
        newest = torch.arange(self.keys - ring, self.keys, device=self.device)
        return torch.cat((torch.arange(sinks, device=self.device), newest))

    def _places(self, j: Tensor) -> tuple[Tensor, Tensor]:
        """(page, slot in it) of keys j."""
        ring, sinks, size = self.slots.ring, self.slots.sinks, self.slots.k.shape[2]
        if ring:
            j = torch.where(j < sinks, j, sinks + (j - sinks) % ring)
        return self.slots.table[self.b, j // size].long(), j % size

    def _read(self, j: Tensor, stored: Tensor, scales: Tensor | None) -> Tensor:
        """Keys j, or their values: [Hkv, keys, D]."""
        pages, slots = self._places(j)
        x = stored[pages, :, slots].double()
        if scales is not None:
            x = x * scales[pages, :, slots].double()[..., None]
        return x.transpose(0, 1)

    def _rotary_positions(self) -> Tensor:
        """Of the new tokens: [queries]."""
        if self.tensors.positions is not None:
            return self._own(self.tensors.positions, 1)[: self.queries]
        return self.shift + self._new()

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        assert self.tensors.inv_freq is not None
        inv_freq = self._own(self.tensors.inv_freq, 1)
        return eager.rotate(x, inv_freq, positions, self.problem.rope_factor, self.problem.interleaved)

    def _new(self) -> Tensor:
        return torch.arange(self.queries, device=self.device)

    def _own(self, x: Tensor, dims: int) -> Tensor:
        """This sequence's part of a tensor of `dims` dimensions, which sequences may share."""
        return x[self.b] if x.dim() > dims else x
