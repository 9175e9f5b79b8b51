"""Speed and memory, ours and others': the same cases, on the same tensors, in one process, in turn.

report = run(make_cases(["dense"]))
report.write(Path("dense.json"))
plot(report, Path("."))
"""

from longattn.bench.cases import DTYPES, SETS, AttentionCase, BlockCase, Case, RopeCase, make_cases
from longattn.bench.contenders import Contender, Prepared, Refused, warmed_up
from longattn.bench.machine import Machine
from longattn.bench.plot import plot
from longattn.bench.registry import contenders
from longattn.bench.report import Report, Result
from longattn.bench.runner import run

__all__ = [
    "DTYPES",
    "SETS",
    "AttentionCase",
    "BlockCase",
    "Case",
    "Contender",
    "Machine",
    "Prepared",
    "Refused",
    "Report",
    "Result",
    "RopeCase",
    "contenders",
    "make_cases",
    "plot",
    "run",
    "warmed_up",
]
