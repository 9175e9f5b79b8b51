"""Compile every configuration of the Triton backend's table, for GPUs that need not be there, and look at the code.

    python -m benchmarks.compile_gpu [--architectures 80 90 100] [--report build/triton-kernels.txt]

Calls go the way that a user's go, on tensors without data, up to the launch, where the kernel is compiled for the
architecture in question. The report lists registers, stack, shared memory and the instructions that matter, a kernel a
line. Fails if a kernel does not compile, takes more shared memory than a block may, if a 16-bit kernel of at most 128
wide heads keeps registers on the stack, or if the main loops for sm_90 have no wgmma.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longattn.backends.base import Gradients
from longattn.backends.triton import attention, config, launch
from longattn.mask import Mask
from longattn.problem import Problem, Tensors, present_features

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may use
MAIN_LOOPS = ("forward_kernel", "key_gradient_kernel", "query_gradient_kernel")
INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async", "ldmatrix", "ex2.approx", "bar.sync")
MASKS = {"full": Mask(), "causal": Mask(right=0), "window": Mask(left=4095, right=0, sinks=4)}


class Case(NamedTuple):
    architecture: int
    width: int
    dtype: torch.dtype
    kind: str  # a name of MASKS, or "all features"

    def __str__(self) -> str:
        return f"sm_{self.architecture} {str(self.dtype)[6:]:8} D {self.width:3} {self.kind}"


class Line(NamedTuple):
    """What a kernel came to."""

    case: Case
    kernel: str
    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes
    counts: dict[str, int]

    def faults(self) -> Iterator[str]:
        narrow = self.case.dtype != torch.float32 and self.case.width <= 128
        if self.shared > SHARED_LIMIT[self.case.architecture]:
            yield f"{self.shared} bytes of shared memory, of {SHARED_LIMIT[self.case.architecture]}"
        if narrow and self.stack and self.kernel in MAIN_LOOPS and self.case.kind in MASKS:
            yield f"{self.stack} bytes of stack"
        if narrow and self.case.architecture == 90 and self.kernel in MAIN_LOOPS and not self.counts["wgmma.mma_async"]:
            yield "no wgmma"

    def __str__(self) -> str:
        mix = "  ".join(f"{name} {count}" for name, count in self.counts.items() if count)
        return (
            f"{self.case!s:34} {self.kernel:22} {self.registers:3} registers  {self.stack:4} B stack  "
            f"{self.shared:6} B shared  {mix}"
        )


def cases(architectures: list[int]) -> list[Case]:
    """Every entry of the table; what the masks and features change in the code is looked at in some."""
    found = []
    for architecture in architectures:
        for width in config.WIDTHS:
            found += [Case(architecture, width, torch.bfloat16, kind) for kind in ("causal", "window")]
            found.append(Case(architecture, width, torch.float32, "causal"))
        found += [Case(architecture, 128, torch.bfloat16, kind) for kind in ("full", "all features")]
        found.append(Case(architecture, 128, torch.float16, "causal"))
    return found


class _Driver:
    """Stands in for the GPU's driver: kernels are compiled, and never loaded."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_case(case: Case) -> list[Line] | str:
    """The kernels of one call, forward and backward; a traceback if one does not compile."""
    from triton.runtime import driver

    lines = []

    def record(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=(programs,), **meta)
        lines.append(_line(case, kernel.fn.__name__, compiled))

    driver.set_active(_Driver(case.architecture))
    launch.launch = record
    try:
        _call(case)
    except Exception:
        return f"{case}\n{traceback.format_exc()}"
    return lines


def _call(case: Case) -> None:
    batch, q_heads, kv_heads, n = 2, 8, 2, 8192
    q, out, dout = (_empty(batch, n, q_heads, case.width, dtype=case.dtype).transpose(1, 2) for _ in range(3))
    k, v = (_empty(batch, n, kv_heads, case.width, dtype=case.dtype).transpose(1, 2) for _ in range(2))
    lse = _empty(batch, q_heads, n)
    tensors, mask, softcap, dropout_p = Tensors(q, k, v), MASKS.get(case.kind, MASKS["window"]), 0.0, 0.0
    if case.kind == "all features":
        softcap, dropout_p = 30.0, 0.1
        tensors = tensors._replace(
            key_mask=_empty(batch, n, dtype=torch.bool),
            key_lens=_empty(batch, dtype=torch.int32),
            lo=_empty(batch, n, dtype=torch.int32),
            hi=_empty(batch, n, dtype=torch.int32),
            bias=_empty(1, q_heads, n, n, dtype=case.dtype),
            alibi_slopes=_empty(q_heads),
            sink_logits=_empty(q_heads),
            inv_freq=_empty(case.width // 2),
            seed=_empty(1, dtype=torch.int64),
        )
    problem = Problem(
        batch, q_heads, kv_heads, n, n, case.width, case.width, case.dtype, "meta", mask, case.width**-0.5,
        softcap=softcap, dropout_p=dropout_p, features=present_features(tensors, softcap, dropout_p),
    )  # fmt: skip
    call = attention.Call(problem, tensors, case.architecture, interpreted=False)
    call.forward(out, lse)
    grads = Gradients(
        *(None if x is None else torch.empty_like(x) for x in (getattr(tensors, name) for name in Gradients._fields))
    )
    call.backward(out, lse, dout, lse, grads)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _line(case: Case, kernel: str, compiled: Any) -> Line:
    usage = _resource_usage(compiled.asm["cubin"])
    counts = {name: len(re.findall(re.escape(name), compiled.asm["ptx"])) for name in INSTRUCTIONS}
    return Line(case, kernel, usage["REG"], usage["STACK"], compiled.metadata.shared, counts)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--architectures", type=int, nargs="+", default=list(config.ARCHITECTURES))
    parser.add_argument("--report", type=Path, default=Path("build/triton-kernels.txt"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)

    todo = cases(options.architectures)
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=8) as pool:
        results = []
        for case, result in zip(todo, pool.imap(compile_case, todo), strict=True):
            print(f"{case}: {'failed' if isinstance(result, str) else f'{len(result)} kernels'}", flush=True)
            results.append(result)
    failed = [result for result in results if isinstance(result, str)]
    lines = [line for result in results if not isinstance(result, str) for line in result]
    faults = [f"{line.case} {line.kernel}: {fault}" for line in lines for fault in line.faults()]
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(*failed, *faults, sep="\n")
    print(f"{len(lines)} kernels in {options.report}; {len(failed)} calls did not compile, {len(faults)} faults")
    return 1 if failed or faults else 0


if __name__ == "__main__":
    sys.exit(main())
