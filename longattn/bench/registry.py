"""Who takes part in a case."""

from __future__ import annotations

from longattn.bench import attention, block, rope
from longattn.bench.cases import AttentionCase, BlockCase, Case, RopeCase
from longattn.bench.contenders import Contender


def contenders(case: Case) -> list[Contender]:
    """All contenders of a case, ours first."""
    match case:
        case AttentionCase():
            return attention.contenders(case)
        case RopeCase():
            return rope.contenders(case)
        case BlockCase():
            return block.contenders(case)
    raise TypeError(f"no contenders for {type(case).__name__}")
