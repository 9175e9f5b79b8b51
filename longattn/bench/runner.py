"""Runs the contenders of each case in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from longattn.bench.cases import Case
from longattn.bench.clock import Call, Clock, in_turn, make_clock
from longattn.bench.contenders import Contender, Outputs, Refused, warmed_up
from longattn.bench.machine import Machine
from longattn.bench.memory import PeakMemory
from longattn.bench.registry import contenders
from longattn.bench.report import Report, Result

Watch = Callable[[int, str], None]  # told how many cases are done, and what happens now

_SECONDS = 2.0  # no further round of a case starts after this long


def run(
    cases: Sequence[Case],
    *,
    rounds: int = 50,
    threads: int | None = None,
    takes_part: Callable[[Case, Contender], bool] = lambda case, contender: True,
    memory: Callable[[Case], bool] = lambda case: True,
    watch: Watch = lambda done, what: None,
) -> Report:
    """Measure all contenders of the cases, which are of one device.

    Args:
        rounds: of a case, at most; a slow case gets fewer, but 5.
        threads: of the CPU, for all contenders; torch's number by default.
        takes_part: whether a contender runs in a case.
        memory: whether to measure that of a case.
        watch: called before each step.
    """
    device = cases[0].device if cases else "cpu"
    results: list[Result] = []
    with _thread_count(threads) as count:
        watch(0, "the machine's peak")
        machine = Machine.describe(device, count)
        clock = make_clock(device)
        with PeakMemory(device, count) as peak:
            for done, case in enumerate(cases):
                watch(done, case.name)
                entrants = [contender for contender in contenders(case) if takes_part(case, contender)]
                results += _measure(case, entrants, clock, rounds, peak if memory(case) else None)
        watch(len(cases), "done")
    return Report(machine, tuple(results))


def _measure(
    case: Case, entrants: Sequence[Contender], clock: Clock, rounds: int, peak: PeakMemory | None
) -> Iterator[Result]:
    calls, differences, refusals = _warm_up(case, entrants)
    samples = dict(zip(calls, in_turn(list(calls.values()), clock, rounds, _SECONDS), strict=True))
    for entrant in entrants:
        if entrant.name in refusals:
            yield Result(case, entrant.name, entrant.role, refused=refusals[entrant.name])
            continue
        yield Result(
            case,
            entrant.name,
            entrant.role,
            seconds=tuple(samples[entrant.name]),
            memory=None if peak is None else peak.measure(case, entrant),
            difference=differences.get(entrant.name),
        )
    if any(entrant.compiled for entrant in entrants):
        torch.compiler.reset()  # its cache is small, and the next case compiles for other shapes


def _warm_up(case: Case, entrants: Sequence[Contender]) -> tuple[dict[str, Call], dict[str, float], dict[str, str]]:
    """By name: the calls of those that can do the case, how far each is from ours, and why the others cannot."""
    calls: dict[str, Call] = {}
    differences: dict[str, float] = {}
    refusals: dict[str, str] = {}
    inputs = case.inputs()
    expected: Outputs | None = None
    for entrant in entrants:
        try:
            calls[entrant.name], outputs = warmed_up(entrant, case, inputs)
        except Refused as refused:
            refusals[entrant.name] = str(refused)
            continue
        if entrant.role == "ours" and expected is None:
            expected = outputs
        if entrant.role != "baseline" and expected is not None:
            differences[entrant.name] = max(map(_difference, outputs, expected))
    return calls, differences, refusals


def _difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    scale = b.abs().max()
    return float((a - b).abs().max() / scale)


@contextmanager
def _thread_count(threads: int | None) -> Iterator[int]:
    """torch's number of threads, set and put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
