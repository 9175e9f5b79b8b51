"""A call told to its user: what a query sees, what that costs, and which backend runs it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from longattn import flops
from longattn.backends import registry
from longattn.mask import Mask
from longattn.problem import Problem, Tensors, check_sequences

__all__ = ["Explanation", "explanation"]


@dataclass(frozen=True)
class Explanation:
    """What a call is, and which backend runs it; str() is a table of all.

    Counts and sizes are those of the definition, not of a machine: 2 operations per multiplication and addition of the
    matrix products, and the bytes of the tensors that go in and come out. Working memory is a few tiles a thread.
    """

    call: str
    sees: str
    all_pairs: int | None  # (query, key) pairs of one head, all sequences together; None: lengths that cannot be read
    visible_pairs: int | None  # those that window, alignment and lengths let see each other
    hides_more: bool  # key_mask, bounds or a bool bias may hide some of them
    forward_flops: int | None
    backward_flops: int | None
    input_bytes: int  # q, k and v
    output_bytes: int  # out and lse
    matrix_bytes: int | None  # what all scores would take as a matrix in the dtype of q: nothing here makes it
    backend: str | None  # None: no backend can run the call
    reasons: dict[str, list[str]]  # of every backend in order of preference; empty where it can run the call

    def __str__(self) -> str:
        rows = [("call", self.call), ("sees", self.sees), ("pairs", self._pairs()), ("work", self._work())]
        rows += [("memory", self._memory()), ("runs on", self.backend or "no backend")]
        rows += [(f"  {name}", self._status(name, why)) for name, why in self.reasons.items()]
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:{width}}{text}" for name, text in rows)

    def _pairs(self) -> str:
        if self.visible_pairs is None or self.all_pairs is None:
            return "unknown: the lengths are in tensors without data"
        share = 100 * self.visible_pairs / max(1, self.all_pairs)
        at_most = "at most " if self.hides_more else ""
        return f"{at_most}{self.visible_pairs:,} of {self.all_pairs:,} per head ({share:.3g} %)"

    def _work(self) -> str:
        if self.forward_flops is None or self.backward_flops is None:
            return "unknown"
        return f"forward {_scaled(self.forward_flops, 'FLOP')}, backward {_scaled(self.backward_flops, 'FLOP')}"

    def _memory(self) -> str:
        text = f"q, k, v {_scaled(self.input_bytes, 'B')}; out, lse {_scaled(self.output_bytes, 'B')}"
        if self.matrix_bytes is None:
            return text
        return f"{text}; a matrix of all scores, which is never made, {_scaled(self.matrix_bytes, 'B')}"

    def _status(self, name: str, why: list[str]) -> str:
        if name == self.backend:
            return "chosen"
        if why:
            return f"cannot: {'; '.join(why)}"
        names = list(self.reasons)
        later = self.backend is not None and names.index(name) > names.index(self.backend)
        return "can run it, but comes later" if later else "can run it, but was not asked to"


def explanation(tensors: Tensors, problem: Problem, backend: str) -> Explanation:
    """Explain a checked call that asks for `backend`. Runs nothing; reads lengths and offsets given as tensors.

    Raises:
        InvalidInput: there is no backend of that name, or cu_seqlens do not fit the tensors.
    """
    reasons = registry.reasons(problem)
    allowed = reasons if backend == "auto" else {registry.get(backend).name: reasons[backend]}
    chosen = next((name for name, why in allowed.items() if not why), None)
    all_pairs, visible_pairs = _count_pairs(tensors, problem)
    itemsize = problem.dtype.itemsize
    queries = prod(tensors.q.shape[:3])
    return Explanation(
        call=str(problem),
        sees=_sees(tensors, problem),
        all_pairs=all_pairs,
        visible_pairs=visible_pairs,
        hides_more=any(name != "key_lens" for name in _hiding(tensors)),
        forward_flops=None if visible_pairs is None else flops.operations(problem, visible_pairs, flops.FORWARD),
        backward_flops=None if visible_pairs is None else flops.operations(problem, visible_pairs, flops.BACKWARD),
        input_bytes=itemsize * sum(x.numel() for x in tensors[:3]),
        output_bytes=queries * (problem.v_head_dim * itemsize + problem.accumulate_dtype.itemsize),
        matrix_bytes=None if all_pairs is None else problem.q_heads * all_pairs * itemsize,
        backend=chosen,
        reasons=reasons,
    )


def _sees(tensors: Tensors, problem: Problem) -> str:
    """The keys that a query sees, in words."""
    mask = problem.mask
    keys = "every key"
    if mask.left is not None or mask.right is not None:
        oldest = "0" if mask.left is None else _shifted("p", -mask.left)
        newest = "the last" if mask.right is None else _shifted("p", mask.right)
        keys = f"keys {oldest} .. {newest}"
        if mask.sinks and mask.left is not None:
            keys += f" and the first {mask.sinks} keys" if mask.sinks > 1 else " and the first key"
    if problem.varlen:
        keys += " of its own sequence"
    text = f"query i, at position p = {_position(tensors, problem)}, sees {keys}"
    hiding = _hiding(tensors)
    return f"{text}, if allowed by {' and '.join(hiding)}" if hiding else text


def _hiding(tensors: Tensors) -> list[str]:
    """The arguments that may hide what the mask shows."""
    given = {"key_mask": tensors.key_mask, "key_lens": tensors.key_lens, "bounds": tensors.lo}
    if tensors.bias is not None and tensors.bias.dtype == torch.bool:
        given["bias"] = tensors.bias
    return [name for name, x in given.items() if x is not None]


def _position(tensors: Tensors, problem: Problem) -> str:
    mask = problem.mask
    if tensors.offset is not None:
        return "i + align[b]"
    if mask.from_end and tensors.key_lens is not None:
        return f"{_shifted('i', mask.offset)} + key_lens[b] - Nq"
    if mask.from_end and problem.varlen:
        return f"{_shifted('i', mask.offset)} + its keys - its queries"
    return _shifted("i", mask.position(0, problem.nq, problem.nk))


def _shifted(name: str, by: int) -> str:
    return name if by == 0 else f"{name} {'+' if by > 0 else '-'} {abs(by)}"


def _count_pairs(tensors: Tensors, problem: Problem) -> tuple[int | None, int | None]:
    """(all, visible) pairs of one head, in all sequences; what key_mask, bounds and bias hide is not looked at."""
    told = (tensors.cu_seqlens_q, tensors.cu_seqlens_k, tensors.key_lens, tensors.offset)
    if any(x is not None and x.is_meta for x in told):
        return None, None
    if problem.varlen:
        check_sequences(tensors, problem)
    cu_q, cu_k, key_lens, offsets = (None if x is None else x.tolist() for x in told)
    if key_lens is None and offsets is None and not problem.varlen:
        lq, lk = problem.nq, problem.nk
        return problem.batch * lq * lk, problem.batch * problem.mask.visible_pairs(lq, lk)
    total = visible = 0
    for b in range(problem.batch):
        lq = problem.nq if cu_q is None else cu_q[b + 1] - cu_q[b]
        lk = problem.nk if cu_k is None else cu_k[b + 1] - cu_k[b]
        aligned = lk if key_lens is None else key_lens[b]
        offset = problem.mask.position(0, lq, aligned) if offsets is None else offsets[b]
        mask = Mask(problem.mask.left, problem.mask.right, problem.mask.sinks, offset, from_end=False)
        total += lq * lk
        visible += mask.visible_pairs(lq, min(lk, max(0, aligned)))
    return total, visible


def _scaled(amount: float, unit: str) -> str:
    """Such as 12.3 GB."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while amount >= 999.5 and len(prefixes) > 1:
        amount /= 1000
        del prefixes[0]
    return f"{amount:.3g} {prefixes[0]}{unit}"
