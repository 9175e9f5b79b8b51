"""The public calls: attention over a sequence of which each rank holds a shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longattn import arguments, ops
from longattn.arguments import Positions, Window
from longattn.backends import registry
from longattn.distributed import blockwise, ulysses
from longattn.distributed.agreement import agree, contents_of, refusing, shape_of
from longattn.distributed.geometry import Geometry
from longattn.distributed.halo import Halo
from longattn.distributed.mesh import Group, Ranks
from longattn.distributed.ring import Ring
from longattn.distributed.schedule import HALO, SCHEDULES, ULYSSES, Call, Choice, choose, explanation, reasons
from longattn.distributed.sharding import in_order
from longattn.distributed.spans import Span, check_layout, spans_of
from longattn.distributed.whole import Whole
from longattn.errors import InvalidInput
from longattn.functional import attention
from longattn.mask import Mask
from longattn.problem import Problem, Tensors, checks_enabled
from longattn.redirection import redirected
from longattn.rope import Rope


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh,
    *,
    layout: str = "contiguous",
    schedule: str = "auto",
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
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`longattn.attention` over a sequence that the ranks of a mesh share; the same result, shard by shard.

    Every rank of the mesh calls it, and the backward too, with the same arguments but for the shards. Masks, positions
    and dropout count in the whole sequence.

    Args:
        q, k, v: this rank's shards, [B, Hq, Nq, D], [B, Hkv, Nk, D], [B, Hkv, Nk, Dv]; of one shape on all ranks.
        mesh: of one dimension, or of two (ring, ulysses).
        layout: how the sequence is cut, as in `shard`.
        schedule: "ring": keys and values travel around; "halo": of a window, only the keys that a rank sees;
            "ulysses": ranks trade their part of the sequence for a part of the heads; on a mesh of two dimensions
            "ring+ulysses" and "halo+ulysses". "auto" chooses from mask, mesh and shapes (see `explain`).
        key_mask: [B, Nk], positions: [Nk], [B, Nk] or a pair, bounds: [Nq] or [B, Nq]: this rank's shards. What bounds
            hold, and key_lens and align, count in the whole sequence.
        alibi_slopes, sink_logits: the same on all ranks. Each rank's gradient is that of its shard of the loss, as with
            any weight: the sum over ranks is that of the whole.
        bias: must be None.
        seed: None draws one, on the first rank.
        Others as in `longattn.attention`.

    Returns:
        This rank's shard of out, [B, Hq, Nq, Dv]; with return_lse also of lse, [B, Hq, Nq]. Differentiable once.

    Raises:
        InvalidInput: an argument breaks the contract or differs between ranks (named with the rank), or the schedule
            that was asked for cannot run the call.
        Unsupported: as `longattn.attention`.
    """
    keywords = {name: value for name, value in locals().items() if name in _KEYWORDS}
    arguments.flag("return_lse", return_lse)
    shared = _shared(q, k, v, mesh, layout, schedule, None, keywords)
    out, lse = _attend(shared, q, k, v, rope, positions, backend)
    return (out, lse) if return_lse else out


def context_parallel_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    mesh: DeviceMesh,
    *,
    layout: str = "contiguous",
    schedule: str = "auto",
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
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`longattn.attention_varlen` over packed documents that the ranks of a mesh share; none sees another.

    Args:
        q, k, v: this rank's shards, [N, Hq, D], [N, Hkv, D], [N, Hkv, Dv].
        cu_seqlens: ints [documents + 1], the same on every rank: where each document starts and the last ends in the
            whole. Which keys travel follows from them, so they are read: on a GPU that waits for it.
        positions: [N] or a pair, this rank's shards; by default each document counts from 0.
        align: "end", "start" (the same here) or an int. key_mask, key_lens, bounds, bias: must be None.
        Others as in `context_parallel_attention`.

    Returns:
        out [N, Hq, Dv]; with return_lse also lse [Hq, N].

    Raises:
        InvalidInput, Unsupported: as `context_parallel_attention`.
    """
    keywords = {name: value for name, value in locals().items() if name in _KEYWORDS}
    arguments.flag("return_lse", return_lse)
    shared = _shared(q, k, v, mesh, layout, schedule, cu_seqlens, keywords)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = _attend(shared, q, k, v, rope, positions, backend)
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    layout: str = "contiguous",
    schedule: str = "auto",
    **keywords: Any,
) -> Choice:
    """Which schedule `context_parallel_attention` would take, and why; what each sends. Sends nothing itself.

    Args:
        As in `context_parallel_attention`, or with cu_seqlens as in `context_parallel_attention_varlen`.

    Raises:
        InvalidInput: an argument breaks the contract.
    """
    for name in ("return_lse", "backend"):
        keywords.pop(name, None)
    unknown = next((name for name in keywords if name not in _KEYWORDS), None)
    if unknown is not None:
        raise InvalidInput(unknown, "a keyword of attention", "unknown")
    keywords = {**_DEFAULTS, **keywords}
    ranks = Ranks.of(mesh)
    checked = _checked(ranks, q, k, v, layout, cu_seqlens, keywords)
    return explanation(_call(ranks, checked), ranks.ring.rank, schedule)


@contextmanager
def context_parallel(mesh: DeviceMesh, *, layout: str = "contiguous", schedule: str = "auto") -> Iterator[None]:
    """While it lasts, `longattn.attention` and `attention_varlen` mean the sequence that the ranks of a mesh share.

    So models take part as they are, those of `longattn.models` and of Hugging Face: they get this rank's shards of
    tokens and targets. One context holds for all threads of the process. Layers that are computed again in the backward
    (checkpoints) need it there, too.

    Args:
        mesh, layout, schedule: as in `context_parallel_attention`.

    Raises:
        InvalidInput: a mesh or layout that there is not.
    """
    check_layout(layout)
    ranks = Ranks.of(mesh)
    with redirected(_Sharded(mesh, ranks, layout, schedule)):
        yield


class _Sharded(NamedTuple):
    """The calls of `longattn.functional` on shards."""

    mesh: DeviceMesh
    ranks: Ranks
    layout: str
    schedule: str

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor | tuple[Tensor, Tensor]:
        where: dict[str, Any] = {"layout": self.layout, "schedule": self.schedule}
        return context_parallel_attention(q, k, v, self.mesh, **where, **keywords)

    def attention_varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **keywords: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        if cu_seqlens_k is not cu_seqlens_q and not torch.equal(cu_seqlens_k, cu_seqlens_q):
            raise InvalidInput("cu_seqlens_k", "cu_seqlens_q, on shards of a sequence", "others")
        where: dict[str, Any] = {"layout": self.layout, "schedule": self.schedule}
        return context_parallel_attention_varlen(q, k, v, cu_seqlens_q, self.mesh, **where, **keywords)

    def token_places(self, tokens: int, device: torch.device) -> Tensor:
        return places(self.ranks, self.layout, tokens, device)

    def whole_length(self, tokens: int) -> int:
        return tokens * self.ranks.size


class _Checked(NamedTuple):
    """A call by its local arguments: what `longattn.arguments` gave, and where it stands in the whole."""

    tensors: Tensors  # offset and key_lens count in the whole
    problem: Problem
    geometry: Geometry  # of the first dimension of the mesh


class _Shared(NamedTuple):
    """A checked call on which all ranks agree, and its schedule."""

    ranks: Ranks
    checked: _Checked
    schedule: str


_DEFAULTS = {
    name: value for name, value in (attention.__kwdefaults__ or {}).items() if name not in ("return_lse", "backend")
}
_KEYWORDS = frozenset(_DEFAULTS)


def _shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh,
    layout: str,
    schedule: str,
    cu_seqlens: Tensor | Sequence[int] | None,
    keywords: dict[str, Any],
) -> _Shared:
    ranks = Ranks.of(mesh)
    with refusing(ranks):
        checked = _checked(ranks, q, k, v, layout, cu_seqlens, keywords)
    said = agree(ranks, _told(checked, layout, schedule, keywords), differ=("key_mask",))
    tensors, problem, geometry = checked
    for name, x in (("q", tensors.q), ("k", tensors.k)):
        if not x.shape[2]:
            raise InvalidInput(name, "at least one token on every rank", f"shape {tuple(x.shape)}")
        if layout == "zigzag" and x.shape[2] * (ranks.ulysses.size if ranks.ulysses else 1) % 2:
            raise InvalidInput(name, "an even number of tokens on every rank, for zigzag", f"shape {tuple(x.shape)}")
    if said is not None and tensors.key_mask is None and any(each["key_mask"] == "given" for each in said):
        every = torch.ones(problem.batch, problem.nk, dtype=torch.bool, device=tensors.k.device)
        tensors = tensors._replace(key_mask=every)
    if problem.dropout_p and keywords["seed"] is None:
        assert tensors.seed is not None
        ranks.broadcast(tensors.seed)
    checked = _Checked(tensors, problem, geometry)
    call = _call(ranks, checked)
    chosen, why = choose(call, schedule)
    if chosen is None:
        asked = SCHEDULES if schedule == "auto" else (schedule,)
        why = "; ".join(f"{name}: {', '.join(reasons(call, name))}" for name in asked)
        raise InvalidInput("schedule", f"one that can run this call on {mesh}", f"{schedule!r} ({why})")
    return _Shared(ranks, checked, chosen)


def _checked(
    ranks: Ranks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    cu_seqlens: Tensor | Sequence[int] | None,
    keywords: dict[str, Any],
) -> _Checked:
    check_layout(layout)
    if keywords["bias"] is not None:
        raise InvalidInput("bias", "None: say it by bounds, key_mask or alibi_slopes", type(keywords["bias"]).__name__)
    unrotated = {**keywords, "rope": None, "positions": None}
    starts = None
    if cu_seqlens is None:
        tensors, problem = arguments.dense(q, k, v, **unrotated)
    else:
        starts = _starts(cu_seqlens)
        tensors, problem = _packed(q, k, v, starts, unrotated, ranks.size)
    mask, offset = problem.mask, tensors.offset
    nq, nk = problem.nq * ranks.size, problem.nk * ranks.size
    if mask.from_end and tensors.key_lens is not None:
        offset = tensors.key_lens - nq
    first = mask.offset + (nk - nq if mask.from_end else 0)
    mask = Mask(mask.left, mask.right, mask.sinks, first, from_end=False)
    geometry = Geometry(mask, nq, nk, layout, ranks.ring.size, starts, offset is not None)
    return _Checked(tensors._replace(offset=offset), problem, geometry)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, starts: tuple[int, ...], keywords: dict[str, Any], ranks: int
) -> tuple[Tensors, Problem]:
    """The check of a shard of packed documents: as of a single one, with slopes for each."""
    for name in ("key_lens", "align"):
        if isinstance(keywords[name], Tensor):
            raise InvalidInput(name, "no tensor with packed documents", "a tensor")
    if not isinstance(q, Tensor) or not isinstance(k, Tensor) or q.dim() != 3 or k.shape[:1] != q.shape[:1]:
        got = " and ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in (q, k))
        raise InvalidInput("q", "q [N, Hq, D], k [N, Hkv, D] and v [N, Hkv, Dv] of as many tokens", got)
    tokens = q.shape[0]
    if list(starts) != sorted(starts) or not starts or starts[0] < 0 or starts[-1] > tokens * ranks:
        expected = f"entries of 0 to {tokens * ranks} that never decrease"
        raise InvalidInput("cu_seqlens", expected, f"{list(starts)}"[:80])
    slopes = keywords["alibi_slopes"]
    by_document = isinstance(slopes, Tensor) and slopes.dim() == 2
    if by_document and tuple(slopes.shape) != (len(starts) - 1, q.shape[1]):
        raise InvalidInput(
            "alibi_slopes", f"shape [{q.shape[1]}] or [{len(starts) - 1}, {q.shape[1]}]", tuple(slopes.shape)
        )
    one = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
    checked = {**keywords, "alibi_slopes": slopes[0] if by_document and len(slopes) else slopes}
    tensors, problem = arguments.packed(q, k, v, one, one, tokens, tokens, **checked)
    return tensors._replace(alibi_slopes=slopes, cu_seqlens_q=None, cu_seqlens_k=None), problem


def _starts(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise InvalidInput("cu_seqlens", "ints [documents + 1]", shape_of(cu_seqlens))
        return tuple(cu_seqlens.tolist())
    return tuple(cu_seqlens)


def _told(checked: _Checked, layout: str, schedule: str, keywords: Mapping[str, Any]) -> dict[str, str]:
    """What the ranks must have in common, by argument."""
    tensors, problem, geometry = checked
    mask, describe = geometry.mask, contents_of if checks_enabled() else shape_of
    told = {name: shape_of(getattr(tensors, name)) for name in ("q", "k", "v")}
    told |= {"layout": layout, "schedule": schedule}
    told |= {"causal, window": f"left {mask.left}, right {mask.right}", "sinks": str(mask.sinks)}
    told |= {"align": str(mask.offset), "scale": repr(problem.scale), "softcap": repr(problem.softcap)}
    told |= {"dropout_p": repr(problem.dropout_p), "gradient": str(problem.needs_grad)}
    told["key_mask"] = "None" if tensors.key_mask is None else "given"
    if geometry.starts is not None:
        told["cu_seqlens"] = contents_of(torch.tensor(geometry.starts, device="cpu"))
    for name in ("key_lens", "offset", "alibi_slopes", "sink_logits"):
        x = getattr(tensors, name)
        if x is not None:
            told["align" if name == "offset" else name] = describe(x)
    if tensors.lo is not None:
        told["bounds"] = shape_of(tensors.lo)
    if tensors.seed is not None:
        told["seed"] = "drawn" if keywords["seed"] is None else _seed(keywords["seed"])
    for name in ("rope", "positions"):
        value = keywords[name]
        if value is not None:
            told[name] = repr(value) if isinstance(value, Rope) else type(value).__name__
    return told


def _seed(seed: int | Tensor) -> str:
    """Its value; of a seed on a GPU, which the CPU would have to wait for, only under LONGATTN_CHECK=1."""
    if isinstance(seed, Tensor) and seed.device.type != "cpu" and not checks_enabled():
        return "on a GPU"
    return str(int(seed))


def _call(ranks: Ranks, checked: _Checked) -> Call:
    tensors, problem, geometry = checked
    # Of the problem no length, mask or flag decides, so that calls of many steps share one choice.
    plain = problem._replace(mask=Mask(), features=(), needs_grad=False)
    other = 0 if ranks.ulysses is None else ranks.ulysses.size
    return Call(plain, geometry, other, tensors.key_mask is not None)


def _attend(
    shared: _Shared, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None, positions: Positions, backend: str
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Nq, Dv], lse [B, Hq, Nq])."""
    ranks, (tensors, problem, geometry), schedule = shared
    q, k, v = tensors.q, tensors.k, tensors.v
    if rope is not None or positions is not None:
        q, k = _rotated(shared, q, k, rope, positions, backend)
    traders, ring = ranks.ulysses, ranks.ring
    if schedule == ULYSSES:
        traders, ring = ranks.ring, Group(None, 1, 0)
    slopes, sink_logits = tensors.alibi_slopes, tensors.sink_logits
    head = 0
    if traders is not None:
        order = _Order(geometry.layout if schedule == ULYSSES else "contiguous", traders)
        q, k, v = (
            order.sorted(ulysses.to_heads(x, traders), 2)
            for x in (q, ulysses.repeated(k, traders), ulysses.repeated(v, traders))
        )
        head = q.shape[1] * traders.rank
        heads = slice(head, head + q.shape[1])
        slopes, sink_logits = (None if x is None else x[..., heads] for x in (slopes, sink_logits))
        gathered = {}
        for name in ("key_mask", "lo", "hi"):
            x = getattr(tensors, name)
            if x is not None:
                gathered[name] = order.sorted(torch.cat(traders.gather(x), -1), -1)
        tensors = tensors._replace(**gathered)
    _, around = _call(ranks, shared.checked).ring(schedule)
    empty = q.new_empty(0)
    beside = tensors._replace(
        q=empty, k=empty, v=empty, sink_logits=None, alibi_slopes=None if slopes is None else slopes.detach()
    )
    mine = problem._replace(q_heads=q.shape[1], kv_heads=k.shape[1])
    whole = Whole(mine, around, ring.rank, beside, head, backend)
    plan = Halo(whole, ring) if schedule.startswith(HALO) else Ring(whole, ring)
    out, lse = blockwise.attend(whole, plan, q, k, v, sink_logits, slopes)
    if traders is not None:
        out = ulysses.to_tokens(order.stored(out, 2), traders)
        lse = ulysses.to_tokens(order.stored(lse, 2)[..., None], traders)[..., 0]
    return out, lse


class _Order:
    """The order of tokens that came together from the shards of several ranks."""

    def __init__(self, layout: str, group: Group) -> None:
        self._layout, self._ranks = layout, group.size

    def sorted(self, x: Tensor, dim: int) -> Tensor:
        """From shard after shard to that of the sequence."""
        if self._layout == "contiguous":
            return x
        shards = x.chunk(self._ranks, dim)
        return in_order(list(shards), [self._spans(rank, x.shape[dim]) for rank in range(self._ranks)], dim)

    def stored(self, x: Tensor, dim: int) -> Tensor:
        """The inverse."""
        if self._layout == "contiguous":
            return x
        spans = [span for rank in range(self._ranks) for span in self._spans(rank, x.shape[dim])]
        return torch.cat([x.narrow(dim, span.start, span.length) for span in spans], dim)

    def _spans(self, rank: int, tokens: int) -> list[Span]:
        return spans_of(self._layout, self._ranks, rank, tokens // self._ranks)


def places(ranks: Ranks, layout: str, tokens: int, device: torch.device) -> Tensor:
    """Where this rank's tokens stand in the whole sequence: int64 [tokens]."""
    parts = 1 if ranks.ulysses is None else ranks.ulysses.size
    spans = spans_of(layout, ranks.ring.size, ranks.ring.rank, tokens * parts)
    mine = torch.cat([torch.arange(*span, device=device) for span in spans])
    return mine if ranks.ulysses is None else mine.chunk(parts)[ranks.ulysses.rank]


def _rotated(
    shared: _Shared, q: Tensor, k: Tensor, rope: Rope | None, positions: Positions, backend: str
) -> tuple[Tensor, Tensor]:
    """q and k as they meet: rotated once, before keys travel."""
    ranks, (tensors, problem, geometry), _ = shared
    nq, nk, device = problem.nq, problem.nk, q.device
    packed = geometry.starts is not None
    length = geometry.nk
    if packed:
        assert geometry.starts is not None
        length = max((geometry.document(at).length for at in range(len(geometry.starts) - 1)), default=0)
    batch = () if packed else (problem.batch,)
    for_q, for_k = arguments.rotated_positions(positions, rope, device, batch, nq, nk)
    assert rope is not None
    if for_k is not None and rope.depends_on_length:  # the largest position may be another rank's
        length = ranks.largest(arguments.context_length(rope, 1, for_q, for_k), device)
    inv_freq, factor = arguments.frequencies(rope, q, length)
    assert inv_freq is not None
    if for_k is None:
        for_q, for_k = _standing(shared, nq, device, True), _standing(shared, nk, device, False)
    elif for_q is None:
        if nq != nk or geometry.mask.offset or tensors.offset is not None:
            got = "one tensor, with queries that do not stand at the keys of their shard"
            raise InvalidInput("positions", "a pair (for q, for k)", got)
        for_q = for_k
    chosen = registry.select(arguments.rotation_problem(q, rope), backend).name
    q, k = (ops.rope(x, inv_freq, at, factor, rope.interleaved, chosen) for x, at in ((q, for_q), (k, for_k)))
    return q, k


def _standing(shared: _Shared, tokens: int, device: torch.device, queries: bool) -> Tensor:
    """The positions of this rank's tokens, float32 [N] or [B, N]; of packed ones in their documents."""
    ranks, (tensors, _, geometry), _ = shared
    at = places(ranks, geometry.layout, tokens, device)
    if geometry.starts is not None:
        starts = torch.tensor(geometry.starts, device=device)
        at = at - starts[(torch.searchsorted(starts, at, right=True) - 1).clamp(min=0)]
    if queries:
        at = at + geometry.mask.offset if tensors.offset is None else at + tensors.offset.long()[:, None]
    return at.float()
