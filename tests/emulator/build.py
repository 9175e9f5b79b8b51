"""Builds the CUDA backend's library for the emulator: the kernels' unmodified sources, compiled by g++.

python tests/emulator/build.py FOLDER      leaves FOLDER/_cuda.so
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EMULATOR = Path(__file__).resolve().parent
CUDA = EMULATOR.parents[1] / "csrc" / "cuda"
PROCESSES = 2
FLAGS = ("-std=c++17", "-march=native", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas")


def build(folder: Path) -> Path:
    """folder/_cuda.so, of all units; what is newer than its sources stays."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted((CUDA / "units").glob("*.cu")), *sorted(EMULATOR.glob("*.cpp"))]
    with ThreadPoolExecutor(PROCESSES) as pool:
        objects = list(pool.map(lambda source: compile_one(source, folder, "-O2"), sources))
    return link(objects, folder / "_cuda.so")


def compile_one(source: Path, folder: Path, *flags: str, cuda: Path = CUDA) -> Path:
    """The object of one source. Headers of hopper/ are found beside the emulator, before those for nvcc."""
    made = folder / f"{source.stem}.o"
    newest = max(path.stat().st_mtime for root in (cuda, EMULATOR) for path in root.rglob("*") if path.is_file())
    if not made.exists() or made.stat().st_mtime <= newest:
        run("g++", *FLAGS, *flags, f"-I{EMULATOR}", f"-I{cuda}", "-x", "c++", "-c", str(source), "-o", str(made))
    return made


def link(objects: Sequence[Path], library: Path) -> Path:
    run("g++", "-shared", "-pthread", *map(str, objects), "-o", str(library))
    return library


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
