"""What the ranks of a test's World run: cases of longattn.distributed against one process that holds everything."""

from __future__ import annotations

import random
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import longattn
from longattn import distributed

TEXT_BYTES = 2048  # what each rank tells every other before a call
CLOSE = 1e-12  # float64: sums in another order


class Case(NamedTuple):
    """One call. Named features are made from the seed by `arguments_of`."""

    seed: int
    mesh: tuple[int, ...]
    layout: str
    schedule: str
    heads: tuple[int, int]
    tokens: tuple[int, int]  # queries and keys of each rank
    keywords: dict[str, Any]
    features: tuple[str, ...]


MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"causal": True, "window": 7},
    {"causal": True, "window": 9, "sinks": 3},
    {"causal": True, "window": 30, "sinks": 17},
    {"window": (5, 9)},
    {"window": (20, 3), "sinks": 2},
    {"window": (-1, 4)},
    {"causal": True, "align": "start"},
    {"causal": True, "align": 5},
    {"causal": True, "window": 11, "sinks": 1, "align": -3},
)
FEATURES = (
    "softcap",
    "alibi",
    "alibi_batch",
    "sink_logits",
    "rope",
    "dropout",
    "key_mask",
    "key_lens",
    "bounds",
    "lse",
)
VARLEN = ("softcap", "alibi", "alibi_batch", "sink_logits", "rope", "dropout", "lse")


def cases(ranks: int, *, packed: bool = False) -> list[Case]:
    """Calls for so many ranks: every mask on every schedule and layout that can take it, with random features.

    Packed ones: a third of that.
    """
    draw = random.Random(ranks)
    meshes = [((ranks,), ("auto", "ring", "halo", "ulysses"))]
    if ranks == 4:
        meshes.append(((2, 2), ("ring+ulysses", "halo+ulysses")))
    found: list[Case] = []
    for mesh, schedules in meshes:
        for schedule, layout, mask in product(schedules, distributed.LAYOUTS, MASKS):
            if schedule.startswith("halo") and not _windowed(mask):
                continue
            if packed and (not isinstance(mask.get("align", ""), str) or draw.random() < 2 / 3):
                continue
            if schedule == "auto" and draw.random() < 1 / 2:
                continue
            heads = draw.choice(((4, 2), (4, 1), (4, 4)) if ranks != 3 else ((6, 2), (3, 3), (6, 1)))
            features = set(draw.sample(VARLEN if packed else FEATURES, draw.choice((0, 1, 2, 4))))
            if "alibi_batch" in features:
                features.discard("alibi")
            if schedule.startswith("halo"):
                features.discard("key_lens")
            nq = draw.choice((4, 8, 10))
            nk = nq if packed or draw.random() < 0.7 else draw.choice((6, 12))
            found.append(Case(len(found), mesh, layout, schedule, heads, (nq, nk), mask, tuple(sorted(features))))
    return found


def _windowed(mask: dict[str, Any]) -> bool:
    return "window" in mask and mask["window"] != (-1, 4)


def check(rank: int, wanted: list[Case], packed: bool) -> int:
    """Run each case on this rank; how many."""
    meshes = {shape: init_device_mesh("cpu", shape) for shape in dict.fromkeys(case.mesh for case in wanted)}
    for case in wanted:
        try:
            (_packed_case if packed else _dense_case)(meshes[case.mesh], case)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    return len(wanted)


def _dense_case(mesh: DeviceMesh, case: Case) -> None:
    torch.manual_seed(case.seed)
    ranks, (q_heads, kv_heads) = mesh.size(), case.heads
    nq, nk = (tokens * ranks for tokens in case.tokens)
    shapes = ((2, q_heads, nq, 8), (2, kv_heads, nk, 8), (2, kv_heads, nk, 6))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    keywords = dict(case.keywords)
    keywords |= _features(case, 2, q_heads)
    keywords["backend"] = "reference" if case.seed % 5 == 0 else "auto"
    along: dict[str, Any] = {}  # what is cut as queries or keys are
    if "key_mask" in case.features:
        along["key_mask"] = torch.rand(2, nk) > 0.3
    if "key_lens" in case.features:
        keywords["key_lens"] = torch.tensor([nk - 3, 5], dtype=torch.int32)
    if "bounds" in case.features:
        lo = torch.randint(0, nk // 2, (nq,))
        along["bounds"] = (lo, lo + nk // 2)
    out, lse = longattn.attention(q, k, v, return_lse=True, **keywords, **along)

    def cut(x: Tensor, dim: int) -> Tensor:
        return distributed.shard(x, mesh, dim=dim, layout=case.layout)

    local = {name: cut(x, -1) if isinstance(x, Tensor) else tuple(cut(y, -1) for y in x) for name, x in along.items()}
    q1, k1, v1 = (cut(x.detach(), 2).requires_grad_() for x in (q, k, v))
    how = {"layout": case.layout, "schedule": case.schedule}
    choice = distributed.explain(q1, k1, v1, mesh, **how, **keywords, **local)
    with distributed.CountBytes() as forward:
        out1, lse1 = distributed.context_parallel_attention(
            q1, k1, v1, mesh, return_lse=True, **how, **keywords, **local
        )
    expected, got = [cut(out, 2), cut(lse, 2)], [out1, lse1]
    grads = [torch.randn_like(x) for x in (out, lse)]
    shared = [keywords[name] for name in ("alibi_slopes", "sink_logits") if name in keywords]
    if "lse" in case.features:
        whole = torch.autograd.grad((out, lse), (q, k, v, *shared), grads)
        with distributed.CountBytes() as backward:
            mine = torch.autograd.grad((out1, lse1), (q1, k1, v1, *shared), [cut(x, 2) for x in grads])
    else:
        whole = torch.autograd.grad(out, (q, k, v, *shared), grads[0])
        with distributed.CountBytes() as backward:
            mine = torch.autograd.grad(out1, (q1, k1, v1, *shared), cut(grads[0], 2))
    _compare(expected + [cut(x, 2) for x in whole[:3]] + list(whole[3:]), got + list(mine[:3]) + _summed(mine[3:]))
    if not {"bounds", "rope", "lse"} & set(case.features):
        told = TEXT_BYTES * sum((mesh.size(dim) - 1) * mesh.size() // _before(mesh, dim) for dim in range(mesh.ndim))
        formula = choice.traffic[choice.schedule or ""]
        sent = forward.total - told
        assert (sent, backward.total) == (formula.forward, formula.backward), f"{sent}, {backward.total}, not {formula}"


def _before(mesh: DeviceMesh, dim: int) -> int:
    """Ranks of the dimensions up to this one: their rows travel together."""
    product = 1
    for at in range(dim + 1):
        product *= mesh.size(at)
    return product


def _packed_case(mesh: DeviceMesh, case: Case) -> None:
    torch.manual_seed(case.seed)
    ranks, (q_heads, kv_heads) = mesh.size(), case.heads
    tokens = case.tokens[0] * ranks
    edges = sorted(random.Random(case.seed).choices(range(tokens + 1), k=random.Random(case.seed).choice((2, 4, 9))))
    starts = torch.tensor(edges if case.seed % 3 else [0, *edges[1:-1], tokens], dtype=torch.int32)
    shapes = ((tokens, q_heads, 8), (tokens, kv_heads, 8), (tokens, kv_heads, 6))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    keywords = dict(case.keywords) | _features(case, len(starts) - 1, q_heads)
    keywords["backend"] = "reference" if case.seed % 5 == 0 else "auto"
    out, lse = longattn.attention_varlen(q, k, v, starts, starts, tokens, tokens, return_lse=True, **keywords)

    def cut(x: Tensor, dim: int = 0) -> Tensor:
        return distributed.shard(x, mesh, dim=dim, layout=case.layout)

    q1, k1, v1 = (cut(x.detach()).requires_grad_() for x in (q, k, v))
    out1, lse1 = distributed.context_parallel_attention_varlen(
        q1, k1, v1, starts, mesh, layout=case.layout, schedule=case.schedule, return_lse=True, **keywords
    )
    grads = [torch.randn_like(x) for x in (out, lse)]
    shared = [keywords[name] for name in ("alibi_slopes", "sink_logits") if name in keywords]
    whole = torch.autograd.grad((out, lse), (q, k, v, *shared), grads)
    mine = torch.autograd.grad((out1, lse1), (q1, k1, v1, *shared), [cut(grads[0]), cut(grads[1], 1)])
    expected = [cut(out), cut(lse, 1), *(cut(x) for x in whole[:3]), *whole[3:]]
    _compare(expected, [out1, lse1, *mine[:3], *_summed(mine[3:])])


def _features(case: Case, sequences: int, q_heads: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in case.features:
        if name == "softcap":
            found["softcap"] = 1.5
        elif name == "alibi":
            found["alibi_slopes"] = torch.rand(q_heads, dtype=torch.float64, requires_grad=True)
        elif name == "alibi_batch":
            found["alibi_slopes"] = torch.rand(sequences, q_heads, dtype=torch.float64, requires_grad=True)
        elif name == "sink_logits":
            found["sink_logits"] = torch.randn(q_heads, dtype=torch.float64, requires_grad=True)
        elif name == "rope":
            found["rope"] = longattn.Rope(6)
        elif name == "dropout":
            found |= {"dropout_p": 0.4, "seed": 17}
    return found


def _summed(shares: tuple[Tensor, ...]) -> list[Tensor]:
    """What all ranks' shares in a gradient sum to."""
    for share in shares:
        dist.all_reduce(share)
    return list(shares)


def _compare(expected: list[Tensor], got: list[Tensor]) -> None:
    for at, (right, ours) in enumerate(zip(expected, got, strict=True)):
        assert ours.shape == right.shape, f"result {at}: {tuple(ours.shape)}, not {tuple(right.shape)}"
        finite = right.isfinite()
        assert torch.equal(ours[~finite], right[~finite]), f"result {at}: wrong infinity"
        right, ours = right[finite].detach(), ours[finite].detach()
        if len(right):
            error, size = float((ours - right).abs().max()), float(right.abs().max())
            assert error <= CLOSE * max(1.0, size), f"result {at}: off by {error}"
