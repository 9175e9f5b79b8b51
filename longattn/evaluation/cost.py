"""Time and peak memory of one call, measured in a process of its own.

A peak is a mark that only rises. A fresh process has nothing behind it that could hide the call's, and a call that
runs out of memory takes no one along.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Cost", "CouldNotRun", "PeakMemory", "measure"]

_REPEAT_FOR = 0.5  # seconds that short calls are repeated for


@dataclass(frozen=True)
class Cost:
    """What one call took.

    seconds: the fastest of `runs` runs.
    peak_bytes: how far the resident memory rose in the first run above what the process held before it.
    peak_source: "VmHWM": Linux's high-water mark, set back before the run. "ru_maxrss": where that is not possible, the
        process's peak since its start; it hides what lies below the peak of loading PyTorch, a few tens of megabytes.
    """

    seconds: float
    runs: int
    peak_bytes: int
    peak_source: str


class CouldNotRun(RuntimeError):
    """The measured call failed, most often for lack of memory; the message has its last words."""


def measure(prepare: str, arguments: dict[str, Any], *, threads: int | None = None, timeout: float = 600.0) -> Cost:
    """Run a call in a fresh process and measure it there.

    Args:
        prepare: "module:function". The function takes `arguments`, makes the inputs, and returns the call to measure.
        arguments: keyword arguments, plain Python values.
        threads: for torch.set_num_threads; as many as here by default.
        timeout: in seconds.

    Raises:
        CouldNotRun: the process failed, was killed, or ran out of time.
    """
    job = {"prepare": prepare, "arguments": arguments, "threads": threads or torch.get_num_threads()}
    command = [sys.executable, "-c", f"from {__name__} import run_job; run_job()", json.dumps(job)]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired as error:
        raise CouldNotRun(f"{prepare} took longer than {timeout:g} s") from error
    if done.returncode < 0:
        raise CouldNotRun(f"{prepare} was killed by signal {-done.returncode} (9: most often out of memory)")
    if done.returncode:
        raise CouldNotRun(f"{prepare} failed: {done.stderr.strip().splitlines()[-1:]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _measure_here(call: Callable[[], object]) -> Cost:
    before = _resident_bytes()
    source = "VmHWM" if before is not None and _reset_high_water_mark() else "ru_maxrss"
    peak = _high_water_mark if source == "VmHWM" else _max_resident_bytes
    base = before if before is not None else peak()
    started = time.perf_counter()
    call()
    times = [time.perf_counter() - started]
    peak_bytes = max(0, peak() - base)
    while sum(times) < _REPEAT_FOR:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return Cost(min(times), len(times), peak_bytes, source)


class PeakMemory:
    """How far memory rises in a `with` block, above what is held at its start: `bytes`, once it has ended.

    Of a GPU, what PyTorch has allocated; of the host, what is resident. None where the system does not say: its mark
    cannot be set back.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes: int | None = None
        self._cuda = device if device.type == "cuda" else None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda)
        elif (before := _resident_bytes()) is not None and _reset_high_water_mark():
            self._before = before
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            peak = _high_water_mark() if self._cuda is None else torch.cuda.max_memory_allocated(self._cuda)
            self.bytes = max(0, peak - self._before)


def _reset_high_water_mark() -> bool:
    """Whether the kernel set VmHWM back to the current resident size (Linux, Documentation/filesystems/proc.rst)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    return _status("VmHWM")


def _resident_bytes() -> int | None:
    return _status("VmRSS") if Path("/proc/self/status").exists() else None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _max_resident_bytes() -> int:
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_job() -> None:
    """What the fresh process runs: the job in its argument, whose cost it prints as JSON."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    module, function = job["prepare"].split(":")
    call = getattr(importlib.import_module(module), function)(**job["arguments"])
    print(json.dumps(asdict(_measure_here(call))))
