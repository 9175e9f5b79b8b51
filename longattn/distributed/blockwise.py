"""Attention whose keys travel, as one differentiable function: memory linear in a rank's share of the sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longattn.distributed.partial import Outputs, QueryGradients
from longattn.distributed.whole import Whole
from longattn.problem import Tensors


class Schedule(Protocol):
    """How keys come to the queries of a rank."""

    def forward(self, outputs: Outputs, own: list[Tensor]) -> list[Tensor]:
        """Attend to all keys. own: k, v and perhaps key_mask. Returns what the backward needs beside it."""

    def backward(self, gradients: QueryGradients, own: list[Tensor], kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(dk, dv) of the own keys, in the dtype of sums."""


def attend(
    whole: Whole,
    schedule: Schedule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's queries over all keys; differentiable in the tensors."""
    return _Blockwise.apply(whole, schedule, q, k, v, sink_logits, alibi_slopes)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        whole: Whole,
        schedule: Schedule,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_logits: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        outputs = Outputs(whole, q, v.shape[3], sink_logits)
        kept = schedule.forward(outputs, _own(whole, k, v))
        out = outputs.out.to(q.dtype)
        # Saved for no other reason than to differ from `longattn.attention` in how much is saved: a checkpoint that
        # computes a layer again, outside the context that made it parallel, then notices.
        marks = q.new_empty(0), q.new_empty(0)
        ctx.save_for_backward(q, k, v, sink_logits, out, outputs.lse, *marks, *whole.tensors, *kept)
        ctx.call = whole, schedule
        ctx.set_materialize_grads(False)
        return out, outputs.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, schedule = ctx.call
        q, k, v, sink_logits, out, lse, _, _, *kept = ctx.saved_tensors
        count = len(Tensors._fields)
        whole, kept = replace(whole, tensors=Tensors(*kept[:count])), kept[count:]
        # Even without a gradient of its own a rank takes part: others wait for its keys.
        dout = torch.zeros_like(out) if dout is None else dout
        slopes = ctx.needs_input_grad[6]
        gradients = QueryGradients(whole, q, sink_logits, out, lse, dout, dlse, slopes)
        dk, dv = schedule.backward(gradients, _own(whole, k, v), kept)
        dsinks = gradients.dsinks().to(sink_logits.dtype) if ctx.needs_input_grad[5] else None
        dslopes = None if gradients.dslopes is None else gradients.dslopes.to(whole.tensors.alibi_slopes.dtype)
        return None, None, gradients.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, dslopes


def _own(whole: Whole, k: Tensor, v: Tensor) -> list[Tensor]:
    mask = whole.tensors.key_mask
    return [k.contiguous(), v.contiguous()] if mask is None else [k.contiguous(), v.contiguous(), mask.contiguous()]
