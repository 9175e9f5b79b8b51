"""Which schedule a call takes, and why: from its mask, the mesh and the shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

from longattn.distributed.geometry import Geometry, broadcast_sinks, halo, hops, imbalance
from longattn.distributed.ring import Route
from longattn.distributed.spans import without
from longattn.errors import InvalidInput
from longattn.problem import Problem

RING, HALO, ULYSSES = "ring", "halo", "ulysses"
SCHEDULES = (RING, HALO, ULYSSES, f"{RING}+{ULYSSES}", f"{HALO}+{ULYSSES}")
_UNBALANCED = 1.25  # the busiest rank's work over the mean


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends for one call, of keys, values, queries, outputs and their gradients."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Choice:
    """The schedule of a call, why it was chosen, and what every other would cost; str() is a table of all."""

    schedule: str | None  # None: the one that was asked for cannot run the call
    why: str
    reasons: Mapping[str, list[str]]  # of every schedule, why it cannot run the call; empty: it can
    traffic: Mapping[str, Traffic]  # of those that can, on this rank
    imbalance: Mapping[str, float]  # of those that can: the pairs that the busiest rank computes, over the mean

    def __str__(self) -> str:
        rows = [("schedule", f"{self.schedule or 'none'}: {self.why}")]
        for name, why in self.reasons.items():
            text = f"cannot: {'; '.join(why)}"
            if not why:
                sent = self.traffic[name]
                text = f"this rank sends {sent.forward:,} B forward, {sent.backward:,} B backward; "
                text += f"the busiest has {self.imbalance[name]:.3g} times the mean work"
            rows.append((f"  {name}", text))
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:{width}}{text}" for name, text in rows)


@dataclass(frozen=True)
class Call:
    """What decides about schedules.

    Args:
        problem: of all heads; its lengths and its mask are not looked at.
        geometry: of the first dimension of the mesh.
        ulysses: the length of the mesh's second dimension, 0: it has none.
        masked: whether there is a key_mask.
    """

    problem: Problem
    geometry: Geometry
    ulysses: int
    masked: bool

    def trading(self, name: str) -> int:
        """How many ranks trade heads in a schedule; 1: none."""
        return self.geometry.ranks if name == ULYSSES else self.ulysses or 1

    def ring(self, name: str) -> tuple[Problem, Geometry]:
        """The heads and the geometry of the ring (or halo) of a schedule."""
        problem, trading = self.problem, self.trading(name)
        kv_heads = _repeated(problem.kv_heads, trading) // trading
        problem = problem._replace(q_heads=problem.q_heads // trading, kv_heads=kv_heads)
        if name == ULYSSES:
            return problem, replace(self.geometry, ranks=1, layout="contiguous")
        return problem, self.geometry


@lru_cache(maxsize=256)
def choose(call: Call, asked: str) -> tuple[str | None, str]:
    """(schedule, why), the same on all ranks: nothing that differs between them decides. None: asked cannot run.

    Args:
        asked: "auto", or the schedule to take.

    Raises:
        InvalidInput: there is no such schedule.
    """
    if asked != "auto" and asked not in SCHEDULES:
        raise InvalidInput("schedule", f"'auto' or one of {', '.join(map(repr, SCHEDULES))}", repr(asked))
    can = [name for name in SCHEDULES if not reasons(call, name)]
    if asked != "auto":
        return (
            (asked, "it was asked for") if asked in can else (None, f"{asked} was asked for, and cannot run the call")
        )
    windowed = next((name for name in can if name.startswith(HALO)), None)
    if windowed is not None:
        came, own = _most_from_others(call.geometry), call.geometry.nk // call.geometry.ranks
        if came <= own:
            return windowed, f"a rank sees at most {came:,} keys of others, no more than the {own:,} of its own"
    ring = next((name for name in can if name.startswith(RING)), None)
    if ring is None:
        return None, "no schedule can run the call"
    if ULYSSES not in can:
        return ring, "keys travel while ranks compute, and a rank holds those of two at a time"
    busiest = imbalance(call.geometry)
    if busiest > _UNBALANCED:
        why = f"all ranks work alike; in a ring the busiest would have {busiest:.3g} times the mean work"
        return ULYSSES, f"{why}, less with layout='zigzag'" if call.geometry.layout == "contiguous" else why
    heads, keys = (_mean_bytes(call, name) for name in (ULYSSES, ring))
    if heads < keys:
        return ULYSSES, f"a rank sends {heads:,} B in the mean, and {keys:,} B in a ring"
    return ring, f"a rank sends {keys:,} B in the mean, while it computes, and {heads:,} B if it traded heads"


def explanation(call: Call, rank: int, asked: str) -> Choice:
    """The choice, and what every schedule costs this rank of the mesh's first dimension."""
    schedule, why = choose(call, asked)
    found = {name: reasons(call, name) for name in SCHEDULES}
    can = [name for name in SCHEDULES if not found[name]]
    work = {name: imbalance(call.ring(name)[1]) for name in can}
    return Choice(schedule, why, found, {name: traffic(call, rank, name) for name in can}, work)


def reasons(call: Call, name: str) -> list[str]:
    """Why a schedule cannot run the call; empty: it can."""
    if ("+" in name) != (call.ulysses > 0):
        return [f"needs a mesh of {'two dimensions' if '+' in name else 'one dimension'}"]
    found, geometry, trading = [], call.geometry, call.trading(name)
    if call.problem.q_heads % trading:
        found.append(f"{trading} ranks of the mesh do not divide the {call.problem.q_heads} heads of q")
    if name.startswith(HALO):
        for side in ("left", "right"):
            if getattr(geometry.mask, side) is None:
                found.append(f"queries see all keys to their {side}")
        if geometry.movable:
            found.append("where queries stand is in tensors (align or key_lens)")
    return found


def traffic(call: Call, rank: int, name: str) -> Traffic:
    """As CountBytes counts: of a broadcast what its root sends, of a reduction what the others do.

    Traded heads: all but the rank's own share of q, k, v, out, and in the forward lse.
    """
    problem, geometry = call.ring(name)
    ranks, trading = geometry.ranks, call.trading(name)
    widths = problem.batch * (problem.head_dim + problem.v_head_dim)
    masked = problem.batch if call.masked else 0
    key = widths * problem.kv_heads * problem.dtype.itemsize + masked
    gradient = widths * problem.kv_heads * problem.accumulate_dtype.itemsize
    forward = backward = 0
    if name.startswith(RING):
        route, keys = Route(hops(geometry)), geometry.nk // ranks
        forward = route.sends(rank) * keys * key
        backward = forward + route.gradient_sends(rank) * keys * gradient
    elif name.startswith(HALO):
        others = [other for other in range(ranks) if other != rank]
        given = sum(span.length for to in others for span in halo(geometry, rank, to))
        came = sum(span.length for source in others for span in halo(geometry, source, rank))
        sinks = broadcast_sinks(geometry).length
        forward = (given + (sinks if rank == 0 else 0)) * key
        backward = (came + (sinks if rank else 0)) * gradient
    if trading > 1:
        rows, keys = geometry.nq // ranks // trading, geometry.nk // ranks // trading
        q_heads, kv_heads = problem.q_heads * trading, problem.kv_heads * trading
        traded = widths * problem.dtype.itemsize * (q_heads * rows + kv_heads * keys)
        lse = problem.batch * problem.accumulate_dtype.itemsize * q_heads * rows
        forward += (traded + lse) * (trading - 1) // trading + masked * keys * (trading - 1)
        backward += traded * (trading - 1) // trading
    return Traffic(forward, backward)


def _mean_bytes(call: Call, name: str) -> int:
    """What a rank sends in forward and backward, the mean over the first dimension of the mesh."""
    sent = [traffic(call, rank, name) for rank in range(call.ring(name)[1].ranks)]
    return sum(each.forward + each.backward for each in sent) // len(sent)


def _most_from_others(geometry: Geometry) -> int:
    """The keys that a rank gets in a halo exchange, at most."""
    sinks, most = broadcast_sinks(geometry), 0
    for rank in range(geometry.ranks):
        seen = [span for queries in geometry.queries_of(rank) for span in geometry.seen_by(queries)]
        most = max(most, sum(span.length for span in without(seen, [sinks, *geometry.keys_of(rank)])))
    return most + sinks.length


def _repeated(kv_heads: int, ranks: int) -> int:
    """How many heads of keys travel: where there are too few for the ranks, each travels several times."""
    return kv_heads * (ranks // gcd(kv_heads, ranks))
