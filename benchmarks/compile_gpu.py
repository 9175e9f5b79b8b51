"""Compile every configuration of the Triton backend's tables, for GPUs that need not be there, and look at the code.

    python -m benchmarks.compile_gpu [--architectures 80 90 100] [--update]

Calls go the way that a user's go, on tensors without data, up to the launch, where the kernel is compiled for the
architecture in question. The report, benchmarks/triton-kernels.txt, has a line for each kernel: registers, stack,
shared memory, and the instructions that matter, counted in the machine code. Fails if a kernel does not compile, takes
more shared memory than a block may, if a 16-bit kernel of at most 128 wide heads keeps registers on the stack, if the
16-bit main loops for sm_90 have no wgmma (but for the backward of 512 wide heads), or if the report is not what is
committed: what a change does to the code is then seen in the change. --update writes the lines of these architectures
anew.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longattn.backends.base import Gradients
from longattn.backends.triton import attention, cached, config, launch
from longattn.mask import Mask
from longattn.problem import CacheTensors, Problem, Slots, Tensors, cache_features, present_features

REPORT = Path(__file__).with_name("triton-kernels.txt")
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may use
MAIN_LOOPS = ("forward_kernel", "key_gradient_kernel", "query_gradient_kernel")
UNSPILLED = (
    *MAIN_LOOPS,
    "attend_kernel",
    "bias_gradient_kernel",
    "combine_kernel",
    "delta_kernel",
)  # others have sines
# A warpgroup multiplies 64 rows: dk and dv of 64 keys, 512 wide, take all registers, and dq beside its scores too many.
WITHOUT_WGMMA = {(512, "key_gradient_kernel"), (512, "query_gradient_kernel")}
# Instructions by what they begin with: products, loads of tiles, exponentials, barriers, what goes to the stack.
PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "FFMA")
INSTRUCTIONS = (*PRODUCTS, "UTMALDG", "LDGSTS", "LDG", "LDSM", "MUFU.EX2", "BAR", "STL", "LDL")
INSTRUCTION_BYTES = 16
MASKS = {"full": Mask(), "causal": Mask(right=0)}
KINDS = ("all features", "window", "expanded", "causal", "full", "prompt", "decode", "ring of int8")  # slow ones first
WINDOW = Mask(left=4095, right=0, sinks=4)


class Case(NamedTuple):
    """One call, forward and backward, or one on a cache."""

    architecture: int
    width: int
    dtype: torch.dtype
    kind: str

    def __str__(self) -> str:
        return f"sm_{self.architecture} {str(self.dtype)[6:]} D {self.width} {self.kind}"


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
        if narrow and self.stack and self.kernel in UNSPILLED:
            yield f"{self.stack} bytes of stack"
        if self.kernel in (*MAIN_LOOPS, "attend_kernel") and not any(self.counts[name] for name in PRODUCTS):
            yield "no products"  # what Triton makes of tiles that it cannot keep
        half = self.case.dtype != torch.float32 and (self.case.width, self.kernel) not in WITHOUT_WGMMA
        if self.kernel in MAIN_LOOPS and half and self.case.architecture == 90 and not self.counts["HGMMA"]:
            yield "no wgmma"

    def __str__(self) -> str:
        mix = "  ".join(f"{name} {count}" for name, count in self.counts.items() if count)
        return (
            f"{self.case!s:34} {self.kernel:22} {self.registers:3} registers {self.stack:4} B stack "
            f"{self.shared:6} B shared  {mix}"
        )


def cases(architectures: list[int]) -> list[Case]:
    """Every entry of the tables; what masks and features change in the code is looked at for some. Slow ones first."""
    found = []
    for architecture in architectures:
        for dtype, width in itertools.product((torch.float32, torch.bfloat16), config.WIDTHS):
            found += [Case(architecture, width, dtype, kind) for kind in ("causal", "decode", "prompt")]
        for width in (64, 128):
            found += [Case(architecture, width, torch.bfloat16, kind) for kind in ("all features", "window")]
        if architecture >= 90:
            found.append(Case(architecture, 128, torch.bfloat16, "expanded"))
        found += [Case(architecture, 128, torch.bfloat16, kind) for kind in ("full", "ring of int8")]
        found.append(Case(architecture, 128, torch.float16, "causal"))
    return sorted(found, key=lambda case: (KINDS.index(case.kind), case.dtype.itemsize == 2, -case.architecture))


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
    """The kernels of one call; a traceback if one does not compile."""
    from triton.runtime import driver

    kernels: dict[str, Any] = {}

    def record(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
        if kernel.fn.__name__ not in kernels:  # a rotation of q and k, and one of their gradients
            kernels[kernel.fn.__name__] = kernel.warmup(*arguments, grid=(programs,), **meta)

    driver.set_active(_Driver(case.architecture))
    launch.launch = record
    try:
        (_call_on_cache if case.kind in ("decode", "prompt", "ring of int8") else _call)(case)
        return _lines(case, kernels)
    except Exception:
        return f"{case}\n{traceback.format_exc()}"


def _call(case: Case) -> None:
    batch, q_heads, kv_heads, n = 2, 8, 2, 8192
    q, out, dout = (_empty(batch, n, q_heads, case.width, dtype=case.dtype).transpose(1, 2) for _ in range(3))
    k, v = (_empty(batch, n, kv_heads, case.width, dtype=case.dtype).transpose(1, 2) for _ in range(2))
    if case.kind == "expanded":  # no descriptor says so
        q, k, v, dout = (x[:1].expand(batch, -1, -1, -1) for x in (q, k, v, dout))
    lse = _empty(batch, q_heads, n)
    tensors, mask, softcap, dropout_p = Tensors(q, k, v), MASKS.get(case.kind, WINDOW), 0.0, 0.0
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


def _call_on_cache(case: Case) -> None:
    """decode: one query, contiguous, split. prompt: many queries, paged. ring of int8: rotated when read."""
    batch, q_heads, kv_heads, keys, page = 2, 8, 2, 65536, 64
    nq, ring = (512 if case.kind == "prompt" else 1), 4096 if case.kind == "ring of int8" else 0
    stored, rotated = (torch.int8 if ring else case.dtype), case.width // 2
    q = _empty(batch, q_heads, nq, case.width, dtype=case.dtype)
    k, v = (_empty(batch, kv_heads, nq, case.width, dtype=case.dtype) for _ in range(2))
    lens = _empty(batch, dtype=torch.int32)
    tensors = CacheTensors(q, k, v, lens, lens, inv_freq=_empty(rotated))
    mask = Mask(right=0)
    slots = Slots(
        *(_empty(batch, kv_heads, keys, case.width, dtype=stored) for _ in range(2)), None, None, lens[:, None]
    )
    if case.kind == "prompt":
        pages = (_empty(4096, kv_heads, page, case.width, dtype=stored) for _ in range(2))
        slots = Slots(*pages, None, None, _empty(batch, keys // page, dtype=torch.int32))
    if ring:
        mask, tables = Mask(left=ring - 1, right=0, sinks=4), (_empty(1, 8192, rotated) for _ in range(2))
        scales = (_empty(batch, kv_heads, ring + 4) for _ in range(2))
        kept = (_empty(batch, kv_heads, ring + 4, case.width, dtype=stored) for _ in range(2))
        slots = Slots(*kept, *scales, lens[:, None], ring, 4)
        tensors = tensors._replace(**dict(zip(("cos", "sin"), tables, strict=True)))
    problem = Problem(
        batch, q_heads, kv_heads, nq, keys, case.width, case.width, case.dtype, "meta", mask, case.width**-0.5,
        storage=stored, frame=ring, features=cache_features(tensors, 0.0, ring > 0, stored),
    )  # fmt: skip
    cached.decode(problem, tensors, slots, torch.empty_like(q), _empty(batch, q_heads, nq), interpreted=False)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _lines(case: Case, kernels: dict[str, Any]) -> list[Line]:
    codes = [_machine_code(compiled.asm["cubin"]) for compiled in kernels.values()]
    opcodes, lines = iter(_opcodes(b"".join(codes), case.architecture)), []
    for (name, compiled), code in zip(kernels.items(), codes, strict=True):
        counts = dict.fromkeys(INSTRUCTIONS, 0)
        for opcode in itertools.islice(opcodes, len(code) // INSTRUCTION_BYTES):
            known = next((known for known in INSTRUCTIONS if opcode.startswith(known)), None)
            if known is not None:
                counts[known] += 1
        usage = _resources(compiled.asm["cubin"])
        lines.append(Line(case, name, usage["REG"], usage["STACK"], compiled.metadata.shared, counts))
    return lines


def _machine_code(cubin: bytes) -> bytes:
    """The instructions of a compiled kernel, which is an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + at * entry) for at in range(count)]
    (_, strings, _) = sections[names]
    return b"".join(
        cubin[start : start + size] for name, start, size in sections if cubin.startswith(b".text.", strings + name)
    )


def _opcodes(code: bytes, architecture: int) -> list[str]:
    """What the instructions are, of all kernels of a call: the disassembler takes longer to start than to work."""
    from triton import knobs

    target = f"SM{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--binary", target, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.MULTILINE)
    assert len(opcodes) * INSTRUCTION_BYTES == len(code), f"{len(opcodes)} instructions in {len(code)} bytes"
    return opcodes


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a compiled kernel, as cuobjdump names them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--architectures", type=int, nargs="+", default=list(config.ARCHITECTURES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--update", action="store_true", help="write the report anew")
    options = parser.parse_args(arguments)

    start, todo = time.monotonic(), cases(options.architectures)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # what others have compiled says nothing about today's compiler
        # (A Pool would wait for ever for a process that was killed.)
        with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
            for case, result in zip(todo, pool.map(compile_case, todo), strict=True):
                print(f"{time.monotonic() - start:4.0f} s  {case}{': failed' * isinstance(result, str)}", flush=True)
                results.append(result)
    failed = [result for result in results if isinstance(result, str)]
    lines = [line for result in results if not isinstance(result, str) for line in result]
    faults = [f"{line.case} {line.kernel}: {fault}" for line in lines for fault in line.faults()]
    print(*failed, *faults, sep="\n")
    compiled_for = tuple(f"sm_{architecture} " for architecture in options.architectures)
    before = REPORT.read_text(encoding="utf-8").splitlines(keepends=True) if REPORT.exists() else []
    report = sorted([f"{line}\n" for line in lines] + [line for line in before if not line.startswith(compiled_for)])
    changed = list(difflib.unified_diff(before, report, "committed", "compiled", n=0))
    sys.stdout.writelines(changed)
    if options.update:
        REPORT.write_text("".join(report), encoding="utf-8")
        changed = []
    if changed:
        print(f"The machine code is not that of {REPORT.name}: if that is meant, commit what --update writes.")
    print(f"{len(lines)} kernels; {len(failed)} calls did not compile, {len(faults)} faults")
    return 1 if failed or faults or changed else 0


if __name__ == "__main__":
    sys.exit(main())
