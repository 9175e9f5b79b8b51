"""Prove the GPU kernels on the GPU of this machine, and measure them: `python -m benchmarks.gpu_check`.

First the tests marked gpu. If all pass, the architecture is entered in longattn/backends/triton/proven.json; then those
marked hopper, where the CUDA library was built: if all pass and its kernels are quicker than Triton's, in
longattn/backends/cuda/proven.json. Nothing else writes there. Then what the targets speak of, and as many other cases
as there is time for, against whatever else can be imported. Prints a table, and leaves a plot of each set beside
benchmarks/results/<gpu>-<date>.json. It ends within 9 minutes.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

import longattn
from longattn.backends import cuda, registry
from longattn.backends.triton import architecture
from longattn.bench import AttentionCase, Case, Report, Result, RopeCase, make_cases, plot, run
from longattn.bench.clock import in_turn, make_clock

RESULTS = Path(__file__).with_name("results")
PROVEN = Path(architecture.__file__).with_name("proven.json")
CUDA_PROVEN = Path(cuda.__file__).with_name("proven.json")
SECONDS = 8.5 * 60  # for all
TEST_SECONDS = 4 * 60
CUDA_TEST_SECONDS = 120
LAUNCHES = 2000


class Target(NamedTuple):
    """A figure to reach: how many times as fast as a peer, or as a plain read or copy of the same memory."""

    name: str
    goal: float
    peer: str | None  # None: a plain read or copy
    case: Case


def targets() -> list[Target]:
    """Of an H200, in the order in which they are measured."""
    found = []
    where = {"set": "targets", "dtype": "bfloat16", "device": "cuda"}
    for causal in (True, False):
        for n in (8192, 16384):
            what = f"D 128, {'causal' if causal else 'full'}, {n}"
            call = {"nk": n, "nq": n, "q_heads": 16, "kv_heads": 16, "head_dim": 128, "causal": causal, **where}
            found.append(Target(f"forward, {what}", 0.80, "SDPA cuDNN", AttentionCase(**call)))
            found.append(Target(f"with backward, {what}", 0.55, "SDPA cuDNN", AttentionCase(**call, backward=True)))
    for n in (32768, 131072):
        call = {"nk": n, "nq": n, "q_heads": 8, "kv_heads": 8, "head_dim": 128, "window": 4096, **where}
        found.append(Target(f"window 4096, {n}", 1.3, "FlexAttention", AttentionCase(**call)))
    call = {"nk": 131072, "nq": 1, "batch": 4, "q_heads": 32, "kv_heads": 8, "head_dim": 128, **where}
    found.append(Target("decode, 131072 keys", 0.85, None, AttentionCase(**call)))
    rope = RopeCase(**where, n=32768, heads=32, head_dim=128)
    found += [Target("rope", 0.90, None, rope), Target("rope against torch.compile", 1.5, "torch.compile", rope)]
    return found


def run_tests(mark: str, seconds: float) -> bool:
    """Whether the tests of a mark all pass."""
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-m", mark, "-x", "--durations=5"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent.parent, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the tests took more than {seconds:.0f} s")
        return False


def enter_as_proven(path: Path, what: str) -> None:
    """Note the architecture, and with which releases it passed."""
    major, minor = torch.cuda.get_device_capability()
    proven = json.loads(path.read_text(encoding="utf-8")) | {f"sm_{major}{minor}": what}
    path.write_text(json.dumps(proven, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def seconds_by_backend(backends: Sequence[str]) -> Iterator[tuple[str, list[float]]]:
    """What is called, and the median seconds of each backend: forward, and with backward, causal and full."""
    clock = make_clock("cuda")
    for width, causal, backward in itertools.product((64, 128, 256), (True, False), (False, True)):
        q, k, v = (
            torch.randn(1, 16, 8192, width, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
            for _ in range(3)
        )
        dout = torch.randn_like(q)

        def call(backend: str) -> object:
            out = longattn.attention(q, k, v, causal=causal, backend=backend)  # noqa: B023 - called in this round
            return torch.autograd.grad(out, (q, k, v), dout) if backward else out  # noqa: B023

        samples = in_turn([partial(call, backend) for backend in backends], clock, rounds=10, seconds=5)
        what = f"{'with backward' if backward else 'forward'}, D {width}, {'causal' if causal else 'full'}, 8192"
        yield what, [statistics.median(times) for times in samples]


def check_cuda(seconds: float) -> Iterator[str]:
    """A line for each finding; enters the CUDA kernels as proven if they pass every test and are quicker throughout."""
    missing = registry.get("cuda").unavailable()
    if missing is not None:
        yield f"CUDA kernels not checked: {missing}"
        return
    if not run_tests("hopper", seconds):
        yield "THE TESTS OF THE CUDA KERNELS FAILED: they are not proven"
        return
    yield "the tests of the CUDA kernels passed"
    quicker = True
    for what, (ours, theirs) in seconds_by_backend(("cuda", "triton")):
        yield f"{what:40} CUDA {ours * 1e3:.3f} ms, Triton {theirs * 1e3:.3f} ms"
        quicker &= ours < theirs
    if quicker:
        enter_as_proven(CUDA_PROVEN, f"longattn {longattn.__version__}")
    else:
        yield "the CUDA kernels are not quicker than Triton's throughout: they are not entered as proven"


def launch_microseconds() -> dict[str, float]:
    """Microseconds of the CPU a call, when nothing waits for the GPU: of our launcher, and of attention as a whole."""
    from longattn.backends.triton import launch
    from longattn.backends.triton.attention import Turn, rope

    q, k, v = (torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    inv_freq, factor = longattn.Rope(64).frequencies(64, "cuda")
    positions = torch.arange(64.0, device="cuda")
    kept: list[Callable[[], None]] = []

    def keep(kernel: object, programs: int, *arguments: object, **constants: object) -> None:
        kept.append(lambda: start(kernel, programs, *arguments, **constants))

    start, launch.launch = launch.launch, keep
    try:
        rope([Turn(q, positions, torch.empty_like(q))], inv_freq, factor, False, False)
    finally:
        launch.launch = start
    calls = {
        "launcher": kept[0],
        "attention without gradient": lambda: longattn.attention(q, k, v, causal=True, backend="triton"),
        "the same, its backend chosen": lambda: longattn.attention(q, k, v, causal=True),
    }
    found = {}
    for name, call in calls.items():
        for _ in range(50):
            call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            call()
        found[name] = (time.perf_counter() - began) / LAUNCHES * 1e6
        torch.cuda.synchronize()
    return found


def judge(report: Report, wanted: list[Target]) -> Iterator[str]:
    """A line for each target that was measured."""
    for target in wanted:
        results = {result.contender: result for result in report.of(target.case) if not result.refused}
        ours = next((result for result in results.values() if result.role == "ours"), None)
        if ours is None:
            yield f"{target.name:40} not measured"
            continue
        value = _value(report, target, ours, results)
        if value is None:
            yield f"{target.name:40} nothing to compare with: {target.peer or 'a plain copy'} did not run"
        else:
            verdict = "met" if value >= target.goal else "MISSED"
            yield f"{target.name:40} {value:5.2f} of {target.peer or 'a plain copy'}, goal {target.goal:.2f}: {verdict}"


def _value(report: Report, target: Target, ours: Result, results: dict[str, Result]) -> float | None:
    if target.peer is None:
        return report.share(ours)
    peer = next((result for name, result in results.items() if name.startswith(target.peer)), None)
    return None if peer is None else ours.speedup(peer)


def table(report: Report) -> Iterator[str]:
    """A line for each case: what each contender reached."""
    for case in report.cases:
        unit, scale = ("TFLOP/s", 1e12) if case.bound == "arithmetic" else ("GB/s", 1e9)
        figures = [
            f"{result.contender} {result.rate / scale:.0f}{'' if result.agrees else ' (DISAGREES)'}"
            for result in report.of(case)
            if not result.refused and result.seconds
        ]
        yield f"{case.name:60} {unit}: {', '.join(figures) or 'not run'}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check needs a GPU, and torch sees none")
        return 1
    deadline = time.monotonic() + options.seconds
    passed = run_tests("gpu", min(TEST_SECONDS, options.seconds))
    print("the tests passed" if passed else "THE TESTS FAILED: nothing is proven, and no figure counts")
    of_cuda = []
    if passed:
        enter_as_proven(PROVEN, f"longattn {longattn.__version__}, triton {version('triton')}")
        of_cuda = list(check_cuda(min(CUDA_TEST_SECONDS, options.seconds)))
        print(*of_cuda, sep="\n")
    overheads = launch_microseconds()
    print(*(f"{name}: {microseconds:.1f} us" for name, microseconds in overheads.items()), sep="\n")

    wanted = targets()
    cases = list(dict.fromkeys([target.case for target in wanted] + make_cases(device="cuda")))
    report = run(
        cases,
        rounds=20,
        takes_part=lambda case, contender: time.monotonic() < deadline,
        memory=lambda case: False,
        watch=lambda done, what: print(f"{done}/{len(cases)} {what}", flush=True),
    )
    report = Report(report.machine, tuple([result for result in report.results if result.seconds or result.refused]))
    lines = [*judge(report, wanted), "", *table(report)]
    print(*lines, sep="\n")

    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    path = RESULTS / f"{name}-{datetime.date.today():%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    report.write(path)
    head = [
        f"tests {'passed' if passed else 'FAILED'}",
        *of_cuda,
        *(f"{what}: {us:.1f} us" for what, us in overheads.items()),
    ]
    path.with_suffix(".txt").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    plots = path.with_suffix("")
    plots.mkdir(exist_ok=True)
    plot(report, plots)
    print(path)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
