"""Builds the CUDA backend's library for the emulator: the kernels' unmodified sources, compiled by g++.

    python tests/emulator/build.py FOLDER      leaves FOLDER/_cuda.so
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EMULATOR = Path(__file__).resolve().parent
CUDA = EMULATOR.parents[1] / "csrc" / "cuda"
PROCESSES = 2
# Headers of hopper/ are found beside the emulator first. Denormals and NaN keep their meaning.
FLAGS = ("-std=c++17", "-O2", "-march=native", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas")


def build(folder: Path, cuda: Path = CUDA, units: tuple[str, ...] = (), emulator_objects: Path | None = None) -> Path:
    """Compile csrc/cuda/units/*.cu, or of it `units` alone, and the emulator, into folder/_cuda.so.

    Args:
        cuda: the kernels' sources; emulator_objects: where the emulator's objects lie already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    include = (f"-I{EMULATOR}", f"-I{cuda}")
    sources = sorted((cuda / "units").glob("*.cu"))
    sources = [source for source in sources if not units or source.stem in units]
    jobs = [(source, folder / f"{source.stem}.o") for source in sources]
    objects = [made for _, made in jobs]
    if emulator_objects is None:
        emulator = [(source, folder / f"emulator_{source.stem}.o") for source in sorted(EMULATOR.glob("*.cpp"))]
        jobs += emulator
        objects += [made for _, made in emulator]
    else:
        objects += sorted(emulator_objects.glob("emulator_*.o"))

    def compile_one(job: tuple[Path, Path]) -> None:
        run("g++", *FLAGS, *include, "-x", "c++", "-c", str(job[0]), "-o", str(job[1]))

    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(compile_one, jobs))
    library = folder / "_cuda.so"
    run("g++", "-shared", "-pthread", *map(str, objects), "-o", str(library))
    return library


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
