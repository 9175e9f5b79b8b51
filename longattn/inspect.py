"""A look inside attention without its matrix: the weights of chosen queries, and statistics of all of them.

Weights are those before dropout, P = exp(s - lse) with the scores s of `attention`, computed in float32 (float64 for
float64) by the eager formula on the tensors' own device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longattn import arguments
from longattn.arguments import Positions, Window
from longattn.backends import eager
from longattn.backends.base import Gradients
from longattn.forked import on_one_thread
from longattn.problem import Problem, Tensors, check_places
from longattn.redirection import refuse_elsewhere
from longattn.rope import Rope
from longattn.tracing import leaf

__all__ = ["AttentionStats", "attention_rows", "attention_stats"]


class AttentionStats(NamedTuple):
    """What the attention matrix [B, Hq, Nq, Nk] of one call says, in float32 (float64 for float64 inputs)."""

    mass: Tensor  # [B, Hq, Nk]: what each key receives, the sum of its weights over all queries
    entropy: Tensor  # [B, Hq, Nq]: of each query's weights, in nats; a learned sink is one outcome more
    top_keys: (
        Tensor  # int64 [B, Hq, Nq, top_k]: the keys of the largest weights, in falling order; -1: no more are visible
    )
    top_weights: Tensor  # [B, Hq, Nq, top_k]: their weights, 0 where there is no key; without gradient


@leaf
@on_one_thread
def attention_rows(
    q: Tensor,
    k: Tensor,
    rows: Sequence[int] | Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    sinks: int = 0,
    align: str | int | Tensor = "end",
    key_mask: Tensor | None = None,
    key_lens: Tensor | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    rope: Rope | None = None,
    positions: Positions = None,
) -> Tensor:
    """The attention weights of some queries; differentiable in q, k, bias, alibi_slopes and sink_logits.

    Args:
        q: [B, Hq, Nq, D]; k: [B, Hkv, Nk, D].
        rows: the queries wanted, ints or an int tensor [R]; negative ones count from the end, any may come twice.
        The keywords: as in `attention`; bias and bounds are those of all Nq queries.

    Returns:
        weights [B, Hq, R, Nk], 0 where a key is hidden. A row sums to 1, to less with sink_logits, and to 0 where its
        query sees nothing. Memory is that of a few such tensors.

    Raises:
        InvalidInput: an argument breaks the contract.
    """
    refuse_elsewhere("attention_rows")
    tensors, problem = arguments.weights(
        q,
        k,
        causal=causal,
        window=window,
        sinks=sinks,
        align=align,
        key_mask=key_mask,
        key_lens=key_lens,
        bounds=bounds,
        bias=bias,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
        rope=rope,
        positions=positions,
    )
    chosen = arguments.query_rows(rows, problem.nq, tensors.q.device)
    part = next(_parts(problem, tensors), None)
    if part is None:
        shape = (problem.batch, problem.q_heads, len(chosen), problem.nk)
        return tensors.q.new_zeros(shape, dtype=problem.accumulate_dtype)
    return eager.Tile(part, chosen, [slice(0, problem.nk)]).weights


@leaf
@on_one_thread
def attention_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    top_k: int = 8,
    causal: bool = False,
    window: Window = None,
    sinks: int = 0,
    align: str | int | Tensor = "end",
    key_mask: Tensor | None = None,
    key_lens: Tensor | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    rope: Rope | None = None,
    positions: Positions = None,
) -> AttentionStats:
    """How much each key receives, how spread each query's weights are, and where the largest are.

    Memory is linear in the lengths and time follows visible pairs: a tile of queries meets the keys that it can see.

    Args:
        q: [B, Hq, Nq, D]; k: [B, Hkv, Nk, D].
        lse: [B, Hq, Nq], as `attention(..., return_lse=True)` gives it, or that of more keys than these (a part of a
            cache, a shard), whose weights then sum to less than 1; computed from the scores by default.
        top_k: how many of the largest weights of each query to return.
        The keywords: as in `attention`.

    Returns:
        AttentionStats. mass and entropy are differentiable, once, in q, k, bias, alibi_slopes, sink_logits and lse. A
        query that sees nothing gives mass to no key and has entropy 0.

    Raises:
        InvalidInput: an argument breaks the contract.
    """
    refuse_elsewhere("attention_stats")
    tensors, problem = arguments.weights(
        q,
        k,
        causal=causal,
        window=window,
        sinks=sinks,
        align=align,
        key_mask=key_mask,
        key_lens=key_lens,
        bounds=bounds,
        bias=bias,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
        rope=rope,
        positions=positions,
    )
    lse = arguments.log_sums(lse, problem, tensors.q.device)
    arguments.count("top_k", top_k)
    return AttentionStats(*_Stats.apply(problem, top_k, lse, *tensors))


def _parts(problem: Problem, tensors: Tensors) -> Iterator[eager.Part]:
    """The whole batch, or nothing where there is nothing; without values, which weights do not depend on."""
    check_places(tensors)
    return eager.parts(problem, tensors._replace(v=tensors.k[..., :0]), problem.accumulate_dtype)


class _Stats(torch.autograd.Function):
    """The statistics tile by tile; the backward visits the tiles again.

    With L = <dmass, mass> + <dentropy, entropy> and log P = s - lse,

        dL/dP_ij = dmass_j - dentropy_i (log P_ij + 1)
        dL/ds_ij = P_ij (dL/dP_ij - sum_j P_ij dL/dP_ij)

    without the sum, which is -dL/dlse_i, where lse is given. The sink is one more key that receives nothing.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, top_k: int, lse: Tensor | None, *args: Tensor | None) -> tuple[Tensor, ...]:
        tensors = Tensors(*args)  # type: ignore[arg-type]
        ctx.problem = problem
        ctx.save_for_backward(lse, *args)
        dtype, device = problem.accumulate_dtype, tensors.q.device
        rows = (problem.batch, problem.q_heads, problem.nq)
        mass = torch.zeros((problem.batch, problem.q_heads, problem.nk), dtype=dtype, device=device)
        entropy = torch.zeros(rows, dtype=dtype, device=device)
        top_keys = torch.full((*rows, top_k), -1, device=device)
        top_weights = torch.zeros((*rows, top_k), dtype=dtype, device=device)
        for part in _parts(problem, tensors):
            for tile in part.tiles():
                weights = _Weights(tile, lse)
                tile.add_keys(mass, weights.keys.sum(2))
                entropy[:, :, tile.rows] = torch.special.entr(weights.keys).sum(-1) + torch.special.entr(weights.sink)
                found = min(top_k, tile.scores.shape[-1])
                scores, at = tile.scores.topk(found)
                keys = tile.keys()[at].masked_fill(scores == -torch.inf, -1)
                top_keys[:, :, tile.rows, :found] = keys
                top_weights[:, :, tile.rows, :found] = weights.keys.gather(-1, at)
        ctx.mark_non_differentiable(top_keys, top_weights)
        return mass, entropy, top_keys, top_weights

    @staticmethod
    @once_differentiable
    @on_one_thread
    def backward(ctx: Any, dmass: Tensor, dentropy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        lse, *args = ctx.saved_tensors
        tensors, problem = Tensors(*args), ctx.problem
        wanted = dict(zip(("lse", *Tensors._fields), ctx.needs_input_grad[2:], strict=True))
        dlse = torch.zeros_like(lse) if wanted["lse"] else None
        sums = Gradients(
            *(
                torch.zeros_like(getattr(tensors, name), dtype=problem.accumulate_dtype) if wanted[name] else None
                for name in Gradients._fields
            )
        )
        for part in _parts(problem, tensors):
            dq, dk = torch.zeros_like(part.q), torch.zeros_like(part.k)
            for tile in part.tiles():
                weights = _Weights(tile, lse)
                rows_dentropy = dentropy[:, :, tile.rows]
                dweights = tile.take_keys(dmass[..., None]).mT - rows_dentropy[..., None] * _log_plus_one(weights.keys)
                dsink = -rows_dentropy * _log_plus_one(weights.sink)
                mean = (weights.keys * dweights).sum(-1) + weights.sink * dsink
                if lse is None:
                    dweights, dsink = dweights - mean[..., None], dsink - mean
                elif dlse is not None:
                    dlse[:, :, tile.rows] = -mean
                dscores = weights.keys * dweights
                tile.add_to_scores(sums, dscores)
                tile.add_to_products(dq, dk, dscores)
                if sums.sink_logits is not None:
                    sums.sink_logits.add_((weights.sink * dsink).sum((0, 2)))
            part.add_q(sums.q, dq)
            part.add_k(sums.k, dk)
        grads = {
            name: None if total is None else total.to(getattr(tensors, name).dtype)
            for name, total in sums._asdict().items()
        }
        return None, None, dlse, *(grads.get(name) for name in Tensors._fields)


class _Weights:
    """The weights of a tile, normalised by its own sums or by those of a given lse [B, Hq, Nq]."""

    def __init__(self, tile: eager.Tile, lse: Tensor | None) -> None:
        self.keys, self.sink = tile.weights, tile.sink  # [B, Hq, rows, keys], [B, Hq, rows]
        if lse is not None:
            ratio = torch.exp(tile.lse - lse[:, :, tile.rows])
            ratio = torch.where(tile.lse == -torch.inf, 0.0, ratio)
            self.keys, self.sink = self.keys * ratio[..., None], self.sink * ratio


def _log_plus_one(weights: Tensor) -> Tensor:
    """log P + 1, and 0 where P is 0 and P log P has no slope to speak of."""
    return torch.where(weights > 0, weights.log() + 1.0, 0.0)
