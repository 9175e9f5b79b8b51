"""The time of calls, taken in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]

_MIN_ROUNDS = 5
_REST = 0.02  # seconds; OpenMP's threads spin about half as long for more work


def make_clock(device: str) -> Clock:
    """A function that runs a call once and returns its seconds."""
    return _CudaClock() if device == "cuda" else _cpu_clock


def in_turn(calls: Sequence[Call], clock: Clock, rounds: int, seconds: float) -> list[list[float]]:
    """The seconds of each call in each round: A B C, A B C, ..., so that a slow moment of the machine hits all alike.

    Args:
        rounds: how many, at most.
        seconds: no further round starts after this long, except that there are at least 5 (or `rounds` if less).
    """
    samples: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for done in range(rounds):
        if done >= _MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for call, times in zip(calls, samples, strict=True):
            times.append(clock(call))
    return samples


def _cpu_clock(call: Call) -> float:
    time.sleep(_REST)  # else the threads of the call before take this one's time
    call()  # and the sleep's
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result  # freed when the clock has stopped
    return elapsed


class _CudaClock:
    """Times the GPU, not the launch: it is kept busy clearing a buffer, which also empties its L2 cache, meanwhile."""

    def __init__(self) -> None:
        self._buffer = torch.empty(2**28, dtype=torch.int8, device="cuda")
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> float:
        self._buffer.zero_()
        self._start.record()
        result = call()
        self._stop.record()
        torch.cuda.synchronize()
        del result
        return self._start.elapsed_time(self._stop) / 1e3
