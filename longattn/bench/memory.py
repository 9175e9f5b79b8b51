"""The peak memory of one call beyond its inputs and outputs.

On a GPU the allocator of PyTorch counts. On a CPU nothing does, so the kernel's own figure is read, the most memory
that a process had resident (VmHWM): a process of its own runs the call once, on its first use at this size, so that
scratch memory that a library keeps for the next call counts, too. What a library needs once, whatever the size, does
not: a call over few tokens goes before. The C library is told to give freed memory back at once, so that no earlier
allocation can hide one of the call.

The processes are forked from one that has loaded everything, and has run nothing but the compiler: each starts clean,
in no time.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from longattn.bench.cases import Case
from longattn.bench.contenders import Contender, Outputs, runnable
from longattn.bench.registry import contenders

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5)
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",  # bytes: from there on an allocation is a mapping, which ends when it is freed
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compilers per process
}


class PeakMemory:
    """Measures cases, on a CPU in processes of their own; a context manager that ends them."""

    def __init__(self, device: str, threads: int) -> None:
        self.unavailable: str | None = None
        self._server: subprocess.Popen[bytes] | None = None
        if device == "cuda":
            return
        if not os.access(_CLEAR_REFS, os.W_OK):
            self.unavailable = f"needs Linux and a writable {_CLEAR_REFS}"
            return
        self._server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ENVIRONMENT},
        )

    def __enter__(self) -> PeakMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait()

    def measure(self, case: Case, contender: Contender) -> int | None:
        """Bytes, or None where they cannot be measured.

        Raises:
            RuntimeError: the call failed, though it may have worked in this process.
        """
        if case.device == "cuda":
            return _on_gpu(case, contender)
        if self._server is None:
            return None
        assert self._server.stdin is not None and self._server.stdout is not None
        pickle.dump((case, contender.name), self._server.stdin)
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"{case.name}, {contender.name}: measuring its memory failed: {answer['error']}")
        return int(answer["bytes"])


def _on_gpu(case: Case, contender: Contender) -> int:
    call, held = _ready(case, contender)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = call()
    torch.cuda.synchronize()
    return _beyond(outputs, held, torch.cuda.max_memory_allocated() - before)


def _on_cpu(case: Case, contender: Contender) -> int:
    call, held = _ready(case, contender)
    _CLEAR_REFS.write_text(_RESET_PEAK)
    before = _status("VmRSS")
    outputs = call()
    return _beyond(outputs, held, _status("VmHWM") - before)


def _ready(case: Case, contender: Contender) -> tuple[Callable[[], Outputs], Sequence[Tensor]]:
    """The call, its code loaded or compiled, and what it holds."""
    if not contender.compiled:
        small = case.small()
        small_inputs = small.inputs()
        runnable(contender.prepare(small, small_inputs), small_inputs)()
    inputs = case.inputs()
    prepared = contender.prepare(case, inputs)
    call = runnable(prepared, inputs)
    if contender.compiled:
        call()
    return call, prepared.held


def _beyond(outputs: Sequence[Tensor], held: Sequence[Tensor], risen: int) -> int:
    def size(tensors: Sequence[Tensor]) -> int:
        return sum(x.numel() * x.element_size() for x in tensors)

    return max(0, risen - size(outputs) + size(held))


def _status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def serve(requests: BinaryIO, answers: BinaryIO, threads: int) -> None:
    """Answer each (case, name of a contender) with a line of JSON from a fork, until the requests end."""
    loaded: set[str] = set()
    while True:
        try:
            case, name = pickle.load(requests)
        except EOFError:
            return
        (contender,) = (contender for contender in contenders(case) if contender.name == name)
        _load(case, contender, loaded)
        read_end, write_end = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(read_end)
            _answer(case, contender, threads, write_end)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(process, 0)
        answers.write(answer or json.dumps({"error": f"the process ended with status {status}"}).encode())
        answers.write(b"\n")
        answers.flush()


def _load(case: Case, contender: Contender, loaded: set[str]) -> None:
    """Import what a call would on its first use, once for all forks; a compiler is loaded by using it."""
    if case.backward:
        importlib.import_module("torch.fx.experimental.symbolic_shapes")
    if contender.compiled and contender.name not in loaded:
        loaded.add(contender.name)
        torch.set_num_threads(1)  # a fork has no other thread than the one that forks
        _ready(case.small(), contender)
        torch.compiler.reset()


def _answer(case: Case, contender: Contender, threads: int, write_end: int) -> None:
    """What the fork does; never returns."""
    try:
        torch.set_num_threads(threads)
        answer: dict[str, Any] = {"bytes": _on_cpu(case, contender)}
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    os.write(write_end, json.dumps(answer).encode())
    os._exit(0)


if __name__ == "__main__":
    output = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints
    with os.fdopen(output, "wb") as stdout:
        serve(sys.stdin.buffer, stdout, int(sys.argv[1]))
