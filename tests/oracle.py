"""Attention by the book: the contract of longattn.attention on full [Nq, Nk] matrices, in plain differentiable PyTorch.

Shares no code with the library: visibility, positions, rotation, softmax and dropout are written from the contract,
and the gradients are autograd's. In float64 this is the exact result; in the dtype of a call it is what eager PyTorch
gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tolerances import accumulation_unit, exponential_unit, rounding_unit

Results = dict[str, Tensor]  # "out", "lse", and the gradients by the name of their argument

PARAMETERS = ("bias", "alibi_slopes", "sink_logits")  # differentiable keywords


def query_positions(batch: int, nq: int, nk: int, align: Any = "end", key_lens: Tensor | None = None) -> Tensor:
    """p_i: int64 [B, Nq]."""
    keys = torch.full((batch,), nk) if key_lens is None else key_lens.long()
    if isinstance(align, str):
        offset = keys - nq if align == "end" else torch.zeros_like(keys)
    else:
        offset = align.long() if isinstance(align, Tensor) else torch.full((batch,), align)
    return torch.arange(nq) + offset[:, None]


def window_sides(causal: bool, window: Any) -> tuple[float, float]:
    """(left, right), infinite where unbounded."""
    left = right = math.inf
    if isinstance(window, int):
        left = right = window - 1
    elif window is not None:
        left, right = (math.inf if side == -1 else side for side in window)
    return left, min(right, 0) if causal else right


def visible(
    batch: int,
    nq: int,
    nk: int,
    *,
    causal: bool = False,
    window: Any = None,
    sinks: int = 0,
    align: Any = "end",
    key_mask: Tensor | None = None,
    key_lens: Tensor | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Which query sees which key: bool [B, Nq, Nk]."""
    left, right = window_sides(causal, window)
    p = query_positions(batch, nq, nk, align, key_lens)[:, :, None].double()
    j = torch.arange(nk).double()
    allowed = (j <= p + right) & ((j >= p - left) | (j < sinks))
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, :]
    if key_lens is not None:
        allowed = allowed & (j < key_lens[:, None, None])
    if bounds is not None:
        lo, hi = (x[..., :, None] for x in bounds)
        allowed = allowed & (lo <= j) & (j < hi)
    return allowed


class _Rotation(NamedTuple):
    """The angles of queries and keys, float64 [1 or B, N, dim / 2] of float32 products."""

    q: Tensor
    k: Tensor
    factor: float
    interleaved: bool

    @classmethod
    def of(cls, rope: Any, positions: Any, p: Tensor, nk: int, length: int | None) -> _Rotation:
        inv_freq, factor = rope.frequencies(_rope_length(positions, nk) if length is None else length)
        if isinstance(positions, tuple):
            for_q, for_k = positions
        elif positions is not None:
            for_k = positions
            table = positions.expand(p.shape[0], nk)
            for_q = table.gather(1, p.clamp(0, max(0, nk - 1))) if nk else torch.zeros_like(p)
        else:
            for_q, for_k = p, torch.arange(nk)
        angle_q, angle_k = ((torch.atleast_2d(x).float()[..., None] * inv_freq).double() for x in (for_q, for_k))
        return cls(angle_q, angle_k, factor, rope.interleaved)

    def turn(self, x: Tensor, angle: Tensor) -> Tensor:
        """x [B, H, N, D] with pair i multiplied by factor * e^(angle_i sqrt(-1)), computed in float32 at least."""
        width = 2 * angle.shape[-1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = (f(angle)[:, None].to(wide.dtype) * self.factor for f in (torch.cos, torch.sin))
        real, imaginary = self._pairs(width)
        turned = wide.clone()
        turned[..., real] = wide[..., real] * cos - wide[..., imaginary] * sin
        turned[..., imaginary] = wide[..., real] * sin + wide[..., imaginary] * cos
        return turned.to(x.dtype)

    def spread(self, x: Tensor, angle: Tensor) -> Tensor:
        """The terms of `turn` (or of its transpose) without their signs, for x >= 0."""
        width = 2 * angle.shape[-1]
        cos, sin = (f(angle)[:, None].abs() * abs(self.factor) for f in (torch.cos, torch.sin))
        real, imaginary = self._pairs(width)
        spread = x.clone()
        spread[..., real] = x[..., real] * cos + x[..., imaginary] * sin
        spread[..., imaginary] = x[..., real] * sin + x[..., imaginary] * cos
        return spread

    def _pairs(self, width: int) -> tuple[slice, slice]:
        if self.interleaved:
            return slice(0, width, 2), slice(1, width, 2)
        return slice(0, width // 2), slice(width // 2, width)


def rotate(x: Tensor, rope: Any, positions: Tensor) -> Tensor:
    """apply_rope by the book, x [B, H, N, D], positions [N] or [B, N]."""
    rotation = _Rotation.of(rope, (positions, positions), positions, x.shape[2], None)
    return rotation.turn(x, rotation.q)


def rotate_terms(x: Tensor, rope: Any, positions: Tensor) -> Tensor:
    """The terms of `rotate`'s sums, without their signs."""
    rotation = _Rotation.of(rope, (positions, positions), positions, x.shape[2], None)
    return rotation.spread(x.double().abs(), rotation.q)


class _Forward(NamedTuple):
    """Matrices of one call, [B, Hq, Nq, Nk] unless said otherwise."""

    out: Tensor  # [B, Hq, Nq, Dv]
    lse: Tensor  # [B, Hq, Nq]
    weights: Tensor  # softmax
    keep: Tensor | float  # dropout's multiplier
    q: Tensor  # [B, Hq, Nq, D], rotated
    k: Tensor  # [B, Hq, Nk, D], rotated
    v: Tensor  # [B, Hq, Nk, Dv]
    distance: Tensor  # |p_i - j|
    rotation: _Rotation | None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    rope: Any = None,
    positions: Any = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    first_sequence: int = 0,
    rope_length: int | None = None,
    **mask: Any,
) -> _Forward:
    batch, q_heads, nq, width = q.shape
    kv_heads, nk = k.shape[1:3]
    p = query_positions(batch, nq, nk, mask.get("align", "end"), mask.get("key_lens"))
    rotation = None
    if rope is not None:
        rotation = _Rotation.of(rope, positions, p, nk, rope_length)
        q, k = rotation.turn(q, rotation.q), rotation.turn(k, rotation.k)
    k, v = (x.repeat_interleave(q_heads // kv_heads, 1) for x in (k, v))

    scores = (q @ k.mT) * (1 / math.sqrt(width) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = (p[:, None, :, None] - torch.arange(nk)).abs()
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None].to(scores.dtype) * distance.to(scores.dtype)
    allowed = visible(batch, nq, nk, **mask)[:, None]
    if bias is not None:
        if bias.dtype == torch.bool:
            allowed = allowed & bias
        else:
            allowed = allowed & (bias != -math.inf)
            scores = scores + bias.masked_fill(bias == -math.inf, 0.0).to(scores.dtype)
    scores = scores.masked_fill(~allowed, -math.inf)

    # A row that sees nothing divides 0 by 1, whatever the dtype.
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    sink = wide.new_full((q_heads,), -math.inf) if sink_logits is None else sink_logits.to(wide.dtype)
    rows = torch.cat((wide, sink[:, None, None].expand(batch, -1, nq, 1)), -1)
    top = rows.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    total = (rows - top).exp().sum(-1)
    sees = total > 0
    lse = torch.where(sees, total.masked_fill(~sees, 1.0).log() + top[..., 0], -math.inf)
    weights = ((wide - top).exp() / total.masked_fill(~sees, 1.0)[..., None]).to(scores.dtype)
    keep: Tensor | float = 1.0
    if dropout_p:
        keep = _kept(dropout_p, seed, first_sequence, weights.shape).to(weights.dtype) / (1 - dropout_p)
    out = (weights * keep) @ v
    return _Forward(out, lse, weights, keep, q, k, v, distance, rotation)


def results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    **keywords: Any,
) -> Results:
    """out, lse and, if `dout` is given, the gradients of <out, dout> + <lse, dlse>; all computed in `dtype`.

    Rows whose lse is -inf are left out of <lse, dlse>: they have no gradient.
    """
    inputs = {"q": q, "k": k, "v": v}
    inputs |= {name: keywords[name] for name in PARAMETERS if keywords.get(name) is not None}
    wanted = {}
    for name, x in inputs.items():
        if x.is_floating_point():
            wanted[name] = inputs[name] = x.detach().to(dtype).requires_grad_(dout is not None)
    forward = _forward(**{**keywords, **inputs})
    found = {"out": forward.out.detach(), "lse": forward.lse.detach()}
    if dout is not None:
        loss = (forward.out * dout.to(dtype)).sum()
        if dlse is not None:
            loss = loss + torch.where(forward.lse > -math.inf, forward.lse * dlse.to(forward.lse.dtype), 0.0).sum()
        grads = torch.autograd.grad(loss, tuple(wanted.values()), materialize_grads=True)
        found |= dict(zip(wanted, grads, strict=True))
    return found


def weights(q: Tensor, k: Tensor, **keywords: Any) -> Tensor:
    """softmax(scores) without dropout, [B, Hq, Nq, Nk] in float64; differentiable."""
    return _forward(q.double(), k.double(), k.double(), **keywords).weights


def second_derivatives(
    inputs: Results,
    dout: Tensor,
    dlse: Tensor,
    tangents: Results,
    *,
    dtype: torch.dtype = torch.float64,
    **keywords: Any,
) -> Results:
    """The gradients of <tangents, gradients> by the names of `inputs`, "dout" and "dlse"; all computed in `dtype`.

    The gradients are those of `results` for `inputs`: q, k, v and PARAMETERS. Every query must see a key.
    """
    leaves = {
        name: x.detach().to(dtype).requires_grad_() for name, x in (inputs | {"dout": dout, "dlse": dlse}).items()
    }
    named = {name: leaves[name] for name in inputs}
    forward = _forward(**named, **keywords)
    outputs, cotangents = (forward.out, forward.lse), (leaves["dout"], leaves["dlse"].to(forward.lse.dtype))
    grads = torch.autograd.grad(outputs, tuple(named.values()), cotangents, create_graph=True, materialize_grads=True)
    along = sum((grad * tangents[name].to(dtype)).sum() for name, grad in zip(named, grads, strict=True))
    found = torch.autograd.grad(along, tuple(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


class _Terms(NamedTuple):
    """What rounding may add to each entry: errors that may all have one sign, and the squares of independent ones."""

    adds: Tensor
    squares: Tensor

    def __mul__(self, size: Tensor | float) -> _Terms:
        return _Terms(self.adds * size, self.squares * size**2)

    def __matmul__(self, size: Tensor) -> _Terms:
        return _Terms(self.adds @ size, self.squares @ size**2)

    @property
    def mT(self) -> _Terms:
        return _Terms(self.adds.mT, self.squares.mT)

    def per_kv_head(self, kv_heads: int) -> _Terms:
        return _Terms(*(x.unflatten(1, (kv_heads, -1)).sum(2) for x in self))

    def sum_to(self, shape: torch.Size) -> _Terms:
        return _Terms(*(x.sum_to_size(shape) for x in self))

    def total(self) -> Tensor:
        return self.adds + self.squares.sqrt()


def rounding_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    *,
    dtype: torch.dtype,
    **keywords: Any,
) -> Results:
    """The floor of every result's budget: rounding units times the terms of its sums before they cancel.

    With e the unit of `dtype`, a that of its accumulator, x that of exponentials, S = |scale| |Q| |K|^T + slopes *
    distance + |bias| the terms of the scores, P the weights, |X| entry by entry and dS the gradient of the scores:

        weights:  e P, independent;   a P (1 + S + rowsum(P * S)), from the scores and the row's sum
        dS:       e |dS|, independent;   a R (1 + S + rowsum(P * S)), and e P sqrt(rowsum((dO * O)^2)) from a rounded O,
                  where R = P * (|dO| |V|^T + rowsum(|dO| * P |V|) + |dlse|)

    These go through the sums of the results, where independent errors add up as squares, and each result is rounded
    once more. With rope, q and k may be rounded after it: e |scale| sqrt(Q^2 (K^2)^T) in each score. A learned sink is
    one more key, with sink_logits its S and no value. Parameters are rounded to their own dtypes.
    """
    exact = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in keywords.items()}
    call = _forward(q.detach().double(), k.detach().double(), v.detach().double(), **exact)
    e, a, x = rounding_unit(dtype), accumulation_unit(dtype), exponential_unit(dtype)
    scale = 1 / math.sqrt(q.shape[-1]) if exact.get("scale") is None else abs(exact["scale"])
    kv_heads = k.shape[1]
    size_q, size_k, size_v = call.q.abs(), call.k.abs(), call.v.abs()
    rotated = torch.zeros((), dtype=torch.float64)
    if call.rotation is not None:
        size_q = call.rotation.spread(q.double().abs(), call.rotation.q)
        size_k = call.rotation.spread(k.double().abs(), call.rotation.k).repeat_interleave(q.shape[1] // kv_heads, 1)
        rotated = scale * (call.q**2 @ call.k.mT**2).sqrt()
    scores = scale * size_q @ size_k.mT
    if exact.get("alibi_slopes") is not None:
        scores = scores + exact["alibi_slopes"].abs()[..., None, None] * call.distance
    bias = exact.get("bias")
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias.masked_fill(bias == -math.inf, 0.0).abs()

    row = (call.weights * scores).sum(-1)
    accumulated = a * (1 + scores + row[..., None])
    weights = _Terms(call.weights * accumulated, (call.weights * e * (1 + rotated)) ** 2)
    kept = weights * call.keep
    lse = x + a * (call.lse.abs() + row) + e * ((call.weights * rotated) ** 2).sum(-1).sqrt()
    terms = {"out": (kept @ size_v).total() + e * call.out.abs(), "lse": lse}
    if dout is None:
        return terms

    dout = dout.double()
    dlse = torch.zeros_like(call.lse) if dlse is None else dlse.double()
    size = dout.abs()
    delta = (dout * call.out).sum(-1) - torch.where(call.lse == -math.inf, 0.0, dlse)
    dscores = call.weights * (call.keep * (dout @ call.v.mT) - delta[..., None])
    before = (size * ((call.weights * call.keep) @ size_v)).sum(-1) + dlse.abs()
    from_out = e * ((dout * call.out) ** 2).sum(-1).sqrt()
    errors = _Terms(
        call.weights * (accumulated * (call.keep * (size @ size_v.mT) + before[..., None]) + from_out[..., None]),
        (dscores * e * (1 + rotated)) ** 2,
    )

    def per_kv_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (kv_heads, -1)).sum(2)

    terms["q"] = scale * ((errors @ size_k).total() + e * (dscores @ call.k).abs())
    terms["k"] = scale * (
        (errors.mT @ size_q).per_kv_head(kv_heads).total() + e * per_kv_head(dscores.mT @ call.q).abs()
    )
    if call.rotation is not None:
        terms["q"] = call.rotation.spread(terms["q"], call.rotation.q)
        terms["k"] = call.rotation.spread(terms["k"], call.rotation.k)
    dv = per_kv_head((call.weights * call.keep).mT @ dout)
    terms["v"] = (kept.mT @ size).per_kv_head(kv_heads).total() + e * dv.abs()
    if bias is not None and bias.dtype != torch.bool:
        unit = rounding_unit(keywords["bias"].dtype)
        terms["bias"] = errors.sum_to(bias.shape).total() + unit * dscores.sum_to_size(bias.shape).abs()
    if keywords.get("alibi_slopes") is not None:
        slopes = keywords["alibi_slopes"]
        exactly = (dscores * call.distance).sum((2, 3)).sum_to_size(slopes.shape).abs()
        far = errors * call.distance.double()
        summed = _Terms(*(x.sum((2, 3)) for x in far)).sum_to(slopes.shape)
        terms["alibi_slopes"] = summed.total() + rounding_unit(slopes.dtype) * exactly
    if keywords.get("sink_logits") is not None:
        logits = exact["sink_logits"][:, None]
        sink = (logits - call.lse).exp()
        exactly = (sink * delta).sum((0, 2)).abs()
        off = sink * (a * (1 + logits.abs() + row) * before + from_out)
        terms["sink_logits"] = off.sum((0, 2)) + rounding_unit(keywords["sink_logits"].dtype) * exactly
    return terms


def by_sequence(
    compute: Callable[..., Results],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    *,
    max_seqlen_k: int,
    **keywords: Any,
) -> Results:
    """`results` or `rounding_terms` of packed sequences q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv], one at a time.

    Gradients of parameters add up over the sequences. A token outside all sequences is a query that sees nothing.
    """
    tq, q_heads, _ = q.shape
    total: Results = {
        "out": torch.zeros(tq, q_heads, v.shape[2], dtype=torch.float64),
        "lse": torch.full((q_heads, tq), 0.0 if compute is rounding_terms else -math.inf, dtype=torch.float64),
    }
    if dout is not None:
        inputs = {"q": q, "k": k, "v": v}
        inputs |= {name: keywords[name] for name in PARAMETERS if keywords.get(name) is not None}
        total |= {name: torch.zeros(x.shape, dtype=torch.float64) for name, x in inputs.items()}
    cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(cu_q) - 1):
        at_q, at_k = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        one = dict(keywords, first_sequence=b, rope_length=_rope_length(keywords.get("positions"), max_seqlen_k))
        for name in ("align", "key_lens", "alibi_slopes"):
            x = one.get(name)
            if isinstance(x, Tensor) and (name != "alibi_slopes" or x.dim() == 2):
                one[name] = x[b : b + 1]
        positions = one.get("positions")
        if isinstance(positions, tuple):
            one["positions"] = positions[0][at_q], positions[1][at_k]
        elif positions is not None:
            one["positions"] = positions[at_k]
        part = compute(
            *(x[at].transpose(0, 1)[None] for x, at in ((q, at_q), (k, at_k), (v, at_k))),
            None if dout is None else dout[at_q].transpose(0, 1)[None],
            None if dlse is None else dlse[None, :, at_q],
            **one,
        )
        total["lse"][:, at_q] = part.pop("lse")[0].double()
        for name, at in (("out", at_q), ("q", at_q), ("k", at_k), ("v", at_k)):
            if name in part:
                total[name][at] += part.pop(name)[0].transpose(0, 1)
        for name, x in part.items():
            if name == "alibi_slopes" and keywords[name].dim() == 2:
                total[name][b] += x[0]
            else:
                total[name] += x
    return total


def _rope_length(positions: Any, longest: int) -> int:
    """Of all packed sequences: one more than the largest position, or the longest of them."""
    given = positions if isinstance(positions, tuple) else (positions,)
    return max((int(x.max()) + 1 for x in given if x is not None and x.numel()), default=longest)


def philox4x32(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), on Python's integers."""
    c0, c1, c2, c3 = counter
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ low, second & 0xFFFFFFFF, (first >> 32) ^ c3 ^ high, first & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _kept(p: float, seed: int, first_sequence: int, shape: torch.Size) -> Tensor:
    """Which weights dropout keeps: entry (b, h, i, j) reads word j % 4 of counter (j // 4, i, h, b)."""
    batch, heads, nq, nk = shape
    threshold = round(p * 2**32)
    words = [
        philox4x32((j // 4, i, h, b), seed)[j % 4] >= threshold
        for b in range(first_sequence, first_sequence + batch)
        for h in range(heads)
        for i in range(nq)
        for j in range(nk)
    ]
    return torch.tensor(words, dtype=torch.bool).view(shape)
