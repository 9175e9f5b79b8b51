"""Compile the CUDA kernels for Hopper, which need not be there, and look at the code.

    python -m benchmarks.compile_cuda [--update]

benchmarks/cuda-kernels.txt has a line for each kernel: registers, stack, and the instructions that matter, counted in
the machine code. Fails if a kernel does not compile, if the compiler serialises products (notes C7500 to C7599), if a
loop of products keeps registers on the stack, if a kernel that multiplies has none or an older product, if its
exponentials do not run under products, if the library made of all is larger than 40 MB, needs more than a C library or
does not load, or if the report is not what is committed. That shared memory fits is asserted in
the kernels' sources. --update writes the report anew.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPORT = Path(__file__).with_name("cuda-kernels.txt")
CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
FLAGS = (
    "-O3",
    "-std=c++17",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-Xptxas",
    "-v",
    f"-I{CUDA}",
)
LARGEST = 40_000_000  # bytes of the library
SYSTEM = {"libc", "libm", "libdl", "librt", "libpthread", "libstdc", "libgcc_s", "ld-linux-x86-64", "ld"}
SPILLS = {("backward_kernel", 64, 128, 128, 3, 2, 1): 4}  # softcap: a few words among some 2500 instructions
MAIN_LOOPS = ("forward_kernel", "backward_kernel")
# Products, loads of tiles, reductions, exponentials, barriers, what goes to the stack.
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "UBLKCP", "UBLKRED", "MUFU.EX2", "SYNCS", "BAR", "STL", "LDL")


class Instruction(NamedTuple):
    address: int
    opcode: str
    target: int | None  # of a branch


class Kernel(NamedTuple):
    """What a kernel came to."""

    name: str  # without namespaces
    registers: int
    stack: int  # bytes a thread
    code: list[Instruction]

    @property
    def is_main(self) -> bool:
        return self.name.startswith(MAIN_LOOPS)

    @property
    def numbers(self) -> list[int]:
        """The template's: width, warpgroups and keys, kind; or width, queries, keys, stages, kind."""
        return [int(x) for x in re.findall(r"(?<=[ )])-?\d+", self.name)]

    def faults(self) -> Iterator[str]:
        products = [i for i, x in enumerate(self.code) if x.opcode.startswith("HGMMA")]
        if any(x.opcode.startswith("HMMA") for x in self.code):
            yield "an older product (HMMA)"
        if not self.is_main:
            return
        if not products:
            yield "no wgmma"
            return
        loops = list(self.loops())
        if not loops:
            yield "no loop of products"
        for loop in loops:
            spills = sum(x.opcode.startswith(("STL", "LDL")) for x in loop)
            if spills > SPILLS.get((self.name.partition("<")[0], *self.numbers), 0):
                yield f"{spills} accesses to the stack in a loop of products"
            inside, wanted = under_products(loop), self.step()[1]
            if inside < wanted:
                yield f"{inside} exponentials of a loop run under products, of {wanted}"

    def step(self) -> tuple[int, int]:
        """(products, exponentials that a thread computes under them) of a step."""
        if self.name.startswith("forward_kernel"):
            width, _, keys, _ = self.numbers
            return width // 16 + keys // 16, keys // 2
        width, queries, keys, *_ = self.numbers
        if keys == 64:  # a warpgroup has half of the products, and its exponentials run under the other's
            return width // 16 + queries // 16 + keys // 16, 0
        return 2 * width // 16 + 2 * queries // 16 + keys // 16, queries // 2

    def loops(self) -> Iterator[list[Instruction]]:
        """The loops over steps: those of as many products; of those that overlap through jumps, the shortest."""
        at = {x.address: i for i, x in enumerate(self.code)}
        spans = []
        for i, x in enumerate(self.code):
            start = at.get(x.target, i) if x.target is not None else i
            products = sum(y.opcode.startswith("HGMMA") for y in self.code[start:i])
            if products == self.step()[0]:
                spans.append((start, i))
        for start, stop in spans:
            if not any(a < stop and start < b and b - a < stop - start for a, b in spans):
                yield self.code[start : stop + 1]

    def __str__(self) -> str:
        counts = Counter(name for x in self.code for name in INSTRUCTIONS if x.opcode.startswith(name))
        mix = "  ".join(f"{name} {counts[name]}" for name in INSTRUCTIONS if counts[name])
        return (
            f"{self.name:68} {self.registers:3} registers {self.stack:3} B stack {len(self.code):5} instructions  {mix}"
        )


def under_products(loop: list[Instruction]) -> int:
    """Exponentials between a wait that leaves products in flight and the next wait."""
    waits = [i for i, x in enumerate(loop) if x.opcode.startswith("WARPGROUP.DEPBAR")]
    if len(waits) < 2:
        return 0
    return sum(x.opcode == "MUFU.EX2" for x in loop[waits[-2] : waits[-1]])


def compile_unit(nvcc: str, cuobjdump: str, unit: Path, folder: Path) -> tuple[list[Kernel], list[str]]:
    """(kernels, faults of all of them)."""
    made = folder / f"{unit.stem}.o"
    done = subprocess.run(
        [nvcc, *FLAGS, "-c", str(unit), "-o", str(made)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        return [], [f"{unit.name} does not compile:\n{done.stdout}"]
    serialised = re.findall(r"\(C75\d\d\).*", done.stdout)
    used = dict(re.findall(r"Compiling entry function '(\S+)'(?:.*\n)+?.*Used (\d+) registers", done.stdout))
    stack = dict(re.findall(r"Compiling entry function '(\S+)'(?:.*\n)+?\s*(\d+) bytes stack frame", done.stdout))
    listing = subprocess.run([cuobjdump, "-sass", str(made)], capture_output=True, text=True, check=True).stdout
    kernels = []
    for part in listing.split("Function : ")[1:]:
        mangled, _, text = part.partition("\n")
        name = plain_name(mangled.strip())
        kernels.append(Kernel(name, int(used[mangled.strip()]), int(stack[mangled.strip()]), instructions(text)))
    return kernels, [f"{unit.name}: {note}" for note in serialised]


def link(nvcc: str, folder: Path) -> list[str]:
    """The library of all units, as setup.py makes it: what is wrong with it."""
    library = folder / "_cuda.so"
    objects = [str(made) for made in sorted(folder.glob("*.o"))]
    command = [nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL", *objects, "-o", str(library)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        return [f"the library does not link:\n{done.stdout}"]
    faults = []
    if library.stat().st_size > LARGEST:
        faults.append(f"the library has {library.stat().st_size >> 20} MB, of {LARGEST >> 20}")
    listing = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(\w+)", listing))
    if needed - SYSTEM:
        faults.append(f"the library needs {', '.join(sorted(needed - SYSTEM))}")
    loaded = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"], capture_output=True
    )
    if loaded.returncode:
        faults.append(f"the library does not load: {loaded.stderr.decode()[-300:]}")
    print(f"_cuda.so: {library.stat().st_size / 1e6:.1f} MB, needs {', '.join(sorted(needed))}")
    return faults


def instructions(text: str) -> list[Instruction]:
    found = []
    for address, opcode, rest in re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", text, re.MULTILINE
    ):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        found.append(Instruction(int(address, 16), opcode, int(target[1], 16) if target else None))
    return found


def plain_name(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"longattn::(cuda|hopper)::|^void |\((longattn::cuda::)?\w+Params\)$", "", name).replace(" >", ">")


def tools() -> tuple[str, str] | str:
    """(nvcc, cuobjdump), or what is missing."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return "there is no nvcc"
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None:
        from triton import knobs

        cuobjdump = knobs.nvidia.cuobjdump.path
    return nvcc, cuobjdump


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--update", action="store_true", help="write the report anew")
    options = parser.parse_args(arguments)

    found = tools()
    if isinstance(found, str):
        print(f"NOT CHECKED: the CUDA kernels; {found}", file=sys.stderr)
        return 0
    start, units = time.monotonic(), sorted((CUDA / "units").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.processes) as pool:
        results = list(pool.map(lambda unit: compile_unit(*found, unit, Path(folder)), units))
        linked = link(found[0], Path(folder))
    kernels = sorted([kernel for result in results for kernel in result[0]], key=str)
    faults = [*(fault for result in results for fault in result[1]), *linked]
    faults += [f"{kernel.name}: {fault}" for kernel in kernels for fault in kernel.faults()]
    print(*faults, sep="\n")
    before = REPORT.read_text(encoding="utf-8").splitlines(keepends=True) if REPORT.exists() else []
    report = [f"{kernel}\n" for kernel in kernels]
    changed = list(difflib.unified_diff(before, report, "committed", "compiled", n=0))
    sys.stdout.writelines(changed)
    if options.update:
        REPORT.write_text("".join(report), encoding="utf-8")
        changed = []
    if changed:
        print(f"The machine code is not that of {REPORT.name}: if that is meant, commit what --update writes.")
    print(f"{len(kernels)} kernels, {len(faults)} faults, {time.monotonic() - start:.0f} s")
    return 1 if faults or changed else 0


if __name__ == "__main__":
    sys.exit(main())
