"""The results of a run: medians, ratios, rates, and their JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, get_args

from longattn.bench.cases import Case, from_dict
from longattn.bench.contenders import Role
from longattn.bench.machine import Machine
from longattn.errors import InvalidInput
from longattn.files import write_text

# max |a - b| / max |b| up to which two contenders agree. Generous: it shall find a wrong mask, not judge rounding.
_AGREEMENT = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Result:
    """What one contender did in one case.

    Args:
        seconds: of each round; empty if it refused.
        memory: peak bytes of one call beyond inputs and outputs; None if not measured.
        difference: max |a - b| / max |b| of its outputs a and ours b, the largest of all outputs; None for baselines.
        refused: why it did not run; None if it did.
    """

    case: Case
    contender: str
    role: Role
    seconds: tuple[float, ...] = ()
    memory: int | None = None
    difference: float | None = None
    refused: str | None = None

    @property
    def median(self) -> float:
        """Seconds; only if it ran."""
        return median(self.seconds)

    @property
    def rate(self) -> float:
        """The case's work by the median: operations or bytes a second."""
        return self.case.work / self.median

    def speedup(self, other: Result) -> float:
        """How many times as fast as another contender of the case: the median of the rounds' ratios.

        A round runs both within moments, so what slows the machine for a while cancels.
        """
        return median(theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True))

    @property
    def agrees(self) -> bool:
        """Whether it computed what ours did."""
        return self.difference is None or self.difference <= _AGREEMENT[self.case.dtype]


@dataclass(frozen=True)
class Report:
    """The results of a run, and the machine that it ran on."""

    machine: Machine
    results: tuple[Result, ...]

    @cached_property
    def _by_case(self) -> dict[Case, list[Result]]:
        found: dict[Case, list[Result]] = {}
        for result in self.results:
            found.setdefault(result.case, []).append(result)
        return found

    @property
    def cases(self) -> list[Case]:
        """In the order in which they ran."""
        return list(self._by_case)

    def of(self, case: Case) -> list[Result]:
        """The results of a case, ours first."""
        return self._by_case.get(case, [])

    def ran(self, case: Case, role: Role | None = None) -> list[Result]:
        """The results of those that ran, of one role if given."""
        return [x for x in self.of(case) if x.seconds and role in (None, x.role)]

    def best_peer(self, case: Case, name: str = "") -> Result | None:
        """The quickest peer that ran and agreed with us, of those whose names start with `name`."""
        right = (x for x in self.ran(case, "peer") if x.agrees and x.contender.startswith(name))
        return min(right, key=lambda x: x.median, default=None)

    def ratio(self, result: Result) -> float | None:
        """How many times as fast as the best peer; None without a peer."""
        best = self.best_peer(result.case)
        return None if best is None else result.speedup(best)

    def share(self, result: Result) -> float | None:
        """Of what this machine can do: its measured peak, or the baseline's speed where bandwidth is the bound."""
        if result.case.bound == "bandwidth":
            baselines = self.ran(result.case, "baseline")
            return result.speedup(baselines[0]) if baselines else None
        peak = self.machine.peaks.get(result.case.dtype)
        return None if peak is None else result.rate / peak

    def by_set(self) -> Iterator[tuple[str, list[Case]]]:
        """The cases of each set."""
        for name, cases in groupby(self.cases, key=lambda case: case.set):
            yield name, list(cases)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what was measured, and what follows from it."""
        return {"machine": self.machine.to_dict(), "results": [self._result_to_dict(result) for result in self.results]}

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            OSError: it cannot be written, for example on a full disk.
        """
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read the report that `write` wrote.

        Raises:
            InvalidInput: another or a damaged file.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(Machine.from_dict(values["machine"]), tuple(map(_result_from_dict, values["results"])))
        except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            got = f"{path}: {type(error).__name__}: {error}"
            raise InvalidInput("report", "a complete file of `longattn bench`", got) from error

    def _result_to_dict(self, result: Result) -> dict[str, Any]:
        values: dict[str, Any] = {
            "name": result.case.name,
            "case": result.case.to_dict(),
            "contender": result.contender,
            "role": result.role,
            "refused": result.refused,
            "seconds": list(result.seconds),
            "memory_bytes": result.memory,
            "difference": result.difference,
        }
        if result.seconds:
            unit = "flops" if result.case.bound == "arithmetic" else "bytes"
            values |= {
                "median_seconds": result.median,
                f"{unit}_per_second": result.rate,
                "share_of_limit": self.share(result),
                "ratio_to_best_peer": self.ratio(result),
            }
        return values


def _result_from_dict(values: dict[str, Any]) -> Result:
    seconds, memory, difference = tuple(values["seconds"]), values["memory_bytes"], values["difference"]
    if not all(type(second) in (int, float) and 0.0 < second < math.inf for second in seconds):
        raise ValueError("seconds that are not above 0")
    for name, value in (("memory_bytes", memory), ("difference", difference)):
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{name} that is not a number")
    if values["role"] not in get_args(Role):
        raise ValueError(f"role {values['role']!r}")
    for name in ("contender", "refused"):
        if not isinstance(values[name], str) and (name, values[name]) != ("refused", None):
            raise ValueError(f"{name} that is not text")
    return Result(
        case=from_dict(values["case"]),
        contender=values["contender"],
        role=values["role"],
        seconds=seconds,
        memory=memory,
        difference=difference,
        refused=values["refused"],
    )
