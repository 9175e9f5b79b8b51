"""The contract in eager PyTorch: attention, its gradients and theirs, one tile of query rows at a time.

A tile meets only the keys that its mask can show it, so time follows visible pairs, and memory the longer of the
sequences. The reference backend is this in float64; every backend's second derivative is this in the dtype of its sums.

With P = exp(s - lse), W = dropout(dout v^T) and delta_i = sum_j P_ij W_ij - dlse_i = <dout_i, out_i> - dlse_i, the
gradient of the scores is

    ds = P * (W - delta)

(Dao et al., "FlashAttention", 2022, appendix B). A second derivative asks for the gradient of <gradients, x'>, where x'
are the tangents of the differentiable arguments. That is G = <dout, out'> + <dlse, lse'>, for the derivatives out' and
lse' of the outputs along x', and with s' that of the scores and W' = dropout(dout v'^T),

    lse'_i = sum_j P_ij s'_ij
    out'   = dropout(P * (s' - lse')) v + dropout(P) v'

which is the forward-mode derivative of a call, and

    dG/dP  = s' * (W - delta) - lse' * W + W' =: Y
    dG/ds  = P * (Y - sum_j P_ij Y_ij)
    dG/ds' = ds

all sums with the sink, if there is one, as one more key whose W is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from longattn.backends.base import Gradients
from longattn.backends.philox import uniform_bits
from longattn.problem import Problem, Tensors

_TILE_BYTES = 1 << 24  # scores held at once; a second derivative holds about ten tensors of their size
_LARGE_LSE = {torch.float32: 2.0**10, torch.float64: 2.0**39}  # a larger one is off by more than 2^-14
_TILE_ROWS = 128  # at least, where a window would allow fewer


def forward(problem: Problem, tensors: Tensors, out: Tensor, lse: Tensor, dtype: torch.dtype) -> None:
    """Fill out and lse, as Backend.forward, with sums in `dtype`."""
    out.zero_()
    lse.fill_(-torch.inf)
    with _bitwise(problem):
        for part in parts(problem, tensors, dtype):
            for tile in part.tiles():
                part.rows_of(out, tile.rows).copy_(tile.drop(tile.weights) @ tile.v)
                part.rows_of(lse, tile.rows).copy_(tile.lse)


def backward(
    problem: Problem,
    tensors: Tensors,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    grads: Gradients,
    dtype: torch.dtype,
) -> None:
    """Fill the tensors of `grads`, as Backend.backward."""
    sums = _zeros_for(grads, dtype)
    with _bitwise(problem):
        for part in parts(problem, tensors, dtype):
            part.add_gradients(sums, out, lse, dout, dlse)
    _copy(sums, grads)


def double_backward(
    problem: Problem,
    tensors: Tensors,
    dout: Tensor,
    dlse: Tensor | None,
    tangents: Gradients,
    grads: Gradients,
    ddout: Tensor,
    ddlse: Tensor,
    dtype: torch.dtype,
) -> None:
    """Fill `grads`, `ddout` and `ddlse` with the gradients of <tangents, what `backward` gives>.

    Args:
        tangents: the incoming gradients of dq, dk, ..., None for zero.
        ddout, ddlse: the gradients of dout [B, Hq, Nq, Dv] and dlse [B, Hq, Nq].
    """
    ddout.zero_()
    ddlse.zero_()
    sums = _zeros_for(grads, dtype)
    with _bitwise(problem):
        for part in parts(problem, tensors, dtype):
            part.add_second_gradients(sums, ddout, ddlse, dout, dlse, tangents)
    _copy(sums, grads)


def jvp(
    problem: Problem, tensors: Tensors, tangents: Gradients, out_t: Tensor, lse_t: Tensor, dtype: torch.dtype
) -> None:
    """Fill the derivatives of out [B, Hq, Nq, Dv] and lse [B, Hq, Nq] along `tangents`, None for zero.

    A row of lse that is -inf is a constant: its derivative is 0.
    """
    out_t.zero_()
    lse_t.zero_()
    with _bitwise(problem):
        for part in parts(problem, tensors, dtype):
            part.write_tangents(out_t, lse_t, tangents)


@contextmanager
def _bitwise(problem: Problem) -> Iterator[None]:
    """One thread if the call is deterministic: the number of threads shows in how sums and products round."""
    if not problem.deterministic or problem.device != "cpu":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rotate(
    x: Tensor, inv_freq: Tensor, positions: Tensor, factor: float, interleaved: bool, inverse: bool = False
) -> Tensor:
    """Rope on x [B, H, N, D] in x's dtype; the angle itself is a product of float32 numbers, as on every backend."""
    angle = (positions.float()[..., None] * inv_freq).to(x.dtype)  # [N or B, N, dim / 2]
    if angle.dim() == 3:
        angle = angle[:, None]
    cos, sin = angle.cos() * factor, angle.sin() * (-factor if inverse else factor)
    dim = 2 * inv_freq.shape[0]
    turning, rest = x[..., :dim], x[..., dim:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, rest), -1)


class Part:
    """Sequences of equal lengths: the whole batch, or one packed sequence. k and v are repeated to Hq heads.

    `take_q`, `take_k` and `take_v` are linear in what they read; `add_q`, `add_k` and `add_v` are their transposes.
    """

    def __init__(
        self,
        problem: Problem,
        tensors: Tensors,
        dtype: torch.dtype,
        batch: slice,
        queries: slice,
        keys: slice,
        first: int,
    ) -> None:
        self.problem, self.tensors, self.dtype = problem, tensors, dtype
        self.batch, self.queries, self.keys = batch, queries, keys
        self.first = first  # the first sequence's number
        self.device = tensors.q.device
        self.sequences, _, self.lq, _ = tensors.q[batch, :, queries].shape
        self.lk = tensors.k[batch, :, keys].shape[2]
        sequence = slice(first, first + self.sequences)
        self.key_lens = None if tensors.key_lens is None else tensors.key_lens[sequence]
        self.offset = None if tensors.offset is None else tensors.offset[sequence]

        shift = problem.mask.position(0, self.lq, 0)
        lens = torch.full((self.sequences,), self.lk, device=self.device)
        if self.key_lens is not None:
            lens = self.key_lens.long()
        starts = lens * int(problem.mask.from_end) + shift if self.offset is None else self.offset.long()
        self.positions = starts[:, None] + torch.arange(self.lq, device=self.device)  # p_i: [B, Lq]
        self.lowest, self.highest = (int(x) for x in starts.aminmax())

        hidden = torch.arange(self.lk, device=self.device) >= lens[:, None]
        if tensors.key_mask is not None:
            hidden = hidden | ~tensors.key_mask
        self.hidden = hidden[:, None, :, None]
        self.q, self.k, self.v = self.take_q(tensors.q), self.take_k(tensors.k), self.take_v(tensors.v)

    def take_q(self, x: Tensor) -> Tensor:
        """The queries, rotated: [B, Hq, Lq, D]."""
        return self._turn(x[self.batch, :, self.queries].to(self.dtype), self._query_angles)

    def take_k(self, x: Tensor) -> Tensor:
        """The keys, rotated: [B, Hq, Lk, D]."""
        return self._turn(self._seen(x), self._key_angles).repeat_interleave(self.problem.group, 1)

    def take_v(self, x: Tensor) -> Tensor:
        return self._seen(x).repeat_interleave(self.problem.group, 1)

    def add_q(self, total: Tensor | None, x: Tensor) -> None:
        if total is not None:
            total[self.batch, :, self.queries] += self._turn(x, self._query_angles, inverse=True)

    def add_k(self, total: Tensor | None, x: Tensor) -> None:
        if total is not None:
            total[self.batch, :, self.keys] += self._turn(self._of_kv_heads(x), self._key_angles, inverse=True)

    def add_v(self, total: Tensor | None, x: Tensor) -> None:
        if total is not None:
            total[self.batch, :, self.keys] += self._of_kv_heads(x)

    def rows_of(self, x: Tensor, rows: slice | Tensor) -> Tensor:
        """A view of the rows of a tensor [B, Hq, Nq, ...]."""
        return x[self.batch, :, self.queries][:, :, rows]

    def slopes_of(self, slopes: Tensor) -> Tensor:
        """The slopes [Hq] that all sequences share, or the rows of this part's out of [B, Hq]."""
        return slopes if slopes.dim() == 1 else slopes[self.first : self.first + self.sequences]

    def tiles(self, lse: Tensor | None = None) -> Iterator[Tile]:
        """The tiles of all rows. lse: that of all keys, [B, Hq, Nq], where these are but some of them."""
        mask = self.problem.mask
        height, width = self.lq, self.lk
        if mask.left is not None and mask.right is not None:
            band = mask.left + mask.right
            height = min(height, max(_TILE_ROWS, band))
            width = min(width, mask.sinks + band + height + self.highest - self.lowest)
        row_bytes = self.dtype.itemsize * self.sequences * self.problem.q_heads * width
        height = max(1, min(height, _TILE_BYTES // max(1, row_bytes)))
        for start in range(0, self.lq, height):
            rows = slice(start, min(start + height, self.lq))
            seen = mask.kv_range(self.lowest + rows.start, self.highest + rows.stop - 1, self.lk)
            ranges = [slice(0, seen.sinks), slice(seen.start, seen.stop)]
            seen_ranges = [keys for keys in ranges if keys.start < keys.stop] or [slice(0, 0)]
            yield Tile(self, rows, seen_ranges, None if lse is None else self.rows_of(lse, rows).to(self.dtype))

    def add_gradients(self, sums: Gradients, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> None:
        dq, dk, dv = torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)
        for tile in self.tiles(lse):
            dout_rows = self.rows_of(dout, tile.rows).to(self.dtype)
            dweights = tile.drop(dout_rows @ tile.v.mT)
            delta = (dout_rows * self.rows_of(out, tile.rows).to(self.dtype)).sum(-1)
            if dlse is not None:
                delta = delta - self.rows_of(dlse, tile.rows)
            dscores = tile.visible(tile.weights * (dweights - delta[..., None]))
            tile.add_to_scores(sums, dscores)
            if sums.sink_logits is not None:
                sums.sink_logits.sub_((tile.sink * delta).sum((0, 2)))
            tile.add_to_products(dq, dk, dscores)
            tile.add_keys(dv, tile.drop(tile.weights).mT @ dout_rows)
        self.add_q(sums.q, dq)
        self.add_k(sums.k, dk)
        self.add_v(sums.v, dv)

    def write_tangents(self, out_t: Tensor, lse_t: Tensor, tangents: Gradients) -> None:
        along = self._along(tangents)
        for tile in self.tiles():
            tile.write_tangents(Direction(tile, along, tangents), out_t, lse_t)

    def add_second_gradients(
        self, sums: Gradients, ddout: Tensor, ddlse: Tensor, dout: Tensor, dlse: Tensor | None, tangents: Gradients
    ) -> None:
        scale = self.problem.scale
        along = self._along(tangents)
        dq, dk, dv = torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)
        for tile in self.tiles():
            direction = Direction(tile, along, tangents)
            q_t, k_t, v_t, sink_t = direction.q, direction.k, direction.v, direction.sink
            scores_t, lse_t, weights_t = direction.scores, direction.lse, direction.weights
            tile.write_tangents(direction, ddout, ddlse)

            dout_rows = self.rows_of(dout, tile.rows).to(self.dtype)
            dweights = tile.drop(dout_rows @ tile.v.mT)
            delta = tile.delta(dweights, dlse)
            centred = dweights - delta[..., None]
            y = scores_t * centred - lse_t[..., None] * dweights + tile.drop(dout_rows @ v_t.mT)
            y, y_sink = tile.visible(y), -sink_t * delta
            mean = (tile.weights * y).sum(-1) + tile.sink * y_sink
            dscores = tile.visible(tile.weights * (y - mean[..., None]))
            dscores_t = tile.visible(tile.weights * centred)
            tile.add_to_scores(sums, dscores)
            if sums.sink_logits is not None:
                sums.sink_logits.add_((tile.sink * (y_sink - mean)).sum((0, 2)))
            if tile.slope is not None:
                bend = -2.0 * tile.slope * tile.capped / self.problem.softcap**2  # d slope / d products
                dscores = tile.slope * dscores + bend * direction.products * dscores_t
                dscores_t = tile.slope * dscores_t
            dq[:, :, tile.rows] = scale * (dscores @ tile.k + dscores_t @ k_t)
            tile.add_keys(dk, scale * (dscores.mT @ tile.q + dscores_t.mT @ q_t))
            tile.add_keys(dv, tile.drop(weights_t).mT @ dout_rows)
        self.add_q(sums.q, dq)
        self.add_k(sums.k, dk)
        self.add_v(sums.v, dv)

    def _along(self, tangents: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of the rotated queries, the rotated keys, and the values."""
        return (
            torch.zeros_like(self.q) if tangents.q is None else self.take_q(tangents.q),
            torch.zeros_like(self.k) if tangents.k is None else self.take_k(tangents.k),
            torch.zeros_like(self.v) if tangents.v is None else self.take_v(tangents.v),
        )

    def _seen(self, x: Tensor) -> Tensor:
        """Of keys or values; what nobody sees may hold anything."""
        return x[self.batch, :, self.keys].to(self.dtype).masked_fill(self.hidden, 0.0)

    def _of_kv_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.problem.kv_heads, self.problem.group)).sum(2)

    def _turn(self, x: Tensor, angles: Callable[[], Tensor], inverse: bool = False) -> Tensor:
        inv_freq, problem = self.tensors.inv_freq, self.problem
        if inv_freq is None:
            return x
        return rotate(x, inv_freq, angles(), problem.rope_factor, problem.interleaved, inverse)

    def _key_angles(self) -> Tensor:
        positions = self.tensors.positions_k
        return torch.arange(self.lk, device=self.device).float() if positions is None else positions[..., self.keys]

    def _query_angles(self) -> Tensor:
        tensors = self.tensors
        if tensors.positions_q is not None:
            return tensors.positions_q[..., self.queries]
        if tensors.positions_k is None:
            return self.positions.float()
        table = tensors.positions_k[..., self.keys].expand(self.sequences, -1)
        if self.lk == 0:
            return torch.zeros_like(self.positions, dtype=torch.float32)
        return table.gather(1, self.positions.clamp(0, self.lk - 1))


class Tile:
    """Query rows against the ranges of keys that they can see: [B, Hq, rows, keys] or, without keys, [B, Hq, rows]."""

    def __init__(self, part: Part, rows: slice | Tensor, ranges: Sequence[slice], lse: Tensor | None = None) -> None:
        self.part, self.rows, self.ranges = part, rows, ranges
        problem, tensors = part.problem, part.tensors
        self.q = part.q[:, :, rows]
        self.k, self.v = self.take_keys(part.k), self.take_keys(part.v)

        scores = problem.scale * (self.q @ self.k.mT)
        self.slope: Tensor | None = None  # d capped / d scores
        if problem.softcap:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
            self.slope = 1.0 - (scores / problem.softcap) ** 2
        self.capped = scores
        if tensors.alibi_slopes is not None:
            scores = scores - self._by_distance(tensors.alibi_slopes)
        bounds = None if tensors.lo is None or tensors.hi is None else (tensors.lo, tensors.hi)
        seen = [
            problem.mask.materialize(
                part.lq,
                part.lk,
                offset=part.offset,
                key_mask=tensors.key_mask,
                key_lens=part.key_lens,
                bounds=bounds,
                rows=rows,
                keys=keys,
                device=part.device,
            )
            for keys in ranges
        ]
        allowed = torch.cat(seen, -1)[:, None]
        if tensors.bias is not None:
            bias = self._cut(tensors.bias)
            if bias.dtype == torch.bool:
                allowed = allowed & bias
            else:
                scores = scores + bias.to(part.dtype)
        self.scores = scores = scores.masked_fill(~allowed, -torch.inf)

        none = scores.new_full(scores.shape[:-1], -torch.inf)
        sinks = none if tensors.sink_logits is None else tensors.sink_logits.to(part.dtype)[:, None].expand_as(none)
        if lse is None:
            # Not exp(s - lse): next to a largest score of -1e30, lse has no digits left for the number of keys.
            peak = torch.cat((scores, sinks[..., None]), -1).detach().amax(-1)
            peak = torch.where(peak == -torch.inf, 0.0, peak)
            weights, sink = torch.exp(scores - peak[..., None]), torch.exp(sinks - peak)
            total = weights.sum(-1) + sink
            self.lse = peak + torch.log(total)
            total = torch.where(total == 0, 1.0, total)
            self.weights, self.sink = weights / total[..., None], sink / total  # of the keys and of the sink
        else:
            self.lse = lse
            shift = torch.where(lse == -torch.inf, 0.0, lse)
            self.weights = torch.exp((scores - shift[..., None]).clamp(max=0.0))
            self.sink = torch.exp((sinks - shift).clamp(max=0.0))
            # A large lse has no digits left for the number of keys. A sum below 1 may be that of a block of keys.
            total = self.weights.sum(-1) + self.sink
            share = torch.where((lse.abs() > _LARGE_LSE[problem.accumulate_dtype]) & (total > 1.0), 1.0 / total, 1.0)
            self.weights, self.sink = self.weights * share[..., None], self.sink * share
        self.keep = self._dropout() if problem.dropout_p else None  # the multiplier of each weight

    def keys(self) -> Tensor:
        """Which key stands in which column: int64 [keys]."""
        return _join([torch.arange(keys.start, keys.stop, device=self.part.device) for keys in self.ranges], 0)

    def take_keys(self, x: Tensor) -> Tensor:
        """The rows of x [B, H, Lk, D] that stand for keys of the tile."""
        return _join([x[:, :, keys] for keys in self.ranges], 2)

    def add_keys(self, total: Tensor, x: Tensor) -> None:
        for keys, share in zip(self.ranges, self._split(x, 2), strict=True):
            total[:, :, keys] += share

    def drop(self, x: Tensor) -> Tensor:
        return x if self.keep is None else x * self.keep

    def visible(self, x: Tensor) -> Tensor:
        """x, and 0 where a weight is: what is hidden may hold anything."""
        return x.masked_fill(self.weights == 0, 0.0)

    def delta(self, dweights: Tensor, dlse: Tensor | None) -> Tensor:
        delta = (self.weights * dweights).sum(-1)
        return delta if dlse is None else delta - self.part.rows_of(dlse, self.rows)

    def tangent(self, products_t: Tensor, tangents: Gradients) -> Tensor:
        """The tangent of the scores, given that of scale * q k^T."""
        scores_t = products_t if self.slope is None else products_t * self.slope
        if tangents.alibi_slopes is not None:
            scores_t = scores_t - self._by_distance(tangents.alibi_slopes)
        if tangents.bias is not None:
            scores_t = scores_t + self._cut(tangents.bias).to(scores_t.dtype)
        return scores_t

    def write_tangents(self, along: Direction, out_t: Tensor, lse_t: Tensor) -> None:
        """Write the tile's rows of the derivatives of out and lse."""
        rows = self.drop(along.weights) @ self.v + self.drop(self.weights) @ along.v
        self.part.rows_of(out_t, self.rows).copy_(rows)
        self.part.rows_of(lse_t, self.rows).copy_(along.lse)

    def add_to_scores(self, sums: Gradients, dscores: Tensor) -> None:
        """Add the gradients of what is added to the scores."""
        if sums.bias is not None:
            rows = sums.bias if sums.bias.shape[2] == 1 else sums.bias[:, :, self.rows]
            shape = (*rows.shape[:3], 1 if rows.shape[3] == 1 else dscores.shape[3])
            dbias = dscores.sum_to_size(shape)
            if rows.shape[3] == 1:
                rows += dbias
            else:
                for keys, share in zip(self.ranges, self._split(dbias, 3), strict=True):
                    rows[..., keys] += share
        if sums.alibi_slopes is not None:
            total = self.part.slopes_of(sums.alibi_slopes)
            total -= (dscores * self._distance()).sum((2, 3)).sum_to_size(total.shape)

    def add_to_products(self, dq: Tensor, dk: Tensor, dscores: Tensor) -> None:
        """Fill the tile's rows of dq and add to dk, both [B, Hq, N, D] and those of rotated vectors."""
        dproducts = self.part.problem.scale * (dscores if self.slope is None else dscores * self.slope)
        dq[:, :, self.rows] = dproducts @ self.k
        self.add_keys(dk, dproducts.mT @ self.q)

    def _cut(self, bias: Tensor) -> Tensor:
        """The tile's part of a tensor that broadcasts to [B, Hq, Nq, Nk]."""
        rows = bias if bias.shape[2] == 1 else bias[:, :, self.rows]
        return rows if rows.shape[3] == 1 else _join([rows[..., keys] for keys in self.ranges], 3)

    def _split(self, x: Tensor, dim: int) -> Sequence[Tensor]:
        return x.split([keys.stop - keys.start for keys in self.ranges], dim)

    def _by_distance(self, slopes: Tensor) -> Tensor:
        return self.part.slopes_of(slopes).to(self.part.dtype)[..., None, None] * self._distance()

    def _distance(self) -> Tensor:
        """|p_i - j|: [B, 1, rows, keys]."""
        return (self.part.positions[:, None, self.rows, None] - self.keys()).abs().to(self.part.dtype)

    def _dropout(self) -> Tensor:
        part, problem, seed = self.part, self.part.problem, self.part.tensors.seed
        assert seed is not None
        origin, device = problem.origin, part.device
        b = origin.sequence + part.first + torch.arange(part.sequences, device=device)
        h = origin.head + torch.arange(problem.q_heads, device=device)
        i = origin.query + torch.arange(part.lq, device=device)[self.rows]
        counted = [slice(origin.key + keys.start, origin.key + keys.stop) for keys in self.ranges]
        bits = _join([uniform_bits(seed, b[:, None, None], h[:, None], i, keys) for keys in counted], 3)
        keep = bits >= round(problem.dropout_p * 2**32)
        return keep.to(part.dtype) / (1.0 - problem.dropout_p)


class Direction:
    """The derivatives of what a tile computes along the tangents of a call's arguments.

    Args:
        along: the derivatives of the part's q, k and v.
    """

    def __init__(self, tile: Tile, along: tuple[Tensor, Tensor, Tensor], tangents: Gradients) -> None:
        part = tile.part
        self.q, self.k, self.v = along[0][:, :, tile.rows], tile.take_keys(along[1]), tile.take_keys(along[2])
        self.sink = 0.0 if tangents.sink_logits is None else tangents.sink_logits.to(part.dtype)[:, None]
        self.products = part.problem.scale * (self.q @ tile.k.mT + tile.q @ self.k.mT)
        self.scores = tile.visible(tile.tangent(self.products, tangents))
        self.lse = (tile.weights * self.scores).sum(-1) + tile.sink * self.sink
        self.weights = tile.weights * (self.scores - self.lse[..., None])


def parts(problem: Problem, tensors: Tensors, dtype: torch.dtype) -> Iterator[Part]:
    if tensors.cu_seqlens_q is None or tensors.cu_seqlens_k is None:
        if problem.batch and problem.nq:
            yield Part(problem, tensors, dtype, slice(None), slice(None), slice(None), 0)
        return
    cu_q, cu_k = tensors.cu_seqlens_q.tolist(), tensors.cu_seqlens_k.tolist()
    for b in range(problem.batch):
        if cu_q[b + 1] > cu_q[b]:
            yield Part(problem, tensors, dtype, slice(None), slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2]), b)


def _zeros_for(grads: Gradients, dtype: torch.dtype) -> Gradients:
    return Gradients(*(None if x is None else torch.zeros_like(x, dtype=dtype) for x in grads))


def _copy(sums: Gradients, grads: Gradients) -> None:
    for total, grad in zip(sums, grads, strict=True):
        if grad is not None and total is not None:
            grad.copy_(total)


def _join(pieces: Sequence[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), dim)
